"""Export one width as an ONNX graph, and quantize the graph to int8."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jasper_fast.exporting.flat import resolve_width, write_flat
from jasper_fast.exporting.parity import PROBES, check_flat_export
from jasper_fast.models.embedder import load_model
from jasper_fast.models.folder import FACTS_FILE, model_folder, read_json
from jasper_fast.models.sentence_transformer import transformers_of
from jasper_fast.reporting.model_card import write_card
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

ONNX_FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_int8.onnx"
ONNX_TOLERANCE = 1e-4  # largest accepted difference of a coordinate between ONNX and PyTorch
INT8_COSINE = 0.95  # smallest accepted cosine of a text between int8 and PyTorch; 0.99 is usual
INPUTS = ["input_ids", "attention_mask"]
TRACED_TEXTS = ["one", "a sentence that is a little longer than the first"]
CHECK_TEXTS = [*TRACED_TEXTS, "words and more words, " * 6, *PROBES.values()]


def export_onnx(
    model: str | Path,
    width: int | None,
    out: str | Path,
    *,
    int8: bool = False,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Write one width as export_flat does, and an ONNX graph ``onnx/model.onnx`` in the same folder.

    The graph maps ``input_ids`` and ``attention_mask``, both (batch, tokens) int64, to ``sentence_embedding``,
    (batch, width) float32 with L2-normalised rows. Its metadata have ``model``, ``width``, ``max_tokens`` and
    ``normalized``. The graph runs in ONNX Runtime before the folder is published. Its embeddings must match those of
    PyTorch. The differences are in the model card and in ``training.json``.

    Args:
        model: model folder from export_student, or its run folder.
        width: width of the embeddings. None: the widest.
        out: new model folder.
        int8: True to add ``onnx/model_int8.onnx``, whose weights are int8, one scale for each output channel.
        weights: False to leave out the files that PyTorch loads. The folder is then for onnxruntime alone.
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
        write_graphs(folder, source, int8=int8, weights=weights, trust_remote_code=trust_remote_code)
    return Path(out)


def write_graphs(
    folder: Path, source: Path, *, int8: bool = False, weights: bool = True, trust_remote_code: bool = False
) -> None:
    """Add ONNX graphs to an unpublished flat folder, and their checks to its card.

    Args:
        folder: unpublished flat folder with its card.
        source: model that the folder was made from, for messages.
        int8: True to add the graph with int8 weights too.
        weights: False to leave out the files that PyTorch loads.
        trust_remote_code: permission to run code from the model. Default: False.

    Raises:
        JasperError: the architecture cannot be exported to ONNX, or the embeddings of a graph differ.
    """
    loaded = load_model(str(folder), device="cpu", trust_remote_code=trust_remote_code)
    facts = read_json(folder / FACTS_FILE)
    width = int(loaded.get_embedding_dimension() or 0)
    graph = folder / ONNX_FILE
    graph.parent.mkdir()
    with _explain_onnx_errors(loaded, source), _quiet():
        name = str(facts.get("name", "student"))
        _write_graph(_EmbeddingModel(loaded), loaded, graph, _metadata(loaded, name, width))
        onnx = {"max_tokens": _max_tokens(loaded), "difference": _onnx_difference(loaded, graph)}
        if int8:
            _write_int8(graph, folder / INT8_FILE)
            onnx["cosine_mean"], onnx["cosine_min"] = _int8_cosines(loaded, folder / INT8_FILE)
    _check_graphs(source, onnx)
    if not weights:
        _remove_weights(folder)
    write_card(folder, {**facts, "onnx": onnx}, [width], flat=True)


def graph_lines(folder: Path) -> list[str]:
    """Describe the graphs of a published folder, one line for each: file, size and the check against PyTorch."""
    onnx = read_json(folder / FACTS_FILE)["onnx"]
    checks = {
        ONNX_FILE: f"differs from PyTorch by at most {onnx['difference']:.1e} in a coordinate",
        INT8_FILE: f"cosine with PyTorch {onnx.get('cosine_mean', 1):.4f} in the mean, at least "
        f"{onnx.get('cosine_min', 1):.4f}",
    }
    return [
        f"{file}: {(folder / file).stat().st_size / 1e6:.1f} MB, {check}, on {len(CHECK_TEXTS)} texts"
        for file, check in checks.items()
        if (folder / file).is_file()
    ]


def _check_graphs(source: Path, onnx: dict[str, float]) -> None:
    """Raise if the embeddings of a graph differ from those of PyTorch. NaN counts as a difference."""
    if not onnx["difference"] <= ONNX_TOLERANCE:
        raise JasperError(
            f"{source}: the ONNX export differs from PyTorch (got a difference of {onnx['difference']:.1e} in a "
            f"coordinate, expected at most {ONNX_TOLERANCE:.0e}). Fix: export without --onnx"
        )
    if "cosine_min" in onnx and not onnx["cosine_min"] >= INT8_COSINE:
        raise JasperError(
            f"{source}: int8 weights change the embeddings too much (got a cosine of {onnx['cosine_min']:.3f} with "
            f"PyTorch, expected at least {INT8_COSINE}). Fix: export without --int8"
        )


class _EmbeddingModel(nn.Module):
    """Sentence-transformers model with two input tensors and one output tensor, as torch.onnx.export expects."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.steps = nn.ModuleList(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        for step in self.steps:
            features = step(features)
        return features["sentence_embedding"]


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of torch's exporter and onnxruntime, which concern their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _max_tokens(loaded: Any) -> int:
    return min(int(module.max_seq_length) for module in transformers_of(loaded))


