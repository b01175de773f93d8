"""The InfoNCE loss on CUDA: strips of cosines by cuBLAS, and a kernel that makes weights of them.

No Q x M matrix is stored, and nothing waits for the device.

Cost for Q = M = 8192 and D = E = 1024 in bfloat16 on an H200: 0.55 TFLOP take 0.9 ms at 600 TFLOP/s. 2 GB through
memory take 0.5 ms.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.kernels import strips
from jasper_fast.kernels.gather import gathered_cosines
from jasper_fast.kernels.pair_losses import COLUMNS, cosines
from jasper_fast.kernels.rows import warps
from jasper_fast.kernels.softmax import add_logits, log_sum
from jasper_fast.kernels.strips import Rows, empty_strip
from jasper_fast.ops.products import multiply

LOG_2 = math.log(2.0)


@triton.jit
def _negative_logits(S, T, row, j, factor, COLUMN_S, factor_t, COLUMN_T, NUMBERS, own, bar, M):
    """Return logits of a query and documents j in powers of two. A document that is no negative has -inf."""
    inside = j < M
    logits = cosines(S + row, j, factor, COLUMN_S, j, inside)
    left_out = (tl.load(NUMBERS + j, mask=inside, other=0) == own) | (j >= M)
    if T is not None:
        above = cosines(T + row, j, factor_t, COLUMN_T, j, inside) - bar
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
    of_teacher = [Rows.of(rows) for rows in teacher]
    count, others, device = len(queries), len(documents), documents.device
    chosen = torch.where(positives < 0, others, positives).contiguous()
    logit_scale = math.log2(math.e) / temperature
    logits = gathered_cosines(left, right, chosen[:, None])[:, 0] * logit_scale
    bar = gathered_cosines(of_teacher[0], of_teacher[1], chosen[:, None])[:, 0] - margin if teacher else None
    own = numbers[chosen.clamp(max=others - 1)]
    # In bfloat16 or float32. Weights of float16 would have 11 bits.
    half = queries.dtype == documents.dtype == torch.bfloat16
    dtype = torch.bfloat16 if half else torch.float32
    right_unit = right.unit(dtype) if query_gradient else None
    left_unit = left.unit(dtype) if document_gradient else None
    of_queries = torch.zeros(queries.shape, device=device) if query_gradient else None
    of_documents = torch.zeros(documents.shape, device=device) if document_gradient else None
    height = strips.strip_height(count, others)
    s_products, t_products = (empty_strip(height, others, torch.float32, device) for _ in range(2))
    weights = empty_strip(height, others, dtype, device) if half else s_products
    log_sums = torch.empty(count, dtype=torch.float32, device=device)
    for begin in range(0, count, height):
        end = min(begin + height, count)
        rows, t = slice(begin, end), None
        s = left.products(right, begin, end, 0, s_products)
        factors_t, columns_t, bars = None, None, None
        if bar is not None:
            t = of_teacher[0].products(of_teacher[1], begin, end, 0, t_products)
            factors_t, columns_t, bars = of_teacher[0].row_factors[rows], of_teacher[1].reciprocals, bar[rows]
        w = weights[: end - begin] if query_gradient or document_gradient else None
        factors = left.row_factors[rows], factors_t, right.reciprocals, columns_t
        figures = own[rows], bars, chosen[rows], logits[rows], log_sums[rows]
        options = {"BLOCK": COLUMNS, "num_warps": warps(COLUMNS)}
        contrast_kernel[(end - begin,)](
            s, t, *factors, numbers, *figures, w, others, s.stride(0), logit_scale, **options
        )
        if w is not None and right_unit is not None and of_queries is not None:
            multiply(w, right_unit, of_queries[rows])
        if w is not None and left_unit is not None and of_documents is not None:
            multiply(w.T, left_unit[rows], of_documents, add=True)
    loss = F.softplus((log_sums - logits) * LOG_2).mean(dtype=torch.float64).to(torch.float32)[None]
    scale = 1.0 / (count * temperature)
    return loss, left.backward(of_queries, scale, left_unit), right.backward(of_documents, scale, right_unit)
