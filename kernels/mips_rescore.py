"""Inner-product search: fp64 products of pairs of a query and a row.

Cost: a row's bytes for each pair. A million pairs of width 1024 in bfloat16 read 2 GB, 0.5 ms of an H200's memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS, DEPTH = 8, 128  # products at once, and elements of each
LEVELS = tl.constexpr(7)  # DEPTH is 2 to this power


@triton.jit
def exact_products(
    QUERIES,  # pointers to queries of D fp64, (PAIRS, 1), or (1, 1) to one for all
    CORPUS,  # (N, D)
    ROW_SCALES,  # (N,) fp32, or None
    row,
    inside,
    D,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return fp64 products with rows (PAIRS,) int64. The order of a sum depends on D alone, so equal rows tie.

    Columns first add up elements BLOCK_K apart, then fold pair by pair. A sum over an axis would add in an order that
    depends on the compiler's layout of threads.
    """
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((PAIRS, BLOCK_K), tl.float64)
    for start in range(0, D, BLOCK_K):
        in_row = start + k[None, :] < D
        c = tl.load(CORPUS + row[:, None] * D + (start + k)[None, :], mask=inside[:, None] & in_row, other=0)
        q = tl.load(QUERIES + (start + k)[None, :], mask=in_row, other=0.0)
        if CORPUS.dtype.element_ty == tl.int8:
            c = c.to(tl.float32)
        acc = tl.fma(c.to(tl.float64), tl.broadcast_to(q, (PAIRS, BLOCK_K)), acc)
    for level in tl.static_range(LEVELS):
        even, uneven = tl.split(tl.reshape(acc, (PAIRS, BLOCK_K >> (level + 1), 2)))
        acc = even + uneven
    total = tl.reshape(acc, (PAIRS,))
    if ROW_SCALES is not None:
        total *= tl.load(ROW_SCALES + row, mask=inside, other=0.0).to(tl.float64)
    return total


@triton.jit
def rescore_kernel(
    QUERIES,  # (Q, D) fp64
    CORPUS,  # (N, D)
    ROW_SCALES,  # (N,) fp32, or None
    QUERY,  # (P,) int64
    ROW,  # (P,) int64, -1: none
    OUT,  # (P,) fp64
    P,
    D,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write fp64 products of pairs, -inf for row -1."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    query = tl.load(QUERY + pair, mask=pair < P, other=0)
    row = tl.load(ROW + pair, mask=pair < P, other=-1)
    total = exact_products(QUERIES + query[:, None] * D, CORPUS, ROW_SCALES, row, row >= 0, D, PAIRS, BLOCK_K)
    tl.store(OUT + pair, tl.where(row >= 0, total, float("-inf")), mask=pair < P)


def rescore(queries: Tensor, rows: Tensor, scales: Tensor | None, query: Tensor, row: Tensor) -> Tensor:
    """Return float64 products of pairs, (P,).

    Args:
        queries: (Q, D) float64 queries, contiguous.
        rows: (N, D) rows, contiguous.
        scales: (N,) float32 scales of int8 rows. None for other dtypes.
        query: (P,) int64 query numbers.
        row: (P,) int64 row numbers. -1 gives -inf.
    """
    out = torch.empty(len(row), dtype=torch.float64, device=rows.device)
    if len(row):
        pairs = query.contiguous(), row.contiguous()
        rescore_kernel[(triton.cdiv(len(row), PAIRS),)](
            queries, rows, scales, *pairs, out, len(row), rows.shape[1], PAIRS=PAIRS, BLOCK_K=DEPTH, num_warps=4
        )
    return out
