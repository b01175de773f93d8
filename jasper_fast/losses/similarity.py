"""The similarity loss: the difference of the two matrices of cosines.

Each student takes one of two forms. Plain torch has both, and so have `kernels/feature_form.py` and
`kernels/pair_losses.py` for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jasper_fast.losses import reference
from jasper_fast.losses.arguments import LossOptions, check_choice, check_pair
from jasper_fast.losses.autograd import attach_gradients, compute_dtype, full_precision, needs_gradient
from jasper_fast.ops import cost
from jasper_fast.ops.dispatch import fake_gradient, fake_loss, fake_losses, uses_triton
from jasper_fast.ops.row_blocks import UnitRows, normalize_all, row_blocks

SIMILARITY_METHODS = ("auto", "tile", "feature", "reference")


def similarity_loss(student: Tensor, teacher: Tensor, *, method: str = "auto") -> Tensor:
    """Return the mean squared difference of the student's and the teacher's (B, B) cosine matrices.

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, E). They get a gradient if they require one.
        method: "tile" takes row blocks of the B x B difference: O(B^2 D) work in bounded memory. "feature" takes D x D
            products: O(B D^2) work. "reference" is plain autograd in O(B^2) memory. "auto" takes the feature form if
            it is cheaper and its sums do not cancel, else the tile form. On CUDA it waits once to decide that for large
            batches, but not while a graph is captured.

    Raises:
        TypeError: a floating-point tensor was expected.
        ValueError: the two are not matrices with equally many rows on one device, or the method is unknown.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # cosine 0
        >>> teacher = torch.tensor([[1.0], [2.0]])  # cosine 1: two of four entries differ by 1
        >>> similarity_loss(student, teacher)
        tensor(0.5000)
    """
    check_pair(student, teacher)
    check_choice("method", method, SIMILARITY_METHODS)
    with full_precision(teacher):
        if method == "reference":
            dtype = compute_dtype([student], teacher)
            return reference.similarity_loss(student.to(dtype), teacher.to(dtype))
        return _similarity([student], teacher, method)[0]


def compute(heads: list[Tensor], teacher: Tensor, options: LossOptions) -> Tensor:
    """Return the losses (H,) of rows of any length, for `jasper_fast.losses.combined`."""
    return _similarity(heads, teacher, "auto")


def _similarity(students: list[Tensor], teacher: Tensor, method: str) -> Tensor:
    with_gradient, with_teacher_gradient = needs_gradient(students), needs_gradient([teacher])
    losses, gradients, teacher_gradients = similarity_op(
        [student.detach() for student in students], teacher.detach(), method, with_gradient, with_teacher_gradient
    )
    heads = list(range(len(students)))
    return attach_gradients(
        losses, [*students, *[teacher] * len(students)], [*gradients, *teacher_gradients], heads + heads
    )


# The operator.


@torch.library.custom_op("jasper_fast::similarity", mutates_args=())
def similarity_op(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute mean((S S' - T T')^2) over unit rows of each student, and the wanted gradients, in bounded workspace.

    Args:
        students: H tensors (B, D_h) of any length, strides and floating dtype.
        teacher: embeddings (B, E).
        method: "tile", "feature", or "auto". The last takes the feature form if it is cheaper, unless the loss turns
            out so small that its sums cancel. Then it takes the tile form. On CUDA it is tried for large batches only.
        gradient: whether the students' gradients are wanted.
        teacher_gradient: whether the teacher's gradient of each loss is wanted.

    Returns:
        The losses (H,) in float32, or float64 if any embeddings are. The students' gradients, and the teacher's of each
        loss, in the dtype of `gradient_dtype`. An unwanted gradient is empty.
    """
    parts = kernel_parts() if uses_triton([*students, teacher]) else torch_parts()
    with torch.cuda.device_of(teacher):  # kernels are launched on the current device
        return compute_by_form(parts, students, teacher, method, gradient, teacher_gradient)


