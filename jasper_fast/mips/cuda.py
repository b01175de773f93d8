"""Search of one corpus segment with the GPU kernels: a sampled threshold, one pass that collects, then a proof.

Each query's threshold is a low-precision order statistic of a random sample of the rows. It is chosen so that a few
times k rows of the whole corpus are above it. One product of the whole segment then collects the rows that can reach
it. The guess is checked. If the k-th best proven lower bound of the collected rows reaches the threshold, no other row
can be among the k best (docs/mips.md). Queries that fail, or have too many candidates, are marked in ``state.missed``.
Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jasper_fast.mips import segment as segments
from jasper_fast.mips.cpu import UNDERFLOW, Queries, accumulation
from jasper_fast.mips.rerank import bytes_per_query, just_below, rerank
from jasper_fast.mips.segment import BIN, UNIT_ROUNDOFF, Segment
from jasper_fast.mips.threshold import MIN_CACHED_STEP, float32_norms, sample
from jasper_fast.mips.topk_state import TopKState

SCAN_DTYPE = torch.bfloat16  # of the scan of float32 rows
MAX_MEMORY_BOUND_QUERIES = 16  # The scan of so few queries is bound by memory, so their sample is thinner.
MAX_UNCONVERTED_QUERIES = 64  # With so few queries, converting float32 rows would cost more than it saves.
MIN_CAPACITY, MIN_MEMORY_BOUND_CAPACITY = 1024, 8192  # candidates of a query
MAX_KERNEL_BINS = 16_384  # of a query for the threshold kernel; kernels/mips_prologue.py has blocks of up to this size
MAX_SLICE_ROWS = 1 << 23  # Places in a tile's mask must fit 32 bits.
SAMPLE_STEPS = (256, 128, 64, 32, 16, 8, 4, 2)  # rows per sampled row
TENSOR_CORE_FACTOR = 4  # Tensor cores truncate, so their error is this multiple of that of ordinary sums.
BOUND_SLACK = 16 * UNIT_ROUNDOFF  # error of float32 arithmetic on bounds, relative to ‖q‖‖x‖


@dataclass(frozen=True)
class Plan:
    """Parameters of a segment's search.

    Args:
        step: number of rows that one sampled row represents. With 1 all rows set the threshold, which is then proven.
        rank: rank of the threshold among the sample's bin maxima, 1 for the largest.
        capacity: maximum number of candidates of a query.
    """

    step: int
    rank: int
    capacity: int


def supports(segment: Segment, k: int) -> bool:
    """Return True if the kernels can search this segment."""
    return segments.on_gpu(segment.rows) and k * BIN <= len(segment)


def plan(rows: int, k: int, size: int) -> Plan:
    """Choose the thinnest sample whose threshold is too high or too low for about one query in ten thousand.

    Let n rows be above the r-th largest of a sample of one row in s. Then n / s is nearly Gamma(r) distributed for any
    corpus, because the rows are drawn at random.

    Args:
        rows: number of rows in the segment.
        k: number of rows to find.
        size: number of queries.
    """
    least = MIN_MEMORY_BOUND_CAPACITY if size <= MAX_MEMORY_BOUND_QUERIES else MIN_CAPACITY
    capacity = max(least, 4 * k + 4 * BIN)
    for step in SAMPLE_STEPS:
        rank = math.ceil(k / step + 3 + 5 * math.sqrt(k / step))
        fits = step * (rank + 5 * math.sqrt(rank) + 5) <= capacity
        if fits and rows // step // BIN >= 4 * rank:
            return Plan(step, rank, capacity)
    return Plan(1, k, capacity)


def rows_at_once(segment: Segment, size: int, k: int, scratch: int) -> int:
    """Return a number of rows, a multiple of 64, whose low-precision copy and sample fit an eighth of scratch each.

    A sample that a lasting segment keeps does not count as scratch.

    Args:
        segment: segment to search.
        size: number of queries.
        k: number of rows to find.
        scratch: bytes of scratch memory.
    """
    width = segment.rows.shape[1]
    step = plan(len(segment), k, size).step
    free = step == 1 or (segment.persistent and step >= MIN_CACHED_STEP)
    sample = 0 if free else segment.rows.element_size() * width / step
    copied = 2 * width if _converts(segment, size) else 0
    fits = int(scratch / 8 / max(sample, copied, 1.0)) // BIN * BIN
    return min(max(64 * BIN, fits), MAX_SLICE_ROWS)


def queries_at_once(segment: Segment, size: int, k: int, scratch: int) -> int:
    """Return the number of queries whose bins and candidates fit three eighths of the scratch memory."""
    chosen = plan(len(segment), k, size)
    bins = len(segment) // chosen.step // BIN + 1
    each = (4 if bins <= MAX_KERNEL_BINS else 12) * bins + bytes_per_query(k, chosen.capacity)
    most = min(3 * scratch // 8 // each, 2**30 // chosen.capacity)
    return max(1, most // 128 * 128 or most)


def scan_rows(segment: Segment, size: int) -> Tensor:
    """Return (N, D) rows for the scan: as stored, or float32 rows rounded for many queries."""
    if segment.scan_copy is not None:
        return segment.scan_copy
    return segment.rows.to(SCAN_DTYPE) if _converts(segment, size) else segment.rows


def _converts(segment: Segment, size: int) -> bool:
    return segment.rows.dtype == torch.float32 and segment.scan_copy is None and size > MAX_UNCONVERTED_QUERIES


def search_cuda(
    segment: Segment, rows: Tensor, first_id: int, queries: Queries, valid: Tensor, state: TopKState, proven: bool
) -> None:
    """Search a segment for any number of queries on CUDA. No score may overflow.

    Args:
        segment: segment to search, with known ``norms``.
        rows: (N, D) result of `scan_rows`.
        first_id: id of the first row.
        queries: the Q queries.
        valid: bool (N,) or (Q, N) mask, contiguous. Empty if all rows are valid.
        state: best rows so far, updated in place.
        proven: True to rank by fp64 scores, False by the scan's.
    """
    from jasper_fast.kernels import mips as kernels
    from jasper_fast.kernels.mips_epilogue import Collected

    chosen = plan(len(segment), state.k, len(queries))
    scan_queries, query_scales, limits = operands(segment, rows, queries, proven)
    scales = (segment.scales if query_scales is not None else None, query_scales)
    norms = float32_norms(segment)
    mask = valid if valid.numel() else None
    if chosen.step == 1:
        lower = kernels.lower_bounds(rows, scan_queries, scales, mask, norms, limits, BIN)
    else:
        drawn = sample(segment, rows, chosen.step)
        drawn_mask = None if mask is None else mask[..., drawn.numbers].contiguous()
        lower = kernels.lower_bounds(
            drawn.rows, scan_queries, (drawn.scales, query_scales), drawn_mask, drawn.norms, limits, 1
        )
    threshold, counts = _thresholds(lower, chosen.rank, state)
    del lower
    scores, numbers = kernels.collect(
        rows, scan_queries, scales, mask, norms, limits, threshold, counts, chosen.capacity
    )
    rerank(Collected(counts, scores, numbers, threshold, norms, limits), segment, first_id, queries, state, proven)


def operands(
    segment: Segment, rows: Tensor, queries: Queries, proven: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Return queries in the scan's dtype, their scales if they are integers, and (relative, absolute) errors.

    Args:
        segment: segment to search.
        rows: (N, D) result of `scan_rows`.
        queries: exact queries.
        proven: False assumes errors of 0.
    """
    from jasper_fast.kernels import mips_prologue

    width = rows.shape[1]
    # Sums of codes are exact.
    product = 8 * UNIT_ROUNDOFF if rows.dtype == torch.int8 else TENSOR_CORE_FACTOR * accumulation(width)
    product += BOUND_SLACK
    if rows.dtype != segment.rows.dtype:  # float32 rows, each element rounded to the scan's dtype
        product += torch.finfo(rows.dtype).eps / 2 * (1 + product)
    return mips_prologue.operands(queries.exact, rows.dtype, product, width * UNDERFLOW, proven)


def _thresholds(lower: Tensor, rank: int, state: TopKState) -> tuple[Tensor, Tensor]:
    """Return the thresholds of a scan, (Q,) float32, and counters for the rows it collects, (Q,) int32."""
    from jasper_fast.kernels import mips_prologue

    if lower.shape[1] <= MAX_KERNEL_BINS:
        return mips_prologue.thresholds(lower, rank, state.cutoffs)
    threshold = torch.maximum(lower.topk(rank, dim=1).values[:, -1], just_below(state.cutoffs))
    return threshold, torch.zeros_like(threshold, dtype=torch.int32)
