"""Add graphs for ONNX Runtime and OpenVINO to a flat folder, each checked in its own runtime."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jasper_fast.exporting.flat import resolve_width, write_flat
from jasper_fast.exporting.int8 import quantize_graph, quiet
from jasper_fast.exporting.openvino import require_openvino, write_openvino
from jasper_fast.exporting.parity import PROBES, check_flat_export
from jasper_fast.exporting.runtimes import EMBEDDINGS, FILES, INPUTS, INT8, ONNX, OPENVINO, PYTORCH, open_runtimes
from jasper_fast.models.embedder import load_model
from jasper_fast.models.folder import FACTS_FILE, model_folder, read_json, write_json
from jasper_fast.models.sentence_transformer import ROLES, transformers_of
from jasper_fast.reporting.model_card import write_card
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

ONNX_FILE, INT8_FILE = FILES[ONNX], FILES[INT8]
ONNX_TOLERANCE = 1e-4  # largest accepted difference of a coordinate between a float32 graph and PyTorch
INT8_COSINE = 0.99  # smallest accepted cosine of a text between int8 and PyTorch; 0.999 is usual
TOKENS = "last_hidden_state"  # output of a graph for programs that pool themselves
POOLINGS = ("mean", "cls", "lasttoken", "weightedmean")  # a linear layer may come before them instead of after
TRACED_TEXTS = ["one", "a sentence that is a little longer than the first"]
CHECK_TEXTS = [*TRACED_TEXTS, "words and more words, " * 6, *PROBES.values()]


def export_onnx(
    model: str | Path,
    width: int | None,
    out: str | Path,
    *,
    onnx: bool = True,
    int8: bool = False,
    openvino: bool = False,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Write one width as export_flat does, and the graphs of :func:`write_graphs` in the same folder.

    Args:
        model: model folder from export_student, or its run folder.
        width: width of the embeddings. None: the widest.
        out: new model folder.
        onnx: as in :func:`write_graphs`.
        int8: as in :func:`write_graphs`.
        openvino: as in :func:`write_graphs`.
        weights: as in :func:`write_graphs`.
        trust_remote_code: permission to run code from the model. Default: False.

    Returns:
        ``out`` as a path.

    Raises:
        JasperError: the model, the width or a package is missing, the architecture cannot be exported to ONNX, or the
            embeddings of a graph differ.
    """
    require_onnx()
    source = model_folder(model)
    width = resolve_width(source, width)
    with publish_dir(out) as folder:
        write_flat(source, width, folder)
        check_flat_export(source, folder, width, trust_remote_code=trust_remote_code)
        write_graphs(folder, source, int8=int8, openvino=openvino, weights=weights, trust_remote_code=trust_remote_code)
    return Path(out)


