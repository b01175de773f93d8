"""Which rows make up which batch: a pure function of (seed, step), so a resumed run needs no loader state."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from jasper_fast.neighbours import Graph

BatchPlan = Callable[[int], np.ndarray]  # stage step -> (B,) int64 rows


@lru_cache(maxsize=4)
def permutation(n: int, *key: int) -> np.ndarray:
    """The order of ``n`` rows that a key (seed, stage, epoch, …) stands for, (n,) int64."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(n)


def random_batches(n: int, batch_size: int, seed: int, stage: int) -> BatchPlan:
    """Every epoch shuffles all rows and deals them out in batches; the incomplete rest of an epoch is left out.

    Args:
        n: rows to draw from.
        batch_size: rows per batch, at most ``n``.
        seed, stage: with the epoch, they determine the order.
    """
    per_epoch = n // batch_size
    if per_epoch == 0:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from {n} rows")

    def rows(step: int) -> np.ndarray:
        epoch, position = divmod(step, per_epoch)
        return permutation(n, seed, stage, epoch)[position * batch_size : (position + 1) * batch_size]

    return rows


def neighbour_batches(graph: Graph, batch_size: int, seed: int, stage: int, random_share: float = 0.0) -> BatchPlan:
    """Batches of whole neighbourhoods: seed rows in shuffled order, each followed by its nearest neighbours.

    A batch holds at most one of texts that are near-duplicates of each other. What is missing where neighbourhoods
    overlap, and the ``random_share``, are rows in another shuffled order.

    Args:
        graph: of n rows, k per neighbourhood.
        batch_size: rows per batch.
        seed, stage: with the epoch, they determine both orders.
        random_share: of the batch, from 0 to below 1.

    Raises:
        ValueError: no whole neighbourhood fits in, or too few rows are left when near-duplicates count once.
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
        while len(chosen) < batch_size:  # once, unless copies abound
            more = others.take(range(start, start + min(taken, n)), mode="wrap")
            chosen = _one_of_copies(np.concatenate([chosen, more]), graph.copies)
            taken *= 4
        return chosen[:batch_size].astype(np.int64)

    return rows


def _one_of_copies(rows: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """The rows in their order, each group of near-duplicates by its first one."""
    _, first = np.unique(copies[rows], return_index=True)
    return rows[np.sort(first)]
