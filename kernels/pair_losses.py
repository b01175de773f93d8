"""The similarity and neighbourhood losses on CUDA: choice of kernels and row blocks, without waiting for the device.

Each loss takes raw embeddings. It returns the losses of several students against one teacher, together with the
gradients with respect to the embeddings. So the backward pass only scales.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from jasper_fast.kernels.configs import TILES_16_BIT, TILES_32_BIT, TILES_SOFTMAX, Tile, choose, tuned
from jasper_fast.kernels.pair_tile import GROUP, log_sums_kernel, pair_tile_kernel
from jasper_fast.kernels.product import exact, product
from jasper_fast.kernels.rows import l2_normalize_backward, reciprocal_norms
from jasper_fast.ops import cost

WORKSPACE = 160 * 2**20  # bytes for the row blocks of one student against one teacher
STEP = 128  # rows of a row block are a multiple of this
PRECISION = "tf32x3"  # of float32 operands; 16-bit ones are exact
BLOCKS = 264  # that keep a large GPU busy: two on each of 132 multiprocessors


class Embeddings(NamedTuple):
    """(B, D) embeddings, their reciprocal norms (B,), and for a softmax their log2-sum-exp2 (B,)."""

    rows: Tensor
    reciprocals: Tensor
    log_sums: Tensor | None = None


def similarity(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute losses (H,) and gradients as `jasper_fast.losses.similarity` does."""
    heads = [_embeddings(s) for s in students]
    target = _embeddings(teacher)
    rows = len(teacher)
    scale = 4.0 / rows**2
    totals = torch.zeros(len(heads), dtype=torch.float64, device=teacher.device)
    sums: list[Tensor | None] = [None] * len(heads)
    teacher_sums: list[Tensor | None] = [None] * len(heads)
    by_feature = [h for h in range(len(heads)) if _by_feature(h, students, teacher, method, teacher_gradient)]
    teacher_gram = _features(target, target) if by_feature else None
    for h in by_feature:
        total, result = _feature(heads[h], target, teacher_gram, gradient, teacher_gradient)
        sums[h], teacher_sums[h] = result.students, result.teacher
        if method == "auto":
            # If the sums cancelled, the tile form overwrites them. Its blocks read the flag on the device.
            flag = result.cancelled
            (tile_total,) = _tiles([heads[h]], target, [sums[h]], [teacher_sums[h]], gradient, teacher_gradient, flag)
            total = torch.where(flag == 1, tile_total, total)
        totals[h] = total
    rest = [h for h in range(len(heads)) if h not in by_feature]
    if rest:
        parts: list[Tensor | None] = [None] * len(rest)
        teacher_parts: list[Tensor | None] = [None] * len(rest)
        rest_totals = _tiles([heads[h] for h in rest], target, parts, teacher_parts, gradient, teacher_gradient)
        for n, h in enumerate(rest):
            totals[h], sums[h], teacher_sums[h] = rest_totals[n], parts[n], teacher_parts[n]
    gradients = [_row_gradient(s, head, scale) for s, head in zip(sums, heads, strict=True)]
    teacher_gradients = [_row_gradient(s, target, -scale) for s in teacher_sums]
    return (totals / rows**2).to(torch.float32), gradients, teacher_gradients


