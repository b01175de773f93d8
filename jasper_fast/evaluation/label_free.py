"""Scores without labels: how much of the teacher's order of held-out documents a student keeps.

A document's neighbours are the other held-out documents with the highest cosines. ``overlap`` is the fraction of the
teacher's ten neighbours that the student shares, ``spearman`` the rank correlation of all cosines. If documents have
queries, such as titles, ``ndcg`` is the nDCG@10 of finding the rest of the document by its query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jasper_fast.data.eval_pairs import pair_set
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.evaluation.metrics import score_codes
from jasper_fast.evaluation.quantized import quantize_groups
from jasper_fast.evaluation.score import (
    BEFORE,
    DOCUMENTS_BY_TEACHER,
    SOURCES,
    STUDENT,
    STUDENT_PCA,
    TEACHER,
    Reduce,
    Row,
    embed,
)
from jasper_fast.models.embedder import EncodeWidths
from jasper_fast.utils.errors import JasperError

NEIGHBOURS = 10
MIN_DOCUMENTS = 2 * NEIGHBOURS + 1  # among fewer documents, random neighbours would share half of the teacher's
CODES = ("float32", "int8", "ubinary")


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents, and the queries of some of them.

    Args:
        texts: the documents, without duplicates.
        questions: the set "query → rest of the document". None: no document has a query.
    """

    texts: list[str]
    questions: RetrievalSet | None = None

    @classmethod
    def of(cls, rows: Mapping[str, Sequence[str]]) -> HeldOut:
        """Take the documents from columns ``text``, and optionally ``query`` and ``body``.

        A repeated text counts once. An empty query or body means that the document has no query.

        Args:
            rows: the cells by column, each column of the same length.
        """
        texts = list(rows["text"])
        empty = [""] * len(texts)
        queries, bodies = list(rows.get("query", empty)), list(rows.get("body", empty))
        first = {text: at for at, text in reversed([*enumerate(texts)])}
        kept = sorted(first.values())
        asked = [at for at in kept if queries[at].strip() and bodies[at].strip()]
        questions = pair_set("held out", [queries[at] for at in asked], [bodies[at] for at in asked])
        return cls([texts[at] for at in kept], questions if asked else None)


_Embedded = tuple[np.ndarray, Mapping[str, np.ndarray] | None]  # documents, and the groups of the questions


@dataclass
class _Scorer:
    """The teacher's neighbours and cosines, and the overlap of every scored model by document."""

    wanted: np.ndarray  # (n, n) float64: weights of the teacher's neighbours
    cosines: np.ndarray  # (n, n) float64: the teacher's cosines
    questions: RetrievalSet | None
    overlaps: dict[tuple[str, int, str], np.ndarray] = field(default_factory=dict)  # (n,) by model, width, precision
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        model: str,
        width: int,
        vectors: np.ndarray,
        asked: Mapping[str, np.ndarray] | None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
    ) -> None:
        codes = vectors if precision == "float32" else quantize_groups({"": vectors}, precision, ranges)[""]
        similarities = cosines(codes)
        overlap = (neighbour_weights(similarities) * self.wanted).sum(axis=1) / NEIGHBOURS
        self.overlaps[model, width, precision] = overlap
        row = {"model": model, "width": width, **({"precision": precision} if precision != "float32" else {})}
        row |= {"overlap": float(overlap.mean()), "overlap_error": standard_error(overlap)}
        row["spearman"] = pair_correlation(similarities, self.cosines)
        if asked is not None and self.questions is not None:
            row["ndcg"] = score_codes(self.questions, asked, precision, ranges)["nDCG@10"]
        self.rows.append(row)

    def add_asymmetric(self, student: _Embedded, teacher: _Embedded) -> None:
        """Add the row of the student's embeddings as queries among the teacher's documents, if the widths agree."""
        (vectors, asked), (documents, answers) = student, teacher
        if vectors.shape != documents.shape:
            return
        overlap = (neighbour_weights(cosines(vectors, documents)) * self.wanted).sum(axis=1) / NEIGHBOURS
        row = {"model": DOCUMENTS_BY_TEACHER, "width": vectors.shape[1]}
        row |= {"overlap": float(overlap.mean()), "overlap_error": standard_error(overlap)}
        if asked is not None and answers is not None and self.questions is not None:
            groups = {"queries": asked["queries"], "documents": answers["documents"]}
            row["ndcg"] = score_codes(self.questions, groups, "float32")["nDCG@10"]
        self.rows.append(row)


