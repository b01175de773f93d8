"""Open an exported folder in every runtime that it has files for, and encode with each in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jasper_fast.exporting.gguf import GGUF_FILE, open_gguf
from jasper_fast.exporting.int8 import check_int8_cpu
from jasper_fast.exporting.openvino import OpenvinoGraph
from jasper_fast.models.embedder import load_model
from jasper_fast.models.folder import read_json
from jasper_fast.models.graph import open_session
from jasper_fast.models.hub import PROMPTS, prompt_of
from jasper_fast.models.sentence_transformer import encode_role
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

PYTORCH, ONNX, INT8, OPENVINO, GGUF = "pytorch", "onnx", "onnx-int8", "openvino", "gguf"
FILES = {  # by runtime, in the order of a table
    PYTORCH: "modules.json",
    ONNX: "onnx/model.onnx",
    INT8: "onnx/model_int8.onnx",
    OPENVINO: "openvino/openvino_model.xml",
    GGUF: GGUF_FILE,
}
INPUTS = ["input_ids", "attention_mask"]
EMBEDDINGS = "sentence_embedding"  # output of a graph
TEXTS_PER_BATCH = 32
Encode = Callable[[list[str], str], np.ndarray]
Graph = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids and mask, (b, tokens) int64 → (b, D) float32


@dataclass(frozen=True)
class Runtime:
    """One file of an exported folder, opened in the program that it is for.

    Attributes:
        name: "pytorch", "onnx", "onnx-int8", "openvino" or "gguf".
        file: path of the file in the folder.
        encode: function (texts, role) → (n, D) float32 embeddings, in the order of the texts. The role is "query" or
            "document". The prompt of the role, truncation and batches are inside.
    """

    name: str
    file: str
    encode: Encode


def open_runtimes(
    folder: Path, names: Sequence[str] | None = None, *, threads: int | None = None, trust_remote_code: bool = False
) -> list[Runtime]:
    """Open an exported folder in its runtimes, on the CPU.

    Args:
        folder: flat folder, with or without PyTorch weights.
        names: runtimes to open, in this order. None: all that the folder has files for.
        threads: CPU threads of each runtime. None: the runtime's default.
        trust_remote_code: permission to run code from the folder. Default: False.

    Returns:
        The opened runtimes. PyTorch is stock sentence-transformers.

    Raises:
        JasperError: the folder has no file for a runtime, a package is missing, or a file cannot be opened.

    Example:
        >>> for runtime in open_runtimes(Path("student-128-onnx"), threads=1):  # doctest: +SKIP
        ...     print(runtime.name, runtime.encode(["How do I reverse a list?"], "query").shape)
    """
    folder = Path(folder)
    present = [name for name in FILES if _has(folder, name)]
    for name in present if names is None else names:
        if name not in present:
            raise JasperError(
                f"{folder}: nothing to open for {name!r} (got {', '.join(present) or 'no model files'}, expected "
                f"{FILES.get(name, 'one of ' + ', '.join(FILES))}). Fix: export the model again with this runtime"
            )
    return [
        Runtime(name, FILES[name], _opened(folder, name, threads, trust_remote_code))
        for name in (present if names is None else names)
    ]


def _has(folder: Path, name: str) -> bool:
    """Return whether a folder has the files of a runtime. PyTorch needs weights too."""
    return (folder / FILES[name]).is_file() and (name != PYTORCH or any(folder.glob("*.safetensors")))


def _opened(folder: Path, name: str, threads: int | None, trust_remote_code: bool) -> Encode:
    if name == PYTORCH:
        return _pytorch(folder, threads, trust_remote_code)
    if name == GGUF:
        return open_gguf(folder, threads=threads)
    run = (_openvino if name == OPENVINO else _onnxruntime)(folder / FILES[name], threads)
    return _graph_encode(folder, run, trust_remote_code)


def _pytorch(folder: Path, threads: int | None, trust_remote_code: bool) -> Encode:
    model = load_model(str(folder), device="cpu", trust_remote_code=trust_remote_code)

    def encode(texts: list[str], role: str) -> np.ndarray:
        with _torch_threads(threads):
            rows = encode_role(model, texts, role, prompt_of(model.prompts, role), TEXTS_PER_BATCH)
        return rows.float().numpy()

    return encode


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _onnxruntime(file: Path, threads: int | None) -> Graph:
    session = open_session(str(file), file, threads)
    check_int8_cpu(session.get_modelmeta().custom_metadata_map, str(file))
    return lambda ids, mask: session.run([EMBEDDINGS], dict(zip(INPUTS, (ids, mask), strict=True)))[0]


def _openvino(file: Path, threads: int | None) -> Graph:
    graph = OpenvinoGraph(str(file), file, threads)
    return lambda ids, mask: graph.run(dict(zip(INPUTS, (ids, mask), strict=True)), EMBEDDINGS)


def _graph_encode(folder: Path, run: Graph, trust_remote_code: bool) -> Encode:
    """Return an encoder around a graph: prompts, tokenizer, truncation, and batches of texts of similar length."""
    tokenizer, tokens = _tokenizer(folder, trust_remote_code)
    file = folder / PROMPTS
    prompts: Mapping[str, str | None] = read_json(file).get("prompts", {}) if file.is_file() else {}

    def embed(texts: list[str]) -> np.ndarray:
        features = tokenizer(texts, padding=True, truncation=True, max_length=tokens, return_tensors="np")
        return run(*(features[name].astype(np.int64) for name in INPUTS))

    def encode(texts: list[str], role: str) -> np.ndarray:
        prompted = [prompt_of(prompts, role) + text for text in texts]
        order = np.argsort([-len(text) for text in prompted], kind="stable")
        rows: np.ndarray | None = None
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            batch = order[start : start + TEXTS_PER_BATCH]
            found = embed([prompted[i] for i in batch])
            rows = np.empty((len(texts), found.shape[1]), dtype=np.float32) if rows is None else rows
            rows[batch] = found
        return embed([""])[:0] if rows is None else rows

    return encode


def _tokenizer(folder: Path, trust_remote_code: bool) -> tuple[Any, int]:
    """Return the tokenizer of a flat folder, and the number of tokens at which texts are truncated."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise JasperError(
            f"{folder}: the tokenizer cannot be loaded ({first_line(error)}). Fix: export the model again"
        ) from error
    file = folder / "sentence_bert_config.json"
    settings = read_json(file) if file.is_file() else {}
    return tokenizer, int(settings.get("max_seq_length") or tokenizer.model_max_length)
