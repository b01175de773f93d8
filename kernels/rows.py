"""L2 normalisation by rows: reciprocal norms and the backward pass.

Cost: memory. For B = 8192, D = 12288 in bfloat16, norms read 0.2 GB, 0.05 ms on an H200. Backward moves 0.8 GB, 0.2 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT32_MAX = tl.constexpr(3.4028234e38)


@triton.jit
def row_part(X, row, columns, D, stride_xb, stride_xd):
    """Return columns of a row in float32, 0 beyond its end."""
    return tl.load(X + row * stride_xb + columns * stride_xd, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def reciprocal_norms_kernel(
    X,  # (B, D)
    R,  # (B,) fp32
    D,
    stride_xb,
    stride_xd,
    BLOCK: tl.constexpr,
):
    """Write R = 1 / |x| for each row, 0 for a zero row and NaN for a row with NaN or infinity."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)  # of float32 numbers they neither overflow nor vanish
    for start in range(0, D, BLOCK):
        x = row_part(X, row, (start + offsets).to(tl.int64), D, stride_xb, stride_xd).to(tl.float64)
        squares += x * x
    total = tl.sum(squares, axis=0)
    reciprocal = tl.minimum(1.0 / tl.sqrt(tl.where(total == 0.0, 1.0, total)), FLOAT32_MAX)
    reciprocal = tl.where(total == 0.0, 0.0, reciprocal)
    tl.store(R + row, tl.where(total < float("inf"), reciprocal, float("nan")).to(tl.float32))


@triton.jit
def l2_normalize_backward_kernel(
    G,  # (B, D) gradient with respect to the unit rows
    X,  # (B, D)
    R,  # (B,) fp32
    OUT,  # (B, D), may be G
    scale,
    D,
    stride_gb,
    stride_xb,
    stride_xd,
    stride_ob,
    BLOCK: tl.constexpr,
):
    """Write OUT = scale * R (g - u (u . g)) with u = R x, the gradient with respect to the raw rows."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    r = tl.load(R + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        columns = (start + offsets).to(tl.int64)
        x, g = row_part(X, row, columns, D, stride_xb, stride_xd), row_part(G, row, columns, D, stride_gb, 1)
        products += (x * r) * g
    along = tl.sum(products, axis=0)
    for start in range(0, D, BLOCK):
        columns = (start + offsets).to(tl.int64)
        x, g = row_part(X, row, columns, D, stride_xb, stride_xd), row_part(G, row, columns, D, stride_gb, 1)
        out = (g - (x * r) * along) * scale * r
        tl.store(OUT + row * stride_ob + columns, out.to(OUT.dtype.element_ty), mask=columns < D)


def _block(width: int) -> int:
    return min(max(triton.next_power_of_2(width), 16), 2048)


def warps(block: int) -> int:
    """Return the warps of a program. More would repeat each other, and a copy could read what another has written."""
    return max(1, min(4, block // 32))


def reciprocal_norms(vectors: Tensor) -> Tensor:
    """Return 1 / |x| of each row in float32, 0 for a zero row and NaN for one with NaN or infinity: (B, D) -> (B,)."""
    rows, width = vectors.shape
    out = torch.empty(rows, dtype=torch.float32, device=vectors.device)
    block = _block(width)
    reciprocal_norms_kernel[(rows,)](vectors, out, width, *vectors.stride(), BLOCK=block, num_warps=warps(block))
    return out


def l2_normalize_backward(gradient: Tensor, vectors: Tensor, reciprocals: Tensor, scale: float, out: Tensor) -> None:
    """Write the scaled gradient with respect to rows, from the gradient with respect to unit rows.

    Args:
        gradient: (B, D) gradient with respect to the unit rows, rows contiguous.
        vectors: (B, D) rows before normalisation, any strides.
        reciprocals: (B,) float32 result of `reciprocal_norms`.
        scale: factor of the result.
        out: (B, D) result, rows contiguous. It may be ``gradient``.
    """
    rows, width = vectors.shape
    block = _block(width)
    strides = gradient.stride(0), *vectors.stride(), out.stride(0)
    l2_normalize_backward_kernel[(rows,)](
        gradient, vectors, reciprocals, out, scale, width, *strides, BLOCK=block, num_warps=warps(block)
    )
