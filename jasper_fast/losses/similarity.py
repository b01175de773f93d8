"""The similarity loss: the difference of the two matrices of cosines.

On CUDA, `kernels/pair_losses.py` computes it. Elsewhere plain torch does, in one of two forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.losses import reference
from jasper_fast.losses.arguments import LossOptions, check_choice, check_pair
from jasper_fast.losses.autograd import attach_gradients, compute_dtype, full_precision, needs_gradient
from jasper_fast.ops import cost
from jasper_fast.ops.dispatch import fake_gradient, fake_losses, uses_triton
from jasper_fast.ops.row_blocks import normalize_all, row_blocks

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
    if uses_triton([*students, teacher]):
        from jasper_fast.kernels import pair_losses

        with torch.cuda.device_of(teacher):  # kernels are launched on the current device
            return pair_losses.similarity(students, teacher, method, gradient, teacher_gradient)
    return _similarity_torch(students, teacher, method, gradient, teacher_gradient)


@similarity_op.register_fake
def _(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    losses, gradients = fake_losses(students, teacher, gradient)
    return losses, gradients, [fake_gradient(teacher, teacher_gradient) for _ in students]


# Plain torch.


def _similarity_torch(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    heads, target = normalize_all(students, teacher)
    units, rows = [head.rows for head in heads], len(teacher)
    losses = target.rows.new_zeros(len(heads))
    gradients: list[Tensor | None] = [None] * len(heads)
    teacher_gradients: list[Tensor | None] = [None] * len(heads)
    by_tile = []
    teacher_gram = None
    for h, unit in enumerate(units):
        if method == "tile" or (
            method == "auto" and not _tries_feature(unit, target.rows, teacher_gradient, len(heads))
        ):
            by_tile.append(h)
            continue
        if teacher_gram is None:
            teacher_gram = target.rows.T @ target.rows  # (E, E)
        gram, cross = unit.T @ unit, target.rows.T @ unit  # (D, D), (E, D)
        student_sum, teacher_sum, cross_sum = _square_sum(gram), _square_sum(teacher_gram), _square_sum(cross)
        total = student_sum - 2.0 * cross_sum + teacher_sum
        if method == "auto" and bool(total < cost.CANCELLATION * (student_sum + teacher_sum)):
            by_tile.append(h)
            continue
        losses[h] = total.clamp(min=0.0) / rows**2  # a mean of squares, also if the sums cancel
        if gradient:
            gradients[h] = (unit @ gram).addmm_(target.rows, cross, alpha=-1.0).mul_(4.0 / rows**2)
        if teacher_gradient:
            product = (target.rows @ teacher_gram).addmm_(unit, cross.T, alpha=-1.0)
            teacher_gradients[h] = product.mul_(4.0 / rows**2)
    if by_tile:
        _similarity_tile(by_tile, units, target.rows, losses, gradients, teacher_gradients, gradient, teacher_gradient)
    return (
        losses,
        [head.backward(part) for head, part in zip(heads, gradients, strict=True)],
        [target.backward(part) for part in teacher_gradients],
    )


def _tries_feature(student: Tensor, teacher: Tensor, teacher_gradient: bool, heads: int) -> bool:
    # On another device than a CPU, looking at the loss to leave the feature form would make the host wait.
    return student.device.type == "cpu" and cost.feature_form_is_cheaper(
        teacher.shape[0], student.shape[1], teacher.shape[1], teacher_gradient, heads=heads
    )


def _square_sum(matrix: Tensor) -> Tensor:
    """Sum squares in float64. Rows are summed in the matrix's own precision."""
    return torch.linalg.vector_norm(matrix, dim=1).to(torch.float64).square().sum()


def _similarity_tile(
    heads: list[int],
    students: list[Tensor],
    teacher: Tensor,
    losses: Tensor,
    gradients: list[Tensor | None],
    teacher_gradients: list[Tensor | None],
    gradient: bool,
    teacher_gradient: bool,
) -> None:
    """Go over blocks of G = S S' - T T' from the diagonal to the right. Columns beyond a block's square count twice."""
    rows = teacher.shape[0]
    totals = torch.zeros(len(students), dtype=torch.float64, device=teacher.device)
    # Each kind of gradient: the embeddings it is made of, its destination, its sign.
    kinds = [(students, gradients, 1.0)] if gradient else []
    kinds += [([teacher] * len(students), teacher_gradients, -1.0)] if teacher_gradient else []
    for begin, end in row_blocks(rows):
        target = teacher[begin:end] @ teacher[begin:].T  # (h, B - begin)
        for n, h in enumerate(heads):
            student = students[h]
            out = target if n == len(heads) - 1 else None  # the last student may overwrite the teacher's block
            difference = torch.addmm(target, student[begin:end], student[begin:].T, beta=-1.0, out=out)
            square, right = difference[:, : end - begin], difference[:, end - begin :]
            totals[h] += _square_sum(square) + 2.0 * _square_sum(right)
            for sides, places, _ in kinds:
                place = places[h]
                if place is None:
                    place = places[h] = torch.zeros_like(sides[h])
                place[begin:end].addmm_(difference, sides[h][begin:])
                place[end:].addmm_(right.T, sides[h][begin:end])
    for h in heads:
        losses[h] = totals[h] / rows**2
        for _, places, sign in kinds:
            place = places[h]
            assert place is not None
            place.mul_(sign * 4.0 / rows**2)
