"""Rerank the rows that a scan collected: rescore the possible ones in fp64 and mark incomplete queries.

The kernels (kernels/mips_epilogue.py) rerank queries whose candidates fit one program. Plain torch does the same for
larger k with some seventy launches instead of three. Tests compare the kernels with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jasper_fast.mips.cpu import Queries
from jasper_fast.mips.segment import BIN, Segment
from jasper_fast.mips.topk_state import TopKState

if TYPE_CHECKING:
    from jasper_fast.kernels.mips_epilogue import Collected

MAX_KERNEL_CANDIDATES = 8192  # of a query; kernels/mips_epilogue.py has blocks of up to this size


def max_rescored(k: int, capacity: int) -> int:
    """Return the maximum number of rows of a query that are rescored."""
    return min(capacity, 2 * k + BIN)


def bytes_per_query(k: int, capacity: int) -> int:
    """Return the bytes that a query's candidates take."""
    if capacity > MAX_KERNEL_CANDIDATES:
        return 48 * capacity
    return 8 * capacity + 24 * max_rescored(k, capacity) + 16 * k


def rerank(
    collected: Collected, segment: Segment, first_id: int, queries: Queries, state: TopKState, proven: bool
) -> Tensor:
    """Merge collected rows into the state.

    Return the thresholds (Q,) float32 with which another scan may complete missed queries, inf for complete ones.

    Args:
        collected: candidates of the scan.
        segment: segment that was scanned.
        first_id: id of the segment's first row.
        queries: the Q queries.
        state: best rows so far, updated in place.
        proven: rescore in fp64. False keeps the scan's scores.
    """
    if collected.scores.shape[1] > MAX_KERNEL_CANDIDATES:
        return rerank_in_torch(collected, segment, first_id, queries, state, proven)
    from jasper_fast.kernels.mips_epilogue import rerank as rerank_in_kernels

    return rerank_in_kernels(
        collected, queries.exact, segment.rows, _row_scales(segment), first_id,
        max_rescored(state.k, collected.scores.shape[1]), proven,
        (state.best, state.counts, state.cutoffs, state.broken, state.missed),
    )  # fmt: skip


def rerank_in_torch(
    collected: Collected, segment: Segment, first_id: int, queries: Queries, state: TopKState, proven: bool
) -> Tensor:
    """Do the same as `rerank`, for any k."""
    from jasper_fast.kernels.mips_rescore import rescore

    counts, scores, numbers, limits = collected.counts, collected.scores, collected.rows, collected.limits
    (size, capacity), k, device = scores.shape, state.k, scores.device
    # The k-th best lower bound of the collected rows is proven. Most candidates fall below it.
    filled = torch.arange(capacity, device=device) < counts[:, None]
    numbers = numbers.where(filled, 0)
    error = collected.norms[numbers // BIN] * limits[0][:, None] + limits[1][:, None]
    error += scores.abs() * collected.rounding
    cutoff = (scores - error).where(filled, -torch.inf).topk(k, dim=1).values[:, -1]
    cutoff = torch.maximum(cutoff, just_below(state.cutoffs))
    upper = (scores + error).where(filled, -torch.inf)
    limit = max_rescored(k, capacity)
    best, place = upper.topk(limit, dim=1)
    possible = (best >= cutoff[:, None]) & (best > -torch.inf)
    crowded = (upper >= cutoff[:, None]).logical_and_(filled).sum(dim=1) > limit
    missed = (counts > capacity) | (collected.thresholds > cutoff) | crowded
    missed &= collected.thresholds < torch.inf  # not scanned
    possible &= ~missed[:, None]
    numbers, scores = numbers.gather(1, place).long(), scores.gather(1, place).double()
    if proven:
        query = torch.arange(size, device=device)[:, None].expand(size, limit).reshape(-1)
        row = numbers.where(possible, -1).view(-1)
        true = rescore(queries.exact, segment.rows, _row_scales(segment), query, row).view(size, limit)
        wrong = ((true - scores).abs() > error.gather(1, place)) & possible
        state.broken |= wrong.any(dim=1)
    else:
        true = scores.masked_fill(~possible, -torch.inf)
    state.missed |= missed
    state.merge_table(true, numbers + first_id)
    return torch.where(counts < k, collected.spares, cutoff).where(missed, torch.inf)


def just_below(cutoffs: Tensor) -> Tensor:
    """Return float32 numbers below the given float64 numbers."""
    return torch.nextafter(cutoffs.float(), torch.full((), -torch.inf, device=cutoffs.device))


def _row_scales(segment: Segment) -> Tensor | None:
    return segment.scales if segment.rows.dtype == torch.int8 else None