@similarity_op.register_fake
def _(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    losses, gradients = fake_losses(students, teacher, gradient)
    return losses, gradients, [fake_gradient(teacher, teacher_gradient) for _ in students]


# The two forms, in plain torch or with kernels.


class Parts(NamedTuple):
    """The steps that differ between plain torch, whose rows are `UnitRows`, and the kernels, whose rows are `Rows`."""

    normalize_all: Callable[[list[Tensor], Tensor], tuple[list[Any], Any]]
    features: Callable[[Any, Any], Tensor]
    feature_gradient: Callable[[Any, Tensor, Any, Tensor, float], Tensor]
    tiles: Callable[[list[Any], Any, float, bool, bool], tuple[Tensor, list[Tensor], list[Tensor]]]
    tries_features: Callable[[int, list[Tensor], Tensor, bool], bool]


def compute_by_form(
    parts: Parts, students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute as `similarity_op` does, each student by features or by tiles."""
    heads, target = parts.normalize_all(students, teacher)
    scale, teacher_gram = 4.0 / len(teacher) ** 2, None
    totals = torch.zeros(len(heads), dtype=torch.float64, device=teacher.device)
    gradients: list[Tensor] = [head.backward(None) for head in heads]
    teacher_gradients: list[Tensor] = [target.backward(None) for _ in heads]
    by_tile = []
    for h, head in enumerate(heads):
        auto = method == "auto"
        if method == "tile" or (auto and not parts.tries_features(h, students, teacher, teacher_gradient)):
            by_tile.append(h)
            continue
        teacher_gram = parts.features(target, target) if teacher_gram is None else teacher_gram  # (E, E)
        gram, cross = parts.features(head, head), parts.features(target, head)  # (D, D), (E, D)
        student_sum, teacher_sum, cross_sum = _square_sum(gram), _square_sum(teacher_gram), _square_sum(cross)
        total = student_sum - 2.0 * cross_sum + teacher_sum
        if auto and bool(total < cost.CANCELLATION * (student_sum + teacher_sum)):
            by_tile.append(h)
            continue
        totals[h] = total.clamp(min=0.0)  # a sum of squares, also if the sums cancel
        if gradient:
            gradients[h] = parts.feature_gradient(head, gram, target, cross, scale)
        if teacher_gradient:
            teacher_gradients[h] = parts.feature_gradient(target, teacher_gram, head, cross.T, scale)
    if by_tile:
        found = parts.tiles([heads[h] for h in by_tile], target, scale, gradient, teacher_gradient)
        for h, total, own, of_teacher in zip(by_tile, *found, strict=True):
            totals[h], gradients[h], teacher_gradients[h] = total, own, of_teacher
    losses = fake_loss([*students, teacher], len(heads))
    return losses.copy_(totals / len(teacher) ** 2), gradients, teacher_gradients


def _square_sum(matrix: Tensor) -> Tensor:
    """Sum squares in float64. Rows are summed in the matrix's own precision."""
    return torch.linalg.vector_norm(matrix, dim=1).to(torch.float64).square().sum()


# Plain torch.


def torch_parts() -> Parts:
    """Return the parts in plain torch."""
    return Parts(normalize_all, _features, _feature_gradient, _similarity_tile, _tries_features)


def _features(left: UnitRows, right: UnitRows) -> Tensor:
    return left.rows.T @ right.rows


def _feature_gradient(one: UnitRows, first: Tensor, other: UnitRows, second: Tensor, scale: float) -> Tensor:
    return one.backward((one.rows @ first).addmm_(other.rows, second, alpha=-1.0).mul_(scale))


def _tries_features(h: int, students: list[Tensor], teacher: Tensor, teacher_gradient: bool) -> bool:
    # On another device than a CPU, looking at the loss to leave the feature form would make the host wait.
    return teacher.device.type == "cpu" and cost.feature_form_is_cheaper(
        teacher.shape[0], students[h].shape[1], teacher.shape[1], teacher_gradient, heads=len(students)
    )


def _similarity_tile(
    heads: list[UnitRows], target: UnitRows, scale: float, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Go over blocks of G = S S' - T T' from the diagonal to the right. Columns beyond a block's square count twice."""
    totals = torch.zeros(len(heads), dtype=torch.float64, device=target.rows.device)
    own = [torch.zeros_like(head.rows) if gradient else None for head in heads]
    of_teacher = [torch.zeros_like(target.rows) if teacher_gradient else None for _ in heads]
    for begin, end in row_blocks(len(target.rows)):
        block = target.rows[begin:end] @ target.rows[begin:].T  # (h, B - begin)
        for h, head in enumerate(heads):
            out = block if h == len(heads) - 1 else None  # the last student may overwrite the teacher's block
            difference = torch.addmm(block, head.rows[begin:end], head.rows[begin:].T, beta=-1.0, out=out)
            square, right = difference[:, : end - begin], difference[:, end - begin :]
            totals[h] += _square_sum(square) + 2.0 * _square_sum(right)
            for side, place in ((head, own[h]), (target, of_teacher[h])):
                if place is not None:
                    place[begin:end].addmm_(difference, side.rows[begin:])
                    place[end:].addmm_(right.T, side.rows[begin:end])
    for part, factor in [*((part, scale) for part in own), *((part, -scale) for part in of_teacher)]:
        if part is not None:
            part.mul_(factor)
    gradients = [head.backward(part) for head, part in zip(heads, own, strict=True)]
    return totals, gradients, [target.backward(part) for part in of_teacher]


# Kernels.


def kernel_parts() -> Parts:
    """Return the parts with kernels for a GPU."""
    from jasper_fast.kernels import feature_form, pair_losses
    from jasper_fast.kernels.strips import WORKSPACE, Rows

    def normalize_all(students: list[Tensor], teacher: Tensor) -> tuple[list[Rows], Rows]:
        return [Rows.of(student) for student in students], Rows.of(teacher)

    def tries_features(h: int, students: list[Tensor], teacher: Tensor, teacher_gradient: bool) -> bool:
        (count, teacher_width), width = teacher.shape, students[h].shape[1]
        fits = 4 * max(width, teacher_width) * teacher_width <= WORKSPACE
        # The host waits to see if the sums cancel, which a capture of a graph does not allow.
        captured = teacher.is_cuda and torch.cuda.is_current_stream_capturing()
        if not fits or captured or count**2 * width < cost.WORTH_WAITING:
            return False
        passes = cost.PASSES.get(students[h].dtype, 1.0)
        return cost.feature_form_is_cheaper(
            count, width, teacher_width, teacher_gradient, heads=len(students), passes=passes
        )

    return Parts(normalize_all, feature_form.features, feature_form.gradient, pair_losses.tiles, tries_features)
