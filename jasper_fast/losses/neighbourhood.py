"""The neighbourhood loss: a KL divergence that weighs a row's nearest rows most. It is not in the paper.

On CUDA, `kernels/pair_losses.py` computes it. Elsewhere plain torch does, in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from jasper_fast.losses.arguments import LossOptions, check_pair, check_temperature
from jasper_fast.losses.autograd import attach_gradients, full_precision, needs_gradient
from jasper_fast.ops.dispatch import fake_losses, uses_triton
from jasper_fast.ops.row_blocks import normalize_all, row_blocks


def neighbourhood_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Return the mean over rows of KL(softmax(t_i . t_j / temperature) || softmax(s_i . s_j / temperature)), j != i.

    Unlike the other losses, it weighs a row's nearest rows most. Use it on batches that hold neighbours. It takes one
    pass over blocks of rows, in bounded memory. One row has no neighbours, so its loss is 0.

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, E). They never get a gradient.
        temperature: divisor of the cosines, finite and > 0.

    Raises:
        TypeError: a floating-point tensor, or a number as the temperature, was expected.
        ValueError: the two are not matrices with equally many rows on one device, or the temperature is out of range.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> same = neighbourhood_loss(teacher, teacher)
        >>> other = neighbourhood_loss(teacher[[0, 2, 1]], teacher)  # the first row's neighbours changed places
        >>> bool(same.abs() < 1e-6), bool(other > 1)
        (True, True)
    """
    check_pair(student, teacher)
    temperature = check_temperature(temperature)
    with full_precision(teacher):
        return _neighbourhood([student], teacher.detach(), temperature)[0]


def compute(heads: list[Tensor], teacher: Tensor, options: LossOptions) -> Tensor:
    """Return the losses (H,) of rows of any length, those of one temperature in one pass and next to each other.

    Raises:
        ValueError: temperatures by width lack a head's.
    """
    teacher = teacher.detach()
    if not isinstance(options.temperature, Mapping):
        return _neighbourhood(heads, teacher, options.temperature)
    groups: dict[float, list[Tensor]] = {}
    for head in heads:
        if head.shape[1] not in options.temperature:
            raise ValueError(f"temperature: none for the head of width {head.shape[1]}, got {options.temperature}")
        groups.setdefault(options.temperature[head.shape[1]], []).append(head)
    return torch.cat([_neighbourhood(group, teacher, temperature) for temperature, group in groups.items()])


def _neighbourhood(students: list[Tensor], teacher: Tensor, temperature: float) -> Tensor:
    losses, gradients = neighbourhood_op(
        [student.detach() for student in students], teacher, temperature, needs_gradient(students)
    )
    return attach_gradients(losses, students, gradients, list(range(len(students))))


# The operator.


@torch.library.custom_op("jasper_fast::neighbourhood", mutates_args=())
def neighbourhood_op(
    students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Compute the mean of KL(softmax(T T' / t) || softmax(S S' / t)) over unit rows, each row without itself.

    Args:
        students: H tensors (B, D_h) of any length, strides and floating dtype.
        teacher: embeddings (B, E), a constant.
        temperature: divisor t > 0.
        gradient: whether the students' gradients are wanted.

    Returns:
        The losses (H,) in float32, or float64 if any embeddings are. The students' gradients in the dtype of
        `gradient_dtype`. An unwanted gradient is empty.
    """
    if uses_triton([*students, teacher]):
        from jasper_fast.kernels import pair_losses

        with torch.cuda.device_of(teacher):  # kernels are launched on the current device
            return pair_losses.neighbourhood(students, teacher, temperature, gradient)
    return _neighbourhood_torch(students, teacher, temperature, gradient)


@neighbourhood_op.register_fake
def _(students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    return fake_losses(students, teacher, gradient)


# Plain torch.


def _neighbourhood_torch(
    students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    heads, target = normalize_all(students, teacher)
    rows = len(teacher)
    gradients = [torch.zeros_like(head.rows) if gradient else None for head in heads]
    totals = torch.zeros(len(heads), dtype=torch.float64, device=teacher.device)
    for begin, end in row_blocks(rows) if rows > 1 else []:
        teacher_log = _log_softmax(target.rows, begin, end, temperature)  # (h, B)
        teacher_probabilities = teacher_log.exp()
        for h, head in enumerate(heads):
            student_log = _log_softmax(head.rows, begin, end, temperature)
            # The entry of a row with itself is finite in both logarithms and has no weight.
            totals[h] += (teacher_log - student_log).mul_(teacher_probabilities).sum(dim=1).sum(dtype=torch.float64)
            place = gradients[h]
            if place is not None:
                change = student_log.exp_().sub_(teacher_probabilities)
                place[begin:end].addmm_(change, head.rows)
                place.addmm_(change.T, head.rows[begin:end])
    for place in gradients:
        if place is not None:
            place.mul_(1.0 / (rows * temperature))
    return (
        (totals / rows).to(target.rows.dtype),
        [head.backward(part) for head, part in zip(heads, gradients, strict=True)],
    )


def _log_softmax(unit: Tensor, begin: int, end: int, temperature: float) -> Tensor:
    logits = (unit[begin:end] @ unit.T).div_(temperature)
    logits.diagonal(begin).fill_(-1e30)
    return logits.log_softmax(dim=1)
