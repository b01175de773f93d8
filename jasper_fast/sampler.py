"""Which rows make up which batch: a pure function of (seed, step), so a resumed run needs no loader state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

BatchPlan = Callable[[int], np.ndarray]  # stage step -> (B,) int64 rows


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, stage: int, epoch: int) -> np.ndarray:
    """The order of ``n`` rows in one epoch of one stage, (n,) int64."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stage, epoch]))).permutation(n)


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


def neighbour_batches(graph: np.ndarray, batch_size: int, seed: int, stage: int) -> BatchPlan:
    """Batches of whole neighbourhoods: seed rows in shuffled order, each followed by its nearest neighbours.

    A row that a batch already holds is replaced by the next seeds' rows, so that every batch has ``batch_size``
    distinct rows.

    Args:
        graph: (n, k) int; column 0 is the row itself, then its k − 1 nearest neighbours, nearest first.
        batch_size: rows per batch, a multiple of k and at most n.
        seed, stage: with the epoch, they determine the order of the seed rows.
    """
    n, k = graph.shape
    groups = batch_size // k
    if n < batch_size or not groups or batch_size % k:
        raise ValueError(f"a batch of {batch_size} cannot be made of groups of {k} from {n} rows")
    per_epoch = n // groups

    def rows(step: int) -> np.ndarray:
        epoch, position = divmod(step, per_epoch)
        order = permutation(n, seed, stage, epoch)
        seeds = np.roll(order, -position * groups)
        distinct = _first_distinct(graph[seeds[:groups]].ravel())
        if len(distinct) < batch_size:  # overlapping neighbourhoods: fill up with the seeds that come next
            distinct = _first_distinct(np.concatenate([distinct, seeds[groups : groups + 2 * batch_size], seeds]))
        return distinct[:batch_size]

    return rows


def neighbour_graph(vectors: Callable[[np.ndarray], np.ndarray], n: int, k: int, block: int = 16_384) -> np.ndarray:
    """The k nearest rows of every row by inner product of the teacher's vectors, the row itself first.

    Args:
        vectors: rows (int64) -> (rows, D) float32 unit vectors; asked for in blocks, n/block times over.
        n: number of rows.
        k: rows per neighbourhood, the row itself included.
        block: rows held in memory at once, twice (as queries and as corpus).

    Returns:
        (n, k) int32.
    """
    import torch

    from jasper_fast.mips.pieces import Piece
    from jasper_fast.mips.search import SCRATCH, search

    if n < k:
        raise ValueError(f"a neighbourhood of {k} needs at least {k} rows, got {n}")

    def block_at(start: int) -> torch.Tensor:
        return torch.as_tensor(vectors(np.arange(start, min(start + block, n)))).contiguous()

    def pieces() -> Iterator[tuple[int, Piece]]:
        return ((at, Piece(block_at(at))) for at in range(0, n, block))

    graph = np.empty((n, k), dtype=np.int32)
    for start in range(0, n, block):
        queries = block_at(start)
        found = search(pieces, n, queries, k, "certified", None, SCRATCH)[1].numpy()
        own = np.arange(start, start + len(queries))[:, None]
        # The row itself comes first, even where k of its duplicates have lower numbers.
        later = np.argsort(found == own, axis=1, kind="stable")[:, : k - 1]
        graph[start : start + len(queries)] = np.concatenate([own, np.take_along_axis(found, later, axis=1)], axis=1)
    return graph


def _first_distinct(rows: np.ndarray) -> np.ndarray:
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)].astype(np.int64)
