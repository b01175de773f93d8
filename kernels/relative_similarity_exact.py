"""The exact relative similarity counts on CUDA: sorts, the merged order of scores and thresholds, and `deal`.

Sorting is left to torch (CUB's radix sort, which moves 24 bytes a pair and pass: 1.5 ms for 33.5 M pairs); nothing here
waits for the device. Memory is about 60 bytes for each pair of one student, whatever the number of students.

Equal teacher scores: for ties="exclude" a group of equals is put in descending order of student score (ascending, where
the margin is not positive). Then what `deal` counts inside the group is known from places alone and is taken off: of a
pair's equals above it all are active, but those of its own score where fl(x - m) = x.

Scores and gradient are products of our own: TF32, which users let cuBLAS multiply in, would change the order of what is
nearly equal.

Estimated for B = 8192 on one H200 (33.5 M pairs, D = 1024): three float32 products 6 ms, two sorts 4 ms, searches and
gathers 8 ms, `deal` 15 ms: 33 ms. Interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.kernels.deal import MAX_PLACES, dominance
from jasper_fast.kernels.product import multiply
from jasper_fast.kernels.ties import take_off_ties


def takes(pairs: int) -> bool:
    """Whether so many pairs fit the events of `deal`."""
    return 1 <= pairs < MAX_PLACES


def cosines(unit: Tensor) -> Tensor:
    """Of all pairs of unit rows, as float32: symmetric, so that equal rows tie. (B, D) -> (B, B)

    A float32 product made of three is not symmetric to the last bit; the mean of it and its mirror image is.
    """
    gram = multiply(unit, unit.T)
    return torch.add(gram, gram.T).mul_(0.5)


def pair_counts(scores: Tensor, teacher: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.pair_counts`; any floating-point dtype."""
    gradient = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    sums, dots = [], []
    spoilt = torch.where(teacher.isnan().any(), torch.nan, 0.0).to(torch.float64)
    for row, out in zip(scores, gradient, strict=True):
        low = _count(row, teacher, margin, exclude_ties, out)
        # An infinite score that takes part in no term adds nothing; one that is not a number spoils the loss.
        terms = torch.where((out == 0) & ~row.isnan(), 0.0, out * row.to(torch.float64))
        sums.append(low)
        dots.append(terms.sum() + spoilt)
    return gradient, torch.stack(sums), torch.stack(dots)


def _count(x: Tensor, t: Tensor, margin: float, exclude_ties: bool, gradient: Tensor) -> Tensor:
    """Writes up - low by pair; returns the sum of low."""
    pairs = len(x)
    missing = x.isnan() | t.isnan()
    # What is not a number goes to the end of both orders, where no count reaches. -0.0 + 0.0 is 0.0.
    x, t = (torch.where(missing, torch.nan, values + 0.0) for values in (x, t))
    student_sorted, student_order = x.sort()
    if exclude_ties:
        by_score = student_order.flip(0) if margin > 0 else student_order
        teacher_sorted, order = t[by_score].sort(stable=True)
        pair_at = by_score[order]  # (P,) by place
        del by_score, order
    else:
        teacher_sorted, pair_at = t.sort(stable=True)
    place = torch.empty(pairs, dtype=torch.int32, device=x.device)
    place[pair_at] = torch.arange(pairs, dtype=torch.int32, device=x.device)
    up, low = dominance(_merged(student_sorted, place[student_order], margin))
    del place, student_sorted, student_order
    score = x[pair_at]
    if exclude_ties and margin > 0:
        take_off_ties(up, low, teacher_sorted, score, margin)
    valid = ~score.isnan()
    low *= valid
    gradient[pair_at] = (up - low).mul_(valid)
    return low.sum(dtype=torch.int64)


def _merged(student_sorted: Tensor, place: Tensor, margin: float) -> Tensor:
    """Scores and thresholds in ascending order, a score first where equal. (P,), (P,) int32 -> (2P,) int32 events."""
    scores = student_sorted.nan_to_num(torch.inf, torch.inf, -torch.inf)  # searches do not know NaN
    thresholds = scores - margin
    own = torch.arange(len(scores), device=scores.device)
    events = torch.empty(2 * len(scores), dtype=torch.int32, device=scores.device)
    events[own + torch.searchsorted(thresholds, scores)] = place << 1
    events[own + torch.searchsorted(scores, thresholds, right=True)] = place << 1 | 1
    return events
