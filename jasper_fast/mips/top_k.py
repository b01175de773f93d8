"""The search loop over corpus segments and groups of queries, and ``topk`` for plain arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.cpu import (
    MAX_FLOAT32_SCORE,
    TILE_QUERIES,
    TILE_ROWS,
    Queries,
    candidates_for,
    max_few_queries,
    multiply_in_bf16,
    native,
    search_few,
    search_plain,
    search_planes,
    search_tiles,
)
from jasper_fast.mips.cuda import queries_at_once, rows_at_once, scan_rows, search_cuda, supports
from jasper_fast.mips.filters import few_valid_rows, search_rows
from jasper_fast.mips.inputs import FLOATS, QUERIES, as_mask, as_tensor, check_finite, check_rows, row_filter
from jasper_fast.mips.prefetch import chunks
from jasper_fast.mips.replay import search_replayed
from jasper_fast.mips.segment import Segment, bin_norms, set_norms
from jasper_fast.mips.topk_state import TopKState
from jasper_fast.ops.native import in_use

Precision = Literal["certified", "exact", "fast"]
PRECISIONS = ("certified", "exact", "fast")
SCRATCH = 256 << 20  # bytes
DIRECT = (torch.float32, torch.bfloat16, torch.int8)  # dtypes of rows that a search of few rows reads


@overload
def topk(
    queries: Tensor, corpus: Any, k: int, *, precision: Precision = ..., valid: Any = ..., scratch: int = ...
) -> tuple[Tensor, Tensor]: ...


@overload
def topk(
    queries: np.ndarray, corpus: Any, k: int, *, precision: Precision = ..., valid: Any = ..., scratch: int = ...
) -> tuple[np.ndarray, np.ndarray]: ...


def topk(
    queries: Any,
    corpus: Any,
    k: int,
    *,
    precision: Precision = "certified",
    valid: Any = None,
    scratch: int = SCRATCH,
) -> tuple[Any, Any]:
    """Return the k rows of highest inner product for every query, best first. Ties go to the lower index.

    Args:
        queries: (Q, D) float tensor or array. The search runs on its device, and results are of the same kind.
        corpus: (N, D) float32, bfloat16 or float16 tensor or array, which may be memory-mapped. A corpus that is on
            another device, in float16 or not contiguous is copied in segments of at most a third of ``scratch``. On a
            GPU the next segment is copied during the search of the current one.
        k: number of rows to return, at least 1.
        precision: "certified" and "exact" rank by the fp64 dot products of the given rows. "certified" uses faster
            low-precision scores with proven error bounds, and repeats queries whose bound fails. "exact" computes
            everything in fp64. "fast" ranks by the low-precision scores.
        valid: rows that may be returned: bool, (N,) or (Q, N), or row numbers, (n,) integers. None allows all rows.
        scratch: bytes that the search may use in addition to its inputs and results.

    Returns:
        scores (Q, k) float32, also for float64 queries, and indices (Q, k) int64. With
        fewer than k (valid) rows the rest is −inf and −1.

    Raises:
        ValueError: wrong shapes, k below 1, an unknown precision, or a row with NaN or infinity. If ``valid`` leaves
            few rows, only these are read and checked.
        TypeError: an unsupported dtype.

    Example:
        >>> import numpy as np
        >>> corpus = np.array([[1.0, 0], [0, 1], [1, 1]], dtype=np.float32)
        >>> scores, indices = topk(np.array([[1.0, 0.5]]), corpus, k=2)
        >>> scores.tolist(), indices.tolist()
        ([[1.5, 1.0]], [[2, 0]])
    """
    query_rows, rows = as_tensor(queries, "queries"), as_tensor(corpus, "corpus")
    check_rows(query_rows, "queries", QUERIES)
    check_rows(rows, "corpus", FLOATS)
    if rows.shape[1] != query_rows.shape[1]:
        raise ValueError(f"queries have width {query_rows.shape[1]} and the corpus {rows.shape[1]}; they must be equal")
    device = query_rows.device
    whole = device.type == "cuda" or rows.dtype != torch.float16  # A CPU widens float16.
    direct = rows.device == device and whole and rows.is_contiguous()
    fraction = 8 if device.type == "cuda" else 3  # A GPU holds two segments, together with the scan's own memory.
    step = len(rows) if direct else max(64, scratch // (fraction * 4 * rows.shape[1]) // 64 * 64)

    def segments() -> Iterable[tuple[int, Segment]]:
        for start, part in chunks(rows, step, device):
            yield start, Segment((part if whole else part.float()).contiguous())

    # A segment without a copy is reused, so its norms are computed once for all groups of queries.
    fixed = list(segments()) if direct and len(rows) else None
    scores, ids = search(
        (lambda: fixed) if fixed is not None else segments, len(rows), query_rows, k, precision, valid, scratch
    )
    return (scores, ids) if isinstance(queries, Tensor) else (scores.numpy(), ids.numpy())


def search(
    segments: Callable[[], Iterable[tuple[int, Segment]]],
    total: int,
    queries: Tensor,
    k: int,
    precision: Precision,
    valid: Any,
    scratch: int,
    shards: Sequence[torch.device] = (torch.device("cpu"),),
    survivors: list[Tensor] | None = None,
    lasting: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run ``topk`` over segments.

    Args:
        segments: function that yields (id of the first row, segment) in order, on the queries' device. It may be called
            repeatedly. Segments with norms of None have not been checked for NaN and infinity.
        total: number of rows in all segments.
        queries: (Q, D) float queries.
        k: number of rows to return, at least 1.
        precision: "certified", "exact" or "fast".
        valid: rows that may be returned, as in ``topk``.
        scratch: bytes that the search may use.
        shards: devices that hold the segments in turn and search at the same time. The queries are on the first.
        survivors: list to which `TopKState.survivors` is appended. None drops it.
        lasting: True for segments of an index, in which searches of few queries on a GPU are replayed as graphs.

    Returns:
        scores (Q, k) float32 and ids (Q, k) int64, padded with −inf and −1.

    Raises:
        ValueError: k below 1, an unknown precision, or a row with NaN or infinity.
        TypeError: a k that is no whole number, or a wrong dtype of ``valid``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be a whole number, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    k, missing = min(int(k), total), max(0, int(k) - total)
    allowed = row_filter(valid, len(queries), total)
    if lasting and valid is None and len(shards) == 1 and precision != "exact":
        found = search_replayed(list(segments()), queries, k, precision == "certified", scratch)
        if found is not None:
            return _padded(*found, missing)
    scaled = Queries.of(queries)
    if not math.isfinite(scaled.largest_norm()):  # The norm, which waits for the device, is needed anyway.
        check_finite(queries, "queries")
    if total == 0:
        return _padded(queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0), missing)
    chosen = _chosen(segments, allowed, len(queries), total) if len(shards) == 1 and in_use(queries) else None
    mask = as_mask(allowed, total, queries.device) if chosen is None else allowed
    if chosen is not None:
        most = max(1, *map(len, chosen))
        k, missing = min(k, most), missing + max(0, k - most)
        state = search_rows(segments(), chosen, scaled, k, precision != "exact", scratch)
        if state.warn_of_broken(stacklevel=4):
            state = search_rows(segments(), chosen, scaled, k, False, scratch)
    elif len(shards) == 1:
        state = _search_complete(segments, scaled, mask, k, precision, scratch)
    else:

        def search_shard(number: int) -> TopKState:
            def shard_segments() -> list[tuple[int, Segment]]:
                return list(segments())[number :: len(shards)]

            device = shards[number]
            return _search_complete(shard_segments, scaled.to(device), mask.to(device), k, precision, scratch)

        with ThreadPoolExecutor(len(shards)) as pool:
            state, *others = pool.map(search_shard, range(len(shards)))
        for other in others:
            scores, ids = other.sorted()
            state.merge_table(scores.to(queries.device), ids.to(queries.device))
            state.survivors += other.survivors.to(queries.device)
    if survivors is not None:
        survivors.append(state.survivors)
    scores, ids = state.sorted()
    return _padded(torch.ldexp(scores, scaled.exponents[:, None].double()), ids, missing)


def _chosen(
    segments: Callable[[], Iterable[tuple[int, Segment]]], allowed: Tensor, size: int, total: int
) -> list[Tensor] | None:
    if allowed.dtype == torch.bool and not allowed.numel():
        return None
    found = segments()
    kept = [segment for _, segment in found] if isinstance(found, list) else []
    if any(segment.rows.dtype not in DIRECT for segment in kept):
        return None
    return few_valid_rows(allowed.cpu(), size, total, any(segment.planes is not None for segment in kept))


def _padded(scores: Tensor, ids: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """Return results with ``missing`` more columns of −inf and −1."""
    if not missing:
        return scores.float(), ids
    pad = torch.nn.functional.pad
    return pad(scores.float(), (0, missing), value=-torch.inf), pad(ids.long(), (0, missing), value=-1)


def _search_complete(
    segments: Callable[[], Iterable[tuple[int, Segment]]],
    queries: Queries,
    mask: Tensor,
    k: int,
    precision: Precision,
    scratch: int,
) -> TopKState:
    """Scan once, then repeat the queries that were incomplete or broke a bound."""
    state = TopKState(len(queries), k, mask.device)
    if not len(queries):
        return state
    _scan(segments, queries, mask, state, precision, scratch)
    if not bool((state.missed | state.broken).any()):
        return state
    missed = state.missed.nonzero()[:, 0]
    if len(missed):  # Too many near-ties for the capacity: the same proof without that limit.
        _search_again(segments, queries, mask, state, missed, precision, scratch)
    if state.warn_of_broken(stacklevel=5):
        _search_again(segments, queries, mask, state, state.broken.nonzero()[:, 0], "exact", scratch)
    return state


def _search_again(
    segments: Callable[[], Iterable[tuple[int, Segment]]],
    queries: Queries,
    mask: Tensor,
    state: TopKState,
    redo: Tensor,
    precision: Precision,
    scratch: int,
) -> None:
    """Search some queries from the start, without the GPU kernels."""
    fresh = TopKState(len(redo), state.k, redo.device)
    _scan(segments, queries.take(redo), mask[redo] if mask.dim() == 2 else mask, fresh, precision, scratch, False)
    for name in ("best", "counts", "cutoffs"):
        getattr(state, name)[redo] = getattr(fresh, name)
    state.broken[redo] = fresh.broken


def _scan(
    segments: Callable[[], Iterable[tuple[int, Segment]]],
    queries: Queries,
    mask: Tensor,
    state: TopKState,
    precision: Precision,
    scratch: int,
    kernels: bool = True,
) -> None:
    for first_id, segment in segments():
        part = mask[..., first_id : first_id + len(segment)].contiguous() if mask.numel() else mask
        compiled = native(segment) and precision != "exact"
        if compiled and segment.planes is not None:
            if segment.norms is None:
                set_norms(segment, bin_norms(segment), first_id)
            if _in_range(segment, queries):
                done = search_planes(segment, first_id, queries, part, state, precision == "certified", scratch)
                if done < len(queries):
                    rest, rest_mask = slice(done, None), part[done:].contiguous() if part.dim() == 2 else part
                    _library(
                        segment, first_id, queries.take(rest), rest_mask, state.part(rest), precision, scratch
                    )  # fmt: skip
                continue
        few = compiled and len(queries) <= max_few_queries(segment.rows, precision == "certified")
        if segment.norms is None and not few:
            set_norms(segment, bin_norms(segment), first_id)
        if few:
            _few(segment, first_id, queries, part, state, precision)
            continue
        if precision != "exact" and kernels and supports(segment, state.k) and _in_range(segment, queries):
            _cuda(segment, first_id, queries, part, state, precision, scratch)
            continue
        _library(segment, first_id, queries, part, state, precision, scratch)


def _library(
    segment: Segment,
    first_id: int,
    queries: Queries,
    mask: Tensor,
    state: TopKState,
    precision: Precision,
    scratch: int,
) -> None:
    """Search with the library's matrix products, on any device."""
    use, rows, size = _plan(segment, queries, state.k, precision, scratch)
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        part_mask = mask[part].contiguous() if mask.dim() == 2 else mask
        if use == "tiles":
            search_tiles(
                segment, first_id, queries.take(part), part_mask, state.part(part), precision == "certified", rows,
                multiply_in_bf16(),
            )  # fmt: skip
        else:
            search_plain(segment, first_id, queries.take(part), part_mask, state.part(part), use, rows)