def score_held_out(
    held_out: HeldOut,
    teacher: np.ndarray,
    encoders: Mapping[str, EncodeWidths],
    floors: Mapping[str, Mapping[int, Reduce]] | None = None,
    ranges: Mapping[int, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Compute the label-free scores of a student, with those of its floors.

    Args:
        held_out: the held-out documents.
        teacher: (n, D) float32 teacher embeddings of ``held_out.texts``.
        encoders: encode functions of the models "student before" and "student", and of the teacher for its nDCG, if it
            can encode.
        floors: {floor: {width: reduce}} as for ``score_rows``. "teacher PCA" reduces ``teacher``, "student PCA" the
            student's widest embeddings.
        ranges: (2, width) ranges of the student's int8 codes by width. Without them, the documents give the ranges.

    Returns:
        ``documents``, ``queries`` (their numbers), ``neighbours`` (10), ``chance`` (the overlap of a random order),
        ``rows`` and ``differences``. A row has ``model``, ``width``, ``precision`` unless it is float32, ``overlap``
        with its standard error ``overlap_error``, ``spearman``, and ``ndcg`` if there are queries. The teacher's row
        has only ``ndcg``. The row of the model "documents by teacher" has no ``spearman``. It is missing if the
        student's widest embeddings and the teacher's differ in width. Differences are paired over documents, see
        :func:`_differences`. With fewer than 21 documents there are only their numbers and ``missing``, the reason.

    Raises:
        JasperError: an embedding contains NaN or infinity.
    """
    count, questions = len(held_out.texts), held_out.questions
    sizes = {"documents": count, "queries": len(questions.queries) if questions else 0}
    if count < MIN_DOCUMENTS:
        reason = f"too few held-out documents (got {count}, expected at least {MIN_DOCUMENTS})"
        return sizes | {
            "missing": f"{reason}. At most a tenth is held out, so give {10 * MIN_DOCUMENTS} documents or more"
        }
    _check("teacher", teacher)
    similarities = cosines(teacher)
    scorer = _Scorer(neighbour_weights(similarities), similarities, questions)
    reduced: dict[str, _Embedded] = {TEACHER: (teacher, None)}
    for model, encode in encoders.items():
        asked = embed(questions, encode) if questions else {}
        if model == TEACHER:
            for width, embedded in asked.items():
                assert questions is not None
                ndcg = score_codes(questions, embedded, "float32")["nDCG@10"]
                scorer.rows.append({"model": TEACHER, "width": width, "ndcg": ndcg})
                reduced[TEACHER] = (teacher, embedded)
            continue
        by_width = dict(sorted(encode(held_out.texts, "document").items(), reverse=True))
        for width, vectors in by_width.items():
            _check(model, vectors)
            for precision in CODES if model == STUDENT else CODES[:1]:
                scorer.add(model, width, vectors, asked.get(width), precision, (ranges or {}).get(width))
        reduced[model] = (by_width[max(by_width)], asked.get(max(by_width)))
    if STUDENT in reduced:
        scorer.add_asymmetric(reduced[STUDENT], reduced[TEACHER])
    for floor, reduces in (floors or {}).items():
        vectors, groups = reduced[SOURCES[floor]]
        for width, reduce in reduces.items():
            asked_floor = {name: reduce(part) for name, part in groups.items()} if groups is not None else None
            scorer.add(floor, width, reduce(vectors), asked_floor)
    return sizes | {
        "neighbours": NEIGHBOURS,
        "chance": NEIGHBOURS / (count - 1),
        "rows": scorer.rows,
        "differences": _differences(scorer.overlaps),
    }


def cosines(vectors: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Return all cosines of the rows, (n, m) float64. Equal codes give exactly equal cosines. A zero row gives 0.

    Args:
        vectors: (n, D) embeddings or codes.
        others: (m, D) embeddings or codes to compare with. None: ``vectors``.
    """
    left = vectors.astype(np.float64)
    right = left if others is None else others.astype(np.float64)
    lengths = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
    return (left @ right.T) / np.maximum(lengths, 1e-300)


def neighbour_weights(similarities: np.ndarray, count: int = NEIGHBOURS, own: bool = True) -> np.ndarray:
    """Weigh the nearest neighbours of each row: 1 for a neighbour, and 0 for others.

    Rows that tie for the last places share them evenly, so the overlap does not depend on the order of the documents.

    Args:
        similarities: (n, m) similarities, with m > ``count``.
        count: number of neighbours.
        own: whether column i is row i itself, which is no neighbour.

    Returns:
        (n, m) float64. Each row sums to ``count``.
    """
    others = similarities.copy()
    if own:
        np.fill_diagonal(others, -np.inf)
    last = np.partition(others, -count, axis=1)[:, -count, None]
    above, tied = others > last, others == last
    places = count - above.sum(axis=1, keepdims=True)
    return above + tied * (places / tied.sum(axis=1, keepdims=True))


def pair_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Return Spearman's correlation of two matrices over all pairs of different rows, 0 if one is constant.

    Args:
        left: (n, n) similarities.
        right: (n, n) similarities.
    """
    from scipy.stats import spearmanr

    pairs = np.triu_indices(len(left), 1)
    if np.ptp(left[pairs]) == 0 or np.ptp(right[pairs]) == 0:
        return 0.0
    return float(spearmanr(left[pairs], right[pairs]).statistic)


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of at least two values.

    Args:
        values: (n,) values.
    """
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _differences(overlaps: Mapping[tuple[str, int, str], np.ndarray]) -> list[dict[str, Any]]:
    """Compare the student's float32 heads, paired over documents.

    Each entry has ``width``, ``to``, the mean ``difference`` in overlap, and its standard ``error``. ``to`` is "student
    before" for the widest head, and "widest" or "student PCA" for the others.
    """
    heads = {width: by for (model, width, form), by in overlaps.items() if model == STUDENT and form == "float32"}
    before = {width: by for (model, width, _), by in overlaps.items() if model == BEFORE}
    widest = max(heads, default=0)
    pairs = [(widest, BEFORE, before[max(before)])] if heads and before else []
    for width in sorted(heads, reverse=True)[1:]:
        pairs.append((width, "widest", heads[widest]))
        if (reference := overlaps.get((STUDENT_PCA, width, "float32"))) is not None:
            pairs.append((width, STUDENT_PCA, reference))
    return [
        {
            "width": width,
            "to": name,
            "difference": float((heads[width] - reference).mean()),
            "error": standard_error(heads[width] - reference),
        }
        for width, name, reference in pairs
    ]


def _check(model: str, vectors: np.ndarray) -> None:
    if bad := int((~np.isfinite(vectors).all(axis=1)).sum()):
        raise JasperError(
            f"held-out documents: {bad} of {len(vectors)} embeddings of the {model} contain NaN or infinity. "
            "Fix: check the model, or evaluate it in float32"
        )
