"""Tiles of the B x B matrices of cosines, with the terms of the similarity and neighbourhood losses.

Cosines come from the raw rows. Products of 16-bit rows are exact in float32, and each row's reciprocal norm is
multiplied in afterwards. There is no normalised copy and no rounding of unit rows. Sums are float32. If tensor cores
cut them off, rows of mean cosine 0.6 lose 2e-5 of the loss at D = 4096 to 12288.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from jasper_fast.kernels.configs import TILES_16_BIT, TILES_32_BIT, TILES_SOFTMAX
from jasper_fast.kernels.registry import TYPES, Form, behind_a_flag, unaligned, with_ones

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def products(
    X, r0, r1, i0, j0, B, D, stride_xb, stride_xd,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return products of rows i0.. with rows j0.. of X, of unit rows if UNIT: (BLOCK_M, BLOCK_N)."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, columns = (B - i0).to(tl.int32), (B - j0).to(tl.int32)
    # 64-bit scalars, 32-bit offsets inside a tile.
    left, right = X + i0 * stride_xb, X + j0 * stride_xb
    left_offsets = m[:, None] * stride_xb + k[None, :] * stride_xd
    right_offsets = k[:, None] * stride_xd + n[None, :] * stride_xb
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + k < D
        a = tl.load(left + left_offsets, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
        b = tl.load(right + right_offsets, mask=inside[:, None] & (n[None, :] < columns), other=0.0)
        if UNIT:
            a = (a.to(tl.float32) * r0[:, None]).to(X.dtype.element_ty)
            b = (b.to(tl.float32) * r1[None, :]).to(X.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left += BLOCK_K * stride_xd
        right += BLOCK_K * stride_xd
    return acc


@triton.jit
def out_of_range(r):
    """Return 1 if products with a row of reciprocal norm r may leave float32's range, else 0."""
    return ((r > 1e12) | ((r < 1e-12) & (r > 0.0))).to(tl.int32)


