"""Candidates of a ranking stage's queries, mined by exact search, and their scores."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.config.rank import GRADES, RankStageConfig
from jasper_fast.mips.segment import Segment
from jasper_fast.mips.top_k import SCRATCH, search
from jasper_fast.teachers.cross_encoder import CrossEncoder, open_cross_encoder
from jasper_fast.teachers.label import label_dataset
from jasper_fast.teachers.score_cache import Score, ScoreCache
from jasper_fast.training.data import Teachers
from jasper_fast.training.rank_queries import RankQueries
from jasper_fast.training.run.progress import duration
from jasper_fast.utils.atomic import locked, write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import settings_digest

if TYPE_CHECKING:
    from jasper_fast.training.run.run import Run

BLOCK = 16_384  # documents, and queries, in memory at once while candidates are mined
SCORED = 256  # queries whose candidates' embeddings are in memory at once

Read = Callable[[np.ndarray], Tensor]  # (B,) int64 rows -> (B, D) float32 unit rows


class Candidates(NamedTuple):
    """Candidates of some queries.

    Attributes:
        rows: (U, K) int64, the documents. -1: no candidate.
        scores: (U, K) float32. That of a missing candidate has no meaning.
        positives: (U,) int64, the column of the document that answers the query. -1: none is known to.
    """

    rows: np.ndarray
    scores: np.ndarray
    positives: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """Candidates of the queries that a stage reads, and the targets of all its texts.

    Args:
        queries: all queries of the stage.
        labels: the teachers' embeddings of the training texts.
        used: (U,) int64, ascending. The queries that the stage reads.
        candidates: their candidates.
        own: (E,) int64, ascending. The rows of own texts with an embedding.
        vectors: (E, D) float32, the teachers' own embeddings of these.
    """

    queries: RankQueries
    labels: Teachers
    used: np.ndarray
    candidates: Candidates
    own: np.ndarray
    vectors: Tensor

    def of(self, queries: np.ndarray) -> Candidates:
        """Return the candidates of queries that the stage reads."""
        at = np.searchsorted(self.used, queries)
        return Candidates(*(part[at] for part in self.candidates))

    def targets(self, rows: np.ndarray) -> Tensor:
        """Return the target embeddings of texts, (B, width) float32 unit rows."""
        reduction = self.labels.reduction

        def reduced(own: Tensor) -> Tensor:
            return own if reduction is None else F.normalize(own @ torch.from_numpy(reduction.matrix), dim=1)

        return _read(rows, self.queries.trained, self.labels.read, lambda own: reduced(self._own(own)))

    def _own(self, rows: np.ndarray) -> Tensor:
        return self.vectors[torch.from_numpy(np.searchsorted(self.own, rows))]


def make_ranking(
    run: Run, name: str, rank: RankStageConfig, queries: RankQueries, texts: Any, labels: Teachers, used: np.ndarray
) -> Ranking:
    """Embed, mine and score what a stage reads. All ranks must call it.

    Embeddings, candidates and the scores of a cross-encoder are cached, so an interrupted or resumed run repeats
    little. The first rank embeds and mines, and all divide the cross-encoder's work.

    Args:
        run: the run.
        name: the stage's name.
        rank: its settings.
        queries: its queries.
        texts: the training texts.
        labels: the teachers' embeddings of these.
        used: (U,) int64, ascending. The queries that the stage reads.

    Raises:
        JasperError: the teachers have no embedding of a text, or a text cannot be scored.
        Stopped: a signal asked to stop.
    """
    started = time.perf_counter()
    own, vectors = run.ranks.main_first(lambda: _embed_own(run, name, rank, queries, used))
    embedded = time.perf_counter()

    def full(rows: np.ndarray) -> Tensor:
        return _read(rows, queries.trained, labels.read_full, lambda of: vectors[np.searchsorted(own, of)])

    rows = run.ranks.main_first(lambda: _cached_rows(run.config.data.cache, labels, rank, queries, used, full))
    mined = time.perf_counter()
    scores = _scores(run, name, rank, queries, texts, used, rows, full)
    ended = time.perf_counter()
    parts = {"embedding": embedded - started, "mining": mined - embedded, "scoring": ended - mined}
    run.log.event("ranking", stage=name, queries=len(used), seconds=ended - started, **parts)
    listed = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts.items())
    run.log.info(f"stage {name}: {len(used):,} queries with {int((rows >= 0).sum()):,} candidates are ready ({listed})")
    positives = _positives(rank, queries, used, rows, scores)
    return Ranking(queries, labels, used, Candidates(rows, scores, positives), own, vectors)


def random_ranking(rank: RankStageConfig, queries: RankQueries, labels: Teachers, used: np.ndarray) -> Ranking:
    """Return random candidates and embeddings in place of real ones, to measure the speed of steps."""
    generator, count = np.random.default_rng(0), min(rank.candidates, len(queries.documents))
    rows = queries.documents[generator.integers(len(queries.documents), size=(len(used), count))]
    own = queries.trained + used
    candidates = Candidates(rows, generator.random(rows.shape, np.float32), np.zeros(len(used), np.int64))
    return Ranking(queries, labels, used, candidates, own, labels.read_full(np.arange(len(own))))


def mine(queries: Tensor, documents: Read, rows: np.ndarray, total: int, count: int) -> np.ndarray:
    """Return the documents with the highest inner products, by exact search.

    Args:
        queries: (U, D) float32.
        documents: a function that reads the embeddings of rows.
        rows: (N,) int64, ascending. The rows that are documents.
        total: rows up to the last document.
        count: number of documents for each query.

    Returns:
        (U, count) int64 rows, best first. -1: there are fewer documents.
    """
    valid = None if len(rows) == total else torch.from_numpy(np.isin(np.arange(total), rows))

    def pieces() -> Iterator[tuple[int, Segment]]:
        for start in range(0, total, BLOCK):
            yield start, Segment(documents(np.arange(start, min(start + BLOCK, total))).contiguous())

    found = []
    for start in range(0, len(queries), BLOCK):
        part = queries[start : start + BLOCK].contiguous()
        found.append(search(pieces, total, part, count, "certified", valid, SCRATCH)[1].numpy())
    return np.concatenate(found) if found else np.empty((0, count), np.int64)


def open_scorer(rank: RankStageConfig) -> CrossEncoder | None:
    """Open the cross-encoder of a stage. None: its targets need none.

    Raises:
        JasperError: it cannot be used.
    """
    if rank.cross_encoder is None:
        return None
    return open_cross_encoder(rank.cross_encoder, max_length=rank.max_length, trust_remote_code=rank.trust_remote_code)


@lru_cache(maxsize=4)
def scorer_identity(rank: RankStageConfig) -> str | None:
    """Return the identity of a stage's cross-encoder, which is opened once for it. None: the targets need none.

    Raises:
        JasperError: it cannot be used.
    """
    scorer = open_scorer(rank)
    return None if scorer is None else scorer.identity


def _read(rows: np.ndarray, trained: int, read: Read, read_own: Read) -> Tensor:
    """Return embeddings of training texts and own texts, (B, D) float32."""
    own = rows >= trained
    if not own.any():
        return read(rows)
    if own.all():
        return read_own(rows)
    parts = torch.cat([read(rows[~own]), read_own(rows[own])])
    order = np.concatenate([np.flatnonzero(~own), np.flatnonzero(own)])
    return parts[torch.from_numpy(np.argsort(order))]


def _embed_own(
    run: Run, name: str, rank: RankStageConfig, queries: RankQueries, used: np.ndarray
) -> tuple[np.ndarray, Tensor]:
    """Return the rows of the own texts that the stage reads, and the teachers' embeddings of them."""
    listed = np.concatenate([queries.sources[used], queries.listed[used].ravel()])
    own = np.unique(np.concatenate([queries.trained + used, listed[listed >= queries.trained]]))
    labels = label_dataset(run.config, queries.texts.select(own - queries.trained), progress=run.ranks.is_main)
    if labels.missing:
        raise JasperError(
            f"stage {name!r}: the teachers' `vectors` lack {labels.missing:,} of {len(own):,} texts of its queries. "
            "Fix: use a teacher with `model`, or add the embeddings of the queries and their candidates"
        )
    return own, labels.embeddings


