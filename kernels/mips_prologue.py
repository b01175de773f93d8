"""Inner-product search, what comes before the scan: queries as it multiplies them, and thresholds from bin maxima.

Each is one small launch for what would be a dozen of torch's: with one query, launches are most of what is not the
scan.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.registry import TYPES, Form, odd, with_ones

STEP = 512  # elements of a query at once
BLOCKS = (64, 1024, 4096, 16_384)  # values of which one program finds the k-th


@triton.jit
def kth_largest(values, k):
    """The k-th largest of (BLOCK,) float32 without NaN: bit by bit, the largest number that k of them reach."""
    bits = values.to(tl.int32, bitcast=True)
    # Integers in the order of the floats: of negative ones all bits turned, of others the first.
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 2147483648, tl.uint32)
    for _ in range(32):
        reached = tl.sum((order >= (found | bit)).to(tl.int32), axis=0)
        found = tl.where(reached >= k, found | bit, found)
        bit = bit >> 1
    kth = found.to(tl.int32, bitcast=True)
    return (kth ^ tl.where(kth < 0, -2147483648, -1)).to(tl.float32, bitcast=True)


@triton.jit
def just_below(cutoff):
    """A float32 below a float64: the one next to the nearest. -inf stays."""
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
    COUNTS,  # (Q,) int32, set to 0
    bins,
    rank,
    BLOCK: tl.constexpr,
):
    """The rank-th largest of a query's bounds, or what lies just below its cutoff, if that is more."""
    q = tl.program_id(0)
    b = tl.arange(0, BLOCK)
    lower = tl.load(LOWER + q.to(tl.int64) * bins + b, mask=b < bins, other=float("-inf"))
    tl.store(THRESHOLDS + q, tl.maximum(kth_largest(lower, rank), just_below(tl.load(CUTOFFS + q))))
    tl.store(COUNTS + q, 0)


@triton.jit
def operands_kernel(
    EXACT,  # (Q, D) fp64, no element beyond 1
    ASKED,  # (Q, D) of the plane's dtype
    SCALES,  # (Q,) fp32 of int8 codes, or None
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    D,
    product,  # fp32: error of the scan's own arithmetic, relative to the norms
    absolute,  # fp32
    PROVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A query rounded for the scan, and the error of its scores: relative to a row's norm, and absolute."""
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
            tl.store(ASKED + first + start + k, code.to(tl.int32).to(tl.int8), mask=inside)
            scanned = code * scale
        else:
            low = x.to(tl.float32).to(ASKED.dtype.element_ty)
            tl.store(ASKED + first + start + k, low, mask=inside)
            scanned = low.to(tl.float64)
        squares += scanned * scanned
        lost += (x - scanned) * (x - scanned)
    relative = tl.sqrt(tl.sum(squares, axis=0)) * product + tl.sqrt(tl.sum(lost, axis=0))
    # 1 + 2^-19 is more than the roundings here and of the product on its way to float32.
    if PROVEN:
        tl.store(RELATIVE + q, (relative * 1.0000019073486328125).to(tl.float32))
        tl.store(ABSOLUTE + q, absolute)
    else:
        tl.store(RELATIVE + q, 0.0)
        tl.store(ABSOLUTE + q, 0.0)


def operands(
    exact: Tensor, dtype: torch.dtype, product: float, absolute: float, proven: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Queries as the scan multiplies them (Q, D), their scales (Q,) if they are int8 codes, and errors.

    Args:
        exact: (Q, D) float64, contiguous, no element beyond 1.
        dtype: of the scan.
        product: error of the scan's own arithmetic, relative to the norms of row and query.
        absolute: error beside that.
        proven: False: no error is assumed, as where order need not be proven.

    Returns:
        The third: (error relative to a row's norm, absolute error), (Q,) float32 each.
    """
    size, width = exact.shape
    asked = torch.empty(size, width, dtype=dtype, device=exact.device)
    scales = torch.empty(size, device=exact.device) if dtype == torch.int8 else None
    limits = torch.empty(size, device=exact.device), torch.empty(size, device=exact.device)
    operands_kernel[(size,)](
        exact, asked, scales, *limits, width, product, absolute * (1 + 2.0**-20), PROVEN=proven, BLOCK=STEP,
        num_warps=4,
    )  # fmt: skip
    return asked, scales, limits


def thresholds(lower: Tensor, rank: int, cutoffs: Tensor) -> tuple[Tensor, Tensor]:
    """The rank-th largest of each query's bounds or a float32 below its cutoff, (Q,) float32; zeros, (Q,) int32.

    Args:
        lower: (Q, bins) float32, contiguous; at most `BLOCKS`[-1] bins, and no fewer than ``rank``.
        rank: 1: the largest.
        cutoffs: (Q,) float64.
    """
    size, bins = lower.shape
    found = torch.empty(size, dtype=torch.float32, device=lower.device)
    counts = torch.empty(size, dtype=torch.int32, device=lower.device)
    block = next(block for block in BLOCKS if block >= bins)
    thresholds_kernel[(size,)](lower, cutoffs, found, counts, bins, rank, BLOCK=block, num_warps=warps(block))
    return found, counts


def warps(block: int) -> int:
    """For a program that holds ``block`` values: at most 32 of them in a thread."""
    return min(16, max(1 if block <= 64 else 4, block // 512))


def forms() -> Iterator[Form]:
    """See `registry`."""
    for block in BLOCKS:
        types = {"LOWER": "*fp32:16", "CUTOFFS": "*fp64:16", "THRESHOLDS": "*fp32:16", "COUNTS": "*i32:16"}
        types |= {"bins": "i32", "rank": "i32"}
        form = Form(f"{block}", thresholds_kernel, types, {"BLOCK": block}, warps=warps(block), quick=block == 64)
        yield form
        if block == 64:
            yield from (with_ones(form, "rank"), with_ones(form, "bins", "rank"))
    for kind in (*TYPES.values(), "i8"):
        for proven in (True, False):
            types = {"EXACT": "*fp64:16", "ASKED": f"*{kind}:16", "RELATIVE": "*fp32:16", "ABSOLUTE": "*fp32:16"}
            types |= {"D": "i32:16", "product": "fp32", "absolute": "fp32"}
            types |= {"SCALES": "*fp32:16"} if kind == "i8" else {}
            constants: dict[str, Any] = {"PROVEN": proven, "BLOCK": STEP} | ({} if kind == "i8" else {"SCALES": None})
            label = f"{kind}, {'proven' if proven else 'fast'}"
            form = Form(label, operands_kernel, types, constants, quick=proven and kind in ("bf16", "i8"))
            yield from (form, odd(form), with_ones(form, "D"))
