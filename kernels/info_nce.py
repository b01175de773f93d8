"""The InfoNCE loss on CUDA: an online softmax, then gradients in row blocks, without waiting for the device.

No Q x M matrix is stored. A row block of weights takes at most `WORKSPACE` bytes, or those of `STEP` rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.kernels.configs import TILES_32_BIT, TILES_SOFTMAX, Tile, choose
from jasper_fast.kernels.contrast_tile import GROUP, contrast_weights_kernel, negative_sums_kernel
from jasper_fast.kernels.gather import RawRows, gathered_cosines
from jasper_fast.kernels.product import product

WORKSPACE = 160 * 2**20  # bytes for a row block of weights
STEP = 128  # rows of a row block are a multiple of this
PRECISION = "tf32x3"  # of float32 operands; products of 16-bit ones are exact
BLOCKS = 264  # that keep a large GPU busy: two on each of 132 multiprocessors
SPLIT = 2  # fewest tiles of documents of a split
LOG_2 = math.log(2.0)


class Tensors(NamedTuple):
    """Arguments of both kernels."""

    queries: RawRows
    documents: RawRows
    teacher: tuple[RawRows, RawRows] | None
    numbers: Tensor  # (M,) int64 fingerprints of the documents
    own: Tensor  # (Q,) int64 those of the positives
    bar: Tensor | None  # (Q,) fp32 teacher's cosine above which a document is no negative

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """Tensors in the order of the kernels' arguments."""
        (x, rx), (y, ry) = self.queries, self.documents
        teacher: tuple[Tensor | None, ...] = (None,) * 4
        if self.teacher is not None:
            (tx, rtx), (ty, rty) = self.teacher
            teacher = (tx, ty, rtx, rty)
        return x, y, rx, ry, *teacher, self.numbers, self.own, self.bar

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Queries, documents, and the widths of student and teacher."""
        width = 0 if self.teacher is None else self.teacher[0].rows.shape[1]
        documents, student_width = self.documents.rows.shape
        return len(self.queries.rows), documents, student_width, width

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the rows."""
        teacher: tuple[int, ...] = (0, 0, 0, 0)
        if self.teacher is not None:
            teacher = (*self.teacher[0].rows.stride(), *self.teacher[1].rows.stride())
        return *self.queries.rows.stride(), *self.documents.rows.stride(), *teacher

    def tile(self, rows: int) -> Tile:
        """Choose a tile for a result of ``rows`` by M."""
        sides = [(self.queries, self.documents), *([] if self.teacher is None else [self.teacher])]
        dtypes = [(x.rows.dtype, y.rows.dtype) for x, y in sides]
        whole = any(left != right or left == torch.float32 for left, right in dtypes)  # multiplied in float32
        return choose(TILES_32_BIT if whole else TILES_SOFTMAX, rows, len(self.documents.rows))


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
    sides = RawRows.of(queries), RawRows.of(documents)
    chosen = torch.where(positives < 0, len(documents), positives)[:, None].contiguous()
    sides_of_teacher: tuple[RawRows, RawRows] | None = None
    bar: Tensor | None = None
    if teacher:
        sides_of_teacher = RawRows.of(teacher[0]), RawRows.of(teacher[1])
        bar = gathered_cosines(*sides_of_teacher, chosen)[:, 0] - margin
    own = numbers[chosen[:, 0].clamp(max=len(documents) - 1)]
    tensors = Tensors(*sides, sides_of_teacher, numbers, own, bar)
    logit_scale = math.log2(math.e) / temperature
    log_sums = _log_sums(tensors, logit_scale)
    above = (log_sums - gathered_cosines(*sides, chosen)[:, 0] * logit_scale) * LOG_2
    loss = F.softplus(above).mean(dtype=torch.float64).to(torch.float32)[None]
    left = right = None
    if query_gradient or document_gradient:
        log_sums = torch.where(log_sums == -torch.inf, 0.0, log_sums)
        strips = log_sums, above.sigmoid(), chosen[:, 0]
        left, right = _gradients(tensors, strips, logit_scale, query_gradient, document_gradient)
    scale = 1.0 / (len(queries) * temperature)
    return loss, sides[0].backward(left, scale), sides[1].backward(right, scale)


def _log_sums(tensors: Tensors, logit_scale: float) -> Tensor:
    """Return log2 of the sum of exp2 over the logits of each query's negatives: (Q,), -inf without negatives."""
    count, documents, *_ = tensors.sizes
    tile = tensors.tile(count)
    blocks = triton.cdiv(count, tile.m)
    splits = max(1, min(triton.cdiv(BLOCKS, blocks), documents // (SPLIT * tile.n)))
    width = triton.cdiv(triton.cdiv(documents, splits), tile.n) * tile.n
    splits = triton.cdiv(documents, width)
    top, total = torch.empty(2, splits, count, dtype=torch.float32, device=tensors.numbers.device)
    negative_sums_kernel[(blocks, splits)](
        *tensors.pointers,
        top,
        total,
        logit_scale,
        *tensors.sizes,
        width,
        *tensors.strides,
        PRECISION=PRECISION,
        **tile.launch,
    )
    highest = top.amax(dim=0)
    base = torch.where(highest == -torch.inf, 0.0, highest)
    return base + ((top - base).exp2() * total).sum(dim=0).log2()


def _gradients(
    tensors: Tensors, strips: tuple[Tensor, ...], logit_scale: float, query_gradient: bool, document_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the unscaled gradients with respect to unit queries and documents."""
    count, documents, *_ = tensors.sizes
    device = tensors.numbers.device
    pitch = -(-documents // 16) * 16  # elements between rows of the workspace
    half = tensors.queries.rows.dtype == tensors.documents.rows.dtype == torch.bfloat16
    store = torch.bfloat16 if half else torch.float32
    height = min(max(WORKSPACE // (store.itemsize * pitch * STEP), 1) * STEP, count)
    weights = torch.empty(height, pitch, dtype=store, device=device)
    left, right = (
        torch.zeros(side.rows.shape, dtype=torch.float32, device=device) if wanted else None
        for side, wanted in ((tensors.queries, query_gradient), (tensors.documents, document_gradient))
    )
    # Without float16, whose products in TF32 would be rounded, or mixed dtypes.
    factors = [side.rows if half else side.rows.float() for side in (tensors.documents, tensors.queries)]
    for begin in range(0, count, height):
        end = min(begin + height, count)
        tile = tensors.tile(end - begin)
        contrast_weights_kernel[(triton.cdiv(end - begin, tile.m) * triton.cdiv(documents, tile.n),)](
            *tensors.pointers,
            *strips,
            weights,
            logit_scale,
            begin,
            end,
            *tensors.sizes,
            *tensors.strides,
            weights.stride(0),
            PRECISION=PRECISION,
            GROUP=GROUP,
            **tile.launch,
        )
        block = weights[: end - begin, :documents]
        for result, factor, rows, inner in (
            (None if left is None else left[begin:end], block, factors[0], tensors.documents.reciprocals),
            (right, block.T, factors[1][begin:end], tensors.queries.reciprocals[begin:end]),
        ):
            if result is not None:
                precision = "bf16" if half else PRECISION
                product(factor, rows, result, inner_a=inner, accumulate=True, precision=precision)
    return left, right