@triton.jit
def cosines(
    X, R, i0, j0, B, D, stride_xb, stride_xd,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return cosines of rows i0.. with rows j0.. of X, with R their reciprocal norms: (BLOCK_M, BLOCK_N)."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    r0 = tl.load(R + i0 + m, mask=m < B - i0, other=0.0)
    r1 = tl.load(R + j0 + n, mask=n < B - j0, other=0.0)
    if X.dtype.element_ty == tl.float32:
        acc = products(X, r0, r1, i0, j0, B, D, stride_xb, stride_xd, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    elif X.dtype.element_ty == tl.float16:
        acc = products(X, r0, r1, i0, j0, B, D, stride_xb, stride_xd, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        acc = acc * (r0[:, None] * r1[None, :])  # symmetric to the last bit
    else:
        # bfloat16 has float32's range, so the few rows whose squares overflow are normalised before the product.
        if tl.max(out_of_range(r0), axis=0) + tl.max(out_of_range(r1), axis=0) == 0:
            acc = products(X, r0, r1, i0, j0, B, D, stride_xb, stride_xd, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            acc = acc * (r0[:, None] * r1[None, :])  # symmetric to the last bit
        else:
            acc = products(X, r0, r1, i0, j0, B, D, stride_xb, stride_xd, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    return acc


@triton.jit
def pair_tile_kernel(
    S,  # (B, D) student rows
    T,  # (B, E) teacher rows
    RS,  # (B,) fp32 reciprocal norms
    RT,  # (B,) fp32
    LS,  # (B,) fp32 log2-sum-exp2 of each student row's logits; None computes the similarity loss
    LT,  # (B,) fp32
    SHARED,  # (end - begin, B - begin) fp32 teacher cosines, or None
    W,  # (end - begin, B - begin) weights for the gradient's product, or None
    PARTIAL,  # (blocks,) fp32 sums of the loss
    FLAG,  # () int32: 0 skips the work; None never does
    logit_scale,  # log2(e) / temperature
    begin,
    end,
    B,
    D,
    E,
    stride_sb,
    stride_sd,
    stride_tb,
    stride_td,
    stride_gb,
    stride_wb,
    FIRST: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile, on or right of the diagonal, of rows begin..end against rows begin..B, for a symmetric loss.

    SHARED is written if FIRST and read otherwise, so several students share one teacher tile. FOLD multiplies W's
    columns by RS. Then W times the raw students is the gradient with respect to unit rows.
    """
    if FLAG is not None:  # noqa: SIM102, decided when compiling
        if tl.load(FLAG) == 0:
            return
    pid = tl.program_id(0)
    across = tl.cdiv(B - begin, BLOCK_N)
    group = pid // (GROUP * across)
    height = min(tl.cdiv(end - begin, BLOCK_M) - group * GROUP, GROUP)
    m0 = (group * GROUP + pid % (GROUP * across) % height) * BLOCK_M
    n0 = (pid % (GROUP * across)) // height * BLOCK_N
    # Compare elements, because tiles need not be square.
    if n0 + BLOCK_N <= m0:
        tl.store(PARTIAL + pid, 0.0)
        return
    i0, j0 = (begin + m0).to(tl.int64), (begin + n0).to(tl.int64)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i, j = m0 + m, n0 + n  # relative to begin
    inside = (i[:, None] < end - begin) & (j[None, :] < B - begin)
    if SHARED is not None and not FIRST:
        t = tl.load(SHARED + m0.to(tl.int64) * stride_gb + n0 + m[:, None] * stride_gb + n[None, :], mask=inside)
    else:
        t = cosines(T, RT, i0, j0, B, E, stride_tb, stride_td, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        if SHARED is not None:
            tl.store(SHARED + m0.to(tl.int64) * stride_gb + n0 + m[:, None] * stride_gb + n[None, :], t, mask=inside)
    s = cosines(S, RS, i0, j0, B, D, stride_sb, stride_sd, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    above = (i[:, None] < j[None, :]) & inside
    if LS is None:
        g = s - t
        terms = g * g
        # Each pair counts for itself and its mirror image, the diagonal once.
        terms = tl.where(above, 2.0 * terms, tl.where((i[:, None] == j[None, :]) & inside, terms, 0.0))
    else:
        row_s = tl.load(LS + i0 + m, mask=m < B - i0, other=0.0)[:, None]
        row_t = tl.load(LT + i0 + m, mask=m < B - i0, other=0.0)[:, None]
        column_s = tl.load(LS + j0 + n, mask=n < B - j0, other=0.0)[None, :]
        column_t = tl.load(LT + j0 + n, mask=n < B - j0, other=0.0)[None, :]
        s, t = s * logit_scale, t * logit_scale
        # Mask before exp2, because values outside or left of the diagonal may overflow.
        s, t = tl.where(above, s, 0.0), tl.where(above, t, 0.0)
        wanted, given = tl.exp2(t - row_t), tl.exp2(s - row_s)
        terms = wanted * ((t - row_t) - (s - row_s))
        g = given - wanted
        wanted, given = tl.exp2(t - column_t), tl.exp2(s - column_s)
        terms += wanted * ((t - column_t) - (s - column_s))
        terms = tl.where(above, terms * LOG_2, 0.0)
        g = tl.where(above, g + (given - wanted), 0.0)
    # Over both axes at once. Triton 3.6 cannot compile one after the other for sm_100.
    tl.store(PARTIAL + pid, tl.sum(terms))
    if W is not None:
        tile = W + m0.to(tl.int64) * stride_wb + n0
        mirror = W + n0.to(tl.int64) * stride_wb + m0
        if FOLD:
            r0 = tl.load(RS + i0 + m, mask=m < B - i0, other=0.0)
            r1 = tl.load(RS + j0 + n, mask=n < B - j0, other=0.0)
            on, off = g * r1[None, :], g * r0[:, None]
        else:
            on, off = g, g
        upper = (i[:, None] <= j[None, :]) & inside
        tl.store(tile + m[:, None] * stride_wb + n[None, :], on.to(W.dtype.element_ty), mask=upper)
        if n0 < end - begin:  # the mirror image, if it belongs to these rows
            transposed = tl.trans(off).to(W.dtype.element_ty)
            below = (j[:, None] > i[None, :]) & (j[:, None] < end - begin) & (i[None, :] < end - begin)
            tl.store(mirror + n[:, None] * stride_wb + m[None, :], transposed, mask=below)


@triton.jit
def log_sums_kernel(
    X,  # (B, D)
    R,  # (B,) fp32
    TOP,  # (splits, B) fp32 largest logit
    SUM,  # (splits, B) fp32 sum of exp2(logit - top)
    logit_scale,
    B,
    D,
    width,
    stride_xb,
    stride_xd,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Run an online softmax in powers of two over the z-th ``width`` columns of some rows, without self-pairs."""
    i0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    split = tl.program_id(1).to(tl.int64)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = split * width
    for start in range(0, tl.minimum(width, B - first).to(tl.int32), BLOCK_N):
        j0 = first + start
        logits = cosines(X, R, i0, j0, B, D, stride_xb, stride_xd, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K) * logit_scale
        others = (n[None, :] < B - j0) & (n[None, :] + (j0 - i0) != m[:, None])
        logits = tl.where(others, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        # A row without logits so far has no largest one. Nothing is subtracted, and exp2(-inf) is 0.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        top = higher
    tl.store(TOP + split * B + i0 + m, top, mask=m < B - i0)
    tl.store(SUM + split * B + i0 + m, total, mask=m < B - i0)


GROUP = 8


def forms() -> Iterator[Form]:
    """Yield the forms of this module's kernels. See `registry`."""
    layouts: list[tuple[dict[str, str], dict[str, int]]] = [
        ({"stride_sb": "i32:16", "stride_tb": "i32:16"}, {"stride_sd": 1, "stride_td": 1}),
        (dict.fromkeys(("stride_sb", "stride_sd", "stride_tb", "stride_td"), "i32"), {}),
    ]
    for student, teacher, (strides, ones), loss in itertools.product(
        TYPES.values(), TYPES.values(), layouts, ("similarity", "neighbourhood")
    ):
        if student != teacher and not ones:
            continue
        whole, store = "fp32" in (student, teacher), "bf16" if student == "bf16" else "fp32"
        layout = "dense" if ones else "strided"
        for tile in TILES_32_BIT if whole else TILES_16_BIT if loss == "similarity" else TILES_SOFTMAX:
            # Other layouts and mixed dtypes change the loads only, so one use covers them.
            for use in ("alone", "first", "next", "loss only") if ones and student == teacher != "fp16" else ("alone",):
                types = {"S": f"*{student}:16", "T": f"*{teacher}:16", "RS": "*fp32:16", "RT": "*fp32:16"}
                types |= {"SHARED": "*fp32:16", "W": f"*{store}:16", "LS": "*fp32:16", "LT": "*fp32:16"}
                types |= {"PARTIAL": "*fp32", "logit_scale": "fp32", **strides}
                types |= dict.fromkeys(("begin", "end", "B", "D", "E", "stride_gb", "stride_wb"), "i32:16")
                absent = ["FLAG"] + (["SHARED"] if use in ("alone", "loss only") else [])
                absent += ["W"] if use == "loss only" else []
                absent += ["LS", "LT"] if loss == "similarity" else []
                constants: dict[str, Any] = dict.fromkeys(absent)
                constants |= {"FIRST": use == "first", "FOLD": use != "next" and student == "bf16"}
                form = Form(
                    f"{loss} {use}, {student}/{teacher} {layout}, {tile}",
                    pair_tile_kernel,
                    {name: kind for name, kind in types.items() if name not in absent},
                    {**constants, **ones, **tile.constants, "PRECISION": "tf32x3", "GROUP": GROUP},
                    tile.warps,
                    tile.stages,
                    tensor_cores=True,
                    # On sm_100 the epilogue is the larger part. Strided loads keep an address for every element.
                    stack={80: 8, 90: 8, 100: 144},
                    spills=not ones,
                    quick=use in ("alone", "first")
                    and layout == "dense"
                    and tile.m == 128
                    and (student, teacher, loss, use)
                    in (
                        ("bf16", "bf16", "similarity", "alone"),
                        ("fp32", "fp32", "similarity", "alone"),
                        ("fp16", "fp16", "similarity", "alone"),
                        ("bf16", "bf16", "neighbourhood", "first"),
                    ),
                )
                yield form
                if use == "alone" and ones and student == teacher:
                    yield unaligned(form, "begin", "stride_wb", "stride_gb")
                    if tile.m == 64:
                        yield with_ones(form, "D", "E", "stride_sb", "stride_tb")
                    if tile.m == 64 and loss == "similarity":
                        yield from (with_ones(form, "end", "B"), behind_a_flag(form))
    for dtype, (strides, ones) in itertools.product(TYPES.values(), layouts):
        for tile in TILES_32_BIT if dtype == "fp32" else TILES_SOFTMAX:
            form = Form(
                f"{dtype} {'dense' if ones else 'strided'}, {tile}",
                log_sums_kernel,
                {"X": f"*{dtype}:16", "R": "*fp32:16", "TOP": "*fp32:16", "SUM": "*fp32:16", "logit_scale": "fp32"}
                | {"B": "i32", "D": "i32:16", "width": "i32:16"}
                | {f"stride_x{n[-1]}": kind for n, kind in strides.items() if n.startswith("stride_s")},
                {**tile.constants, "PRECISION": "tf32x3"} | ({"stride_xd": 1} if ones else {}),
                tile.warps,
                tile.stages,
                tensor_cores=True,
                spills=not ones,
                quick=dtype == "bf16" and bool(ones) and tile.m == 128,
            )
            yield form
            if ones:
                yield from (unaligned(form, "width"), with_ones(form, "D", "stride_xb"))
