"""Compare maps from a new model into an old index on held-out pairs, and choose one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from jasper_fast.adaptation.migration.old_index import L2
from jasper_fast.fitting.agreement import DEPTH, Reference, mean_error
from jasper_fast.fitting.maps import low_rank_map, procrustes_map, ridge_map
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.mips import topk
from jasper_fast.models.embedder import normalise

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
RANK_STRENGTH = 1.0  # λ of the low-rank maps
FEWEST_QUESTIONS = 30  # titles from which they choose the map
TIE = 0.002  # nDCG@10 of titles; among maps within it of the best, the overlap decides
LEAST_ERRORS = 3.0  # standard errors above chance that a usable map's overlap needs
LEAST_OWN = 0.5  # fraction of documents whose own row a usable map finds. In trials with 200 pairs it was 0.97 or more


@dataclass(frozen=True)
class Corpus:
    """Rows of the old index that questions are compared with.

    Args:
        rows: (n, width) float32, as stored but divided by their mean length.
        metric: "inner product" or "L2".
    """

    rows: np.ndarray
    metric: str

    def documents(self) -> np.ndarray:
        """Return the rows in the form in which inner products rank as the metric does."""
        if self.metric != L2:
            return self.rows
        squares = (self.rows.astype(np.float64) ** 2).sum(axis=1, keepdims=True)
        return np.hstack([self.rows, -squares / 2]).astype(np.float32)

    def questions(self, questions: np.ndarray) -> np.ndarray:
        """Return questions in the same form."""
        if self.metric != L2:
            return questions
        return np.hstack([questions, np.ones((len(questions), 1), np.float32)])


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs and the corpus, to score maps.

    Args:
        documents: (m, h) float32 unit rows, the new model's embeddings of the held-out documents.
        questions: (q, h) float32 unit rows, those of titles or first sentences. q may be 0.
        owners: (q,) int64, document of each question: its number among the held-out documents.
        answers: (q,) int64, the same among all pairs.
        corpus: rows of the old index. The rows of the held-out documents are the first m.
        pair_rows: rows of the old index of all pairs, as the corpus.
        new_documents: (n, h) float32 unit rows, the new model's embeddings of the documents of all pairs.
    """

    documents: np.ndarray
    questions: np.ndarray
    owners: np.ndarray
    answers: np.ndarray
    corpus: Corpus
    pair_rows: Corpus
    new_documents: np.ndarray


@dataclass(frozen=True)
class MapScore:
    """Held-out scores of a map.

    Args:
        name: name of the map.
        overlap: mean fraction of the old index's ten nearest rows of a document that its mapped embedding finds.
        error: standard error of ``overlap``.
        own_row: fraction of documents whose own row is among the ten that their mapped embedding finds.
        answer: nDCG@10 of titles or first sentences that find their document in the corpus. None: there are none.
        kept: the same among the rows of all pairs, as a fraction of that of the new model in its own space.
    """

    name: str
    overlap: float
    error: float
    own_row: float
    answer: float | None
    kept: float | None


@dataclass(frozen=True)
class MapTable:
    """All scored maps.

    Args:
        rows: scores, in the order of the candidates.
        best: the chosen one.
        own: nDCG@10 of the titles among all pairs in the new model's own space. None: there are no titles.
        chance: overlap of a random order.
    """

    rows: list[MapScore]
    best: MapScore
    own: float | None
    chance: float

    @property
    def usable(self) -> bool:
        """Return True if the chosen map is clearly better than chance, and finds the own row of most documents."""
        margin = LEAST_ERRORS * max(self.best.error, 1e-6)
        return self.best.overlap - self.chance > margin and self.best.own_row >= LEAST_OWN

    def as_json(self) -> dict[str, object]:
        """Return the table as plain JSON."""
        return {"maps": list(map(asdict, self.rows)), "best": self.best.name, "own": self.own, "chance": self.chance}


def candidate_maps(statistics: PairStatistics) -> Iterator[tuple[str, np.ndarray]]:
    """Yield named maps (h, d): none, Procrustes, ridge towards it, and low-rank maps.

    Args:
        statistics: sums over pairs of the new model's embeddings and old rows, both of unit length.
    """
    width, target = statistics.cross.shape
    if width == target:
        yield "none", np.eye(width)
    start = procrustes_map(statistics)
    yield "Procrustes", start
    for strength in STRENGTHS:
        yield f"ridge, λ {strength:g}", ridge_map(statistics, strength, start)
    least = min(width, target)
    for rank in (least // 2, least // 4):
        if rank:
            yield f"rank {rank}, λ {RANK_STRENGTH:g}", low_rank_map(statistics, RANK_STRENGTH, rank)


def mapped(embeddings: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return embeddings (n, h) in the old space, (n, d) float32 unit rows."""
    return normalise(embeddings.astype(np.float64) @ matrix)


def compare_maps(statistics: PairStatistics, held: HeldOut) -> MapTable:
    """Score the candidates on held-out pairs, and choose one.

    The map whose titles find their document best is chosen, and of those within 0.002 the one with the highest overlap.
    Overlap alone favours maps that copy the errors of a weaker old model. With few titles it has to decide. Titles are
    compared with the whole corpus, because few pairs are easy to tell apart even in a wrong space.

    Args:
        statistics: sums over the other pairs.
        held: the held-out pairs.
    """
    documents, pair_rows = held.corpus.documents(), held.pair_rows.documents()
    count = len(held.documents)
    reference = Reference(held.corpus.questions(held.corpus.rows[:count]), documents)
    own = answer_ndcg(held.questions, held.new_documents, held.answers) if len(held.questions) else None
    rows = []
    for name, matrix in candidate_maps(statistics):
        moved = held.corpus.questions(mapped(held.documents, matrix))
        found = reference.measure(moved, documents)
        answer = kept = None
        if own is not None:
            questions = held.corpus.questions(mapped(held.questions, matrix))
            answer = answer_ndcg(questions, documents, held.owners)
            kept = answer_ndcg(questions, pair_rows, held.answers) / own if own else None
        own_row = float(_found(moved, documents, np.arange(count)).any(axis=1).mean())
        rows.append(MapScore(name, float(found.overlap.mean()), mean_error(found.overlap), own_row, answer, kept))
    return MapTable(rows, _best(rows, len(held.questions)), own, min(1.0, DEPTH / len(documents)))


def _best(rows: list[MapScore], questions: int) -> MapScore:
    found = [row.answer for row in rows if row.answer is not None]
    least = max(found) - TIE if questions >= FEWEST_QUESTIONS else -np.inf
    return max((row for row in rows if (row.answer or 0.0) >= least), key=lambda row: row.overlap)


def answer_ndcg(questions: np.ndarray, documents: np.ndarray, answers: np.ndarray) -> float:
    """Return the mean nDCG@10 of finding one right document.

    Args:
        questions: (q, w) float32.
        documents: (n, w) float32.
        answers: (q,) int64, row of the right document of each question.
    """
    found = _found(questions, documents, answers)
    return float((found @ (1 / np.log2(np.arange(2, found.shape[1] + 2)))).mean())


def _found(questions: np.ndarray, documents: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return where the right document is among the ten nearest of each question, (q, 10) bool."""
    _, ranked = topk(questions, documents, min(DEPTH, len(documents)))
    return ranked == answers[:, None]
