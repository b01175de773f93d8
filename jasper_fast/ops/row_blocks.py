"""Losses over a B x B matrix of cosines, computed row strip by row strip in bounded memory, in plain torch.

Each function gives the losses of several students against one teacher and, in the same pass, their gradients with
respect to the vectors as they were given, so that a backward pass only scales. What depends on the teacher alone is
computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jasper_fast import cost
from jasper_fast.rows import tangent_, unit_rows

WORKSPACE = 4 * 2**20  # elements of one strip buffer; a pass holds one for the teacher and a few for a student


class _Unit(NamedTuple):
    """(B, D) unit rows, the reciprocals (B, 1) of the lengths they had, and the dtype of their gradient."""

    rows: Tensor
    inverse: Tensor
    dtype: torch.dtype

    def finish(self, gradient: Tensor | None) -> Tensor:
        """From a gradient with respect to the unit rows to that of the vectors; none, an empty tensor."""
        if gradient is None:
            return self.rows.new_empty(0, dtype=self.dtype)
        return tangent_(gradient, self.rows, self.inverse).to(self.dtype).contiguous()


def _units(students: list[Tensor], teacher: Tensor) -> tuple[list[_Unit], _Unit]:
    double = any(v.dtype == torch.float64 for v in (*students, teacher))
    dtype = torch.float64 if double else torch.float32
    *heads, target = [
        _Unit(*unit_rows(v, dtype), torch.float32 if v.dtype == torch.float16 else v.dtype)
        for v in (*students, teacher)
    ]
    return heads, target


def _strips(rows: int) -> list[tuple[int, int]]:
    height = max(16, min(rows, 512, WORKSPACE // rows))
    return [(begin, min(begin + height, rows)) for begin in range(0, rows, height)]


def similarity(
    students: list[Tensor], teacher: Tensor, method: str, gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See `ops.similarity`."""
    heads, target = _units(students, teacher)
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
        own, other, mixed = _square_sum(gram), _square_sum(teacher_gram), _square_sum(cross)
        total = own - 2.0 * mixed + other
        if method == "auto" and bool(total < cost.CANCELLATION * (own + other)):
            by_tile.append(h)
            continue
        losses[h] = total.clamp(min=0.0) / rows**2  # a mean of squares, also where the sums cancel
        if gradient:
            gradients[h] = (unit @ gram).addmm_(target.rows, cross, alpha=-1.0).mul_(4.0 / rows**2)
        if teacher_gradient:
            product = (target.rows @ teacher_gram).addmm_(unit, cross.T, alpha=-1.0)
            teacher_gradients[h] = product.mul_(4.0 / rows**2)
    if by_tile:
        _similarity_tile(by_tile, units, target.rows, losses, gradients, teacher_gradients, gradient, teacher_gradient)
    return (
        losses,
        [head.finish(own) for head, own in zip(heads, gradients, strict=True)],
        [target.finish(own) for own in teacher_gradients],
    )


def _tries_feature(student: Tensor, teacher: Tensor, teacher_gradient: bool, heads: int) -> bool:
    # Elsewhere than on a CPU, looking at the loss to leave the feature form would make the host wait.
    return student.device.type == "cpu" and cost.feature_form_is_cheaper(
        teacher.shape[0], student.shape[1], teacher.shape[1], teacher_gradient, heads=heads
    )


def _square_sum(matrix: Tensor) -> Tensor:
    """Sum of squares in float64; rows are summed in the matrix's own precision."""
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
    """Strips of G = S S' - T T' from the diagonal rightwards; what lies right of a strip's square counts twice."""
    rows = teacher.shape[0]
    totals = torch.zeros(len(students), dtype=torch.float64, device=teacher.device)
    # Each kind of gradient: the vectors it is made of, where it goes, its sign.
    kinds = [(students, gradients, 1.0)] if gradient else []
    kinds += [([teacher] * len(students), teacher_gradients, -1.0)] if teacher_gradient else []
    for begin, end in _strips(rows):
        target = teacher[begin:end] @ teacher[begin:].T  # (h, B - begin)
        for n, h in enumerate(heads):
            student = students[h]
            out = target if n == len(heads) - 1 else None  # the last student may use up the teacher's strip
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


def neighbourhood(
    students: list[Tensor], teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """See `ops.neighbourhood`."""
    heads, target = _units(students, teacher)
    rows = len(teacher)
    gradients = [torch.zeros_like(head.rows) if gradient else None for head in heads]
    totals = torch.zeros(len(heads), dtype=torch.float64, device=teacher.device)
    for begin, end in _strips(rows) if rows > 1 else []:
        wanted_log = _log_softmax(target.rows, begin, end, temperature)  # (h, B)
        wanted = wanted_log.exp()
        for h, head in enumerate(heads):
            given_log = _log_softmax(head.rows, begin, end, temperature)
            # The entry of a row with itself is finite in both logarithms and has no weight.
            totals[h] += (wanted_log - given_log).mul_(wanted).sum(dim=1).sum(dtype=torch.float64)
            place = gradients[h]
            if place is not None:
                change = given_log.exp_().sub_(wanted)
                place[begin:end].addmm_(change, head.rows)
                place.addmm_(change.T, head.rows[begin:end])
    for place in gradients:
        if place is not None:
            place.mul_(1.0 / (rows * temperature))
    return (
        (totals / rows).to(target.rows.dtype),
        [head.finish(own) for head, own in zip(heads, gradients, strict=True)],
    )


def _log_softmax(unit: Tensor, begin: int, end: int, temperature: float) -> Tensor:
    logits = (unit[begin:end] @ unit.T).div_(temperature)
    logits.diagonal(begin).fill_(-1e30)
    return logits.log_softmax(dim=1)