def _cached_rows(
    cache: str, labels: Teachers, rank: RankStageConfig, queries: RankQueries, used: np.ndarray, full: Read
) -> np.ndarray:
    """Return the candidates of the used queries, (U, K) int64, from the cache if it has them."""
    count = rank.candidates
    key = settings_digest([labels.fingerprint, queries.fingerprint, count, rank.targets == GRADES, used.tolist()])
    file = Path(cache).expanduser() / f"candidates-{key}.npy"
    with locked(file):
        try:
            return np.load(file)
        except (OSError, ValueError, EOFError):  # it is missing or damaged
            rows = _candidate_rows(rank, queries, used, full)
            buffer = io.BytesIO()
            np.save(buffer, rows)
            write_atomic(file, buffer.getvalue())
            return rows


def _candidate_rows(rank: RankStageConfig, queries: RankQueries, used: np.ndarray, full: Read) -> np.ndarray:
    """Return the source document, the listed candidates and the mined ones of each query, up to K of them."""
    listed = np.concatenate([queries.sources[used][:, None], queries.listed[used]], axis=1)
    if rank.targets == GRADES:  # an ungraded document may be a right answer
        mined = np.empty((len(used), 0), np.int64)
    else:
        documents = queries.documents
        count = min(len(documents), rank.candidates + listed.shape[1] + 1)  # some may be listed, and one barred
        mined = mine(full(queries.trained + used), full, documents, int(documents[-1]) + 1, count)
    rows = np.full((len(used), rank.candidates), -1, np.int64)
    for place, (first, rest, barred) in enumerate(zip(listed, mined, queries.barred[used], strict=True)):
        chosen = dict.fromkeys([*first.tolist(), *(row for row in rest.tolist() if row != barred)])
        chosen.pop(-1, None)
        found = list(chosen)[: rank.candidates]
        rows[place, : len(found)] = found
    return rows


