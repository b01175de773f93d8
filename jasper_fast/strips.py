"""Losses over a B x B matrix of cosines, computed row strip by row strip in bounded memory.

Each function gives the losses of several students against one teacher and, in the same pass, their gradients with
respect to the unit rows, so that a backward pass only scales. What depends on the teacher alone is computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORKSPACE = 4 * 2**20  # elements of one strip buffer; a pass holds one for the teacher and a few for a student
# Below this share of |S'S|^2 + |T'T|^2 the feature form has lost about three of its seven digits to cancellation.
CANCELLATION = 1e-3


def _strips(rows: int) -> list[tuple[int, int]]:
    height = max(16, min(rows, 512, WORKSPACE // rows))
    return [(begin, min(begin + height, rows)) for begin in range(0, rows, height)]


def feature_form_is_cheaper(rows: int, width: int, teacher_width: int, teacher_gradient: bool) -> bool:
    """The cost model of method="auto", in multiply-adds of forward and gradient.

    Tile form: half of both Gram matrices by symmetry, then one product for each gradient asked for,
    B^2 ((D + E) / 2 + D [+ E]). Feature form: S'S, T'S, T'T and two products for each gradient,
    B (D^2 + D E + E^2 + D (D + E) [+ E (D + E)]). The tile form must lose by a quarter: it is the more accurate.
    """
    both = width + teacher_width
    tile = rows * (both / 2 + width + (teacher_width if teacher_gradient else 0))
    feature = width * width + width * teacher_width + teacher_width * teacher_width + width * both
    feature += teacher_width * both if teacher_gradient else 0
    return feature < 0.8 * tile


def similarity(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """mean((S S' - T T')^2) of each student.

    Args:
        students: H tensors (B, D_h) of unit rows.
        teacher: (B, E) unit rows.
        method: "tile", "feature", or "auto": the feature form where it is cheaper and the device is a CPU, unless the
            loss turns out so small that the feature form's sums cancel; then the tile form.
        gradient: whether the students' gradients are wanted.
        teacher_gradient: whether the teacher's gradient of each loss is wanted.

    Returns:
        losses (H,), the students' gradients, the teacher's gradients; an unwanted gradient is an empty tensor.
    """
    rows = teacher.shape[0]
    losses = teacher.new_zeros(len(students))
    gradients = [s.new_empty(0) for s in students]
    teacher_gradients = [s.new_empty(0) for s in students]
    by_tile = []
    teacher_gram = None
    for h, student in enumerate(students):
        if method == "tile" or (method == "auto" and not _tries_feature(student, teacher, teacher_gradient)):
            by_tile.append(h)
            continue
        if teacher_gram is None:
            teacher_gram = teacher.T @ teacher  # (E, E)
        gram, cross = student.T @ student, teacher.T @ student  # (D, D), (E, D)
        own, other, mixed = _square_sum(gram), _square_sum(teacher_gram), _square_sum(cross)
        total = own - 2.0 * mixed + other
        if method == "auto" and bool(total < CANCELLATION * (own + other)):
            by_tile.append(h)
            continue
        losses[h] = total / rows**2
        if gradient:
            gradients[h] = torch.addmm(student @ gram, teacher, cross, alpha=-1.0).mul_(4.0 / rows**2)
        if teacher_gradient:
            product = torch.addmm(teacher @ teacher_gram, student, cross.T, alpha=-1.0)
            teacher_gradients[h] = product.mul_(4.0 / rows**2)
    if by_tile:
        _similarity_tile(by_tile, students, teacher, losses, gradients, teacher_gradients, gradient, teacher_gradient)
    return losses, gradients, teacher_gradients


def _tries_feature(student: Tensor, teacher: Tensor, teacher_gradient: bool) -> bool:
    # Elsewhere than on a CPU, looking at the loss to leave the feature form would make the host wait.
    cheaper = feature_form_is_cheaper(teacher.shape[0], student.shape[1], teacher.shape[1], teacher_gradient)
    return student.device.type == "cpu" and cheaper


def _square_sum(matrix: Tensor) -> Tensor:
    """Sum of squares in float64; rows are summed in the matrix's own precision."""
    return torch.linalg.vector_norm(matrix, dim=1).to(torch.float64).square().sum()


