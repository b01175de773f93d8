"""Export a model: write its form, then add what other runtimes need. Nothing is published before all steps succeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from jasper_fast.exporting.axes import find_axes
from jasper_fast.exporting.check_sets import CheckSet, checks_of
from jasper_fast.exporting.flat import resolve_width, write_flat
from jasper_fast.exporting.gguf import gguf_line, require_gguf, write_gguf
from jasper_fast.exporting.golden import golden_facts, write_golden
from jasper_fast.exporting.headless import headless_width, write_headless
from jasper_fast.exporting.onnx import graph_lines, require_onnx, write_graphs
from jasper_fast.exporting.openvino import require_openvino
from jasper_fast.exporting.parity import check_flat_export
from jasper_fast.exporting.prefix import NARROW, write_prefix
from jasper_fast.exporting.quality import join_roles, measure_quality
from jasper_fast.exporting.runtimes import Runtime, open_runtimes
from jasper_fast.exporting.shrink import MB, ShrinkRequest, shrink
from jasper_fast.exporting.token_table import folder_bytes
from jasper_fast.models.embedder import load_model, model_widths
from jasper_fast.models.folder import FACTS_FILE, is_headless, model_folder, read_json, write_json
from jasper_fast.models.hub import resolve_model
from jasper_fast.models.sentence_transformer import ROLES
from jasper_fast.reporting.model_card import write_card
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError

CARD_BYTES, GOLDEN_BYTES = 50_000, 300  # of card, facts and golden.json: in any case, and for each dimension
FLAT, PREFIX, HEADLESS = FORMS = "flat", "prefix", "headless"


@dataclass(frozen=True)
class ExportRequest:
    """One call of ``jasper-fast export``.

    Args:
        source: run folder, model folder, or folder of an adapted model.
        out: new folder. None: next to the model, named after the form.
        form: modules of the export, one of ``FORMS``. None: flat, or headless for a student without a head.
        width: width of the embeddings. None: the widest. The prefix form always has the widest.
        axes: texts whose axes order the dimensions of the prefix form, in a format of ``data.sources``. None: what the
            adaptation saved, or the texts of the run.
        columns: columns of these texts, and of documents in ``check``, which are joined.
        onnx: True to add an ONNX graph.
        int8: True to add a graph with int8 weights too.
        openvino: True to add a model for OpenVINO.
        gguf: True to add a GGUF file for llama.cpp.
        weights: False to leave out the files that PyTorch loads.
        small: what makes the model smaller.
        check: retrieval sets or files of documents on which the export is compared with its source, see
            ``checks_of``. Empty: the held-out documents of the run.
        allow_loss: True to publish an export beyond the limits of the quality gate.
        trust_remote_code: permission to run code from the model. Default: False.
    """

    source: Path
    out: Path | None = None
    form: str | None = None
    width: int | None = None
    axes: str | None = None
    columns: Sequence[str] = ("text",)
    onnx: bool = False
    int8: bool = False
    openvino: bool = False
    gguf: bool = False
    weights: bool = True
    small: ShrinkRequest = field(default_factory=ShrinkRequest)
    check: Sequence[str] = ()
    allow_loss: bool = False
    trust_remote_code: bool = False

    @property
    def has_onnx(self) -> bool:
        """True if the export has graphs for ONNX Runtime."""
        return self.onnx or self.int8 or not (self.weights or self.openvino)

    @property
    def has_graphs(self) -> bool:
        """True if the export has graphs."""
        return self.has_onnx or self.openvino


def export(request: ExportRequest) -> Path:
    """Write an export, check it against its source, and publish it.

    Args:
        request: the model and what to make of it.

    Returns:
        The published folder.

    Raises:
        JasperError: the model, the width or a package is missing, the folder exists already, or an exported embedding
            differs from its source.

    Example:
        >>> export(ExportRequest(Path("runs/try-1"), width=128))  # doctest: +SKIP
    """
    _check_options(request)
    checks = checks_of(request.check, request.columns, request.source)
    out = request.out or _default_out(request)
    with publish_dir(out) as folder:
        places = write_form(request, folder)
        for place in places:
            steps = shrink(_small_request(request, place, checks), place)
            if (place / "modules.json").is_file():  # else it has become a graph already
                _write_runtimes(request, place)
        runtimes = [open_runtimes(place, threads=torch.get_num_threads()) for place in places]
        _measure(request, folder, runtimes, checks, shrunk=bool(steps))
        for place, opened in zip(places, runtimes, strict=True):
            roles = ROLES if place == folder else [place.name]
            write_golden(place, opened[0].encode, golden_facts(place), roles)
            facts = read_json(place / FACTS_FILE)
            write_card(place, facts, [facts["export"]["width"]], flat=True)
            _check_size(request, place)
    return out


def _small_request(request: ExportRequest, folder: Path, checks: Sequence[CheckSet]) -> ShrinkRequest:
    """Return what makes a folder smaller, with room for the files that are written after it."""
    width = read_json(folder / FACTS_FILE)["export"]["width"]
    texts = {check.evalset.name: check.evalset.documents for check in checks}
    return replace(request.small, reserve=CARD_BYTES + GOLDEN_BYTES * width, checks=texts)


def _check_size(request: ExportRequest, folder: Path) -> None:
    size = folder_bytes(folder)
    if request.small.max_mb is not None and size > request.small.max_mb * MB:
        raise JasperError(
            f"--max-mb: with its card and golden.json, the export is too large (got {size / MB:.2f} MB, expected at "
            f"most {request.small.max_mb:g}). Nothing was published. Fix: give --max-mb {size / MB + 0.05:.1f}"
        )


def _write_runtimes(request: ExportRequest, folder: Path) -> None:
    """Add the files of other runtimes than PyTorch."""
    trust = request.trust_remote_code
    if request.gguf:
        written = write_gguf(folder, trust_remote_code=trust)
        write_json(folder / FACTS_FILE, {**read_json(folder / FACTS_FILE), "gguf": written})
    if request.has_graphs:
        write_graphs(
            folder,
            request.source,
            onnx=request.has_onnx,
            int8=request.int8,
            openvino=request.openvino,
            weights=request.weights,
            trust_remote_code=trust,
        )


def _measure(
    request: ExportRequest,
    folder: Path,
    runtimes: Sequence[Sequence[Runtime]],
    checks: Sequence[CheckSet],
    *,
    shrunk: bool,
) -> None:
    """Compare all files with the source, and raise if one is beyond its limits. Two encoders are joined."""
    place = folder if len(runtimes) == 1 else folder / ROLES[0]
    exported = read_json(place / FACTS_FILE)["export"]
    measure_quality(
        _source(request),
        folder,
        runtimes[0] if len(runtimes) == 1 else join_roles(*runtimes),
        widths=[exported["width"], *exported.get("prefix_widths", [])],
        form=exported["form"],
        checks=checks,
        shrunk=shrunk,
        allow_loss=request.allow_loss,
        trust_remote_code=request.trust_remote_code,
    )


def write_form(request: ExportRequest, folder: Path) -> list[Path]:
    """Write the PyTorch model of a form into an unpublished folder, compared with its source.

    Args:
        request: the model and the form.
        folder: unpublished folder.

    Returns:
        The model folders: ``folder``, or two in it if queries and documents have different encoders.

    Raises:
        JasperError: as in :func:`export`.
    """
    trust = request.trust_remote_code
    if request.form == PREFIX:
        source = _resolved(request.source)
        model = load_model(str(source), device="cpu", trust_remote_code=trust)
        full, *narrow = model_widths(model)
        widths = narrow or [width for width in NARROW if width < full]
        axes = find_axes(request.source, model, widths, request.axes, request.columns)
        facts = read_json(source / FACTS_FILE) if (source / FACTS_FILE).is_file() else {}
        return write_prefix(model, axes, widths, folder, facts, trust_remote_code=trust)
    source = model_folder(request.source)
    if is_headless(source):
        write_headless(source, folder, trust_remote_code=trust)
        return [folder]
    width = resolve_width(source, request.width)
    write_flat(source, width, folder)
    check_flat_export(source, folder, width, trust_remote_code=trust)
    return [folder]


def export_lines(folder: Path) -> list[str]:
    """Describe a published export for the terminal, one line for each part."""
    models = [folder] if (folder / FACTS_FILE).is_file() else [folder / role for role in ROLES]
    lines = []
    for model in models:
        facts = read_json(model / FACTS_FILE)
        exported = facts["export"]
        lines += [f"wrote {model}: {exported['form']}, embeddings {exported['width']} wide"]
        lines += graph_lines(model) if "onnx" in facts else []
        lines += [gguf_line(model, facts["gguf"])] if "gguf" in facts else []
    return lines + (axes_lines(exported) if "axes" in exported else [])


def axes_lines(exported: Mapping[str, Any]) -> list[str]:
    """Describe the axes of a prefix export, and what each kind of axes keeps.

    Args:
        exported: facts of the export.
    """
    axes = exported["axes"]
    lines = [f"dimensions are ordered by {axes['name']} of {axes['texts']}"]
    for name, kept in axes["overlap"].items():
        shares = ", ".join(f"{100 * share:.1f} % at {width}" for width, share in kept.items())
        lines.append(f"  {name} keep {shares} of the ten nearest neighbours of held-out texts")
    return lines


def _check_options(request: ExportRequest) -> None:
    """Reject a form that the student cannot have, and options that the form has no use for."""
    if request.has_graphs or (request.small.max_mb is not None and request.small.graph):
        require_onnx()
    if request.openvino:
        require_openvino()
    if request.gguf:
        require_gguf()
    if request.form == PREFIX and request.width is not None:
        raise JasperError(
            f"--width {request.width}: the prefix form has all widths, and its reader cuts the embeddings (got a "
            "width, expected none). Fix: leave out --width"
        )
    if request.form == PREFIX:
        return
    if request.axes is not None:
        raise JasperError("--axes orders the dimensions of the prefix form alone. Fix: add --form prefix")
    source = model_folder(request.source)
    headless = is_headless(source)
    if request.form == HEADLESS and not headless:
        raise JasperError(
            f"{source}: the student has a head, and without it the embeddings would be others (got --form headless, "
            "expected a student without a head). Fix: train one with `student.head_type: none`, or export --form flat"
        )
    if request.form == FLAT and headless:
        raise JasperError(f"{source}: the student has no head (got --form flat). Fix: give --form headless")
    if headless and request.width not in (None, headless_width(source)):
        raise JasperError(
            f"{source}: a student without a head has one width (got --width {request.width}, expected "
            f"{headless_width(source)}). Fix: leave --width out, or export --form prefix and cut its embeddings"
        )


def _default_out(request: ExportRequest) -> Path:
    """Return a place next to the model, named after the form and the runtimes."""
    graphs = "-onnx" if request.has_onnx else "-openvino" if request.openvino else "-gguf" if request.gguf else ""
    if request.form == PREFIX:
        place = _resolved(request.source).resolve()
        return place.parent / f"{place.name}-{request.form}{graphs}"
    source = model_folder(request.source)
    place = source.resolve()
    form = HEADLESS if is_headless(source) else str(resolve_width(source, request.width))
    return place.parent / f"{place.name}-{form}{graphs}"


def _source(request: ExportRequest) -> Path:
    """Return the model folder that the export is compared with."""
    return _resolved(request.source) if request.form == PREFIX else model_folder(request.source)


def _resolved(source: Path) -> Path:
    """Return the model folder of a run or of an adapted model. Both forms of the latter can be exported.

    Raises:
        JasperError: there is no such folder.
    """
    if not source.is_dir():
        raise JasperError(f"{source}: there is no such folder. Fix: give a run folder, for example runs/NAME")
    return Path(resolve_model(str(source)))
