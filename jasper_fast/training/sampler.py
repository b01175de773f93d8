"""Rows of each batch, a pure function of seed and step, so that a resumed run needs no loader state."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from jasper_fast.config.run import Config
from jasper_fast.training.data import Teachers
from jasper_fast.training.neighbours import Graph, cached_graph
from jasper_fast.utils.errors import JasperError

BatchPlan = Callable[[int], np.ndarray]  # stage step -> (B,) int64 rows


def batch_plan(config: Config, index: int, source: Any, teachers: Teachers, log: Callable[[str], None]) -> BatchPlan:
    """Return the plan of a stage's batches.

    Args:
        config: the run's configuration.
        index: the stage's position in it.
        source: the training texts or images.
        teachers: the teacher embeddings, for batches of neighbours.
        log: a function that prints a line.

    Raises:
        JasperError: too few texts differ for a batch of neighbours.
    """
    stage = config.stages[index]
    n = min(len(source), stage.texts or len(source))
    if stage.max_chars is not None:
        short = rows_up_to(source, n, stage.max_chars)
        positions = random_batches(len(short), stage.batch_size, config.seed, index)
        return lambda step: short[positions(step)]
    if stage.batches == "random":
        return random_batches(n, stage.batch_size, config.seed, index)
    graph = cached_graph(config.data.cache, teachers, n, stage.neighbours, log)
    try:
        return neighbour_batches(graph, stage.batch_size, config.seed, index, stage.random_share)
    except ValueError as error:
        raise JasperError(
            f"stage {stage.name!r}: {error}. Fix: lower batch_size, give more text, or set batches: random"
        ) from None


def rows_up_to(texts: Any, n: int, max_chars: int) -> np.ndarray:
    """Return the rows among the first n texts that have at most ``max_chars`` characters, int64 ascending."""
    import pyarrow.compute as pc

    columns = texts.select_columns(["text"]).select(range(n)).with_format("arrow")
    lengths = [pc.utf8_length(part.column("text")).to_numpy() for part in columns.iter(65_536)]
    return np.flatnonzero(np.concatenate(lengths) <= max_chars) if lengths else np.zeros(0, np.int64)


@lru_cache(maxsize=4)
def permutation(n: int, *key: int) -> np.ndarray:
    """Return the order of ``n`` rows that belongs to a key (seed, stage, epoch, …), (n,) int64."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(n)


def random_batches(n: int, batch_size: int, seed: int, stage: int) -> BatchPlan:
    """Return batches of all rows in an order that every epoch shuffles, without the incomplete last batch of an epoch.

    Args:
        n: the number of rows.
        batch_size: rows per batch, at most ``n``.
        seed: the run's seed.
        stage: the stage's index.

    Raises:
        ValueError: a batch has more than ``n`` rows.
    """
    per_epoch = n // batch_size
    if per_epoch == 0:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from {n} rows")

    def rows(step: int) -> np.ndarray:
        epoch, position = divmod(step, per_epoch)
        return permutation(n, seed, stage, epoch)[position * batch_size : (position + 1) * batch_size]

    return rows


def neighbour_batches(graph: Graph, batch_size: int, seed: int, stage: int, random_share: float = 0.0) -> BatchPlan:
    """Return batches of whole neighbourhoods: seed rows in shuffled order, each followed by its nearest neighbours.

    A batch has at most one of the texts that are near-duplicates of each other. Rows in another shuffled order fill
    the ``random_share``, and places that are free because neighbourhoods overlap.

    Args:
        graph: the neighbour graph of n rows, k per neighbourhood.
        batch_size: rows per batch.
        seed: the run's seed.
        stage: the stage's index.
        random_share: the fraction of a batch that is drawn at random, from 0 to below 1.

    Raises:
        ValueError: no whole neighbourhood fits into a batch, or too few rows are left without near-duplicates.
    """
    n, k = graph.nearest.shape
    groups = round((1.0 - random_share) * batch_size) // k
    if not groups:
        raise ValueError(
            f"a batch of {batch_size}, {random_share:.0%} of it random, holds no neighbourhood of {k} texts"
        )
    distinct = len(np.unique(graph.copies))
    if distinct < batch_size:
        raise ValueError(
            f"a batch of {batch_size} cannot be filled: of {n} texts only {distinct} differ when near-duplicates count "
            "as one"
        )
    per_epoch = n // groups

    def rows(step: int) -> np.ndarray:
        epoch, position = divmod(step, per_epoch)
        seeds = permutation(n, seed, stage, epoch)[position * groups : (position + 1) * groups]
        mined = graph.nearest[seeds].ravel()
        chosen = _one_of_copies(mined[mined >= 0], graph.copies)
        others, taken = permutation(n, seed, stage, epoch, 1), 2 * batch_size
        start = position * batch_size % n
        while len(chosen) < batch_size:  # one pass, unless there are many copies
            more = others.take(range(start, start + min(taken, n)), mode="wrap")
            chosen = _one_of_copies(np.concatenate([chosen, more]), graph.copies)
            taken *= 4
        return chosen[:batch_size].astype(np.int64)

    return rows


def _one_of_copies(rows: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Return the rows in their order, without near-duplicates of earlier ones."""
    _, first = np.unique(copies[rows], return_index=True)
    return rows[np.sort(first)]
