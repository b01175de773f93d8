"""The two small forms of an export: a folder of weights for PyTorch, and a folder with one int8 graph."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from jasper_fast.exporting.int8 import quantize_graph
from jasper_fast.exporting.onnx import INT8_FILE, remove_weights, write_model_graph
from jasper_fast.exporting.runtimes import INT8, open_runtimes
from jasper_fast.exporting.small_graph import CodedGraph
from jasper_fast.exporting.token_table import folder_bytes, halve_weights, prune_settings, prune_table
from jasper_fast.exporting.vocabulary import Vocabulary
from jasper_fast.models.embedder import load_model, model_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CODED_COSINE = 0.95  # smallest accepted cosine of a text between a graph with a coded token table and the whole model
FINE = 4  # in graphs with fewer tokens, one of four has the finer embedding


@dataclass(frozen=True)
class Whole:
    """The model before it is made smaller.

    Args:
        folder: its flat folder.
        model: the same folder, loaded on the CPU.
        vocabulary: its tokenizer. None: it stays as it is.
        counts: (v,) integers, occurrences of each token in the corpus. None: no corpus, so no token is removed.
        trust_remote_code: permission to run code from the model. Default: False.
    """

    folder: Path
    model: SentenceTransformer
    vocabulary: Vocabulary | None
    counts: np.ndarray | None
    trust_remote_code: bool = False

    @cached_property
    def need(self) -> np.ndarray:
        """(v,) float64, how much each token is needed."""
        assert self.vocabulary is not None
        return self.vocabulary.need(np.zeros(len(self.vocabulary.tokens)) if self.counts is None else self.counts)

    @cached_property
    def order(self) -> np.ndarray:
        """(n,) int64, the tokens from the most to the least needed."""
        assert self.vocabulary is not None
        counts = np.zeros(len(self.vocabulary.tokens), np.int64) if self.counts is None else self.counts
        return self.vocabulary.order(counts)

    @property
    def least(self) -> int:
        """The smallest number of tokens."""
        assert self.vocabulary is not None
        return len(self.order) if self.counts is None else int(self.vocabulary.required.sum())


class Form(Protocol):
    """A form of a small model, which can be written in several sizes."""

    name: str
    least_cosine: float  # accepted between a text's embedding and that of the whole model, if all tokens were kept
    sizes: tuple[int, int]  # the smallest and the largest

    def write(self, size: int, out: Path) -> int:
        """Write the form as a new folder, in place of an existing one, and return its bytes."""

    def kept(self, size: int) -> np.ndarray | None:
        """Return the sorted numbers of the tokens that a size keeps. None: all."""

    def encode(self, out: Path, texts: list[str]) -> np.ndarray:
        """Encode texts as documents with a written folder, (n, D) float32 unit rows."""


class WeightsForm:
    """A folder that sentence-transformers loads. Its size is the number of tokens.

    Args:
        whole: the model.
        half: True to store the weights as float16.
    """

    def __init__(self, whole: Whole, half: bool) -> None:
        self.whole, self.half = whole, half
        self.name = "float16 weights" if half else "float32 weights"
        self.least_cosine = 0.9999 if half else 1 - 1e-6
        self.sizes = (1, 1) if whole.counts is None else (whole.least, len(whole.order))

    def kept(self, size: int) -> np.ndarray | None:
        """Return the most needed tokens."""
        return None if self.whole.counts is None else np.sort(self.whole.order[:size])

    def write(self, size: int, out: Path) -> int:
        """Copy the folder, then replace its tokens and weights."""
        _copy(self.whole.folder, out)
        if (kept := self.kept(size)) is not None and self.whole.vocabulary is not None:
            prune_table(out, kept, self.whole.model)
            prune_settings(out, self.whole.vocabulary, kept)
        if self.half:
            halve_weights(out)
        return folder_bytes(out)

    def encode(self, out: Path, texts: list[str]) -> np.ndarray:
        """Encode with sentence-transformers."""
        model = load_model(str(out), device="cpu", trust_remote_code=self.whole.trust_remote_code)
        return encode_model(model, texts)


class GraphForm:
    """A folder with ``onnx/model_int8.onnx`` and the tokenizer, for onnxruntime alone.

    The token table has two bits a number, or four for tokens that are needed more. Sizes up to the number of tokens
    count the tokens, and a quarter of these are fine. Larger sizes add fine tokens.

    Args:
        whole: the model.
        place: empty folder for the graph of the whole model.

    Raises:
        JasperError: a package is missing, or the architecture cannot be exported to ONNX.
    """

    name = "int8 graph"
    least_cosine = CODED_COSINE

    def __init__(self, whole: Whole, place: Path) -> None:
        self.whole = whole
        exported, quantized = place / "whole.onnx", place / "whole_int8.onnx"
        write_model_graph(whole.model, whole.folder, exported)
        quantize_graph(exported, quantized, tokens=False)
        self.graph = CodedGraph(quantized)
        tokens = len(whole.order)
        self.sizes = (whole.least, 2 * tokens - tokens // FINE)

    def kept(self, size: int) -> np.ndarray:
        """Return the most needed tokens."""
        return np.sort(self.whole.order[:size])

    def fine(self, size: int) -> np.ndarray:
        """Return those of the kept tokens that are needed most."""
        kept = self.kept(size)
        number = len(kept) // FINE + max(0, size - len(self.whole.order))
        return kept[np.argsort(-self.whole.need[kept], kind="stable")[:number]]

    def write(self, size: int, out: Path) -> int:
        """Copy the small files, and write the graph with fewer rows in its token table."""
        assert self.whole.vocabulary is not None
        _copy(self.whole.folder, out)
        remove_weights(out)
        (out / INT8_FILE).parent.mkdir(exist_ok=True)
        self.graph.write(self.kept(size), self.fine(size), out / INT8_FILE)
        prune_settings(out, self.whole.vocabulary, self.kept(size))
        return folder_bytes(out)

    def encode(self, out: Path, texts: list[str]) -> np.ndarray:
        """Encode with onnxruntime."""
        (runtime,) = open_runtimes(out, [INT8], trust_remote_code=self.whole.trust_remote_code)
        return runtime.encode(texts, "document")


def encode_model(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """Encode texts as documents with sentence-transformers, (n, D) float32 unit rows."""
    (rows,) = model_encoder(model)(texts, "document").values()
    return rows


def _copy(source: Path, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(source, out)