def _cuda(
    segment: Segment,
    first_id: int,
    queries: Queries,
    mask: Tensor,
    state: TopKState,
    precision: Precision,
    scratch: int,
) -> None:
    """Search with the GPU kernels, in slices of rows and groups of queries that fit the scratch memory."""
    rows = rows_at_once(segment, len(queries), state.k, scratch)
    for begin in range(0, len(segment), rows):
        part = segment.slice(begin, begin + rows) if rows < len(segment) else segment
        part_mask = mask[..., begin : begin + rows].contiguous() if mask.numel() else mask
        if not supports(part, state.k):  # The last slice is too short for the kernels.
            _library(part, first_id + begin, queries, part_mask, state, precision, scratch)
            continue
        scanned = scan_rows(part)
        size = queries_at_once(part, len(queries), state.k, scratch)
        for start in range(0, len(queries), size):
            group = slice(start, start + size)
            group_mask = part_mask[group] if part_mask.dim() == 2 else part_mask
            with torch.cuda.device_of(scanned):  # Kernels launch on the current device.
                search_cuda(
                    part, scanned, first_id + begin, queries.take(group), group_mask, state.part(group),
                    precision == "certified",
                )  # fmt: skip


def _few(
    segment: Segment, first_id: int, queries: Queries, mask: Tensor, state: TopKState, precision: Precision
) -> None:
    unchecked = segment.norms is None
    before = (state.best.clone(), state.counts.clone(), state.cutoffs.clone()) if unchecked else None
    if unchecked or _in_range(segment, queries):
        search_few(segment, first_id, queries, mask, state, precision == "certified")
        if before is None:
            return
        norms, segment.norms = segment.norms, None
        assert norms is not None
        set_norms(segment, norms, first_id)
        if _in_range(segment, queries):
            return
        for name, value in zip(("best", "counts", "cutoffs"), before, strict=True):
            getattr(state, name).copy_(value)  # Scores may have overflowed: repeat this segment in fp64.
        state.broken.fill_(False)
    search_plain(segment, first_id, queries, mask, state, "exact", _rows_for(SCRATCH, segment, len(queries), 8))


