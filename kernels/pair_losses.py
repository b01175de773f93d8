"""The similarity and neighbourhood losses on CUDA: strips of cosines by cuBLAS, and kernels that make weights of them.

Each loss takes raw embeddings. It returns the losses of several students against one teacher, together with the
gradients with respect to the embeddings. So the backward pass only scales. Similarity takes the columns from a strip's
diagonal on, for itself and its mirror image. Neighbourhood takes whole rows, whose softmax is known at once.

Cost on an H200 in bfloat16, at B = 8192, D = E = 12288: similarity does 3.5 TFLOP at 650 TFLOP/s, 5.4 ms. 3 GB through
memory take 0.7 ms, in part at the same time. An eager loss takes about 10 ms. Neighbourhood does 6.6 TFLOP, 11 ms. At
B = 65536, D = 1024 strips take 160 MB, and 16 of 50 ms go into additions to float32 sums.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels import strips
from jasper_fast.kernels.rows import warps
from jasper_fast.kernels.softmax import LOG_2, add_logits, log_sum
from jasper_fast.kernels.strips import Rows, empty_strip
from jasper_fast.ops.products import multiply

COLUMNS = 1024  # of a strip that a program takes at once
# A logit that is fused into the subtraction of its log sum differs in the last bit from the one in the sum.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def cosines(PRODUCTS, at, row, COLUMN, columns, mask):
    """Return products of a strip times the factors of their row and columns, 0 outside the mask."""
    products = tl.load(PRODUCTS + at, mask=mask, other=0.0)
    return products * (row * tl.load(COLUMN + columns, mask=mask, other=0.0))


@triton.jit
def difference_kernel(
    S,  # (h, w) fp32 products of student rows; weights may overwrite them
    T,  # (h, w) fp32 products of teacher rows
    ROW_S,  # (h,) fp32 factors of the rows
    ROW_T,
    COLUMN_S,  # (w,) fp32 factors of the columns
    COLUMN_T,
    W,  # (h, w) weights for the gradient's product, or None
    SUMS,  # (h, blocks) fp32 sums of the loss
    height,
    width,
    stride,
    weight_scale,
    BLOCK: tl.constexpr,
):
    """Write the differences of cosines in a row, and the sum of their squares."""
    i = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = j < width, i.to(tl.int64) * stride + j
    g = cosines(S, at, tl.load(ROW_S + i), COLUMN_S, j, inside)
    g -= cosines(T, at, tl.load(ROW_T + i), COLUMN_T, j, inside)
    # Columns beyond the strip's square count for their mirror images too.
    terms = tl.where(inside, tl.where(j < height, g * g, 2.0 * g * g), 0.0)
    tl.store(SUMS + i * tl.num_programs(1) + tl.program_id(1), tl.sum(terms, axis=0))
    if W is not None:
        tl.store(W + at, (g * weight_scale).to(W.dtype.element_ty), mask=inside)


@triton.jit
def divergence_kernel(
    S, T, ROW_S, ROW_T, COLUMN_S, COLUMN_T, W,  # as above
    SUMS,  # (h,) fp32 losses of the rows
    begin,
    width,
    stride,
    logit_scale,  # log2(e) / temperature
    weight_scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row's KL divergence and the differences of its probabilities, without the row's pair with itself."""
    i, block = tl.program_id(0), tl.arange(0, BLOCK)
    row = i.to(tl.int64) * stride
    row_s, row_t = tl.load(ROW_S + i) * logit_scale, tl.load(ROW_T + i) * logit_scale
    top_s, total_s = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    top_t, total_t = top_s, total_s
    for start in range(0, width, BLOCK):
        j = start + block
        others = (j < width) & (j != begin + i)
        s = cosines(S, row + j, row_s, COLUMN_S, j, others)
        top_s, total_s = add_logits(top_s, total_s, tl.where(others, s, float("-inf")))
        t = cosines(T, row + j, row_t, COLUMN_T, j, others)
        top_t, total_t = add_logits(top_t, total_t, tl.where(others, t, float("-inf")))
    log_s, log_t = log_sum(top_s, total_s), log_sum(top_t, total_t)
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        j = start + block
        others = (j < width) & (j != begin + i)
        s = tl.where(others, cosines(S, row + j, row_s, COLUMN_S, j, others) - log_s, 0.0)
        t = tl.where(others, cosines(T, row + j, row_t, COLUMN_T, j, others) - log_t, 0.0)
        wanted = tl.exp2(t)
        terms += wanted * (t - s)  # 0 where there is no other row
        if W is not None:
            g = (tl.exp2(s) - wanted) * weight_scale
            tl.store(W + row + j, g.to(W.dtype.element_ty), mask=j < width)
    tl.store(SUMS + i, tl.sum(terms, axis=0) * LOG_2)