def _similarity_tile(
    heads: list[int],
    students: list[Tensor],
    teacher: Tensor,
    losses: Tensor,
    gradients: list[Tensor],
    teacher_gradients: list[Tensor],
    gradient: bool,
    teacher_gradient: bool,
) -> None:
    """Strips of G = S S' - T T' from the diagonal rightwards; what lies right of a strip's square counts twice."""
    rows = teacher.shape[0]
    totals = torch.zeros(len(students), dtype=torch.float64, device=teacher.device)
    for h in heads:
        if gradient:
            gradients[h] = torch.zeros_like(students[h])
        if teacher_gradient:
            teacher_gradients[h] = torch.zeros_like(teacher)
    for begin, end in _strips(rows):
        target = teacher[begin:end] @ teacher[begin:].T  # (h, B - begin)
        for n, h in enumerate(heads):
            student = students[h]
            out = target if n == len(heads) - 1 else None  # the last student may use up the teacher's strip
            difference = torch.addmm(target, student[begin:end], student[begin:].T, beta=-1.0, out=out)
            square, right = difference[:, : end - begin], difference[:, end - begin :]
            totals[h] += _square_sum(square) + 2.0 * _square_sum(right)
            if gradient:
                gradients[h][begin:end].addmm_(difference, student[begin:])
                gradients[h][end:].addmm_(right.T, student[begin:end])
            if teacher_gradient:
                teacher_gradients[h][begin:end].addmm_(difference, teacher[begin:])
                teacher_gradients[h][end:].addmm_(right.T, teacher[begin:end])
    for h in heads:
        losses[h] = totals[h] / rows**2
        if gradient:
            gradients[h].mul_(4.0 / rows**2)
        if teacher_gradient:
            teacher_gradients[h].mul_(-4.0 / rows**2)


def neighbourhood(
    students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Mean over rows of KL(softmax(T T' / t) || softmax(S S' / t)) of each student, each row without itself.

    Args:
        students: H tensors (B, D_h) of unit rows.
        teacher: (B, E) unit rows, a constant.
        temperature: t > 0.
        gradient: whether the students' gradients are wanted.

    Returns:
        losses (H,) and the students' gradients; an unwanted gradient is an empty tensor.
    """
    rows = teacher.shape[0]
    gradients = [torch.zeros_like(s) if gradient else s.new_empty(0) for s in students]
    totals = torch.zeros(len(students), dtype=torch.float64, device=teacher.device)
    if rows < 2:
        return totals.to(teacher.dtype), gradients
    for begin, end in _strips(rows):
        wanted_log = _log_softmax(teacher, begin, end, temperature)  # (h, B)
        wanted = wanted_log.exp()
        for h, student in enumerate(students):
            given_log = _log_softmax(student, begin, end, temperature)
            # The entry of a row with itself is finite in both logarithms and has no weight.
            totals[h] += (wanted_log - given_log).mul_(wanted).sum(dim=1).sum(dtype=torch.float64)
            if gradient:
                change = given_log.exp_().sub_(wanted)
                gradients[h][begin:end].addmm_(change, student)
                gradients[h].addmm_(change.T, student[begin:end])
    for h in range(len(students)):
        if gradient:
            gradients[h].mul_(1.0 / (rows * temperature))
    return (totals / rows).to(teacher.dtype), gradients


def _log_softmax(unit: Tensor, begin: int, end: int, temperature: float) -> Tensor:
    logits = (unit[begin:end] @ unit.T).div_(temperature)
    logits.diagonal(begin).fill_(-1e30)
    return logits.log_softmax(dim=1)
