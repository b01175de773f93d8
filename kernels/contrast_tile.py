"""Tiles of the Q x M matrix of cosines of queries and documents, with the terms of the InfoNCE loss.

Both kernels compute a tile of logits, and with a teacher its tile of cosines too, to leave out false negatives. So a
tile costs 2 (D + E) FLOP an element, twice, and the two gradients' products 4 D. For Q = M = 8192 and D = E = 1024 that
is 0.8 TFLOP, about 2 ms at 400 TFLOP/s. Log sums read operands from L2: a 128 x 64 tile has 43 FLOP a byte in bf16.
Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from jasper_fast.kernels.configs import TILES_32_BIT, TILES_SOFTMAX, Tile
from jasper_fast.kernels.pair_tile import GROUP, out_of_range
from jasper_fast.kernels.registry import TYPES, Form, unaligned, with_ones


@triton.jit
def cross_products(
    X, Y, r0, r1, i0, j0, Q, M, D, stride_xb, stride_xd, stride_yb, stride_yd,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return products of rows i0.. of X with rows j0.. of Y, of unit rows if UNIT: (BLOCK_M, BLOCK_N)."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, columns = (Q - i0).to(tl.int32), (M - j0).to(tl.int32)
    # 64-bit scalars, 32-bit offsets inside a tile.
    left, right = X + i0 * stride_xb, Y + j0 * stride_yb
    left_offsets = m[:, None] * stride_xb + k[None, :] * stride_xd
    right_offsets = k[:, None] * stride_yd + n[None, :] * stride_yb
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + k < D
        a = tl.load(left + left_offsets, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
        b = tl.load(right + right_offsets, mask=inside[:, None] & (n[None, :] < columns), other=0.0)
        if UNIT:
            a, b = a.to(tl.float32) * r0[:, None], b.to(tl.float32) * r1[None, :]
            if X.dtype.element_ty == Y.dtype.element_ty:
                a, b = a.to(X.dtype.element_ty), b.to(X.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left += BLOCK_K * stride_xd
        right += BLOCK_K * stride_yd
    return acc


@triton.jit
def cross_cosines(
    X, Y, RX, RY, i0, j0, Q, M, D, stride_xb, stride_xd, stride_yb, stride_yd,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return cosines of rows i0.. of X with rows j0.. of Y, with RX and RY their reciprocal norms."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    r0 = tl.load(RX + i0 + m, mask=m < Q - i0, other=0.0)
    r1 = tl.load(RY + j0 + n, mask=n < M - j0, other=0.0)
    if X.dtype.element_ty != Y.dtype.element_ty or X.dtype.element_ty == tl.float32:
        acc = cross_products(X, Y, r0, r1, i0, j0, Q, M, D, stride_xb, stride_xd, stride_yb, stride_yd,
                             True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    elif X.dtype.element_ty == tl.float16:
        acc = cross_products(X, Y, r0, r1, i0, j0, Q, M, D, stride_xb, stride_xd, stride_yb, stride_yd,
                             False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        acc = acc * (r0[:, None] * r1[None, :])
    else:
        # bfloat16 has float32's range, so the few rows whose squares overflow are normalised before the product.
        if tl.max(out_of_range(r0), axis=0) + tl.max(out_of_range(r1), axis=0) > 0:
            acc = cross_products(X, Y, r0, r1, i0, j0, Q, M, D, stride_xb, stride_xd, stride_yb, stride_yd,
                                 True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        else:
            acc = cross_products(X, Y, r0, r1, i0, j0, Q, M, D, stride_xb, stride_xd, stride_yb, stride_yd,
                                 False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
            acc = acc * (r0[:, None] * r1[None, :])
    return acc


@triton.jit
def negative_logits(
    X, Y, RX, RY, TX, TY, RTX, RTY, NUMBERS, OWN, BAR, logit_scale, i0, j0, Q, M, D, E,
    stride_xb, stride_xd, stride_yb, stride_yd, stride_txb, stride_txd, stride_tyb, stride_tyd,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return logits of queries i0.. and documents j0.. in powers of two. A document that is no negative has -inf."""
    logits = cross_cosines(X, Y, RX, RY, i0, j0, Q, M, D, stride_xb, stride_xd, stride_yb, stride_yd,
                           PRECISION, BLOCK_M, BLOCK_N, BLOCK_K) * logit_scale  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    number = tl.load(NUMBERS + j0 + n, mask=n < M - j0, other=0)
    own = tl.load(OWN + i0 + m, mask=m < Q - i0, other=0)
    left_out = (number[None, :] == own[:, None]) | (n[None, :] >= M - j0)
    if TX is not None:
        scores = cross_cosines(TX, TY, RTX, RTY, i0, j0, Q, M, E, stride_txb, stride_txd, stride_tyb, stride_tyd,
                               PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        bar = tl.load(BAR + i0 + m, mask=m < Q - i0, other=0.0)[:, None]
        left_out = left_out | (scores > bar)
        # Comparisons drop NaN.
        logits = tl.where((scores == scores) & (bar == bar), logits, float("nan"))
    return tl.where(left_out & (logits == logits), float("-inf"), logits)


@triton.jit
def negative_sums_kernel(
    X,  # (Q, D) queries
    Y,  # (M, D) documents
    RX,  # (Q,) fp32 reciprocal norms
    RY,  # (M,) fp32
    TX,  # (Q, E) the teacher's queries, or None
    TY,  # (M, E) the teacher's documents, or None
    RTX,  # (Q,) fp32, or None
    RTY,  # (M,) fp32, or None
    NUMBERS,  # (M,) int64, equal for equal documents
    OWN,  # (Q,) int64 number of each query's positive
    BAR,  # (Q,) fp32 teacher's cosine above which a document is no negative, or None
    TOP,  # (splits, Q) fp32 largest logit
    SUM,  # (splits, Q) fp32 sum of exp2(logit - top)
    logit_scale,  # log2(e) / temperature
    Q,
    M,
    D,
    E,
    width,
    stride_xb,
    stride_xd,
    stride_yb,
    stride_yd,
    stride_txb,
    stride_txd,
    stride_tyb,
    stride_tyd,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Run an online softmax in powers of two over the negatives of some queries in the z-th ``width`` documents."""
    i0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    split = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = split * width
    for start in range(0, tl.minimum(width, M - first).to(tl.int32), BLOCK_N):
        logits = negative_logits(
            X, Y, RX, RY, TX, TY, RTX, RTY, NUMBERS, OWN, BAR, logit_scale, i0, first + start, Q, M, D, E,
            stride_xb, stride_xd, stride_yb, stride_yd, stride_txb, stride_txd, stride_tyb, stride_tyd,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, axis=1))
        # A query without negatives so far has no largest logit. Nothing is subtracted, and exp2(-inf) is 0.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        top = higher
    tl.store(TOP + split * Q + i0 + m, top, mask=m < Q - i0)
    tl.store(SUM + split * Q + i0 + m, total, mask=m < Q - i0)


@triton.jit
def contrast_weights_kernel(
    X, Y, RX, RY, TX, TY, RTX, RTY, NUMBERS, OWN, BAR,  # as above
    LOG_SUMS,  # (Q,) fp32 log2-sum-exp2 of the negatives' logits, 0 without negatives
    WRONG,  # (Q,) fp32 probability of all negatives
    POSITIVES,  # (Q,) int64
    W,  # (end - begin, M) weights for the gradients' products
    logit_scale,
    begin,
    end,
    Q,
    M,
    D,
    E,
    stride_xb,
    stride_xd,
    stride_yb,
    stride_yd,
    stride_txb,
    stride_txd,
    stride_tyb,
    stride_tyd,
    stride_wb,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the loss's derivative with respect to a tile of logits: probabilities, less 1 at the positive."""
    # Concurrent blocks share rows and columns in the L2 cache.
    pid = tl.program_id(0)
    across = tl.cdiv(M, BLOCK_N)
    group = pid // (GROUP * across)
    height = min(tl.cdiv(end - begin, BLOCK_M) - group * GROUP, GROUP)
    m0 = (group * GROUP + pid % (GROUP * across) % height).to(tl.int64) * BLOCK_M
    j0 = ((pid % (GROUP * across)) // height).to(tl.int64) * BLOCK_N
    i0 = begin + m0
    logits = negative_logits(
        X, Y, RX, RY, TX, TY, RTX, RTY, NUMBERS, OWN, BAR, logit_scale, i0, j0, Q, M, D, E,
        stride_xb, stride_xd, stride_yb, stride_yd, stride_txb, stride_txd, stride_tyb, stride_tyd,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = m < end - i0
    log_sums = tl.load(LOG_SUMS + i0 + m, mask=inside, other=0.0)[:, None]
    wrong = tl.load(WRONG + i0 + m, mask=inside, other=0.0)[:, None]
    positive = tl.load(POSITIVES + i0 + m, mask=inside, other=-1)[:, None]
    weights = tl.where(j0 + n[None, :] == positive, -wrong, tl.exp2(logits - log_sums) * wrong)
    tile = W + m0 * stride_wb + j0 + m[:, None] * stride_wb + n[None, :]
    tl.store(tile, weights.to(W.dtype.element_ty), mask=inside[:, None] & (n[None, :] < M - j0))


STRIDES = tuple(f"stride_{side}{axis}" for side in ("x", "y", "tx", "ty") for axis in "bd")


def forms() -> Iterator[Form]:
    """Yield the forms of this module's kernels. See `registry`."""
    for dtype in TYPES.values():
        yield from _forms(dtype, (TILES_32_BIT if dtype == "fp32" else TILES_SOFTMAX)[0])
    yield from _forms("bf16", TILES_SOFTMAX[0], teacher=False)
    for form in _forms("fp32", TILES_32_BIT[1]):
        yield form
        yield unaligned(form, "width", "begin", "stride_wb")
        yield with_ones(form, "Q", "M", "D", "E", *STRIDES[::2])


def _forms(dtype: str, tile: Tile, teacher: bool = True) -> Iterator[Form]:
    types = dict.fromkeys(("X", "Y", "TX", "TY"), f"*{dtype}:16") | {"NUMBERS": "*i64:16", "OWN": "*i64:16"}
    types |= dict.fromkeys(("RX", "RY", "RTX", "RTY", "BAR"), "*fp32:16") | {"logit_scale": "fp32"}
    types |= dict.fromkeys(("Q", "M", "D", "E", *STRIDES[::2]), "i32:16")
    constants: dict[str, Any] = {**dict.fromkeys(STRIDES[1::2], 1), **tile.constants, "PRECISION": "tf32x3"}
    if not teacher:
        constants |= dict.fromkeys(("TX", "TY", "RTX", "RTY", "BAR"))
        types = {name: kind for name, kind in types.items() if name not in constants}
    label = f"{dtype}{'' if teacher else ', no teacher'}, {tile}"
    options: dict[str, Any] = {"tensor_cores": True, "quick": dtype == "bf16" and teacher}
    options["stack"] = {80: 8, 90: 8, 100: 144}  # on sm_100 the epilogue is the larger part, as in `pair_tile`
    sums = {"TOP": "*fp32:16", "SUM": "*fp32:16", "width": "i32:16"}
    yield Form(label, negative_sums_kernel, {**types, **sums}, constants, tile.warps, tile.stages, **options)
    weights = {"LOG_SUMS": "*fp32:16", "WRONG": "*fp32:16", "POSITIVES": "*i64:16"}
    weights |= {"W": "*bf16:16" if dtype == "bf16" else "*fp32:16"}
    weights |= dict.fromkeys(("begin", "end", "stride_wb"), "i32:16")
    constants = {**constants, "GROUP": GROUP}
    yield Form(label, contrast_weights_kernel, {**types, **weights}, constants, tile.warps, tile.stages, **options)