def neighbourhood(
    students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Compute losses (H,) and gradients as `jasper_fast.losses.neighbourhood` does."""
    heads, target, count = [Rows.of(s) for s in students], Rows.of(teacher), len(teacher)
    logit_scale = math.log2(math.e) / temperature
    totals, gradients, _ = tiles(heads, target, 1.0 / (count * temperature), gradient, False, logit_scale)
    return (totals / count).to(torch.float32), gradients


def tiles(
    heads: list[Rows],
    target: Rows,
    scale: float,
    gradient: bool,
    teacher_gradient: bool,
    logit_scale: float | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return totals (H,) float64 and scaled gradients: of similarity, or with a logit scale of neighbourhood."""
    count, device = len(target.raw), target.raw.device
    height = strips.strip_height(count, count)
    if logit_scale is None:  # lower strips multiply fewer pairs twice, and higher ones are faster
        height = min(height, max(1024, count // 8 // strips.STEP * strips.STEP))
    wanted = gradient or teacher_gradient
    dtypes = {head.raw.dtype for head in heads if wanted} - {torch.float32}  # their weights overwrite products
    buffers = {dtype: empty_strip(height, count, dtype, device) for dtype in dtypes}
    s_products, t_products = (empty_strip(height, count, torch.float32, device) for _ in range(2))
    totals = torch.zeros(len(heads), dtype=torch.float64, device=device)
    sides = [(h, [(head, 1.0)] * gradient + [(target, -1.0)] * teacher_gradient) for h, head in enumerate(heads)]
    learning = [*(heads if gradient else []), *([target] if teacher_gradient else [])]
    units = {id(side): side.unit(side.raw.dtype) for side in learning}
    sums = {(h, sign): torch.zeros(side.raw.shape, device=device) for h, kinds in sides for side, sign in kinds}
    for begin in range(0, count, height):
        end = min(begin + height, count)
        first, mirrored = (begin, end) if logit_scale is None else (0, 0)  # columns, and those for mirror images
        t = target.products(target, begin, end, first, t_products)
        for h, kinds in sides:
            s = heads[h].products(heads[h], begin, end, first, s_products)
            w = buffers.get(heads[h].raw.dtype, s)[: end - begin, : count - first] if wanted else None
            totals[h] += _weights(s, t, heads[h], target, w, begin, first, logit_scale)
            for side, sign in kinds:
                assert w is not None
                unit, out = units[id(side)], sums[h, sign]
                multiply(w, unit[first:], out[begin:end], add=True)
                multiply(w[:, mirrored - first :].T, unit[begin:end], out[mirrored:], add=True)
    gradients, teacher_gradients = [], []
    for h, head in enumerate(heads):
        own = scale / _weight_scale(head.raw.dtype)
        gradients.append(head.backward(sums.get((h, 1.0)), own, units.get(id(head))))
        teacher_gradients.append(target.backward(sums.get((h, -1.0)), -own))
    return totals, gradients, teacher_gradients


def _weight_scale(dtype: torch.dtype) -> float:
    return strips.FLOAT16_WEIGHTS if dtype == torch.float16 else 1.0


def _weights(
    s: Tensor, t: Tensor, head: Rows, target: Rows, w: Tensor | None, begin: int, first: int, logit_scale: float | None
) -> Tensor:
    """Write a strip's weights, and return the sum of its losses in float64."""
    height, width = s.shape
    rows = slice(begin, begin + height)
    factors = head.row_factors[rows], target.row_factors[rows], head.reciprocals[first:], target.reciprocals[first:]
    weight_scale = _weight_scale(head.raw.dtype)
    options: dict[str, Any] = {"BLOCK": COLUMNS, "num_warps": warps(COLUMNS)}
    blocks = triton.cdiv(width, COLUMNS) if logit_scale is None else 1
    sums = torch.empty(height, blocks, dtype=torch.float32, device=s.device)
    if logit_scale is None:
        difference_kernel[(height, blocks)](
            s, t, *factors, w, sums, height, width, s.stride(0), weight_scale, **options
        )
    else:
        divergence_kernel[(height,)](
            s, t, *factors, w, sums, begin, width, s.stride(0), logit_scale, weight_scale, **options, **EXACT
        )
    return sums.sum(dtype=torch.float64)
