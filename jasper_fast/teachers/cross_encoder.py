"""Score pairs of a query and a document with a cross-encoder: a PyTorch model or an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jasper_fast.models.graph import Arrays, TextGraph, find_graph, graph_revision
from jasper_fast.models.hub import CANNOT_LOAD, CUSTOM_CODE, model_revision, resolve_model
from jasper_fast.teachers.base import Progress
from jasper_fast.teachers.model import local_device, token_batches
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import settings_digest
from jasper_fast.utils.names import first_line

Pair = tuple[str, str]

BATCH_TOKENS = 8192  # padded tokens of a forward pass
TOKENIZED_AT_ONCE = 512  # pairs per call of the tokenizer
LOGITS = "logits"
PROBES = (("seven", "rivers"), ("how far did the water run", "the water of the seven rivers ran past the old road"))


class CrossEncoder:
    """A cross-encoder that is ready to score.

    Args:
        name: model, for messages.
        revision: identity of its files, or its commit on the hub.
        max_length: tokens after which a pair is cut, the longer text first.
        tokenize: function from pairs to arrays (n, tokens).
        forward: function from such arrays to the scores of n pairs, as (n,) or (n, 1).

    Attributes:
        name: model, for messages.
        identity: digest of the model's files and ``max_length``. Equal identities give equal scores.
        max_length: tokens after which a pair is cut.
    """

    def __init__(
        self,
        name: str,
        revision: str,
        max_length: int,
        tokenize: Callable[[Sequence[Pair]], Arrays],
        forward: Callable[[Arrays], np.ndarray],
    ) -> None:
        self.name, self.max_length = name, max_length
        self.identity = settings_digest({"revision": revision, "max_length": max_length}, size=16)
        self._tokenize, self._forward = tokenize, forward

    def scores(self, pairs: Sequence[Pair], progress: Progress | None = None) -> np.ndarray:
        """Score pairs of a query and a document.

        Args:
            pairs: n pairs (query, document), in any order.
            progress: function called after each batch with its numbers of pairs and tokens.

        Returns:
            (n,) float32 logits, in the order of the pairs. Higher is more relevant.

        Raises:
            JasperError: a score is not finite. The message names the pair.
        """
        chunks = (pairs[start : start + TOKENIZED_AT_ONCE] for start in range(0, len(pairs), TOKENIZED_AT_ONCE))
        lengths = np.concatenate([np.empty(0, np.int64), *map(self._lengths, chunks)])
        found = np.empty(len(pairs), np.float32)
        for batch in token_batches(lengths, BATCH_TOKENS):
            found[batch] = self._forward(self._tokenize([pairs[i] for i in batch])).reshape(len(batch))
            if progress is not None:
                progress(len(batch), int(lengths[batch].sum()))
        for bad in np.flatnonzero(~np.isfinite(found))[:1]:
            raise JasperError(
                f"{self.name}: the score of pair {bad} ({pairs[bad][0][:40]!r}, {pairs[bad][1][:40]!r}) is not finite. "
                "Fix: correct or remove the text, or copy the model again"
            )
        return found

    def _lengths(self, pairs: Sequence[Pair]) -> np.ndarray:
        return self._tokenize(pairs)["attention_mask"].sum(axis=1)


def open_cross_encoder(source: str, *, max_length: int = 256, trust_remote_code: bool = False) -> CrossEncoder:
    """Open a cross-encoder with one score for each pair.

    Args:
        source: folder with PyTorch weights or an ONNX graph and a tokenizer, ``FILE.onnx``, ``bundle:NAME``,
            ``package:import_name/folder``, or hub name. onnxruntime runs graphs.
        max_length: tokens after which a pair is cut, the longer text first. A lower limit of the model wins.
        trust_remote_code: permission to run code that comes with the model.

    Raises:
        JasperError: the model or a package is missing, a file is damaged, the model gives no single score, or its
            scores depend on other pairs.

    Example:
        >>> judge = open_cross_encoder("bundle:ms-marco-MiniLM-L-12-v2")  # doctest: +SKIP
        >>> judge.scores([("capital of France", "Paris is the capital of France.")])  # doctest: +SKIP
        array([8.9], dtype=float32)
    """
    graph = find_graph(source)
    if graph is not None:
        return _open_graph(source, graph, max_length, trust_remote_code)
    return _open_torch(source, max_length, trust_remote_code)


def _open_graph(source: str, file: Path, max_length: int, trust_remote_code: bool) -> CrossEncoder:
    graph = TextGraph(source, file, threads=torch.get_num_threads(), trust_remote_code=trust_remote_code)
    output = LOGITS if LOGITS in graph.outputs else next(iter(graph.outputs)) if len(graph.outputs) == 1 else None
    shape = graph.outputs.get(output, []) if output else []
    if output is None or len(shape) not in (1, 2) or (len(shape) == 2 and isinstance(shape[1], int) and shape[1] != 1):
        listed = ", ".join(f"{name} {shape}" for name, shape in graph.outputs.items())
        raise JasperError(
            f"{source}: the graph has no output with one score for each pair (got {listed}, expected {LOGITS} of shape "
            "(batch, 1)). Fix: give the graph of a cross-encoder with one label"
        )
    graph.probe(output, *PROBES)
    limit = min(max_length, graph.limit or max_length)
    return CrossEncoder(
        source,
        graph_revision(file),
        limit,
        lambda pairs: graph.tokenize(pairs, limit),
        lambda features: graph.run(features, output),
    )


def _open_torch(source: str, max_length: int, trust_remote_code: bool) -> CrossEncoder:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    where, revision = resolve_model(source), model_revision(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not revision.startswith("sha256:"):
        options["revision"] = revision
    try:
        settings = AutoConfig.from_pretrained(where, **options)
        _check_labels(source, settings)
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)
        model: Any = AutoModelForSequenceClassification.from_pretrained(where, dtype=torch.float32, **options)
    except CANNOT_LOAD as error:
        fix = CUSTOM_CODE if "trust_remote_code" in str(error) else "Fix: copy or download the model again"
        raise JasperError(f"{source}: cannot be loaded as a cross-encoder ({first_line(error)}). {fix}") from error
    model.eval().to(local_device())
    known = [tokenizer.model_max_length, getattr(settings, "max_position_embeddings", None)]
    limit = min([max_length, *(value for value in known if isinstance(value, int) and value > 0)])

    def tokenize(pairs: Sequence[Pair]) -> Arrays:
        queries, documents = zip(*pairs, strict=True)
        return tokenizer(
            list(queries), list(documents), padding=True, truncation=True, max_length=limit, return_tensors="np"
        )

    @torch.inference_mode()
    def forward(features: Arrays) -> np.ndarray:
        inputs = {key: torch.from_numpy(np.asarray(value)).to(model.device) for key, value in features.items()}
        return model(**inputs).logits.float().cpu().numpy()

    return CrossEncoder(source, revision, limit, tokenize, forward)


def _check_labels(source: str, settings: Any) -> None:
    architectures = getattr(settings, "architectures", None) or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures) or settings.num_labels != 1:
        raise JasperError(
            f"{source}: not a cross-encoder with one score (got {', '.join(architectures) or 'no architecture'} with "
            f"{settings.num_labels} labels, expected a ForSequenceClassification with 1 label). Fix: choose a "
            "reranker, such as bundle:ms-marco-MiniLM-L-12-v2"
        )
