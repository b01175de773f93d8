"""The InfoNCE loss on CUDA: strips of cosines by cuBLAS, and a kernel that makes weights of them.

No Q x M matrix is stored, and nothing waits for the device.

Cost for Q = M = 8192 and D = E = 1024 in bfloat16 on an H200: 0.55 TFLOP take 0.9 ms at 600 TFLOP/s. 2 GB through
memory take 0.5 ms. Compiled, interpreted and emulated, not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.kernels import strips
from jasper_fast.kernels.gather import RawRows, gathered_cosines
from jasper_fast.kernels.softmax import add_logits, log_sum
from jasper_fast.kernels.strips import Rows, empty_strip, multiply

LOG_2 = math.log(2.0)
COLUMNS = 1024  # documents that a program takes at once


@triton.jit
def _negative_logits(S, T, row, j, factor, COLUMN_S, factor_t, COLUMN_T, NUMBERS, own, bar, M):
    """Return logits of a query and documents j in powers of two. A document that is no negative has -inf."""
    inside = j < M
    logits = tl.load(S + row + j, mask=inside, other=0.0) * (factor * tl.load(COLUMN_S + j, mask=inside, other=0.0))
    left_out = (tl.load(NUMBERS + j, mask=inside, other=0) == own) | (j >= M)
    if T is not None:
        scores = tl.load(T + row + j, mask=inside, other=0.0)
        above = scores * (factor_t * tl.load(COLUMN_T + j, mask=inside, other=0.0)) - bar
        left_out = left_out | (above > 0.0)
        logits = tl.where(above == above, logits, float("nan"))  # comparisons drop NaN
    return tl.where(left_out & (logits == logits), float("-inf"), logits)


@triton.jit
def contrast_kernel(
    S,  # (h, M) fp32 products of queries and documents; weights may overwrite them
    T,  # (h, M) fp32 the teacher's, or None
    ROW_S,  # (h,) fp32 factors of the rows
    ROW_T,  # (h,) fp32, or None
    COLUMN_S,  # (M,) fp32 factors of the columns
    COLUMN_T,  # (M,) fp32, or None
    NUMBERS,  # (M,) int64, equal for equal documents
    OWN,  # (h,) int64 number of each query's positive
    BAR,  # (h,) fp32 teacher's cosine above which a document is no negative, or None
    POSITIVES,  # (h,) int64
    LOGITS,  # (h,) fp32 logits of the positives in powers of two
    LOG_SUMS,  # (h,) fp32 log2-sum-exp2 of the negatives' logits, -inf without negatives
    W,  # (h, M) weights for the gradients' products, or None
    M,
    stride,
    logit_scale,  # log2(e) / temperature
    BLOCK: tl.constexpr,
):
    """Write a query's log sum, and the derivative with respect to its logits: probabilities, less 1 at the positive."""
    i, block = tl.program_id(0), tl.arange(0, BLOCK)
    row, own, factor = i.to(tl.int64) * stride, tl.load(OWN + i), tl.load(ROW_S + i) * logit_scale
    factor_t, bar = 0.0, 0.0
    if T is not None:
        factor_t, bar = tl.load(ROW_T + i), tl.load(BAR + i)
    top, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, M, BLOCK):
        logits = _negative_logits(S, T, row, start + block, factor, COLUMN_S, factor_t, COLUMN_T, NUMBERS, own, bar, M)
        top, total = add_logits(top, total, logits)
    negatives = log_sum(top, total)
    tl.store(LOG_SUMS + i, negatives)
    if W is not None:
        wrong = 1.0 / (1.0 + tl.exp2(tl.load(LOGITS + i) - negatives))  # the probability of all negatives
        negatives = tl.where(negatives == float("-inf"), 0.0, negatives)
        positive = tl.load(POSITIVES + i)
        for start in range(0, M, BLOCK):
            j = start + block
            logits = _negative_logits(S, T, row, j, factor, COLUMN_S, factor_t, COLUMN_T, NUMBERS, own, bar, M)
            weights = tl.where(j == positive, -wrong, tl.exp2(logits - negatives) * wrong)
            tl.store(W + row + j, weights.to(W.dtype.element_ty), mask=j < M)


