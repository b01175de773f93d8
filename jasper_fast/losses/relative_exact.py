"""The operators behind the losses: the compiled extension's or a kernel's, each with a fallback in plain torch.

Kernels are launched on the current CUDA device, so each operator makes that the device of its tensors: inside, where
torch.compile does not look.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from jasper_fast import strips
from jasper_fast.extension import extension_path, native

MAX_PAIRS = 2**31 - 1  # counts are int32


def pack_pairs(matrix: Tensor) -> Tensor:
    """The strict upper triangle, row by row. (B, B) -> (P,)."""
    if native(matrix):
        return torch.ops.jasper_fast_native.pack_pairs(matrix.contiguous())
    if uses_triton([matrix]):
        from jasper_fast.kernels import pairs

        return pairs.pack_pairs(matrix.contiguous())
    i, j = torch.triu_indices(len(matrix), len(matrix), offset=1, device=matrix.device)
    return matrix[i, j]


def unpack_pairs(counts: Tensor, rows: int, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * counts on both sides of a zero diagonal. (P,) int32 -> (B, B)."""
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
        scores: (H, P) pair scores of H students, float32 or float64.
        teacher: (P,) pair scores of their one teacher, of the same dtype; P < 2**31.
        margin: as in the loss; thresholds are fl(score - margin), rounded once.
        exclude_ties: leave out pairs with equal teacher scores; otherwise pair index decides.

    Returns:
        up - low (H, P) int32, the gradient of the summed loss with respect to the scores; sum of low (H,) int64;
        <up - low, scores> (H,) float64. A pair without a number on either side takes no part in the counts and makes
        the last figure NaN.
    """
    with torch.cuda.device_of(scores):
        return _pair_counts(scores, teacher, margin, exclude_ties)


def _pair_counts(scores: Tensor, teacher: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    if native(scores):
        return torch.ops.jasper_fast_native.pair_counts(scores.contiguous(), teacher.contiguous(), margin, exclude_ties)
    if uses_triton([scores]) and scores.shape[1]:
        from jasper_fast.kernels import relative_similarity_exact

        if relative_similarity_exact.takes(scores.shape[1]):
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
    """One student's counts with a wavelet matrix over teacher positions: log2(P) passes of whole-tensor operations."""
    pairs = len(x)
    missing = x.isnan() | t.isnan()
    # What is not a number goes to the end of both orders, where no query reaches.
    student_sorted, student_order = torch.where(missing, torch.nan, x).sort()
    teacher_sorted, teacher_order = torch.where(missing, torch.nan, t).sort(stable=True)
    # searchsorted does not know NaN, and nothing is counted at +inf that should not be.
    student_sorted = student_sorted.masked_fill(student_sorted.isnan(), torch.inf)
    teacher_sorted = teacher_sorted.masked_fill(teacher_sorted.isnan(), torch.inf)
    position = torch.empty_like(teacher_order)
    position[teacher_order] = torch.arange(pairs, device=x.device)
    own = position[student_order]  # (P,) teacher positions in student order
    first, last = own, own + 1
    if exclude_ties:
        first = torch.searchsorted(teacher_sorted, teacher_sorted)[own]
        last = torch.searchsorted(teacher_sorted, teacher_sorted, right=True)[own]
    threshold = student_sorted - margin
    passed = torch.searchsorted(student_sorted, threshold, right=True)  # scores <= this pair's threshold
    reached = torch.searchsorted(threshold, student_sorted)  # thresholds < this pair's score
    below_passed, below_reached = _count_below(own, torch.stack((passed, reached)), torch.stack((first, last)))
    valid = ~missing[student_order]
    low = torch.where(valid, first - below_passed, 0)
    up = torch.where(valid, reached - below_reached, 0)
    gradient = torch.zeros(pairs, dtype=torch.int32, device=x.device)
    gradient[student_order] = (up - low).to(torch.int32)
    terms = gradient * x.to(torch.float64)
    dot = torch.where((gradient == 0) & ~x.isnan(), 0.0, terms).sum()
    return gradient, low.sum(), torch.where(t.isnan().any(), torch.nan, dot)


def _count_below(values: Tensor, prefix: Tensor, bound: Tensor) -> Tensor:
    """How many of values[:prefix] are < bound; values is a permutation of range(P), prefix and bound share a shape."""
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
    """Relative similarity of unit rows against one teacher: losses (H,) and, if asked for, their gradients.

    The teacher's scores are sorted once for all students.
    """
    # Going through the registered operator takes 0.15 ms, a tenth of this loss of 128 rows.
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
    scores = torch.stack([pack_pairs(_cosines(s)) for s in students])
    counts, low, dot = _pair_counts(scores, pack_pairs(_cosines(teacher)), margin, exclude_ties)
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


