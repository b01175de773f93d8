"""Compare two models by their embeddings of the same texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.drift.diagnosis import Diagnosis, declared_differences
from jasper_fast.drift.endpoint import EndpointOptions, EndpointSide, is_address
from jasper_fast.drift.findings import Finding
from jasper_fast.drift.graph import GraphSide, find_graph
from jasper_fast.drift.llama import GgufSide, find_gguf
from jasper_fast.drift.measures import Figures, is_unit, measure, unit
from jasper_fast.drift.recorded import GoldenSide, holds_weights
from jasper_fast.drift.side import Side
from jasper_fast.drift.stock import StockSide
from jasper_fast.exporting.golden import ROLES, Text, golden_texts
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import looks_like_path

MIN_COSINE = 0.9999  # rounding of float32 and float16 stays above it
FILES: Mapping[str, Callable[[str, Path], Side]] = {  # how to open a file, by its suffix
    ".onnx": GraphSide,
    ".xml": GraphSide,
    ".gguf": GgufSide,
    ".json": lambda _, file: GoldenSide(str(file)),
}


@dataclass(frozen=True)
class Options:
    """Options of a comparison.

    Args:
        texts: file with one text a line, each embedded as a query and as a document. None: those of a golden file, or
            built-in ones.
        role: "query" or "document", to compare embeddings of one role only. None compares both.
        dimensions: width at which both are compared: a head, the field ``dimensions`` of an OpenAI-style request, or
            the first numbers. None: their own widths.
        min_cosine: smallest cosine of a text's two embeddings that counts as equal.
        accept: kinds of findings that do not count as a difference.
        send_prompts: True to put the prompts that the other side declares before the texts for an endpoint.
        endpoint: options of requests. Their ``dimensions`` are those of the comparison.
        trust_remote_code: permission to run a model's custom code.
    """

    texts: Path | None = None
    role: str | None = None
    dimensions: int | None = None
    min_cosine: float = MIN_COSINE
    accept: Sequence[str] = ()
    send_prompts: bool = False
    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Args:
        sides: A and B.
        texts: number of texts.
        figures: figures of the embeddings as they came.
        seconds: seconds a text for each side. None for a golden file.
        findings: differences, each with its fix.
        accepted: kinds of findings that do not count.
        declared: declared settings that differ.
        notes: limits of this comparison.
    """

    sides: tuple[Side, Side]
    texts: int
    figures: Figures
    seconds: tuple[float | None, float | None]
    findings: Sequence[Finding]
    accepted: Sequence[str]
    declared: Sequence[str]
    notes: Sequence[str]

    @property
    def same(self) -> bool:
        """True if no finding counts."""
        return all(finding.kind in self.accepted for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        found = [
            {"kind": f.kind, "text": f.text, "fix": f.fix, "cosine_min_after": f.cosine_min, "exact": f.exact}
            for f in self.findings
        ]
        return {
            "same": self.same,
            "sides": [{"name": side.name, "kind": side.kind} for side in self.sides],
            "texts": self.texts,
            **self.figures.as_dict(),
            "seconds_per_text": list(self.seconds),
            "findings": found,
            "accepted": list(self.accepted),
            "declared": list(self.declared),
            "notes": list(self.notes),
        }


def compare_models(first: str, second: str, options: Options = Options()) -> Comparison:  # noqa: B008
    """Compare two models.

    Args:
        first: A: folder, run, .onnx, .xml (OpenVINO) or .gguf file, address of an endpoint, or golden file.
        second: B, likewise.
        options: the options.

    Returns:
        The comparison, with the reasons of a difference.

    Raises:
        JasperError: a side cannot be opened or gives no embeddings, or the texts do not fit.
    """
    sides = dict(zip("AB", _open_sides((first, second), options), strict=True))
    if options.send_prompts:
        _send_prompts(sides)
    texts = _choose_texts([*sides.values()], options)
    rows, seconds = {}, {}
    for letter, side in sides.items():
        rows[letter], seconds[letter] = _timed(side, texts, options.dimensions)
    figures = measure(rows["A"], rows["B"])
    diagnosis = Diagnosis(sides, texts, dict(rows), options.min_cosine, options.dimensions)
    findings = diagnosis.find()
    pair = (sides["A"], sides["B"])
    times = (seconds["A"], seconds["B"])
    declared = declared_differences(pair)
    return Comparison(pair, len(texts), figures, times, findings, options.accept, declared, diagnosis.notes)


def open_side(name: str, options: Options = Options()) -> Side:  # noqa: B008
    """Open one side of a comparison.

    Args:
        name: folder, run, .onnx, .xml (OpenVINO) or .gguf file, address of an endpoint, or golden file.
        options: options of the comparison.

    Raises:
        JasperError: there is no such file or folder, or it cannot be opened.
    """
    if is_address(name):
        return EndpointSide(name, replace(options.endpoint, dimensions=options.dimensions))
    path = Path(name).expanduser()
    if not path.exists() and (path.suffix in FILES or looks_like_path(name)):
        raise JasperError(f"{name}: there is no such file or folder. Fix: check the path")
    file = path
    if path.is_dir() and not holds_weights(path):
        file = find_graph(path) or find_gguf(path) or path
    if not file.is_file():
        return StockSide(name, options.dimensions, trust_remote_code=options.trust_remote_code)
    if file.suffix not in FILES:
        raise JasperError(
            f"{name}: unknown kind of file (got {path.suffix or 'no suffix'}, expected {', '.join(FILES)}). Fix: give "
            "the folder of the model"
        )
    return FILES[file.suffix](name, file)


def _open_sides(names: Sequence[str], options: Options) -> list[Side]:
    """Open both sides, models last, because they take longest to load and the other errors come at once."""
    order = sorted(names, key=lambda name: not (is_address(name) or name.endswith(".json")))
    opened = {name: open_side(name, options) for name in order}
    return [opened[name] for name in names]


def _send_prompts(sides: dict[str, Side]) -> None:
    """Let endpoints get the prompts that the other side declares."""
    for letter, other in (("A", "B"), ("B", "A")):
        side, known = sides[letter], sides[other].facts.prompts
        if not isinstance(side, EndpointSide):
            continue
        if known is None:
            raise JasperError(
                f"--send-prompts: {sides[other].name} declares no prompts. Fix: compare with a folder or a golden file"
            )
        side.prompts = {role: known.get(role) or "" for role in ROLES}


def _choose_texts(sides: Sequence[Side], options: Options) -> list[Text]:
    golden = next((side for side in sides if isinstance(side, GoldenSide)), None)
    if options.texts is not None:
        texts = _read_texts(options.texts)
    else:
        texts = list(golden.texts) if golden is not None else golden_texts()
    chosen = [text for text in texts if options.role in (None, text.role)]
    if not chosen:
        raise JasperError(
            f"--role {options.role}: no text has this role. Fix: leave --role out, or give the other role"
        )
    return chosen


def _read_texts(path: Path) -> list[Text]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise JasperError(f"{path}: the texts cannot be read ({error}). Fix: give a text file in UTF-8") from None
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not texts:
        raise JasperError(f"{path}: no texts (expected one in each line). Fix: give a file with texts")
    return [Text(role, text) for role in ROLES for text in texts]


def _timed(side: Side, texts: Sequence[Text], dimensions: int | None) -> tuple[np.ndarray, float | None]:
    """Return the embeddings of a side at the width to compare, and its seconds a text."""
    if side.live:
        side.embed(texts[:1])  # the first call loads and compiles
    start = time.perf_counter()
    rows = side.embed(texts)
    seconds = (time.perf_counter() - start) / len(texts) if side.live else None
    if dimensions is None or rows.shape[1] == dimensions:
        return rows, seconds
    if rows.shape[1] < dimensions:
        raise JasperError(
            f"--dimensions {dimensions}: {side.name} has {rows.shape[1]} numbers a text. Fix: give at most that many"
        )
    if isinstance(side, EndpointSide) and not side.tei:
        return rows, seconds  # the server ignored `dimensions`, which is a difference
    return (unit(rows[:, :dimensions]) if is_unit(rows) else rows[:, :dimensions]), seconds