def info_nce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    numbers: Tensor,
    temperature: float,
    teacher: list[Tensor],
    margin: float,
    query_gradient: bool,
    document_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss (1,) and gradients as `jasper_fast.losses.info_nce` does.

    Args:
        queries: rows (Q, D).
        documents: rows (M, D).
        positives: rows of the documents (Q,), int64. One outside them makes the loss NaN.
        numbers: fingerprints (M,) of the documents.
        temperature: divisor of the cosines.
        teacher: the teacher's queries (Q, E) and documents (M, E), or nothing.
        margin: margin of the teacher's cosines.
        query_gradient: whether the queries' gradient is wanted. An unwanted one is empty.
        document_gradient: the same for the documents.
    """
    left, right = Rows.of(queries), Rows.of(documents)
    sides_of_teacher = [Rows.of(rows) for rows in teacher]
    (count, width), others, device = queries.shape, len(documents), documents.device
    chosen = torch.where(positives < 0, others, positives).contiguous()
    logit_scale = math.log2(math.e) / temperature
    logits = _cosines(left, right, chosen) * logit_scale
    bar = _cosines(sides_of_teacher[0], sides_of_teacher[1], chosen) - margin if teacher else None
    own = numbers[chosen.clamp(max=others - 1)]
    # In bfloat16 or float32. Weights of float16 would have 11 bits.
    half = queries.dtype == documents.dtype == torch.bfloat16
    dtype = torch.bfloat16 if half else torch.float32
    units = [
        side.unit(dtype) if wanted else None for side, wanted in ((right, query_gradient), (left, document_gradient))
    ]
    sums = [
        torch.zeros(rows, width, device=device) if wanted else None
        for rows, wanted in ((count, query_gradient), (others, document_gradient))
    ]
    height = strips.strip_height(count, others)
    s_products = empty_strip(height, others, torch.float32, device)
    t_products = empty_strip(height, others, torch.float32, device)
    weights = empty_strip(height, others, dtype, device) if half else s_products
    log_sums = torch.empty(count, dtype=torch.float32, device=device)
    for begin in range(0, count, height):
        end = min(begin + height, count)
        s = left.products(right, begin, end, 0, s_products)
        t = sides_of_teacher[0].products(sides_of_teacher[1], begin, end, 0, t_products) if teacher else None
        w = weights[: end - begin] if query_gradient or document_gradient else None
        rows = slice(begin, end)
        contrast_kernel[(end - begin,)](
            s,
            t,
            left.row_factors[rows],
            sides_of_teacher[0].row_factors[rows] if teacher else None,
            right.reciprocals,
            sides_of_teacher[1].reciprocals if teacher else None,
            numbers,
            own[rows],
            None if bar is None else bar[rows],
            chosen[rows],
            logits[rows],
            log_sums[rows],
            w,
            others,
            s.stride(0),
            logit_scale,
            BLOCK=COLUMNS,
        )
        if w is not None and units[0] is not None and sums[0] is not None:
            multiply(w, units[0], sums[0][rows])
        if w is not None and units[1] is not None and sums[1] is not None:
            multiply(w.T, units[1][rows], sums[1], add=True)
    above = (log_sums - logits) * LOG_2
    loss = F.softplus(above).mean(dtype=torch.float64).to(torch.float32)[None]
    scale = 1.0 / (count * temperature)
    return loss, left.backward(sums[0], scale, units[1]), right.backward(sums[1], scale, units[0])


def _cosines(left: Rows, right: Rows, chosen: Tensor) -> Tensor:
    """Return the cosine of each row with its chosen row (Q,)."""
    one, other = (RawRows(side.raw, side.reciprocals) for side in (left, right))
    return gathered_cosines(one, other, chosen[:, None])[:, 0]