def _cosines(unit: Tensor) -> Tensor:
    """Of all pairs of unit rows; equal rows have equal ones. (B, D) -> (B, B)"""
    if uses_triton([unit]):
        from jasper_fast.kernels import relative_similarity_exact

        return relative_similarity_exact.cosines(unit)
    return unit @ unit.T


def multiply(a: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
    """a x, added to ``into`` if that is given; by the kernels as float32, whatever cuBLAS is allowed to round to."""
    if uses_triton([a, x]):
        from jasper_fast.kernels import product

        return product.multiply(a, x, into)
    return a @ x if into is None else into.addmm_(a, x)


@torch.library.custom_op("jasper_fast::relative_similarity", mutates_args=())
def registered_relative_similarity(
    students: list[Tensor], teacher: Tensor, margin: float, exclude_ties: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """`relative_similarity` as torch.compile and tensor subclasses see it."""
    with torch.cuda.device_of(teacher):
        return _relative_similarity(students, teacher, margin, exclude_ties, gradient)


@registered_relative_similarity.register_fake
def _(
    students: list[Tensor], teacher: Tensor, margin: float, exclude_ties: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    return teacher.new_empty(len(students)), _fake_gradients(students, gradient)


@torch.library.custom_op("jasper_fast::similarity", mutates_args=())
def similarity(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """mean((S S' - T T')^2) over unit rows of each student, and the gradients asked for, in bounded workspace.

    Args:
        students: H tensors (B, D_h) of any length, strides and floating dtype.
        teacher: (B, E).
        method: "tile", "feature", or "auto": the feature form where it is cheaper, unless the loss turns out so small
            that the feature form's sums cancel; then the tile form. On CUDA the kernels find that out themselves.
        gradient: whether the students' gradients are wanted.
        teacher_gradient: whether the teacher's gradient of each loss is wanted.

    Returns:
        losses (H,) in float32, or float64 where any vectors are; the students' gradients, and the teacher's of each
        loss, in the dtype of `gradient_dtype`. An unwanted gradient is empty.
    """
    if uses_triton([*students, teacher]):
        from jasper_fast.kernels import pair_losses

        with torch.cuda.device_of(teacher):
            return pair_losses.similarity(students, teacher, method, gradient, teacher_gradient)
    return strips.similarity(students, teacher, method, gradient, teacher_gradient)


@similarity.register_fake
def _(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    losses, gradients = _fake_losses(students, teacher, gradient)
    return losses, gradients, [_fake_gradient(teacher, teacher_gradient) for _ in students]


@torch.library.custom_op("jasper_fast::neighbourhood", mutates_args=())
def neighbourhood(
    students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Mean over rows of KL(softmax(T T' / t) || softmax(S S' / t)) of each student's unit rows, each without itself.

    Args:
        students: H tensors (B, D_h) of any length, strides and floating dtype.
        teacher: (B, E), a constant.
        temperature: t > 0.
        gradient: whether the students' gradients are wanted.

    Returns:
        losses and the students' gradients, as those of `similarity`.
    """
    if uses_triton([*students, teacher]):
        from jasper_fast.kernels import pair_losses

        with torch.cuda.device_of(teacher):
            return pair_losses.neighbourhood(students, teacher, temperature, gradient)
    return strips.neighbourhood(students, teacher, temperature, gradient)


@neighbourhood.register_fake
def _(students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    return _fake_losses(students, teacher, gradient)


def uses_triton(vectors: list[Tensor]) -> bool:
    """Whether Triton kernels serve these: on CUDA, where Triton is installed, and none is float64."""
    return vectors[-1].is_cuda and _TRITON and all(v.dtype != torch.float64 for v in vectors)


_TRITON = importlib.util.find_spec("triton") is not None


def gradient_dtype(vectors: Tensor) -> torch.dtype:
    """In which a mean's gradient is kept until it is scaled: float32 for float16, which could not hold it."""
    return torch.float32 if vectors.dtype == torch.float16 else vectors.dtype


def _fake_losses(students: list[Tensor], teacher: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    double = any(v.dtype == torch.float64 for v in (*students, teacher))
    losses = teacher.new_empty(len(students), dtype=torch.float64 if double else torch.float32)
    return losses, [_fake_gradient(s, gradient) for s in students]


def _fake_gradient(vectors: Tensor, wanted: bool) -> Tensor:
    return vectors.new_empty(vectors.shape if wanted else (0,), dtype=gradient_dtype(vectors))


def _fake_gradients(students: list[Tensor], gradient: bool) -> list[Tensor]:
    return [torch.empty_like(s) if gradient else s.new_empty(0) for s in students]
