"""Measured costs of exact search and of scores: neighbour graphs, and the candidates of a ranking stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jasper_fast.config.rank import GRADES, RankStageConfig
from jasper_fast.teachers.reduction import Reduction
from jasper_fast.training.neighbours import neighbour_graph
from jasper_fast.training.rank_queries import RankQueries
from jasper_fast.training.ranking import mine, open_scorer

GRAPH_TURNS = 2  # of which the faster one counts
GRAPH_ROWS = 16_384  # rows of the neighbour graph that is measured; fewer are slower for each pair of rows
SAMPLE = 64  # queries, texts and pairs that are measured
WARM_UP = 8  # pairs that are scored before


class RankingCost(NamedTuple):
    """Cost of the candidates of a ranking stage's queries.

    Attributes:
        query: seconds to embed a query and its own documents, and to mine and score its candidates.
        queries: number of queries. 0: the stage ranks nothing.
        pairs: pairs that a cross-encoder scores for a query. 0: none does.
    """

    query: float = 0.0
    queries: int = 0
    pairs: int = 0


class RandomTeachers:
    """Random unit embeddings in place of the teachers', which need not exist yet.

    Args:
        width: the width of the teachers' embeddings.
    """

    fingerprint = "random"
    reduction: Reduction | None = None

    def __init__(self, width: int) -> None:
        self.width = width
        self.revisions: list[str | None] = []

    def read(self, rows: np.ndarray) -> Tensor:
        """Return unit embeddings of some texts, (B, width) float32."""
        generator = torch.Generator().manual_seed(len(rows))
        return torch.nn.functional.normalize(torch.randn(len(rows), self.width, generator=generator), dim=1)

    read_full = read


def graph_seconds(n: int, k: int, width: int) -> float:
    """Return the seconds of the neighbour graph of n rows: pairs of rows are scored, and each row's best are sorted.

    The first part grows with the square of n, the second one with n. Two sizes tell them apart.
    """
    teachers = RandomTeachers(width)

    def read(numbers: np.ndarray) -> np.ndarray:
        return teachers.read(numbers).numpy()

    def seconds(rows: int) -> float:
        times = []
        for _ in range(GRAPH_TURNS):
            started = time.perf_counter()
            neighbour_graph(read, rows, k)
            times.append(time.perf_counter() - started)
        return min(times)

    neighbour_graph(read, k, k)  # the first call is slow
    rows = max(k, min(n, GRAPH_ROWS))
    whole = seconds(rows)
    if n <= rows:
        return whole
    quadratic = min(max(2 * whole - 4 * seconds(rows // 2), 0.0), whole)
    return quadratic * (n / rows) ** 2 + (whole - quadratic) * n / rows


def query_seconds(
    rank: RankStageConfig,
    queries: RankQueries,
    texts: Any,
    embed: Callable[[list[str], list[str]], float],
    width: int,
    ranks: int = 1,
) -> RankingCost:
    """Measure what a query costs before the first step. Nothing counts as cached, so equal runs have equal plans.

    Args:
        rank: the settings of the stage.
        queries: its queries.
        texts: the training texts.
        embed: a function from texts and roles to the teachers' seconds per text.
        width: the width of the teachers' embeddings.
        ranks: the number of processes, which divide the scoring.

    Raises:
        JasperError: the cross-encoder cannot be used.
    """
    own = queries.trained + np.array(spread(range(len(queries.texts)), SAMPLE))
    seconds = embed(*queries.read(texts, own)) * len(queries.texts) / len(queries)
    documents = queries.documents
    if rank.targets != GRADES:
        seconds += _mining_seconds(len(documents), min(len(documents), rank.candidates), width)
    scorer = open_scorer(rank)
    pairs = min(rank.candidates, len(documents)) if scorer is not None else 0
    if scorer is not None:
        asked = queries.read(texts, queries.trained + np.array(spread(range(len(queries)), SAMPLE)))[0]
        found = queries.read(texts, np.array(spread(documents.tolist(), len(asked))))[0]
        sample = list(zip(asked, found, strict=False))
        scorer.scores(sample[:WARM_UP])
        started = time.perf_counter()
        scorer.scores(sample)
        seconds += pairs * (time.perf_counter() - started) / len(sample) / ranks
    return RankingCost(seconds, len(queries), pairs)


def _mining_seconds(documents: int, count: int, width: int) -> float:
    """Return the seconds of mining the candidates of one query. They grow with the number of documents."""
    rows = min(documents, GRAPH_ROWS)
    teachers = RandomTeachers(width)
    asked = teachers.read(np.arange(SAMPLE))
    started = time.perf_counter()
    mine(asked, teachers.read, np.arange(rows), rows, min(count, rows))
    return (time.perf_counter() - started) / len(asked) * documents / rows


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return up to ``count`` items that are spread evenly over all."""
    if len(items) <= count:
        return list(items)
    return [items[math.floor((i + 0.5) * len(items) / count)] for i in range(count)]
