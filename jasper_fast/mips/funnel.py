"""Matryoshka funnel: a shortlist by narrow embeddings, reranked by the wide ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.binary import SignIndex
from jasper_fast.mips.cpu import Queries
from jasper_fast.mips.index import FlatIPIndex
from jasper_fast.mips.inputs import QUERIES, as_tensor, check_finite, check_rows
from jasper_fast.mips.topk_state import TopKState


def funnel(
    narrow_queries: Any,
    wide_queries: Any,
    narrow: FlatIPIndex | SignIndex,
    wide: FlatIPIndex,
    k: int,
    *,
    shortlist: int,
) -> tuple[Any, Any]:
    """Return the k best rows of a shortlist by narrow embeddings, ranked by exact products of the wide ones.

    Args:
        narrow_queries: (Q, narrow.dim) queries, a tensor or array.
        wide_queries: (Q, wide.dim) embeddings of the same queries. Results are of the same kind.
        narrow: index of the corpus's narrow embeddings. A FlatIPIndex of dtype "int8" is small, a `SignIndex` smallest.
        wide: index of the wide embeddings of the same corpus, in the same order.
        k: number of rows to return, at most ``shortlist``.
        shortlist: number of rows per query that the narrow embeddings choose. A longer one takes more time and
            improves recall.

    Returns:
        scores (Q, k) float32 by the wide embeddings and ids (Q, k), best first. Ties go to the lower id.

    Raises:
        ValueError: sizes that do not match each other, or a query with NaN or infinity.

    Example:
        >>> import numpy as np
        >>> embeddings = np.random.default_rng(0).standard_normal((100, 64), dtype=np.float32)
        >>> narrow, wide = FlatIPIndex(16, dtype="int8"), FlatIPIndex(64, dtype="float32")
        >>> narrow.add(embeddings[:, :16])
        >>> wide.add(embeddings)
        >>> scores, ids = funnel(embeddings[:3, :16], embeddings[:3], narrow, wide, k=1, shortlist=20)
        >>> ids.tolist()
        [[0], [1], [2]]
    """
    if len(narrow) != len(wide):
        raise ValueError(f"the narrow index holds {len(narrow)} rows and the wide one {len(wide)}; both need the same")
    if isinstance(narrow, FlatIPIndex) and not torch.equal(narrow.ids, wide.ids):
        raise ValueError("the narrow and the wide index need the same ids in the same order")
    if not 1 <= k <= shortlist:
        raise ValueError(f"k must be from 1 to the shortlist's length, {shortlist}; got {k}")
    queries = as_tensor(wide_queries, "wide_queries")
    check_rows(queries, "wide_queries", QUERIES)
    if queries.shape[1] != wide.dim:
        raise ValueError(f"wide_queries have width {queries.shape[1]}, the wide index {wide.dim}")
    length = min(shortlist, len(narrow))
    if isinstance(narrow, SignIndex):
        chosen = narrow.search(narrow_queries, length)[1]
    else:
        chosen = narrow.search(narrow_queries, length, precision="fast")[1]
    ids = torch.as_tensor(chosen)
    if len(ids) != len(queries):
        raise ValueError(f"{len(ids)} narrow queries and {len(queries)} wide ones; both need the same")
    check_finite(queries, "wide_queries")
    rows = ids if isinstance(narrow, SignIndex) else wide.rows_of(ids)
    scores, best = _rank(Queries.of(queries.to(wide.device)), rows.to(wide.device), wide, k)
    scores, best = scores.to(queries.device), wide.ids_of(best).to(queries.device)
    return (scores, best) if isinstance(wide_queries, Tensor) else (scores.numpy(), best.numpy())


def funnel_recall(found: Any, wide_queries: Any, wide: FlatIPIndex) -> float:
    """Return the fraction of the full-width top k that a funnel returned.

    If the index has fewer than k rows, the fraction is of all rows.

    Args:
        found: (Q, k) ids that ``funnel`` returned.
        wide_queries: (Q, wide.dim) queries of that call.
        wide: wide index of that call.

    Example:
        >>> import numpy as np
        >>> index = FlatIPIndex(2, dtype="float32")
        >>> index.add(np.array([[1.0, 0], [0.8, 0], [0, 1]]))
        >>> funnel_recall(np.array([[0, 2]]), np.array([[1.0, 0.1]]), index)
        0.5
    """
    if not len(wide):
        return 1.0
    ids = np.asarray(found)
    _, expected = wide.search(wide_queries, ids.shape[1])
    full_ids = np.asarray(expected)[:, : len(wide)]  # the rest is padded with -1
    return float(np.mean([np.isin(full, row).mean() for full, row in zip(full_ids, ids, strict=True)]))


def _rank(queries: Queries, ids: Tensor, wide: FlatIPIndex, k: int) -> tuple[Tensor, Tensor]:
    state = TopKState(len(queries), k, ids.device)
    query = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids).reshape(-1)
    numbers = ids.reshape(-1)
    chunk = max(1, wide.scratch // (3 * 8 * wide.dim))  # pairs scored at once
    for first, segment in wide.segments():
        inside = ((numbers >= first) & (numbers < first + len(segment))).nonzero()[:, 0]
        for part in inside.split(chunk):
            pairs = query[part], numbers[part] - first
            device = segment.rows.device
            scored = segment.exact(queries.exact.to(device), (pairs[0].to(device), pairs[1].to(device)))
            state.merge(pairs[0], scored.to(ids.device), numbers[part])
    scores, best = state.sorted()
    return torch.ldexp(scores, queries.exponents[:, None].double()).float(), best
