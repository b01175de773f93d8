"""Searches of few queries on a GPU as CUDA graphs, because their launches take longer than their work.

A second search of the same shape in the same segments is captured, and later ones replay it. A graph has everything
from the queries to the sorted results of all segments. The host waits once, for the flag that they are complete. Graphs
need segments that an index keeps, and no mask. No GPU has run this yet.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from jasper_fast.mips.cpu import MAX_FLOAT32_SCORE, Queries
from jasper_fast.mips.cuda import (
    MAX_MEMORY_BOUND_QUERIES,
    plan,
    queries_at_once,
    rows_at_once,
    scan_rows,
    search_cuda,
    supports,
)
from jasper_fast.mips.segment import Segment
from jasper_fast.mips.threshold import MIN_CACHED_STEP, prepare
from jasper_fast.mips.topk_state import TopKState

MAX_GRAPHS = 8  # that a segment keeps, for different numbers of queries and k
Parts = Sequence[tuple[int, Segment]]
Results = tuple[Tensor, ...]


class Captured:
    """One search that is replayed with other queries.

    Args:
        function: search of (Q, D) queries. It launches only.
        queries: queries of the right shape.
        parts: ids of the first rows and segments, which must stay the same.
    """

    def __init__(self, function: Callable[[Tensor], Results], queries: Tensor, parts: Parts) -> None:
        # A graph of a segment is kept in the segment, so a reference back would keep both.
        self.parts, self.lock = [(first, weakref.ref(part)) for first, part in parts], threading.Lock()
        self.queries = queries.clone()
        self.results, self.replay, self.done = capture(lambda: function(self.queries))

    def searches(self, parts: Parts) -> bool:
        """Return True if these are the segments that were captured."""
        pairs = zip(self.parts, parts, strict=False)
        return len(self.parts) == len(parts) and all(a[0] == b[0] and a[1]() is b[1] for a, b in pairs)

    def __call__(self, queries: Tensor) -> Results:
        """Return copies of the results for these queries, from any thread and stream."""
        with self.lock:
            if self.done is not None:
                self.done.wait()  # The device waits for the previous reader of the results.
            self.queries.copy_(queries)
            self.replay()
            results = tuple(part.clone() for part in self.results)
            if self.done is not None:
                self.done.record()
        return results


def capture(launch: Callable[[], Results]) -> tuple[Results, Callable[[], None], Any]:
    """Capture launches, and return their results, a function that repeats them, and an event."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = launch()
    return results, graph.replay, torch.cuda.Event()


def search_replayed(parts: Parts, queries: Tensor, k: int, proven: bool, scratch: int) -> tuple[Tensor, Tensor] | None:
    """Return the k best rows of each query from a graph. None: no graph was captured, or it cannot answer a query.

    Args:
        parts: ids of the first rows, and segments.
        queries: (Q, D) float queries on the segments' device.
        k: number of rows to find.
        proven: True to rank by fp64 scores.
        scratch: bytes that a search may use.

    Returns:
        scores (Q, k) float64 and ids (Q, k) int64, or None.
    """
    size = len(queries)
    if not parts or not 0 < size <= MAX_MEMORY_BOUND_QUERIES:
        return None
    if not all(_fits(part, size, k, scratch) for _, part in parts):
        return None
    kept, key = parts[0][1].derived.setdefault("graphs", {}), (size, k, proven, queries.dtype)
    found = kept.get(key)
    if found is None:  # The first search compiles and prepares what a capture must not.
        kept[key] = ()
        return None
    with torch.cuda.device_of(queries):
        for _, part in parts:
            prepare(part, scan_rows(part), plan(len(part), k, size).step)
        if found is not False and not (isinstance(found, Captured) and found.searches(parts)):
            found = kept[key] = _captured(parts, queries, k, proven)
            while len(kept) > MAX_GRAPHS:
                del kept[next(iter(kept))]
        if found is False:
            return None
        scores, ids, complete = found(queries)
    return (scores, ids) if bool(complete) else None


def _captured(parts: Parts, queries: Tensor, k: int, proven: bool) -> Captured | Literal[False]:
    """Capture a search. A failure is reported, and False then marks searches that are not captured again."""
    try:
        return Captured(lambda given: _search(parts, given, k, proven), queries, parts)
    except RuntimeError as error:
        warnings.warn(f"searches of {len(queries)} queries are not replayed as a CUDA graph: {error}", stacklevel=5)
        return False


def _fits(segment: Segment, size: int, k: int, scratch: int) -> bool:
    """Return True if an index keeps a segment, no score overflows, and the kernels search it as a whole."""
    if not segment.persistent or segment.norms is None or not supports(segment, k):
        return False
    # Elements of scaled queries are at most 1.
    if segment.largest_norm() * segment.rows.shape[1] ** 0.5 >= MAX_FLOAT32_SCORE:
        return False
    if 1 < plan(len(segment), k, size).step < MIN_CACHED_STEP:  # Its sample is drawn for each search.
        return False
    whole = rows_at_once(segment, size, k, scratch) >= len(segment)
    return whole and queries_at_once(segment, size, k, scratch) >= size


def _search(parts: Parts, given: Tensor, k: int, proven: bool) -> Results:
    """Search all segments, and return scores, ids, and True if all queries are finite and complete."""
    queries = Queries.of(given)
    state, everything = TopKState(len(given), k, given.device), torch.empty(0, dtype=torch.bool, device=given.device)
    for first_id, segment in parts:
        search_cuda(segment, scan_rows(segment), first_id, queries, everything, state, proven)
    scores, ids = state.sorted()
    finite = torch.linalg.vector_norm(queries.exact, torch.inf) <= 1  # False for NaN and infinity
    complete = finite > (state.missed | state.broken).any()  # "and not", in one launch
    return torch.ldexp(scores, queries.exponents[:, None].double()), ids, complete
