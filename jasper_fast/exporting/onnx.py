"""Export one width as an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jasper_fast.exporting.flat import resolve_width, write_flat
from jasper_fast.exporting.parity import check_flat_export
from jasper_fast.models.embedder import load_model
from jasper_fast.models.folder import model_folder
from jasper_fast.models.sentence_transformer import transformers_of
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

ONNX_FILE = "onnx/model.onnx"
ONNX_TOLERANCE = 1e-4  # largest accepted difference of a coordinate between ONNX and PyTorch
CHECK_TEXTS = ["one", "a sentence that is a little longer than the first", "words and more words, " * 6]


def export_onnx(model: str | Path, width: int | None, out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Write one width as export_flat does, and an ONNX graph ``onnx/model.onnx`` in the same folder.

    The graph maps ``input_ids`` and ``attention_mask``, both (B, L) int64, to ``sentence_embedding``, (B, width)
    float32 with L2-normalised rows. B and L are dynamic. onnxruntime runs the graph before the folder is published.
    Its embeddings must match those of PyTorch.

    Args:
        model: model folder from export_student, or its run folder.
        width: width of the embeddings. None: the widest.
        out: new model folder.
        trust_remote_code: permission to run code from the model. Default: False.

    Returns:
        ``out`` as a path.

    Raises:
        JasperError: the model, the width or a package is missing, the architecture cannot be exported to ONNX, or the
            embeddings of the graph differ.
    """
    _require_onnx()
    source = model_folder(model)
    width = resolve_width(source, width)
    with publish_dir(out) as folder:
        write_flat(source, width, folder)
        check_flat_export(source, folder, width, trust_remote_code=trust_remote_code)
        loaded = load_model(str(folder), device="cpu", trust_remote_code=trust_remote_code)
        graph = folder / ONNX_FILE
        graph.parent.mkdir()
        with _explain_onnx_errors(loaded, source):
            _write_graph(_EmbeddingModel(loaded), loaded, graph)
            difference = _onnx_difference(loaded, graph)
        if not difference <= ONNX_TOLERANCE:
            raise JasperError(
                f"{source}: the ONNX export differs from PyTorch (got a difference of {difference:.1e} in a "
                f"coordinate, expected at most {ONNX_TOLERANCE:.0e}). Fix: export without --onnx"
            )
    return Path(out)


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


def _write_graph(vectors: nn.Module, loaded: Any, path: Path) -> None:
    features = loaded.preprocess(CHECK_TEXTS[:2])
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    large = (
        sum(p.numel() * p.element_size() for p in vectors.parameters()) > 1 << 30
    )  # an ONNX file is limited to 2 GiB
    torch.onnx.export(
        vectors.eval(),
        (features["input_ids"], features["attention_mask"]),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        dynamo=True,
        external_data=large,
        verbose=False,
    )


def _onnx_difference(loaded: Any, path: Path) -> float:
    """Return the largest difference of a coordinate between onnxruntime and PyTorch, on shapes not used for tracing."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for texts in (CHECK_TEXTS, CHECK_TEXTS[:1], [CHECK_TEXTS[2]] * 5):
        features = loaded.preprocess(texts)
        inputs = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
        embeddings = torch.from_numpy(session.run(None, inputs)[0])
        differences.append((embeddings - loaded.encode(texts, convert_to_tensor=True)).abs().max())
    return float(torch.stack(differences).max())  # NaN if any is


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise JasperError(
            f"--onnx: the package {error.name} is missing. Fix: `pip install onnx onnxscript onnxruntime` "
            "(or the extra `export`)"
        ) from None
