"""Facts about student and teacher on this machine: sizes, speeds, and the lengths of the documents."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.adaptation.documents import Corpus
from jasper_fast.adaptation.embeddings import own_length
from jasper_fast.adaptation.request import Request
from jasper_fast.config.models import TeacherConfig
from jasper_fast.models.embedder import EncodeWidths, routes
from jasper_fast.models.folder import FACTS_FILE
from jasper_fast.models.hub import resolve_model
from jasper_fast.models.lengths import CHARACTERS_PER_TOKEN, SAMPLE, sample_evenly
from jasper_fast.models.sentence_transformer import transformers_of
from jasper_fast.teachers.model import Teacher
from jasper_fast.training.encoding import TEXTS, measure_speeds
from jasper_fast.utils.names import public_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

QUERIES = 12  # questions that are encoded one at a time
LONGEST = 4096  # tokens up to which a document is counted


def model_facts(name: str, width: int, model: SentenceTransformer | None) -> dict[str, Any]:
    """Return name, width, parameters and length of a model.

    Args:
        name: the model as given.
        width: coordinates of its embeddings.
        model: the loaded model. None: precomputed vectors.
    """
    facts: dict[str, Any] = {"name": public_name(name), "width": width, "vectors": model is None}
    if model is None:
        return facts | {"parameters": None, "max_length": None}
    return facts | {"parameters": sum(p.numel() for p in model.parameters()), "max_length": own_length(model)}


def width_of(model: SentenceTransformer) -> int:
    """Return the widest width of a loaded model."""
    heads = routes(model)[1]
    return max(heads) if heads else int(model.get_embedding_dimension() or 0)


def layers_of(student: str, teacher: TeacherConfig, loaded: SentenceTransformer | None) -> str | None:
    """Return how many of the teacher's layers a student has, such as "3 of 6". None: it is not made of them."""
    file = Path(resolve_model(student)).expanduser() / FACTS_FILE
    if loaded is None or teacher.model is None or not file.is_file():
        return None
    facts = json.loads(file.read_text(encoding="utf-8")).get("student", {})
    if facts.get("model") != public_name(teacher.model) or not isinstance(facts.get("layers"), list):
        return None
    depths = [getattr(module.model.config, "num_hidden_layers", None) for module in transformers_of(loaded)]
    return f"{len(facts['layers'])} of {depths[0]}" if depths and depths[0] else None


def token_counts(corpus: Corpus, model: Any) -> np.ndarray:
    """Count the tokens of a sample of the documents, not truncated at the model's length, (n,) int64.

    Args:
        corpus: the texts.
        model: the student, for its tokenizer. A model without one gets the numbers of words.
    """
    texts = sample_evenly(corpus.texts.select(range(corpus.documents)), SAMPLE)
    tokenizer = getattr(model, "tokenizer", None)
    if not callable(tokenizer):
        return np.array([len(text.split()) for text in texts], np.int64)
    cut = [text[: CHARACTERS_PER_TOKEN * LONGEST] for text in texts]
    found = tokenizer(cut, truncation=True, max_length=LONGEST, return_attention_mask=False, verbose=False)
    return np.array([len(ids) for ids in found["input_ids"]], np.int64)


def document_facts(
    request: Request, corpus: Corpus, counts: np.ndarray, max_length: int | None, earlier: int
) -> dict[str, Any]:
    """Return what became of the documents, and how long they are.

    Args:
        request: the call.
        corpus: the texts.
        counts: result of `token_counts`.
        max_length: tokens that the student reads. None: no limit.
        earlier: documents that earlier calls counted.
    """
    columns = request.source.columns
    facts = {
        "sources": [public_name(request.documents)],
        "columns": " + ".join(columns) if len(columns) > 1 else None,
        "read": corpus.counts.documents,
        "used": corpus.documents,
        "duplicates": corpus.counts.duplicates,
        "empty": corpus.counts.too_short,
        "short": corpus.one_word,
        "median_tokens": int(np.median(counts)),
        "longer": float((counts > max_length).mean()) if max_length else 0.0,
        "max_length": max_length,
    }
    return facts | ({"earlier": earlier} if earlier else {})


def speeds(
    student: EncodeWidths, teacher: Teacher | None, corpus: Corpus, counts: np.ndarray, length: int
) -> dict[str, Any]:
    """Measure how many documents and questions a second student and teacher encode.

    Args:
        student: function that encodes as the student.
        teacher: the teacher. None: precomputed vectors.
        corpus: the texts.
        counts: result of `token_counts`.
        length: tokens that the student reads.

    Returns:
        ``student`` and ``teacher`` (None for vectors) with ``documents_per_s`` and ``queries_per_s``, the number of
        ``texts`` and their ``mean_tokens``.
    """
    documents = corpus.texts[: min(TEXTS, corpus.documents)]["text"]
    asked = _questions(corpus)
    encoders: dict[str, Callable[..., Any]] = {"student": student}
    if teacher is not None:
        encoders["teacher"] = teacher.encode
    found, number = measure_speeds({name: partial(one, role="document") for name, one in encoders.items()}, documents)
    table: dict[str, Any] = {"student": None, "teacher": None}
    for name, one in encoders.items():
        table[name] = {"documents_per_s": round(found[name], 1), "queries_per_s": round(_queries(one, asked), 1)}
    return table | {"texts": number, "mean_tokens": round(float(np.minimum(counts, length).mean()), 1)}


def _questions(corpus: Corpus) -> list[str]:
    rows = corpus.asked if corpus.questions else range(corpus.held_out)
    return list(corpus.texts[rows.start : min(rows.stop, rows.start + QUERIES)]["text"])


def _queries(encode: Callable[[list[str], str], Any], questions: list[str]) -> float:
    """Return questions per second, one at a time: the inverse of the median time of one."""
    encode(questions[:1], "query")
    seconds = []
    for question in questions:
        began = time.perf_counter()
        encode([question], "query")
        seconds.append(time.perf_counter() - began)
    return 1.0 / max(statistics.median(seconds), 1e-6)
