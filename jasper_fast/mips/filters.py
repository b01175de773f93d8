"""Searches that a filter restricts to a few rows: a scan of all rows would cost more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from jasper_fast.mips.cpu import Queries
from jasper_fast.mips.segment import Segment, bin_norms, set_norms
from jasper_fast.mips.topk_state import TopKState

MAX_CHOSEN_SHARE = 1 / 16  # A search of fewer valid rows does not scan the others.
MAX_DIRECT_QUERIES = 32  # More queries of such a search scan a copy of the valid rows.


def few_valid_rows(mask: Tensor) -> Tensor | None:
    """Return the rows that a mask leaves, if a search of these alone is faster than a scan.

    Args:
        mask: bool (N,) or (Q, N), or empty if all rows are valid.

    Returns:
        (n,) int64 row numbers, or None.
    """
    if mask.dim() != 1 or not 0 < int(torch.count_nonzero(mask)) <= len(mask) * MAX_CHOSEN_SHARE:
        return None
    return mask.nonzero()[:, 0]


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


def search_rows(segments: Iterable[tuple[int, Segment]], numbers: Tensor, queries: Queries, k: int) -> TopKState:
    """Search some rows only, by fp64 scores of all of them.

    Args:
        segments: (id of the first row, segment) pairs in order.
        numbers: (n,) int64 row numbers, ascending.
        queries: the Q queries.
        k: number of rows to find.
    """
    state = TopKState(len(queries), k, numbers.device)
    for first_id, segment, own in _chosen_by_segment(segments, numbers):
        torch.ops.jasper_fast_native.mips_rows(
            own, queries.exact, segment.rows, segment.scales, first_id, state.best, state.counts, state.cutoffs
        )
    return state


def _chosen_by_segment(
    segments: Iterable[tuple[int, Segment]], numbers: Tensor
) -> Iterator[tuple[int, Segment, Tensor]]:
    """Yield (id of the first row, segment, its own numbers of the given rows) for segments with given rows."""
    for first_id, segment in segments:
        if segment.norms is None:
            set_norms(segment, bin_norms(segment), first_id)
        begin, end = torch.searchsorted(numbers, torch.tensor([first_id, first_id + len(segment)])).tolist()
        if begin < end:
            yield first_id, segment, numbers[begin:end] - first_id
