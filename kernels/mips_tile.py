"""Inner-product search: the parts of one tile of scores, namely its origin, products, mask and error bounds."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_origin(tile, across, down, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first corpus row and first query of a tile: ``GROUP`` corpus tiles, then the next queries."""
    group = tile // (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    inside = tile % (GROUP * across)
    return (group * GROUP + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def tile_scores(
    CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, N, Q, D, stride_c, stride_q,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return scores of rows m0.. and queries n0.. (BLOCK_M, BLOCK_N) fp32. Sums of integer codes are exact."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if ROW_SCALES is None else tl.int32)
    if DESCRIPTORS:
        for start in range(0, D, BLOCK_K):
            c = CORPUS.load([m0, start])
            q = QUERIES.load([n0, start])
            acc = tl.dot(c, q.T, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    else:
        # 64-bit scalars, 32-bit offsets inside a tile.
        left, right = CORPUS + m0.to(tl.int64) * stride_c, QUERIES + n0.to(tl.int64) * stride_q
        c_offsets = m[:, None] * stride_c + k[None, :]
        q_offsets = n[None, :] * stride_q + k[:, None]
        for start in range(0, D, BLOCK_K):
            inside = start + k < D
            c = tl.load(left + c_offsets, mask=(m[:, None] < N - m0) & inside[None, :], other=0)
            q = tl.load(right + q_offsets, mask=(n[None, :] < Q - n0) & inside[:, None], other=0)
            acc = tl.dot(c, q, acc, input_precision=PRECISION, out_dtype=acc.dtype)
            left += BLOCK_K
            right += BLOCK_K
    if ROW_SCALES is not None:
        row = tl.load(ROW_SCALES + m0 + m, mask=m < N - m0, other=0.0)
        query = tl.load(QUERY_SCALES + n0 + n, mask=n < Q - n0, other=0.0)
        return acc.to(tl.float32) * row[:, None] * query[None, :]
    else:
        return acc


@triton.jit
def allowed(VALID, m0, n0, N, Q, stride_v, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the mask of a tile's existing and valid rows and queries: (BLOCK_M, BLOCK_N)."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (m0 + m[:, None] < N) & (n0 + n[None, :] < Q)
    if VALID is not None:
        # A mask for all queries has stride 0.
        first = VALID + n0.to(tl.int64) * stride_v + m0
        inside &= tl.load(first + (n[None, :] * stride_v + m[:, None]), mask=inside, other=0) != 0
    return inside


@triton.jit
def errors(
    NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q, ROWS_PER_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return bounds (BLOCK_M, BLOCK_N) of the errors of a tile's scores. ``ROWS_PER_NORM`` rows have one norm."""
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    norm = tl.load(NORMS + m // ROWS_PER_NORM, mask=m < N, other=0.0)
    relative = tl.load(RELATIVE + n, mask=n < Q, other=0.0)
    absolute = tl.load(ABSOLUTE + n, mask=n < Q, other=0.0)
    return norm[:, None] * relative[None, :] + absolute[None, :]
