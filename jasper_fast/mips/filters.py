"""Searches that a filter restricts to a few rows: a scan of all rows would cost more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.cpu import Queries
from jasper_fast.mips.segment import BIN, Segment
from jasper_fast.mips.topk_state import TopKState

# A search of fewer valid rows than this does not scan the others.
MAX_CHOSEN_SHARE, MAX_CHOSEN_SHARE_EACH = 1 / 12, 1 / 24  # the second for a mask per query
MAX_DIRECT_QUERIES = 128  # More queries of such a search scan a copy of the valid rows.
# Planes of bins with more valid rows than this are faster to scan than their float32 rows are to read.
MAX_CHOSEN_IN_BIN = 8


def few_valid_rows(valid: Tensor, total: int, planes: bool) -> list[Tensor] | None:
    """Return the rows that a filter leaves, if a search of these alone is faster than a scan.

    Args:
        valid: bool (N,) or (Q, N), empty if all rows are valid, or int64 (n,) row numbers, ascending.
        total: number of rows N.
        planes: True if a scan reads planes, and leaves out the bins without valid rows.

    Returns:
        int64 row numbers, one (n,) for all queries or one for each. None if a scan is faster.
    """
    if valid.dtype != torch.bool:
        dense = planes and _bins_of(valid) * MAX_CHOSEN_IN_BIN < len(valid)
        return None if dense or len(valid) > total * MAX_CHOSEN_SHARE else [valid]
    if not valid.numel():
        return None
    share = MAX_CHOSEN_SHARE if valid.dim() == 1 else MAX_CHOSEN_SHARE_EACH
    each: list[Tensor] = []
    for mask in valid.contiguous().view(-1, total):
        rows, numbers = torch.ops.jasper_fast_native.mips_chosen(mask, int(total * share))
        count, bins = numbers.tolist()
        if count > len(rows) or (planes and bins * MAX_CHOSEN_IN_BIN < count):
            return None
        each.append(rows)
    return each


def _bins_of(rows: Tensor) -> int:
    """Return the number of bins that have some of the rows, which ascend."""
    bins = rows // BIN
    return int((bins[1:] != bins[:-1]).sum()) + min(1, len(rows))


def taken_rows(segments: Iterable[tuple[int, Segment]], numbers: Tensor) -> list[tuple[int, Segment]]:
    """Return copies of some rows as segments, numbered from 0.

    Args:
        segments: (id of the first row, segment) pairs in order.
        numbers: (n,) int64 row numbers, ascending.
    """
    taken: list[tuple[int, Segment]] = []
    first = 0
    for _, segment, own in _chosen_by_segment(segments, numbers):
        taken.append((first, segment.take(own)))
        first += len(own)
    return taken


def search_rows(segments: Iterable[tuple[int, Segment]], each: list[Tensor], queries: Queries, k: int) -> TopKState:
    """Search some rows only, by fp64 scores of all of them.

    Args:
        segments: (id of the first row, segment) pairs in order.
        each: int64 row numbers, ascending: one (n,) for all queries or one for each.
        queries: the Q queries.
        k: number of rows to find.

    Raises:
        ValueError: one of the rows holds NaN or infinity.
    """
    state = TopKState(len(queries), k, each[0].device)
    parts = [slice(q, q + 1) for q in range(len(queries))] if len(each) > 1 else [slice(None)]
    fixed = list(segments) if len(each) > 1 else segments
    for numbers, part in zip(each, parts, strict=True):
        own_state, exact = state.part(part), queries.exact[part]
        for first_id, segment, own in _chosen_by_segment(fixed, numbers):
            torch.ops.jasper_fast_native.mips_rows(
                own, exact, segment.rows, segment.scales, first_id, own_state.best, own_state.counts, own_state.cutoffs
            )
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
