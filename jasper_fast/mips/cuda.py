"""Search of one corpus segment with the GPU kernels: a sampled threshold, one pass that collects, then a proof.

Each query's threshold is a low-precision order statistic of a random sample of the rows. It is chosen so that a few
times k rows of the whole corpus are above it. One product of the whole segment then collects the rows that can reach
it. The guess is checked. If the k-th best proven lower bound of the collected rows reaches the threshold, no other row
can be among the k best (docs/mips.md). Queries that fail, or have too many candidates, are scanned again in the same
chain, with a threshold that their candidates prove. The kernels of this repair return at once if no query needs it.
Queries that fail twice are marked in ``state.missed``. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jasper_fast.mips import segment as segments
from jasper_fast.mips.cpu import UNDERFLOW, Queries, accumulation
from jasper_fast.mips.rerank import bytes_per_query, just_below, rerank
from jasper_fast.mips.segment import BIN, UNIT_ROUNDOFF, Segment
from jasper_fast.mips.threshold import MIN_CACHED_STEP, float32_norms, sample
from jasper_fast.mips.topk_state import TopKState

if TYPE_CHECKING:
    from jasper_fast.kernels.mips import Scan

SCAN_DTYPE = torch.bfloat16  # of library products, for many queries
MAX_MEMORY_BOUND_QUERIES = 16  # The scan of so few queries is bound by memory, so their sample is thinner.
MAX_REPAIRED = 64  # queries of a scan that may be scanned again
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

    @property
    def spare_rank(self) -> int:
        """Return the rank of the threshold of a repair, which nearly fills the capacity."""
        fits = 4 * self.capacity // (5 * self.step)
        return self.rank if self.step == 1 else max(self.rank, min(2 * self.rank, fits))


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
    """Return a number of rows, a multiple of 64, whose sample fits an eighth of scratch.

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
    fits = int(scratch / 8 / max(sample, 1.0)) // BIN * BIN
    return min(max(64 * BIN, fits), MAX_SLICE_ROWS)


