"""Scores of all pairs of rows, packed as the strict upper triangle of a matrix row by row, and its unpacking.

cuBLAS chooses another kernel, and so another rounding, for another shape. Here each score is the same sum in every
tile and for either order of its rows, so that equal rows tie.

Cost: a tile of 128 x 64 takes 55 TFLOP/s as three TF32 products. Of B x B tiles half are computed: for B = 8192, D =
1024 that is 69 GFLOP, 1.3 ms on an H200. Unpacking moves 0.4 GB, 0.1 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}
SIDE = 64  # of a tile to unpack


@triton.jit
def _high(x):
    """Round float32 to the 11 bits of TF32, to nearest. Tensor cores ignore the others. The remainder keeps NaN."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def pair_scores_kernel(
    X,  # (B, D) fp32
    PACKED,  # (P,) fp32
    B,
    D,
    stride_xb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the products of a tile's pairs of rows, those right of the diagonal."""
    tiles = tl.cdiv(B, BLOCK_N)
    first_row, first_column = tl.program_id(0) // tiles * BLOCK_M, tl.program_id(0) % tiles * BLOCK_N
    if first_column + BLOCK_N - 1 > first_row:
        rows = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        columns = (first_column + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        k = tl.arange(0, BLOCK_K)
        left, right = X + rows * stride_xb + k[None, :], X + columns * stride_xb + k[:, None]
        coarse = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        fine, mirrored = coarse, coarse
        for start in range(0, D, BLOCK_K):
            a = tl.load(left + start, mask=(rows < B) & (start + k < D)[None, :], other=0.0)
            b = tl.load(right + start, mask=(start + k < D)[:, None] & (columns < B), other=0.0)
            a_high, b_high = _high(a), _high(b)
            coarse = tl.dot(a_high, b_high, coarse, input_precision="tf32")
            fine = tl.dot(a_high, b - b_high, fine, input_precision="tf32")
            mirrored = tl.dot(a - a_high, b_high, mirrored, input_precision="tf32")
        new = (rows < B) & (columns < B) & (columns > rows)
        # Symmetric to the last bit, because each sum is.
        tl.store(PACKED + rows * (2 * B - rows - 1) // 2 - rows - 1 + columns, coarse + (fine + mirrored), mask=new)


@triton.jit
def unpack_kernel(
    PACKED,  # (P,) int32
    MATRIX,  # (B, B) fp32
    scale,
    B,
    tiles,
    SIDE: tl.constexpr,
):
    """Write scale * PACKED on both sides of a zero diagonal. A program reads an upper tile and writes both."""
    tile_row, tile_column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tile_column >= tile_row:
        rows = (tile_row * SIDE + tl.arange(0, SIDE)).to(tl.int64)[:, None]
        columns = (tile_column * SIDE + tl.arange(0, SIDE)).to(tl.int64)[None, :]
        inside = (rows < B) & (columns < B)
        new = inside & (columns > rows)
        x = tl.load(PACKED + rows * (2 * B - rows - 1) // 2 - rows - 1 + columns, mask=new, other=0)
        x = x.to(tl.float32) * scale
        tl.store(MATRIX + columns * B + rows, x, mask=new)
        tl.store(MATRIX + rows * B + columns, x, mask=inside & (columns >= rows))


def pair_scores(unit: Tensor) -> Tensor:
    """Return the products of all pairs of float32 rows (B, D), as (P,) float32. Those of equal pairs are equal."""
    unit = unit.contiguous()
    rows, width = unit.shape
    packed = torch.empty(rows * (rows - 1) // 2, dtype=torch.float32, device=unit.device)
    programs = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(rows, TILE["BLOCK_N"])
    pair_scores_kernel[(programs,)](unit, packed, rows, width, width, **TILE)
    return packed


def unpack_pairs(packed: Tensor, rows: int, scale: float) -> Tensor:
    """Unpack (P,) int32 into (B, B) float32: scale * packed on both sides of a zero diagonal."""
    matrix = torch.empty(rows, rows, dtype=torch.float32, device=packed.device)
    tiles = triton.cdiv(rows, SIDE)
    unpack_kernel[(tiles * tiles,)](packed, matrix, scale, rows, tiles, SIDE=SIDE, num_warps=8)
    return matrix
