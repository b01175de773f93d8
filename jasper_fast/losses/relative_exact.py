"""The exact relative similarity loss: the compiled extension's or a kernel's form, each with a fallback in plain torch.

Kernels are launched on the current CUDA device. Each operator makes the device of its tensors the current one inside,
where torch.compile does not look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.ops.dispatch import fake_unit_gradients, uses_triton
from jasper_fast.ops.native import extension_path, native

MAX_PAIRS = 2**31 - 1  # counts are int32


def pair_scores(unit: Tensor) -> Tensor:
    """Return the cosines of all pairs of unit rows, those of equal rows equal. (B, D) -> (P,)."""
    if uses_triton([unit]):
        from jasper_fast.kernels import pairs

        return pairs.pair_scores(unit)
    return pack_pairs(unit @ unit.T)


def pack_pairs(matrix: Tensor) -> Tensor:
    """Return the strict upper triangle, row by row. (B, B) -> (P,)."""
    if native(matrix):
        return torch.ops.jasper_fast_native.pack_pairs(matrix.contiguous())
    i, j = torch.triu_indices(len(matrix), len(matrix), offset=1, device=matrix.device)
    return matrix[i, j]


def unpack_pairs(counts: Tensor, rows: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Return scale * counts on both sides of a zero diagonal. (P,) int32 -> (B, B)."""
    if extension_path() is not None and counts.device.type == "cpu" and dtype == torch.float32:
        return torch.ops.jasper_fast_native.unpack_pairs(counts.contiguous(), rows, scale)
    if dtype == torch.float32 and uses_triton([counts]):
        from jasper_fast.kernels import pairs

        return pairs.unpack_pairs(counts, rows, scale)
    i, j = torch.triu_indices(rows, rows, offset=1, device=counts.device)
    matrix = torch.zeros(rows, rows, dtype=dtype, device=counts.device)
    matrix[i, j] = (counts.to(torch.float64) * scale).to(dtype)
    return matrix + matrix.T