def write_graphs(
    folder: Path,
    source: Path,
    *,
    onnx: bool = True,
    int8: bool = False,
    openvino: bool = False,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Add graphs to an unpublished flat folder, and their checks to its card.

    A graph maps ``input_ids`` and ``attention_mask``, both (batch, tokens) int64, to ``sentence_embedding``,
    (batch, width) float32 with L2-normalised rows. Its metadata have ``model``, ``width``, ``max_tokens`` and
    ``normalized``. Each graph runs in its own runtime, and its embeddings must match those of PyTorch. The differences
    are in the model card and in ``training.json``.

    Without PyTorch weights, a graph also has the output ``last_hidden_state``, (batch, tokens, width) float32. Each
    token has gone through the head already, so the mean over tokens, normalised, is the embedding. The folder's modules
    are then Transformer, Pooling and Normalize, for ``backend="onnx"`` of sentence-transformers.

    Args:
        folder: unpublished flat folder with its card.
        source: model that the folder was made from, for messages.
        onnx: False to leave out the ONNX graph of a folder that has an OpenVINO model. Default: True.
        int8: True to add ``onnx/model_int8.onnx``, as :func:`quantize_graph` makes it. It keeps the ONNX graph too.
        openvino: True to add ``openvino/openvino_model.xml`` with float32 weights.
        weights: False to leave out the files that PyTorch loads. The folder is then for the graphs alone.
        trust_remote_code: permission to run code from the model. Default: False.

    Raises:
        JasperError: a package is missing, the architecture cannot be exported, or the embeddings of a graph differ.
    """
    require_onnx()
    if openvino:
        require_openvino()
    loaded = load_model(str(folder), device="cpu", trust_remote_code=trust_remote_code)
    facts = read_json(folder / FACTS_FILE)
    width = int(loaded.get_embedding_dimension() or 0)
    metadata = _metadata(loaded, str(facts.get("name", "student")), width)
    tokens = None if weights else _token_modules(loaded)
    with _explain_onnx_errors(loaded, source), quiet():
        _write_graph(_EmbeddingModel(tokens or loaded, tokens is not None), loaded, folder / ONNX_FILE, metadata)
        if int8:
            quantize_graph(folder / ONNX_FILE, folder / INT8_FILE)
        if openvino:
            write_openvino(folder / ONNX_FILE, folder / FILES[OPENVINO], metadata)
        written = [ONNX, *[INT8] * int8, *[OPENVINO] * openvino]
        checks: dict[str, float] = {"max_tokens": _max_tokens(loaded), "tokens": tokens is not None}
        checks |= _compare(folder, written, trust_remote_code)
    _check_graphs(source, checks)
    if openvino and not (onnx or int8):
        shutil.rmtree((folder / ONNX_FILE).parent)
        del checks["difference"]
    if not weights:
        remove_weights(folder, width if tokens else None)
    write_card(folder, {**facts, "onnx": checks}, [width], flat=True)


def write_model_graph(loaded: Any, source: Path, path: Path) -> None:
    """Write the graph of a flat model in float32.

    Args:
        loaded: the model, on the CPU.
        source: its folder, for messages and for its name.
        path: new graph in an existing folder.

    Raises:
        JasperError: a package is missing, or the architecture cannot be exported to ONNX.
    """
    require_onnx()
    facts = read_json(source / FACTS_FILE) if (source / FACTS_FILE).is_file() else {}
    width = int(loaded.get_embedding_dimension() or 0)
    with _explain_onnx_errors(loaded, source), quiet():
        metadata = _metadata(loaded, str(facts.get("name", "student")), width)
        _write_graph(_EmbeddingModel(loaded, False), loaded, path, metadata)


def graph_lines(folder: Path) -> list[str]:
    """Describe the graphs of a published folder, one line for each: file, size and the check against PyTorch."""
    checks = read_json(folder / FACTS_FILE)["onnx"]
    differs = "differs from PyTorch by at most {:.1e} in a coordinate"
    cosine = "cosine with PyTorch {:.4f} in the mean, at least {:.4f}"
    lines = {
        ONNX: (differs, ("difference",)),
        INT8: (cosine, ("cosine_mean", "cosine_min")),
        OPENVINO: (differs, ("openvino_difference",)),
    }
    return [
        f"{FILES[name]}: {_megabytes(folder / FILES[name]):.1f} MB, {line.format(*(checks[key] for key in keys))}, on "
        f"{len(CHECK_TEXTS)} texts"
        for name, (line, keys) in lines.items()
        if (folder / FILES[name]).is_file()
    ]


def _megabytes(file: Path) -> float:
    """Return the size of a graph with the file of its weights, if they are separate."""
    weights = (file.with_name(file.name + ".data"), file.with_suffix(".bin"))
    return sum(part.stat().st_size for part in (file, *weights) if part.is_file()) / 1e6


def _check_graphs(source: Path, checks: Mapping[str, float]) -> None:
    """Raise if the embeddings of a graph differ from those of PyTorch. NaN counts as a difference."""
    for key, option in (("difference", "--onnx"), ("openvino_difference", "--openvino")):
        if key in checks and not checks[key] <= ONNX_TOLERANCE:
            raise JasperError(
                f"{source}: the export with {option} differs from PyTorch (got a difference of {checks[key]:.1e} in a "
                f"coordinate, expected at most {ONNX_TOLERANCE:.0e}). Fix: export without {option}"
            )
    if "cosine_min" in checks and not checks["cosine_min"] >= INT8_COSINE:
        raise JasperError(
            f"{source}: int8 weights change the embeddings too much (got a cosine of {checks['cosine_min']:.3f} with "
            f"PyTorch, expected at least {INT8_COSINE}). Fix: export without --int8"
        )


def _token_modules(loaded: Any) -> list[Any] | None:
    """Return a model's modules with its heads before the pooling. The embeddings stay the same.

    Returns:
        The modules, or None if the pooling or a head does not permit another order.
    """
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling

    modules = list(loaded)
    pooled = next((i for i, module in enumerate(modules) if isinstance(module, Pooling)), None)
    if pooled is None or modules[pooled].pooling_mode not in POOLINGS:
        return None
    heads = [copy.copy(module) for module in modules if isinstance(module, Dense)]
    if any(not isinstance(head.activation_function, nn.Identity) or head.use_residual for head in heads):
        return None
    for head in heads:
        head.module_input_name = head.module_output_name = "token_embeddings"
    return [*modules[:pooled], *heads, *(module for module in modules[pooled:] if not isinstance(module, Dense))]


class _EmbeddingModel(nn.Module):
    """Modules of sentence-transformers with two input tensors, as torch.onnx.export expects."""

    def __init__(self, modules: Any, tokens: bool) -> None:
        super().__init__()
        self.steps = nn.ModuleList(modules)
        self.outputs = {EMBEDDINGS: "sentence_embedding", **({TOKENS: "token_embeddings"} if tokens else {})}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        for step in self.steps:
            features = step(features)
        return tuple(features[name] for name in self.outputs.values())


@contextmanager
def _explain_onnx_errors(loaded: Any, source: Path) -> Iterator[None]:
    """Raise errors of torch's exporter and onnxruntime as a JasperError with the name of the architecture."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    failures: list[type[Exception]] = [torch.onnx.OnnxExporterError]
    failures += [kind for kind in vars(runtime).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    try:
        yield
    except tuple(failures) as error:
        architecture = " and ".join(type(module.model).__name__ for module in transformers_of(loaded))
        raise JasperError(
            f"{source}: torch {torch.__version__} cannot export {architecture} to ONNX "
            f"({first_line(error.__cause__ or error)}). Nothing was published. Fix: export without --onnx"
        ) from error


def _max_tokens(loaded: Any) -> int:
    return min(int(module.max_seq_length) for module in transformers_of(loaded))


def _metadata(loaded: Any, name: str, width: int) -> dict[str, str]:
    """Return the metadata of a graph. ONNX has only text."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    normalized = str(any(isinstance(module, Normalize) for module in loaded)).lower()
    return {"model": name, "width": str(width), "max_tokens": str(_max_tokens(loaded)), "normalized": normalized}


def _write_graph(vectors: _EmbeddingModel, loaded: Any, path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    features = loaded.preprocess(TRACED_TEXTS)
    axes = {0: "batch", 1: "tokens"}
    large = (
        sum(p.numel() * p.element_size() for p in vectors.parameters()) > 1 << 30
    )  # an ONNX file is limited to 2 GiB
    program: Any = torch.onnx.export(
        vectors.eval(),
        tuple(features[name] for name in INPUTS),
        input_names=INPUTS,
        output_names=list(vectors.outputs),
        dynamic_shapes=dict.fromkeys(INPUTS, axes),
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    program.save(str(path), external_data=large)


def _compare(folder: Path, names: list[str], trust_remote_code: bool) -> dict[str, float]:
    """Compare each graph with PyTorch, in its own runtime, for both roles and on shapes that were not traced.

    Returns:
        Largest difference of a coordinate for float32, and the mean and the smallest cosine for int8.
    """
    pytorch, *graphs = open_runtimes(folder, [PYTORCH, *names], trust_remote_code=trust_remote_code)
    calls = [(texts, role) for role in ROLES for texts in (CHECK_TEXTS, CHECK_TEXTS[:1], [CHECK_TEXTS[2]] * 5)]
    expected = np.concatenate([pytorch.encode(*call) for call in calls])
    checks: dict[str, float] = {}
    for graph in graphs:
        found = np.concatenate([graph.encode(*call) for call in calls])
        if graph.name == INT8:
            cosines = (found * expected).sum(axis=1)
            checks |= {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
        else:
            key = "difference" if graph.name == ONNX else f"{graph.name}_difference"
            checks[key] = float(np.abs(found - expected).max())
    return checks


def remove_weights(folder: Path, width: int | None = None) -> None:
    """Remove the files of a flat folder that only PyTorch needs. The tokenizer stays.

    Args:
        folder: unpublished flat folder.
        width: width of the graph's tokens, whose pooling sentence-transformers may do. None: the modules are removed.
    """
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    listing = folder / "modules.json"
    kept: list[dict[str, Any]] = []
    for module in read_json(listing):
        if module["path"] and (width is None or module["type"].endswith(".Dense")):
            shutil.rmtree(folder / module["path"])
        else:
            kept.append({**module, "idx": len(kept), "name": str(len(kept))})
    if width is None:
        listing.unlink()
        return
    write_json(listing, kept)
    (pooling,) = (folder / module["path"] / "config.json" for module in kept if module["type"].endswith(".Pooling"))
    write_json(pooling, {**read_json(pooling), "word_embedding_dimension": width})
    settings = folder / "sentence_bert_config.json"
    # Arguments for PyTorch's model class, which the class for graphs rejects.
    write_json(settings, {key: value for key, value in read_json(settings).items() if key != "model_args"})


def require_onnx() -> None:
    """Check that the packages for ONNX are installed.

    Raises:
        JasperError: one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise JasperError(
            f"--onnx: the package {error.name} is missing. Fix: `pip install onnx onnxscript onnxruntime` "
            "(or the extra `export`)"
        ) from None
