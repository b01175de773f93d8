"""Matryoshka funnel: a shortlist by narrow vectors, ranked again by the wide ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.index import FlatIPIndex
from jasper_fast.mips.inputs import QUERIES, as_tensor, check_rows
from jasper_fast.mips.scan import Queries
from jasper_fast.mips.signs import SignIndex
from jasper_fast.mips.state import State


def funnel(
    narrow_queries: Any,
    wide_queries: Any,
    narrow: FlatIPIndex | SignIndex,
    wide: FlatIPIndex,
    k: int,
    *,
    shortlist: int,
) -> tuple[Any, Any]:
    """The k best of a shortlist: found with narrow vectors, ranked by exact products of the wide ones.

    Args:
        narrow_queries: (Q, narrow.dim) tensor or array.
        wide_queries: (Q, wide.dim) of the same questions; its kind is the results' kind.
        narrow: the narrow vectors of a corpus; dtype "int8" makes a small shortlist index, a `SignIndex` the smallest.
        wide: the wide vectors of the same corpus, in the same order.
        k: how many, at most ``shortlist``.
        shortlist: rows per query that the narrow vectors choose; more cost time and give recall.

    Returns:
        scores (Q, k) float32 by the wide vectors and ids (Q, k), best first, ties by the lower id.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if len(narrow) != len(wide):
        raise ValueError(f"the narrow index holds {len(narrow)} rows and the wide one {len(wide)}; both need the same")
    if not 1 <= k <= shortlist:
        raise ValueError(f"k must be from 1 to the shortlist's length, {shortlist}; got {k}")
    asked = as_tensor(wide_queries, "wide_queries")
    check_rows(asked, "wide_queries", QUERIES)
    if asked.shape[1] != wide.dim:
        raise ValueError(f"wide_queries have width {asked.shape[1]}, the wide index {wide.dim}")
    length = min(shortlist, len(narrow))
    if isinstance(narrow, SignIndex):
        chosen = narrow.search(narrow_queries, length)[1]
    else:
        chosen = narrow.search(narrow_queries, length, precision="fast")[1]
    ids = torch.as_tensor(chosen)
    if len(ids) != len(asked):
        raise ValueError(f"{len(ids)} narrow queries and {len(asked)} wide ones; both need the same")
    bad = (~asked.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(f"wide_queries: row {int(bad[0])} holds NaN or infinity")
    scores, best = _rank(Queries.of(asked.to(wide.device)), ids.to(wide.device), wide, k)
    scores, best = scores.to(asked.device), best.to(asked.device)
    return (scores, best) if isinstance(wide_queries, Tensor) else (scores.numpy(), best.numpy())


def funnel_recall(found: Any, wide_queries: Any, wide: FlatIPIndex) -> float:
    """The share of the full-width top k that a funnel found; of an index of fewer than k rows, of all of them.

    Args:
        found: (Q, k) ids from ``funnel``.
        wide_queries: as given there.
        wide: as given there.
    """
    if not len(wide):
        return 1.0
    ids = np.asarray(found)
    _, expected = wide.search(wide_queries, ids.shape[1])
    there = np.asarray(expected)[:, : len(wide)]  # the rest is filled up with -1
    return float(np.mean([np.isin(full, own).mean() for full, own in zip(there, ids, strict=True)]))


def _rank(queries: Queries, ids: Tensor, wide: FlatIPIndex, k: int) -> tuple[Tensor, Tensor]:
    state = State(len(queries), k, ids.device)
    query = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids).reshape(-1)
    numbers = ids.reshape(-1)
    chunk = max(1, wide.scratch // (3 * 8 * wide.dim))  # pairs scored at once
    for first, piece in wide.pieces():
        inside = ((numbers >= first) & (numbers < first + len(piece))).nonzero()[:, 0]
        for part in inside.split(chunk):
            pairs = query[part], numbers[part] - first
            there = piece.rows.device
            scored = piece.exact(queries.exact.to(there), (pairs[0].to(there), pairs[1].to(there)))
            state.merge(pairs[0], scored.to(ids.device), numbers[part])
    scores, best = state.sorted()
    return torch.ldexp(scores, queries.exponents[:, None].double()).float(), best