def _scores(
    run: Run,
    name: str,
    rank: RankStageConfig,
    queries: RankQueries,
    texts: Any,
    used: np.ndarray,
    rows: np.ndarray,
    full: Read,
) -> np.ndarray:
    """Return the scores of the candidates, (U, K) float32. Those of missing ones are 0."""
    scores = np.zeros(rows.shape, np.float32)
    there = rows >= 0
    if rank.targets == GRADES:
        grades = queries.grades[used][:, : rows.shape[1]]
        scores[:, : grades.shape[1]] = np.nan_to_num(grades)
        return scores
    if rank.cross_encoder is None:
        for start in range(0, len(used), SCORED):
            part = slice(start, start + SCORED)
            of_part = np.where(there[part], rows[part], queries.trained + used[part, None])
            documents = full(of_part.ravel()).view(*of_part.shape, -1)
            scores[part] = torch.einsum("ukd,ud->uk", documents, full(queries.trained + used[part])).numpy()
        return scores
    pairs = _pairs(queries, texts, used, rows)
    cache = ScoreCache(run.config.data.cache, rank.cross_encoder, str(scorer_identity(rank)))

    def opened() -> Score:
        scorer = open_scorer(rank)
        assert scorer is not None
        run.log.info(f"stage {name}: scoring by {scorer.name} what the cache lacks of {len(pairs):,} pairs")
        return scorer.scores

    count = run.count_pooled(name, "scoring", "pairs")
    scores[there] = cache.scores(pairs, opened, count, run.ranks, run.log.info)
    return scores


def _pairs(queries: RankQueries, texts: Any, used: np.ndarray, rows: np.ndarray) -> list[tuple[str, str]]:
    """Return the texts of each query with each of its candidates, row by row."""
    there = rows >= 0
    distinct, places = np.unique(rows[there], return_inverse=True)
    documents = queries.read(texts, distinct)[0]
    asked = queries.read(texts, queries.trained + used)[0]
    of_query = np.nonzero(there)[0].tolist()
    return [(asked[query], documents[place]) for query, place in zip(of_query, places.tolist(), strict=True)]


def _positives(
    rank: RankStageConfig, queries: RankQueries, used: np.ndarray, rows: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """Return the column of each query's right answer: the source, the best grade above 0, or the highest score."""
    there = rows >= 0
    best = np.where(there, scores, -np.inf).argmax(axis=1)
    positives = np.where(there.any(axis=1), best, -1)
    grades = queries.grades[used][:, : rows.shape[1]]
    graded = ~np.isnan(grades).all(axis=1) if grades.shape[1] else np.zeros(len(used), bool)
    if graded.any():
        positives[graded] = np.where(np.nan_to_num(grades[graded][:, 0]) > 0, 0, -1)  # the best grade comes first
    positives[queries.sources[used] >= 0] = 0
    return positives
