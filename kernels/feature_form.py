"""The feature form of the similarity loss: products of D x D in place of B x B, in chunks of rows by cuBLAS.

A sum over rows of unit left' times unit right is (scaled left)' times raw right, with both norms in the left factor. Of
bfloat16 rows the right factor is exact, and the left one is the sum of two bfloat16 halves, which keep 16 bits. Other
dtypes are multiplied in full float32. Chunks are added in float64.

Cost on an H200 at B = 65536, D = E = 1024, 7 products of 2 B D D FLOP: in bfloat16 3.2 ms at 600 TFLOP/s. 4 GB through
memory take 1 ms. In float32 the products take 20 ms, at 50 TFLOP/s. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.kernels import strips
from jasper_fast.kernels.strips import Rows, multiply
from jasper_fast.ops import cost

# Products of the feature form in the time of one of the tile form's. float16 leaves the tensor cores.
PASSES = {torch.bfloat16: 2.0, torch.float16: 12.0}


def is_cheaper(h: int, students: list[Tensor], teacher: Tensor, teacher_gradient: bool) -> bool:
    """Return True if a student's feature form is cheaper than strips and its products fit the workspace."""
    width, teacher_width = students[h].shape[1], teacher.shape[1]
    if 4 * max(width, teacher_width) * teacher_width > strips.WORKSPACE:
        return False
    passes = PASSES.get(students[h].dtype, 1.0)
    return cost.feature_form_is_cheaper(
        len(teacher), width, teacher_width, teacher_gradient, heads=len(students), passes=passes
    )


def loss(head: Rows, target: Rows, teacher_gram: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return |S'S|^2 - 2 |T'S|^2 + |T'T|^2, the products S'S and T'S, and whether the sums cancelled.

    Args:
        head: student rows.
        target: teacher rows.
        teacher_gram: T'T (E, E) float64.
    """
    gram, cross = features(head, head), features(target, head)  # (D, D), (E, D)
    student_sum, cross_sum, teacher_sum = (matrix.square().sum() for matrix in (gram, cross, teacher_gram))
    total = student_sum - 2.0 * cross_sum + teacher_sum
    return total.clamp(min=0.0), (gram, cross), total < cost.CANCELLATION * (student_sum + teacher_sum)


def features(left: Rows, right: Rows) -> Tensor:
    """Return unit left' times unit right: (D, E) float64."""
    shape = left.raw.shape[1], right.raw.shape[1]
    total = torch.zeros(shape, dtype=torch.float64, device=left.raw.device)
    part = torch.empty(shape, dtype=torch.float32, device=left.raw.device)
    for rows in _chunks(left, right):
        scaled = left.raw[rows] * left.reciprocals[rows, None] * right.reciprocals[rows, None]
        for n, half in enumerate(_halves(scaled, left, right)):
            multiply(half.T, right.raw[rows], part, add=n > 0)
        total += part
    return total


def difference(one: Rows, first: Tensor, other: Rows, second: Tensor) -> Tensor:
    """Return unit rows of one times first (D, N) minus unit rows of the other times second (E, N): (B, N) float32."""
    out = torch.empty(len(one.raw), first.shape[1], dtype=torch.float32, device=one.raw.device)
    for rows in _chunks(one, other):
        parts = []
        for side, factor in ((one, first), (other, second)):
            part = torch.empty_like(out[rows])
            for n, half in enumerate(_halves(factor.float(), side)):
                multiply(side.raw[rows], half, part, add=n > 0)
            parts.append(part.mul_(side.reciprocals[rows, None]))
        torch.sub(*parts, out=out[rows])
    return out


def _halves(factor: Tensor, *others: Rows) -> list[Tensor]:
    """Split a float32 factor into two of bfloat16 if it multiplies bfloat16 rows."""
    if any(rows.raw.dtype != torch.bfloat16 for rows in others):
        return [factor]
    high = factor.to(torch.bfloat16)
    return [high, (factor - high).to(torch.bfloat16)]


def _chunks(one: Rows, other: Rows) -> list[slice]:
    count, width = len(one.raw), max(one.raw.shape[1], other.raw.shape[1])
    length = max(strips.WORKSPACE // (16 * width), 256)
    return [slice(begin, min(begin + length, count)) for begin in range(0, count, length)]
