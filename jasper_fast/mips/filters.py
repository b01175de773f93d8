"""Searches that a filter restricts to a few rows: a scan of all rows would cost more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.cpu import Queries, candidates_for
from jasper_fast.mips.segment import BIN, Segment
from jasper_fast.mips.topk_state import TopKState

# A search of fewer valid rows than this does not scan the others.
MAX_CHOSEN_SHARE, MAX_CHOSEN_SHARE_EACH = 1 / 12, 1 / 24  # the second for one query, or a mask per query
ROW_QUERIES = 256  # queries that read the valid rows together
# Planes of bins with more valid rows than this are faster to scan than their float32 rows are to read.
MAX_CHOSEN_IN_BIN = 8
# Several queries read no more float32 rows than this sooner than the planes of their bins.
MAX_READ_TOGETHER = 4096


def few_valid_rows(valid: Tensor, size: int, total: int, planes: bool) -> list[Tensor] | None:
    """Return the rows that a filter leaves, if a search of these alone is faster than a scan.

    Args:
        valid: bool (N,) or (Q, N), empty if all rows are valid, or int64 (n,) row numbers, ascending.
        size: number of queries Q.
        total: number of rows N.
        planes: True if a scan reads planes, and leaves out the bins without valid rows.

    Returns:
        int64 row numbers, one (n,) for all queries or one for each. None if a scan is faster.
    """
    together = size > 1 and valid.dim() == 1
    share = MAX_CHOSEN_SHARE if together else MAX_CHOSEN_SHARE_EACH

    def dense(count: int, bins: int) -> bool:
        return planes and bins * MAX_CHOSEN_IN_BIN < count and not (together and count <= MAX_READ_TOGETHER)

    if valid.dtype != torch.bool:
        return None if len(valid) > total * share or dense(len(valid), _bins_of(valid)) else [valid]
    if not valid.numel():
        return None
    each: list[Tensor] = []
    for mask in valid.contiguous().view(-1, total):
        rows, numbers = torch.ops.jasper_fast_native.mips_chosen(mask, int(total * share))
        count, bins = numbers.tolist()
        if count > len(rows) or dense(count, bins):
            return None
        each.append(rows)
    return each


def _bins_of(rows: Tensor) -> int:
    """Return the number of bins that have some of the rows, which ascend."""
    bins = rows.numpy() // BIN
    return int(np.count_nonzero(bins[1:] != bins[:-1])) + min(1, len(rows))


def search_rows(
    segments: Iterable[tuple[int, Segment]], each: list[Tensor], queries: Queries, k: int, low: bool, scratch: int
) -> TopKState:
    """Search some rows only, by float32 scores with bounds, and fp64 scores of those that can be among the k best.

    Args:
        segments: (id of the first row, segment) pairs in order.
        each: int64 row numbers, ascending: one (n,) for all queries or one for each.
        queries: the Q queries.
        k: number of rows to find.
        low: False to use fp64 scores alone.
        scratch: bytes that the search may use.

    Raises:
        ValueError: one of the rows holds NaN or infinity.
    """
    state = TopKState(len(queries), k, each[0].device)
    capacity, threads = candidates_for(k), torch.get_num_threads()
    step = max(1, min(ROW_QUERIES, scratch // (2 * threads * (8 * capacity + 16 * k))))
    starts = range(0, len(queries), 1 if len(each) > 1 else step)
    fixed = list(segments) if len(starts) > 1 else segments
    for start in starts:
        part = slice(start, start + starts.step)
        own_state, scan, exact = (
            (state.part(part), queries.scan[part], queries.exact[part])
            if len(starts) > 1
            else (state, queries.scan, queries.exact)
        )
        for first_id, segment, own in _chosen_by_segment(fixed, each[start if len(each) > 1 else 0]):
            norms = segment.scales[:0].double() if segment.norms is None else segment.norms
            torch.ops.jasper_fast_native.mips_rows(
                own, scan, exact, segment.rows, segment.scales, norms, first_id, low, capacity,
                own_state.best, own_state.counts, own_state.cutoffs, own_state.broken,
            )  # fmt: skip
    return state


def _chosen_by_segment(
    segments: Iterable[tuple[int, Segment]], numbers: Tensor
) -> Iterator[tuple[int, Segment, Tensor]]:
    """Yield (id of the first row, segment, its own numbers of the given rows) for segments with given rows."""
    for first_id, segment in segments:
        begin, end = np.searchsorted(numbers.numpy(), (first_id, first_id + len(segment))).tolist()
        if begin == end:
            continue
        own = numbers[begin:end] - first_id if first_id else numbers[begin:end]
        if segment.norms is None:  # not checked yet; the other rows are not read
            finite = segment.rows[own].isfinite().all(dim=1)
            if not bool(finite.all()):
                raise ValueError(f"corpus: row {first_id + int(own[~finite][0])} holds NaN or infinity")
        yield first_id, segment, own