def neighbourhood(
    students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Compute losses (H,) and gradients as `jasper_fast.losses.neighbourhood` does."""
    rows = len(teacher)
    if rows < 2:
        gradients = [_empty_gradient(s).zero_() if gradient else s.new_empty(0) for s in students]
        return torch.zeros(len(students), dtype=torch.float32, device=teacher.device), gradients
    logit_scale = math.log2(math.e) / temperature
    heads = [_log_sums(_embeddings(s), logit_scale) for s in students]
    target = _log_sums(_embeddings(teacher), logit_scale)
    sums: list[Tensor | None] = [None] * len(heads)
    totals = _tiles(heads, target, sums, [None] * len(heads), gradient, False, logit_scale=logit_scale)
    gradients = [_row_gradient(s, head, 1.0 / (rows * temperature)) for s, head in zip(sums, heads, strict=True)]
    return (totals / rows).to(torch.float32), gradients


def _embeddings(rows: Tensor) -> Embeddings:
    if max(rows.stride()) >= 2**22:  # offsets inside a tile are 32-bit
        rows = rows.contiguous()
    return Embeddings(rows, reciprocal_norms(rows))


def _empty_gradient(rows: Tensor) -> Tensor:
    """Return an empty tensor for a gradient, in float32 for float16 rows, which could not hold an unscaled mean's."""
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    return torch.empty(rows.shape, dtype=dtype, device=rows.device)


def _row_gradient(unit_gradient: Tensor | None, embeddings: Embeddings, scale: float) -> Tensor:
    """Return the gradient with respect to rows from that with respect to unit rows. None gives an empty tensor."""
    if unit_gradient is None:
        return embeddings.rows.new_empty(0, dtype=_empty_gradient(embeddings.rows[:0]).dtype)
    out = unit_gradient if unit_gradient.dtype == embeddings.rows.dtype else _empty_gradient(embeddings.rows)
    l2_normalize_backward(unit_gradient, embeddings.rows, embeddings.reciprocals, scale, out)
    return out


# The tile form: tiles of B x B.


def _tiles(
    heads: list[Embeddings],
    target: Embeddings,
    sums: list[Tensor | None],
    teacher_sums: list[Tensor | None],
    gradient: bool,
    teacher_gradient: bool,
    flag: Tensor | None = None,
    *,
    logit_scale: float = 0.0,
    fold: bool | None = None,
) -> Tensor:
    """Return totals (H,) float64 of the similarity loss, or with log sums of the neighbourhood loss.

    Args:
        heads: students.
        target: their teacher.
        sums: unscaled gradients with respect to each student's unit rows. Float32 (B, D) tensors are overwritten, and
            None is replaced by a new tensor.
        teacher_sums: the same for the teacher's unit rows, with the opposite sign.
        gradient: compute the students' gradients.
        teacher_gradient: compute the teacher's gradients.
        flag: () int32 switch. With 0 nothing is written, and the totals are undefined. None computes all.
        logit_scale: log2(e) / temperature.
        fold: leave the product of a single row block to cuBLAS. None does so for bfloat16.
    """
    rows = len(target.rows)
    pitch = -(-rows // 16) * 16  # elements between rows of the workspace
    many, wanted = len(heads) > 1, gradient or teacher_gradient
    stores = {head.rows.dtype: torch.bfloat16 if head.rows.dtype == torch.bfloat16 else torch.float32 for head in heads}
    element = 4 * many + max(store.itemsize for store in stores.values()) * wanted
    # Several students share a budget three times as large. A single row block needs no addition.
    fit = WORKSPACE * (3 if many else 1) // (max(element, 1) * pitch)
    height = rows if fit >= rows else max(fit // STEP, 1) * STEP
    height = min(height, rows)
    device = target.rows.device
    shared = torch.empty(height, pitch, dtype=torch.float32, device=device) if many else None
    buffers = {
        store: torch.empty(height, pitch, dtype=store, device=device) for store in set(stores.values()) if wanted
    }
    totals = torch.zeros(len(heads), dtype=torch.float64, device=device)
    # cuBLAS takes no flag.
    may_fold = height == rows and gradient and not teacher_gradient and flag is None
    for begin in range(0, rows, height):
        end = min(begin + height, rows)
        for h, head in enumerate(heads):
            weights = buffers[stores[head.rows.dtype]] if wanted else None
            folded = may_fold and (head.rows.dtype == torch.bfloat16 if fold is None else fold)
            partial = _pair_tile(head, target, shared, weights, flag, logit_scale, begin, end, h == 0, folded)
            totals[h] += partial.sum(dtype=torch.float64)
            if weights is None:
                continue
            if folded:
                sums[h] = weights[:, :rows] @ head.rows
                continue
            for side, results, use in ((head, sums, gradient), (target, teacher_sums, teacher_gradient)):
                if use:
                    result = results[h]
                    if result is None:
                        result = results[h] = torch.empty(side.rows.shape, dtype=torch.float32, device=device)
                    _add_row_block(result, weights, side, begin, end, flag)
    return totals


def _pair_tile(
    head: Embeddings,
    target: Embeddings,
    shared: Tensor | None,
    weights: Tensor | None,
    flag: Tensor | None,
    logit_scale: float,
    begin: int,
    end: int,
    first: bool,
    fold: bool,
) -> Tensor:
    rows = len(target.rows)
    softmax = head.log_sums is not None
    candidates = _pair_tiles(softmax, head.rows, target.rows)

    def run(tile: Tile) -> Tensor:
        blocks = triton.cdiv(end - begin, tile.m) * triton.cdiv(rows - begin, tile.n)
        partial = torch.empty(blocks, dtype=torch.float32, device=head.rows.device)
        pair_tile_kernel[(blocks,)](
            head.rows,
            target.rows,
            head.reciprocals,
            target.reciprocals,
            head.log_sums,
            target.log_sums,
            shared,
            weights,
            partial,
            flag,
            logit_scale,
            begin,
            end,
            rows,
            head.rows.shape[1],
            target.rows.shape[1],
            *head.rows.stride(),
            *target.rows.stride(),
            0 if shared is None else shared.stride(0),
            0 if weights is None else weights.stride(0),
            FIRST=first,
            FOLD=fold,
            PRECISION=PRECISION,
            GROUP=GROUP,
            **tile.launch,
        )
        return partial

    size = tuple(triton.next_power_of_2(i) for i in (end - begin, rows, head.rows.shape[1], target.rows.shape[1]))
    key = ("pair_tile", softmax, size, head.rows.dtype, target.rows.dtype, first, head.rows.device)
    usual = choose(candidates, end - begin, rows - begin)
    # A launch behind a flag may do nothing, so its time says nothing.
    return run(usual if flag is not None else tuned(key, candidates, usual, run, head.rows))


def _pair_tiles(softmax: bool, *embeddings: Tensor) -> tuple[Tile, ...]:
    if any(v.dtype == torch.float32 for v in embeddings):
        return TILES_32_BIT
    return TILES_SOFTMAX if softmax else TILES_16_BIT


def _add_row_block(sums: Tensor, weights: Tensor, side: Embeddings, begin: int, end: int, flag: Tensor | None) -> None:
    """Add to the gradient of the block's rows, and by symmetry to that of the rows after it."""
    rows, height = len(sums), end - begin
    bf16 = side.rows.dtype == weights.dtype == torch.bfloat16
    # float16 values are TF32 values, so one product keeps them. The kernel rounds the weights to 11 bits.
    precision = "bf16" if bf16 else "tf32" if side.rows.dtype == torch.float16 else PRECISION
    for block, of, to in (
        (weights[:height, : rows - begin], slice(begin, rows), slice(begin, end)),
        (weights[:height, height : rows - begin].T, slice(begin, end), slice(end, rows)),
    ):
        if len(block):
            inner = side.reciprocals[of]
            product(block, side.rows[of], sums[to], inner_a=inner, accumulate=begin > 0, precision=precision, flag=flag)


def _log_sums(embeddings: Embeddings, logit_scale: float) -> Embeddings:
    """Add log2 of the sum of exp2 over each row's logits, without the self-pair."""
    rows, width = embeddings.rows.shape
    tile = choose(_pair_tiles(True, embeddings.rows), rows, rows)
    blocks = triton.cdiv(rows, tile.m)
    splits = max(1, min(triton.cdiv(BLOCKS, blocks), rows // (2 * tile.n)))
    columns = triton.cdiv(triton.cdiv(rows, splits), tile.n) * tile.n
    splits = triton.cdiv(rows, columns)
    top, total = torch.empty(2, splits, rows, dtype=torch.float32, device=embeddings.rows.device)
    log_sums_kernel[(blocks, splits)](
        embeddings.rows,
        embeddings.reciprocals,
        top,
        total,
        logit_scale,
        rows,
        width,
        columns,
        *embeddings.rows.stride(),
        PRECISION=PRECISION,
        **tile.launch,
    )
    highest = top.amax(dim=0)
    return embeddings._replace(log_sums=highest + ((top - highest).exp2() * total).sum(dim=0).log2())


# The feature form: products of D x D.


class _Feature(NamedTuple):
    students: Tensor | None
    teacher: Tensor | None
    cancelled: Tensor  # () int32


def _by_feature(h: int, students: list[Tensor], teacher: Tensor, method: str, teacher_gradient: bool) -> bool:
    if method != "auto":
        return method == "feature"
    width, teacher_width = students[h].shape[1], teacher.shape[1]
    if 4 * max(width, teacher_width) * teacher_width > WORKSPACE:
        return False
    # bfloat16 products are exact in one pass for tiles and take three for features. float16 takes six.
    passes = {torch.bfloat16: 3.0, torch.float16: 6.0}.get(students[h].dtype, 1.0)
    return cost.feature_form_is_cheaper(
        len(teacher), width, teacher_width, teacher_gradient, heads=len(students), passes=passes
    )


def _feature(
    head: Embeddings, target: Embeddings, teacher_gram: Tensor | None, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, _Feature]:
    """Return |S'S|^2 - 2 |T'S|^2 + |T'T|^2 in float64, and the gradients of `_tiles` with respect to unit rows."""
    assert teacher_gram is not None
    gram, cross = _features(head, head), _features(target, head)  # (D, D), (E, D)
    student_sum, cross_sum, teacher_sum = (matrix.square().sum() for matrix in (gram, cross, teacher_gram))
    total = student_sum - 2.0 * cross_sum + teacher_sum
    cancelled = (total < cost.CANCELLATION * (student_sum + teacher_sum)).to(torch.int32)
    sums = teacher_sums = None
    if gradient:
        sums = _difference(head, gram, target, cross)
    if teacher_gradient:
        teacher_sums = _difference(head, cross.T, target, teacher_gram)
    return total.clamp(min=0.0), _Feature(sums, teacher_sums, cancelled)


def _difference(head: Embeddings, first: Tensor, target: Embeddings, second: Tensor) -> Tensor:
    """Return unit students times first minus unit teachers times second."""
    out = torch.empty(len(head.rows), first.shape[1], dtype=torch.float32, device=head.rows.device)
    product(head.rows, first.float(), out, row=head.reciprocals, precision=exact(head.rows.dtype))
    negative = (-second).float()
    product(target.rows, negative, out, row=target.reciprocals, accumulate=True, precision=exact(target.rows.dtype))
    return out


def _features(left: Embeddings, right: Embeddings) -> Tensor:
    """Return unit left' times unit right, in parts of bounded length that are added in float64: (D, E)."""
    (rows, m), n = left.rows.shape, right.rows.shape[1]
    tile = choose(TILES_32_BIT, m, n)
    blocks = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    splits = max(1, min(triton.cdiv(BLOCKS, blocks), triton.cdiv(rows, 256), WORKSPACE // (4 * m * n)))
    depth = triton.cdiv(triton.cdiv(rows, splits), 32) * 32
    parts = torch.empty(triton.cdiv(rows, depth), m, n, dtype=torch.float32, device=left.rows.device)
    product(
        left.rows.T,
        right.rows,
        parts,
        inner_a=left.reciprocals,
        inner_x=right.reciprocals,
        depth=depth,
        precision=exact(left.rows.dtype, right.rows.dtype),
    )
    return parts.sum(dim=0, dtype=torch.float64)