@torch.library.custom_op("jasper_fast::pair_counts", mutates_args=())
def pair_counts(scores: Tensor, teacher: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count the active terms of the relative similarity loss exactly, in O(P log P) time and O(P) memory.

    Args:
        scores: pair scores (H, P) of H students, float32 or float64.
        teacher: pair scores (P,) of their one teacher, of the same dtype. P < 2**31.
        margin: the margin of the loss. Thresholds are fl(score - margin), rounded once.
        exclude_ties: whether pairs with equal teacher scores are left out. Otherwise the pair index decides.

    Returns:
        up - low (H, P) int32, the gradient of the summed loss with respect to the scores. The sum of low (H,) int64.
        <up - low, scores> (H,) float64. A pair with NaN on either side takes no part in the counts and makes the last
        figure NaN.
    """
    with torch.cuda.device_of(scores):
        return _pair_counts(scores, teacher, margin, exclude_ties)


def _pair_counts(scores: Tensor, teacher: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    if native(scores):
        return torch.ops.jasper_fast_native.pair_counts(scores.contiguous(), teacher.contiguous(), margin, exclude_ties)
    if uses_triton([scores]) and scores.shape[1]:
        from jasper_fast.kernels import relative_similarity_exact

        if relative_similarity_exact.supports(scores.shape[1]):
            return relative_similarity_exact.pair_counts(scores, teacher, margin, exclude_ties)
    counted = [_pair_counts_torch(row, teacher, margin, exclude_ties) for row in scores]
    gradient, low, dot = (torch.stack(parts) for parts in zip(*counted, strict=True))
    return gradient, low, dot


@pair_counts.register_fake
def _(scores: Tensor, teacher: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads = scores.shape[0]
    return (
        torch.empty_like(scores, dtype=torch.int32, memory_format=torch.contiguous_format),
        scores.new_empty((heads,), dtype=torch.int64),
        scores.new_empty((heads,), dtype=torch.float64),
    )


def _pair_counts_torch(x: Tensor, t: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count for one student with a wavelet matrix over teacher positions: log2(P) passes of tensor operations."""
    pairs = len(x)
    missing = x.isnan() | t.isnan()
    # NaN goes to the end of both orders, where no query reaches.
    student_sorted, student_order = torch.where(missing, torch.nan, x).sort()
    teacher_sorted, teacher_order = torch.where(missing, torch.nan, t).sort(stable=True)
    # searchsorted does not handle NaN. Nothing is counted at +inf.
    student_sorted = student_sorted.masked_fill(student_sorted.isnan(), torch.inf)
    teacher_sorted = teacher_sorted.masked_fill(teacher_sorted.isnan(), torch.inf)
    position = torch.empty_like(teacher_order)
    position[teacher_order] = torch.arange(pairs, device=x.device)
    teacher_position = position[student_order]  # (P,) teacher positions in student order
    first, last = teacher_position, teacher_position + 1
    if exclude_ties:
        first = torch.searchsorted(teacher_sorted, teacher_sorted)[teacher_position]
        last = torch.searchsorted(teacher_sorted, teacher_sorted, right=True)[teacher_position]
    threshold = student_sorted - margin
    passed = torch.searchsorted(student_sorted, threshold, right=True)  # scores <= this pair's threshold
    reached = torch.searchsorted(threshold, student_sorted)  # thresholds < this pair's score
    below_passed, below_reached = _count_below(
        teacher_position, torch.stack((passed, reached)), torch.stack((first, last))
    )
    valid = ~missing[student_order]
    low = torch.where(valid, first - below_passed, 0)
    up = torch.where(valid, reached - below_reached, 0)
    gradient = torch.zeros(pairs, dtype=torch.int32, device=x.device)
    gradient[student_order] = (up - low).to(torch.int32)
    terms = gradient * x.to(torch.float64)
    dot = torch.where((gradient == 0) & ~x.isnan(), 0.0, terms).sum()
    return gradient, low.sum(), torch.where(t.isnan().any(), torch.nan, dot)


def _count_below(values: Tensor, prefix: Tensor, bound: Tensor) -> Tensor:
    """Count values[:prefix] < bound. values is a permutation of range(P), and prefix and bound share a shape."""
    begin, end, total = torch.zeros_like(prefix), prefix, torch.zeros_like(prefix)
    for bit in reversed(range(len(values).bit_length())):
        zero = (values >> bit) & 1 == 0
        zeros = torch.cat((values.new_zeros(1), zero.cumsum(0)))  # zeros[n]: among the first n
        begin_zero, end_zero = zeros[begin], zeros[end]
        one = (bound >> bit) & 1 == 1
        total = total + torch.where(one, end_zero - begin_zero, 0)
        begin = torch.where(one, zeros[-1] + begin - begin_zero, begin_zero)
        end = torch.where(one, zeros[-1] + end - end_zero, end_zero)
        values = torch.cat((values[zero], values[~zero]))
    return total


def relative_similarity(
    students: list[Tensor], teacher: Tensor, margin: float, exclude_ties: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Compute the losses (H,) of unit rows against one teacher and, if ``gradient`` is set, their gradients.

    The teacher's scores are sorted once for all students.
    """
    # A call through the registered operator takes 0.15 ms, a tenth of this loss of 128 rows.
    if torch.compiler.is_compiling() or type(teacher) is not Tensor:
        return registered_relative_similarity(students, teacher, margin, exclude_ties, gradient)
    with torch.cuda.device_of(teacher):
        return _relative_similarity(students, teacher, margin, exclude_ties, gradient)


def _relative_similarity(
    students: list[Tensor], teacher: Tensor, margin: float, exclude_ties: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    rows, heads = teacher.shape[0], len(students)
    pairs = rows * (rows - 1) // 2
    if pairs < 2:
        return teacher.new_zeros(heads), [torch.zeros_like(s) if gradient else s.new_empty(0) for s in students]
    scores = torch.stack([pair_scores(s) for s in students])
    counts, low, dot = _pair_counts(scores, pair_scores(teacher), margin, exclude_ties)
    terms = pairs * (pairs - 1) / 2
    losses = ((dot + margin * low.double()) / terms).to(teacher.dtype)
    if not gradient:
        return losses, [s.new_empty(0) for s in students]
    del scores
    spoilt = losses * 0.0  # NaN where the loss is not finite, so that its gradient is not either
    gradients = [
        multiply(unpack_pairs(counts[h], rows, 1.0 / terms, s.dtype), s).add_(spoilt[h]) for h, s in enumerate(students)
    ]
    return losses, gradients


def multiply(a: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
    """Return a x, added to ``into`` if that is given. On CUDA in float32, even if cuBLAS may use TF32."""
    if uses_triton([a, x]):
        from jasper_fast.kernels import strips

        return strips.multiply(a, x, into, add=into is not None)
    return a @ x if into is None else into.addmm_(a, x)


@torch.library.custom_op("jasper_fast::relative_similarity", mutates_args=())
def registered_relative_similarity(
    students: list[Tensor], teacher: Tensor, margin: float, exclude_ties: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Register `relative_similarity` for torch.compile and tensor subclasses."""
    with torch.cuda.device_of(teacher):
        return _relative_similarity(students, teacher, margin, exclude_ties, gradient)


@registered_relative_similarity.register_fake
def _(
    students: list[Tensor], teacher: Tensor, margin: float, exclude_ties: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    return teacher.new_empty(len(students)), fake_unit_gradients(students, gradient)