def _in_range(segment: Segment, queries: Queries) -> bool:
    """Return True if no fp32 score or partial sum of this segment can overflow."""
    return segment.largest_norm() * queries.largest_norm() < MAX_FLOAT32_SCORE


def _plan(segment: Segment, queries: Queries, k: int, precision: Precision, scratch: int) -> tuple[str, int, int]:
    """Return ("tiles" or a precision, corpus rows and queries of one product) within ``scratch`` bytes."""
    if precision == "exact" or not _in_range(segment, queries):
        size = min(len(queries), 64)
        return "exact", _rows_for(scratch, segment, size, 8), size
    if native(segment):
        size = min(len(queries), TILE_QUERIES)
        while size > 1 and size * candidates_for(k) * 8 > scratch // 2:  # candidates
            size //= 2
        return "tiles", min(TILE_ROWS, _rows_for(scratch // 2, segment, size, 4)), size
    size = min(len(queries), 256)
    return precision, _rows_for(scratch, segment, size, 8), size


def _rows_for(scratch: int, segment: Segment, size: int, bytes_each: int) -> int:
    """Return the number of corpus rows per product, a multiple of 64.

    It counts memory for the rows' float copy, the scores, and tensors derived from the scores.
    """
    each = bytes_each * segment.rows.shape[1] + 5 * 8 * size
    return max(64, min(1 << 16, scratch // each // 64 * 64))
