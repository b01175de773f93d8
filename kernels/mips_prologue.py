"""Inner-product search, before the scan: queries in the scan's dtype, and thresholds from bin maxima.

Each step is one small launch in place of a dozen torch launches. With one query, launches take most of the time
outside the scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 512  # elements of a query at once
BLOCKS = (64, 1024, 4096, 16_384)  # values among which one program finds the k-th


@triton.jit
def kth_largest(values, k):
    """Return the k-th largest of (BLOCK,) float32 without NaN: bit by bit, the largest number that k of them reach."""
    bits = values.to(tl.int32, bitcast=True)
    # Integers in the order of the floats: all bits of negative ones flipped, the first bit of others.
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    prefix = tl.full((), 0, tl.uint32)
    bit = tl.full((), 2147483648, tl.uint32)
    for _ in range(32):
        reached = tl.sum((order >= (prefix | bit)).to(tl.int32), axis=0)
        prefix = tl.where(reached >= k, prefix | bit, prefix)
        bit = bit >> 1
    kth = prefix.to(tl.int32, bitcast=True)
    return (kth ^ tl.where(kth < 0, -2147483648, -1)).to(tl.float32, bitcast=True)


@triton.jit
def just_below(cutoff):
    """Return a float32 below a float64: the one below the nearest. -inf stays."""
    nearest = cutoff.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 2147483647)
    order = tl.where(nearest == 0, -1, order) - 1  # of both zeros
    lower = (order ^ ((order >> 31) & 2147483647)).to(tl.float32, bitcast=True)
    return tl.where(nearest == float("-inf"), nearest, lower)


@triton.jit
def thresholds_kernel(
    LOWER,  # (Q, bins) fp32
    CUTOFFS,  # (Q,) fp64
    THRESHOLDS,  # (Q,) fp32
    SPARES,  # (Q,) fp32: the same of a lower rank
    COUNTS,  # (Q,) int32, set to 0
    SPARE_COUNTS,  # (Q,) int32, set to 0
    bins,
    rank,
    spare_rank,
    BLOCK: tl.constexpr,
):
    """Write the rank-th largest of a query's bounds, or a float32 just below its cutoff if that is larger."""
    q = tl.program_id(0)
    b = tl.arange(0, BLOCK)
    lower = tl.load(LOWER + q.to(tl.int64) * bins + b, mask=b < bins, other=float("-inf"))
    cutoff = just_below(tl.load(CUTOFFS + q))
    tl.store(THRESHOLDS + q, tl.maximum(kth_largest(lower, rank), cutoff))
    tl.store(SPARES + q, tl.maximum(kth_largest(lower, spare_rank), cutoff))
    tl.store(COUNTS + q, 0)
    tl.store(SPARE_COUNTS + q, 0)


@triton.jit
def operands_kernel(
    EXACT,  # (Q, D) fp64, no element beyond 1
    SCAN_QUERIES,  # (Q, D) in the scan's dtype
    SCALES,  # (Q,) fp32 of int8 codes, or None
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    D,
    product,  # fp32: error of the scan's arithmetic, relative to the norms
    absolute,  # fp32
    BLOCK: tl.constexpr,
):
    """Write a query rounded for the scan, and its scores' errors: relative to a row's norm, and absolute."""
    q = tl.program_id(0)
    first = q.to(tl.int64) * D
    k = tl.arange(0, BLOCK)
    if SCALES is not None:
        largest = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, D, BLOCK):
            largest = tl.maximum(largest, tl.abs(tl.load(EXACT + first + start + k, mask=k < D - start, other=0.0)))
        short = (tl.max(largest, axis=0) / 127).to(tl.float32)
        short = tl.where(short > 0, short, 1.0)
        tl.store(SCALES + q, short)
        scale = short.to(tl.float64)
    squares, lost = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, D, BLOCK):
        inside = k < D - start
        x = tl.load(EXACT + first + start + k, mask=inside, other=0.0)
        if SCALES is not None:
            code = x / scale + 6755399441055744.0 - 6755399441055744.0  # 1.5 x 2^52: nearest integer, half to even
            code = tl.minimum(tl.maximum(code, -127.0), 127.0)
            tl.store(SCAN_QUERIES + first + start + k, code.to(tl.int32).to(tl.int8), mask=inside)
            scanned = code * scale
        else:
            low = x.to(tl.float32).to(SCAN_QUERIES.dtype.element_ty)
            tl.store(SCAN_QUERIES + first + start + k, low, mask=inside)
            scanned = low.to(tl.float64)
        squares += scanned * scanned
        lost += (x - scanned) * (x - scanned)
    relative = tl.sqrt(tl.sum(squares, axis=0)) * product + tl.sqrt(tl.sum(lost, axis=0))
    # 1 + 2^-19 exceeds the roundings here and those of the product's conversion to float32.
    tl.store(RELATIVE + q, (relative * 1.0000019073486328125).to(tl.float32))
    tl.store(ABSOLUTE + q, absolute)


def operands(
    exact: Tensor, dtype: torch.dtype, product: float, absolute: float
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Round queries for the scan.

    Args:
        exact: (Q, D) float64 queries, contiguous, with no element beyond 1.
        dtype: dtype of the scan.
        product: error of the scan's arithmetic, relative to the norms of row and query.
        absolute: absolute error of the scan's arithmetic.

    Returns:
        queries (Q, D) in the scan's dtype, their scales (Q,) float32 if they are int8 codes, and two errors. One is
        relative to a row's norm and one absolute, (Q,) float32 each.
    """
    size, width = exact.shape
    scan_queries = torch.empty(size, width, dtype=dtype, device=exact.device)
    scales = torch.empty(size, device=exact.device) if dtype == torch.int8 else None
    limits = torch.empty(size, device=exact.device), torch.empty(size, device=exact.device)
    operands_kernel[(size,)](
        exact, scan_queries, scales, *limits, width, product, absolute * (1 + 2.0**-20), BLOCK=STEP
    )
    return scan_queries, scales, limits


def thresholds(lower: Tensor, ranks: tuple[int, int], cutoffs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the thresholds of a scan and of its repair, (Q,) float32, and zeroed counters of both, (Q,) int32.

    Args:
        lower: (Q, bins) float32 bounds, contiguous, with ``max(ranks)`` to `BLOCKS`[-1] bins.
        ranks: ranks of both thresholds among the bounds, 1 for the largest.
        cutoffs: (Q,) float64 cutoffs.
    """
    size, bins = lower.shape
    threshold, spare = (torch.empty(size, dtype=torch.float32, device=lower.device) for _ in range(2))
    counts, spare_counts = (torch.empty(size, dtype=torch.int32, device=lower.device) for _ in range(2))
    block = next(block for block in BLOCKS if block >= bins)
    thresholds_kernel[(size,)](
        lower, cutoffs, threshold, spare, counts, spare_counts, bins, *ranks, BLOCK=block, num_warps=warps(block)
    )
    return threshold, spare, counts, spare_counts


def warps(block: int) -> int:
    """Return the warps of a program that holds ``block`` values, at most 32 of them in a thread."""
    return min(16, max(1 if block <= 64 else 4, block // 512))
