"""Rows that are gathered by index: their cosines, and weighted sums of them. For the ranking losses.

Both kernels read a gathered row once, and these bytes decide their time. For Q 4096, K 32, D 1024 in bfloat16 they are
0.27 GB, 0.1 ms of an H200's memory. Sums are over sorted entries, not atomic, so repeated runs give the same bits.
A block adds the entries of its document one after the other, so a document in very many lists makes one block slow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.rows import row_part
from jasper_fast.kernels.strips import Rows

CANDIDATES, COLUMNS = 16, 128  # of a block of cosines
ENTRIES, SUM_COLUMNS = 8, 256  # of a block of sums


@triton.jit
def gathered_cosines_kernel(
    X,  # (Q, D)
    Y,  # (M, D)
    RX,  # (Q,) fp32 reciprocal norms
    RY,  # (M,) fp32
    CHOSEN,  # (Q, K) int64 rows of Y
    OUT,  # (Q, K) fp32
    K,
    M,
    D,
    stride_xb,
    stride_xd,
    stride_yb,
    stride_yd,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write cosines of a row of X and BLOCK_C of its chosen rows of Y: 0 for index -1, NaN for others outside Y."""
    query = tl.program_id(0).to(tl.int64)
    c, d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    chosen = tl.load(CHOSEN + query * K + c, mask=c < K, other=-1)
    there = (chosen >= 0) & (chosen < M)
    rx, ry = tl.load(RX + query), tl.load(RY + chosen, mask=there, other=0.0)
    acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = (start + d).to(tl.int64)
        x = row_part(X, query, columns, D, stride_xb, stride_xd) * rx
        rows = Y + chosen[:, None] * stride_yb + columns[None, :] * stride_yd
        y = tl.load(rows, mask=there[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32) * ry[:, None]
        acc += x[None, :] * y
    cosine = tl.where(there | (chosen == -1), tl.sum(acc, axis=1), float("nan"))
    tl.store(OUT + query * K + c, cosine, mask=c < K)


@triton.jit
def weighted_sums_kernel(
    X,  # (N, D)
    R,  # (N,) fp32 reciprocal norms
    ROWS,  # (entries,) int64 rows of X
    WEIGHTS,  # (entries,) fp32
    STARTS,  # (groups + 1,) int64 first entry of each group, and the last one's end
    OUT,  # (groups, D) fp32
    N,
    D,
    stride_xb,
    stride_xd,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write BLOCK_D columns of a group's sum of WEIGHTS times unit rows. Rows of weight 0 are not read."""
    group = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    begin = tl.load(STARTS + group)
    count = (tl.load(STARTS + group + 1) - begin).to(tl.int32)
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, count, BLOCK_E):
        entry = begin + start + e
        weight = tl.load(WEIGHTS + entry, mask=start + e < count, other=0.0)
        row = tl.load(ROWS + entry, mask=start + e < count, other=-1)
        there = (row >= 0) & (row < N) & (weight != 0.0)
        r = tl.load(R + row, mask=there, other=0.0)
        inside = there[:, None] & (columns < D)[None, :]
        x = tl.load(X + row[:, None] * stride_xb + columns[None, :] * stride_xd, mask=inside, other=0.0)
        acc += x.to(tl.float32) * r[:, None] * weight[:, None]  # NaN as a weight counts, also without a row
    tl.store(OUT + group * D + columns, tl.sum(acc, axis=0), mask=columns < D)


def gathered_cosines(x: Rows, y: Rows, chosen: Tensor) -> Tensor:
    """Return the cosines of each row of x with its chosen rows of y.

    Args:
        x: rows (Q, D).
        y: rows (M, D), in any dtype.
        chosen: rows of y (Q, K), int64, contiguous. -1 gives 0, another index outside y gives NaN.

    Returns:
        (Q, K) float32.
    """
    count, k = chosen.shape
    out = torch.empty(count, k, dtype=torch.float32, device=chosen.device)
    sizes = (k, *y.raw.shape, *x.raw.stride(), *y.raw.stride())
    gathered_cosines_kernel[(count, triton.cdiv(k, CANDIDATES))](
        x.raw, y.raw, x.reciprocals, y.reciprocals, chosen, out, *sizes, BLOCK_C=CANDIDATES, BLOCK_D=COLUMNS
    )
    return out


def gathered_gradients(
    x: Rows, y: Rows, chosen: Tensor, weights: Tensor, x_gradient: bool, y_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to the rows of x and y, from that with respect to `gathered_cosines`.

    Args:
        x: rows (Q, D).
        y: rows (M, D).
        chosen: rows of y (Q, K), int64, contiguous.
        weights: derivatives (Q, K) float32, contiguous. Rows of weight 0 are not read.
        x_gradient: whether the gradient of x is wanted. An unwanted one is empty.
        y_gradient: the same for y.
    """
    (count, k), device = chosen.shape, chosen.device
    left = right = None
    if x_gradient:
        starts = torch.arange(0, (count + 1) * k, k, device=device)
        left = _weighted_sums(y, chosen.view(-1), weights.reshape(-1), starts)
    if y_gradient:
        documents, order = chosen.view(-1).sort(stable=True)
        starts = torch.searchsorted(documents, torch.arange(len(y.raw) + 1, device=device))
        right = _weighted_sums(x, order // k, weights.reshape(-1)[order], starts)
    return x.backward(left, 1.0), y.backward(right, 1.0)


def _weighted_sums(x: Rows, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    groups, width = len(starts) - 1, x.raw.shape[1]
    out = torch.empty(groups, width, dtype=torch.float32, device=rows.device)
    sizes = (*x.raw.shape, *x.raw.stride())
    weighted_sums_kernel[(groups, triton.cdiv(width, SUM_COLUMNS))](
        x.raw, x.reciprocals, rows, weights, starts, out, *sizes, BLOCK_E=ENTRIES, BLOCK_D=SUM_COLUMNS
    )
    return out