def queries_at_once(segment: Segment, size: int, k: int, scratch: int) -> int:
    """Return the number of queries whose bins and candidates fit three eighths of the scratch memory."""
    chosen = plan(len(segment), k, size)
    bins = len(segment) // chosen.step // BIN + 1
    each = (4 if bins <= MAX_KERNEL_BINS else 12) * bins + bytes_per_query(k, chosen.capacity)
    most = min(3 * scratch // 8 // each, 2**30 // chosen.capacity)
    return max(1, most // 128 * 128 or most)


def scan_rows(segment: Segment) -> Tensor:
    """Return (N, D) rows for the scan: the low-precision copy of an index, or the rows as stored."""
    return segment.rows if segment.scan_copy is None else segment.scan_copy


def scan_of(segment: Segment, rows: Tensor, queries: Queries, mask: Tensor | None, proven: bool, many: bool) -> Scan:
    """Prepare a scan by library products (``many``) or in registers. Other arguments are those of `search_cuda`."""
    from jasper_fast.kernels.mips import Scan

    scan_queries, query_scales, limits = operands(segment, rows, queries, proven, many)
    scales = (segment.scales if rows.dtype == torch.int8 else None, query_scales)
    return Scan(rows, scan_queries, scales, mask, float32_norms(segment), limits)


def _lower_bounds(scan: Scan, segment: Segment, step: int) -> Tensor:
    """Return bounds of the bins of a sample, or of all rows for step 1: (Q, bins) float32."""
    from jasper_fast.kernels import mips as kernels

    if step == 1:
        return kernels.lower_bounds(scan)
    drawn = sample(segment, scan.rows, step)
    mask = None if scan.mask is None else scan.mask[..., drawn.numbers].contiguous()
    scales = (drawn.scales, scan.scales[1])
    return kernels.lower_bounds(replace(scan, rows=drawn.rows, scales=scales, mask=mask, norms=drawn.norms))


def search_cuda(
    segment: Segment, rows: Tensor, first_id: int, queries: Queries, valid: Tensor, state: TopKState, proven: bool
) -> None:
    """Search a segment for any number of queries on CUDA. No score may overflow.

    Many queries are always ranked by fp64 scores, because theirs are rounded to bfloat16.

    Args:
        segment: segment to search, with known ``norms``.
        rows: (N, D) result of `scan_rows`.
        first_id: id of the first row.
        queries: the Q queries.
        valid: bool (N,) or (Q, N) mask, contiguous. Empty if all rows are valid.
        state: best rows so far, updated in place.
        proven: True to rank by fp64 scores, False by the scan's.
    """
    from jasper_fast.kernels import mips
    from jasper_fast.kernels.mips_chunks import chunked
    from jasper_fast.kernels.mips_epilogue import Collected

    many = chunked(len(queries))
    proven |= many
    chosen = plan(len(segment), state.k, len(queries))
    scan = scan_of(segment, rows, queries, valid if valid.numel() else None, proven, many)
    threshold, spares, counts, more = _thresholds(_lower_bounds(scan, segment, chosen.step), chosen, state)
    rounding = mips.ROUNDING if many else 0.0
    found = mips.collect(scan, threshold, counts, chosen.capacity)
    collected = Collected(counts, *found, threshold, scan.norms, scan.limits, spares, rounding)
    own = state.part(slice(None))
    own.missed = torch.empty_like(state.missed)  # not read, because `again` says which queries to scan again
    again = rerank(collected, segment, first_id, queries, own, proven)
    del found, collected
    _repair(scan, segment, first_id, queries, state, again, more, chosen.capacity, proven)


def _repair(
    scan: Scan,
    segment: Segment,
    first_id: int,
    queries: Queries,
    state: TopKState,
    thresholds: Tensor,
    counts: Tensor,
    capacity: int,
    proven: bool,
) -> None:
    """Scan up to `MAX_REPAIRED` missed queries again, in registers, and mark those that fail twice as missed.

    Args:
        scan: the first scan.
        segment: segment to search.
        first_id: id of the first row.
        queries: the Q queries.
        state: best rows so far, updated in place.
        thresholds: (Q,) float32 thresholds of queries that this segment's scan missed, inf for others.
        counts: (Q,) int32 zeros.
        capacity: maximum number of candidates of a query.
        proven: True to rank by fp64 scores.
    """
    from jasper_fast.kernels import mips
    from jasper_fast.kernels.mips_epilogue import Collected

    incomplete = thresholds < torch.inf
    wanted = incomplete.sum(dtype=torch.int32)
    order, own, size = None, state, len(queries)
    if scan.queries.dtype != scan.rows.dtype or size > MAX_REPAIRED:
        # Incomplete queries first, lower ones first. A selection of so few is cheaper than a sort.
        priority = incomplete * size - torch.arange(size, device=thresholds.device)
        order = priority.topk(min(MAX_REPAIRED, size), sorted=False).indices
        queries, own = queries.take(order), state.part(order)
        state.missed |= incomplete  # those beyond the repair too
        thresholds, counts = thresholds[order], counts[order]
        mask = scan.mask if scan.mask is None or scan.mask.dim() == 1 else scan.mask[order]
        scan = scan_of(segment, scan.rows, queries, mask, proven, False)
    found = mips.collect(scan, thresholds, counts, capacity, wanted=wanted)
    collected = Collected(counts, *found, thresholds, scan.norms, scan.limits, thresholds)
    rerank(collected, segment, first_id, queries, own, proven)
    if order is not None:
        for name in ("best", "counts", "cutoffs", "broken", "missed"):
            getattr(state, name)[order] = getattr(own, name)


def operands(
    segment: Segment, rows: Tensor, queries: Queries, proven: bool, many: bool = False
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Return queries in the scan's dtype, their scales if they are integers, and (relative, absolute) errors.

    Args:
        segment: segment to search.
        rows: (N, D) result of `scan_rows`.
        queries: exact queries.
        proven: False assumes errors of 0.
        many: True for library products in `SCAN_DTYPE`, to which int8 codes convert exactly.
    """
    from jasper_fast.kernels import mips_prologue

    width = rows.shape[1]
    dtype = SCAN_DTYPE if many else rows.dtype
    # Sums of codes are exact.
    product = 8 * UNIT_ROUNDOFF if dtype == torch.int8 else TENSOR_CORE_FACTOR * accumulation(width)
    product += BOUND_SLACK
    for given, rounded in ((segment.rows.dtype, rows.dtype), (rows.dtype, dtype)):
        if given != rounded and given != torch.int8:  # each element rounded
            product += torch.finfo(rounded).eps / 2 * (1 + product)
    scan_queries, scales, limits = mips_prologue.operands(queries.exact, dtype, product, width * UNDERFLOW)
    if not proven:
        limits = torch.zeros_like(limits[0]), torch.zeros_like(limits[1])
    return scan_queries, scales, limits


def _thresholds(lower: Tensor, chosen: Plan, state: TopKState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the thresholds of a scan and of its repair, (Q,) float32, and zeros for the rows of both, (Q,) int32."""
    from jasper_fast.kernels import mips_prologue

    ranks = chosen.rank, chosen.spare_rank
    if lower.shape[1] <= MAX_KERNEL_BINS:
        return mips_prologue.thresholds(lower, ranks, state.cutoffs)
    best, cutoffs = lower.topk(max(ranks), dim=1).values, just_below(state.cutoffs)
    threshold, spare = (torch.maximum(best[:, rank - 1], cutoffs) for rank in ranks)
    counts, spare_counts = (torch.zeros_like(threshold, dtype=torch.int32) for _ in range(2))
    return threshold, spare, counts, spare_counts
