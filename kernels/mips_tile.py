"""Inner-product search: the parts of one tile of scores, namely products or its part of a chunk, mask and errors."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

BIN = tl.constexpr(64)  # as in jasper_fast.mips.segment
ROUNDING = 2.0**-8 * (1 + 2.0**-6)  # relative error of a bfloat16 score, which has 8 bits, with a margin
ROUNDED = tl.constexpr(ROUNDING)


@dataclass(frozen=True)
class Tile:
    """A block's part of a product: rows, columns, and the depth of one step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """Constants under the names of the kernels' arguments."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    @property
    def launch(self) -> dict[str, int]:
        """`constants` and the other options of a launch."""
        return {**self.constants, "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


@triton.jit
def tile_scores(
    CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, first, N, Q, D, stride_c, stride_q,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return scores of rows m0.. and queries n0.. (BLOCK_M, BLOCK_N) fp32. Sums of integer codes are exact.

    Without QUERIES, CORPUS has the bits of the bfloat16 scores of rows ``first``.. and all queries.
    """
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if QUERIES is None:
        inside = (m[:, None] < N - m0) & (n[None, :] < Q - n0)
        bits = tl.load(
            CORPUS + (m0 - first).to(tl.int64) * stride_c + n0 + (m[:, None] * stride_c + n[None, :]),
            mask=inside,
            other=0,
        )
        score = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
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
        score = acc.to(tl.float32)
    if ROW_SCALES is not None:
        score *= tl.load(ROW_SCALES + m0 + m, mask=m < N - m0, other=0.0)[:, None]
    if QUERY_SCALES is not None:
        score *= tl.load(QUERY_SCALES + n0 + n, mask=n < Q - n0, other=0.0)[None, :]
    return score


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
    score, NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q,
    ROWS_PER_NORM: tl.constexpr, CHUNKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return bounds (BLOCK_M, BLOCK_N) of the errors of a tile's scores. ``ROWS_PER_NORM`` rows have one norm."""
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    norm = tl.load(NORMS + m // ROWS_PER_NORM, mask=m < N, other=0.0)
    relative = tl.load(RELATIVE + n, mask=n < Q, other=0.0)
    absolute = tl.load(ABSOLUTE + n, mask=n < Q, other=0.0)
    error = norm[:, None] * relative[None, :] + absolute[None, :]
    if CHUNKED:
        error += tl.abs(score) * ROUNDED
    return error
