"""Packing of (B, B) matrices into their strict upper triangle, row by row, and unpacking."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.registry import Form, with_ones

COLUMNS = 1024
TILE = 64


@triton.jit
def pack_kernel(
    MATRIX,  # (B, B)
    PACKED,  # (P,) fp32
    B,
    stride_mb,
    BLOCK: tl.constexpr,
):
    """Pack elements right of the diagonal, one row and BLOCK columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    new = (columns > row) & (columns < B)
    x = tl.load(MATRIX + row * stride_mb + columns, mask=new)
    tl.store(PACKED + row * (2 * B - row - 1) // 2 - row - 1 + columns, x, mask=new)


@triton.jit
def unpack_kernel(
    PACKED,  # (P,) int32
    MATRIX,  # (B, B) fp32
    scale,
    B,
    tiles,
    TILE: tl.constexpr,
):
    """Write scale * PACKED on both sides of a zero diagonal. A program reads an upper tile and writes both."""
    tile_row, tile_column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tile_column >= tile_row:
        rows = (tile_row * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
        columns = (tile_column * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
        inside = (rows < B) & (columns < B)
        new = inside & (columns > rows)
        x = tl.load(PACKED + rows * (2 * B - rows - 1) // 2 - rows - 1 + columns, mask=new, other=0)
        x = x.to(tl.float32) * scale
        tl.store(MATRIX + columns * B + rows, x, mask=new)
        tl.store(MATRIX + rows * B + columns, x, mask=inside & (columns >= rows))


def pack_pairs(matrix: Tensor) -> Tensor:
    """Pack a (B, B) float32 matrix with contiguous rows into (P,)."""
    rows = len(matrix)
    packed = torch.empty(rows * (rows - 1) // 2, dtype=matrix.dtype, device=matrix.device)
    pack_kernel[(rows, triton.cdiv(rows, COLUMNS))](matrix, packed, rows, matrix.stride(0), BLOCK=COLUMNS)
    return packed


def unpack_pairs(packed: Tensor, rows: int, scale: float) -> Tensor:
    """Unpack (P,) int32 into (B, B) float32: scale * packed on both sides of a zero diagonal."""
    matrix = torch.empty(rows, rows, dtype=torch.float32, device=packed.device)
    tiles = triton.cdiv(rows, TILE)
    unpack_kernel[(tiles * tiles,)](packed, matrix, scale, rows, tiles, TILE=TILE, num_warps=8)
    return matrix


def forms() -> Iterator[Form]:
    """Yield the forms of this module's kernels. See `registry`."""
    pack = Form(
        f"{COLUMNS}",
        pack_kernel,
        {"MATRIX": "*fp32:16", "PACKED": "*fp32:16", "B": "i32", "stride_mb": "i32"},
        {"BLOCK": COLUMNS},
        quick=True,
    )
    unpack = Form(
        f"{TILE}x{TILE}",
        unpack_kernel,
        {"PACKED": "*i32:16", "MATRIX": "*fp32:16", "scale": "fp32", "B": "i32", "tiles": "i32"},
        {"TILE": TILE},
        warps=8,
        stack={90: 8, 100: 8},
        quick=True,
    )
    yield from (pack, unpack)
    yield with_ones(pack, "B", "stride_mb")
    yield with_ones(unpack, "tiles")
    yield with_ones(unpack, "B", "tiles")