def _metadata(loaded: Any, name: str, width: int) -> dict[str, str]:
    """Return the metadata of a graph. ONNX has only text."""
    return {"model": name, "width": str(width), "max_tokens": str(_max_tokens(loaded)), "normalized": "true"}


def _write_graph(vectors: nn.Module, loaded: Any, path: Path, metadata: dict[str, str]) -> None:
    features = loaded.preprocess(TRACED_TEXTS)
    axes = {0: "batch", 1: "tokens"}
    large = (
        sum(p.numel() * p.element_size() for p in vectors.parameters()) > 1 << 30
    )  # an ONNX file is limited to 2 GiB
    program: Any = torch.onnx.export(
        vectors.eval(),
        tuple(features[name] for name in INPUTS),
        input_names=INPUTS,
        output_names=["sentence_embedding"],
        dynamic_shapes=dict.fromkeys(INPUTS, axes),
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    program.save(str(path), external_data=large)


def _write_int8(graph: Path, path: Path) -> None:
    """Quantize the weights of a graph to int8. One scale per tensor would triple the error of one per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    external = graph.with_name(graph.name + ".data").is_file()
    quantize_dynamic(graph, path, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=external)


def _embed(loaded: Any, path: Path, texts: list[str]) -> np.ndarray:
    """Embed texts with a graph in onnxruntime, in one batch, (n, D) float32."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    features = loaded.preprocess(texts)
    return session.run(["sentence_embedding"], {name: features[name].numpy() for name in INPUTS})[0]


def _onnx_difference(loaded: Any, path: Path) -> float:
    """Return the largest difference of a coordinate between onnxruntime and PyTorch, on shapes not used for tracing."""
    groups = (CHECK_TEXTS, CHECK_TEXTS[:1], [CHECK_TEXTS[2]] * 5)
    return float(np.max([np.abs(_embed(loaded, path, texts) - loaded.encode(texts)).max() for texts in groups]))


def _int8_cosines(loaded: Any, path: Path) -> tuple[float, float]:
    """Return the mean and the smallest cosine between embeddings of int8 and PyTorch."""
    cosines = (_embed(loaded, path, CHECK_TEXTS) * loaded.encode(CHECK_TEXTS)).sum(axis=1)
    return float(cosines.mean()), float(cosines.min())


def _remove_weights(folder: Path) -> None:
    """Remove the files of a flat folder that only sentence-transformers needs. The tokenizer stays."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for module in read_json(folder / "modules.json"):
        if module["path"]:
            shutil.rmtree(folder / module["path"])
    (folder / "modules.json").unlink()


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
