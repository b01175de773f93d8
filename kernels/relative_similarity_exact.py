"""The exact relative similarity counts on CUDA: sorts, the merged order of scores and thresholds, and counts.

torch sorts (CUB's radix sort moves 24 bytes per pair and pass, 1.5 ms for 33.5 M pairs). Nothing here waits for the
device. Memory is about 60 bytes for each pair of one student, for any number of students.

For ties="exclude" a group of equal teacher scores is put in descending order of student score (ascending for a margin
that is not positive). Then the counts inside the group follow from places alone and are subtracted. All of a pair's
equals above it are active, except those of its score if fl(x - m) = x.

Cost for B = 8192 on one H200 (33.5 M pairs, D = 1024): 26 ms in all, and 7 ms for B = 4096. Scores take 2.6 ms. Sorts,
searches and gathers take 13, `dominance_counts` 7, and the gradient's product by cuBLAS 3. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.kernels.dominance_counts import MAX_PLACES, dominance


def supports(pairs: int) -> bool:
    """Return True if the events of `dominance` can hold this number of pairs."""
    return 1 <= pairs < MAX_PLACES


def pair_counts(scores: Tensor, teacher: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count pairs as `jasper_fast.losses.relative_exact` does, for any floating-point dtype."""
    gradient = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    sums, dots = [], []
    nan_if_missing = torch.where(teacher.isnan().any(), torch.nan, 0.0).to(torch.float64)
    for row, out in zip(scores, gradient, strict=True):
        low = _count(row, teacher, margin, exclude_ties, out)
        # An infinite score without terms adds nothing. A NaN score makes the loss NaN.
        terms = torch.where((out == 0) & ~row.isnan(), 0.0, out * row.to(torch.float64))
        sums.append(low)
        dots.append(terms.sum() + nan_if_missing)
    return gradient, torch.stack(sums), torch.stack(dots)


def _count(x: Tensor, t: Tensor, margin: float, exclude_ties: bool, gradient: Tensor) -> Tensor:
    """Write up - low by pair, and return the sum of low."""
    pairs = len(x)
    missing = x.isnan() | t.isnan()
    # NaN goes to the end of both orders, beyond all counts. -0.0 + 0.0 is 0.0.
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
    up, low = dominance(merged(student_sorted, place[student_order], margin))
    del place, student_sorted, student_order
    score = x[pair_at]
    if exclude_ties and margin > 0:
        subtract_ties(up, low, teacher_sorted, score, margin)
    valid = ~score.isnan()
    low *= valid
    gradient[pair_at] = (up - low).mul_(valid)
    return low.sum(dtype=torch.int64)


def merged(student_sorted: Tensor, place: Tensor, margin: float) -> Tensor:
    """Merge scores and thresholds in ascending order, scores first if equal. (P,), (P,) int32 -> (2P,) int32 events."""
    scores = student_sorted.nan_to_num(torch.inf, torch.inf, -torch.inf)  # searchsorted cannot order NaN
    thresholds = scores - margin
    position = torch.arange(len(scores), dtype=torch.int32, device=scores.device)
    events = torch.empty(2 * len(scores), dtype=torch.int32, device=scores.device)
    events[torch.searchsorted(thresholds, scores, out_int32=True).add_(position)] = place << 1
    events[torch.searchsorted(scores, thresholds, right=True, out_int32=True).add_(position)] = place << 1 | 1
    return events


def subtract_ties(up: Tensor, low: Tensor, teacher: Tensor, student: Tensor, margin: float) -> None:
    """Subtract, in place, the counts between pairs of equal teacher score.

    In a group of equal teacher scores, student scores must descend. A pair is active with all pairs of its group with a
    greater score. If its threshold moves, it is also active with those of equal score.

    Args:
        up: (N,) int32 counts by place.
        low: (N,) int32 counts by place.
        teacher: (N,) teacher scores by place.
        student: (N,) student scores by place.
        margin: margin of the loss, above 0.
    """
    groups = _differs_from_last(teacher)
    runs = _differs_from_last(student) | groups  # of equal teacher and student scores
    groups, runs = (starts.cumsum(0, dtype=torch.int32) for starts in (groups, runs))
    place = torch.arange(len(up), dtype=torch.int32, device=up.device)
    moves = student - margin < student
    # The numbers of groups and runs ascend, so the ends of one are found by its number.
    for counts, right, sign in ((low, False, -1), (up, True, 1)):
        group, run = (torch.searchsorted(of, of, right=right, out_int32=True) for of in (groups, runs))
        run -= int(right)
        group -= int(right)
        counts += torch.where(moves, place, run).sub_(group).mul_(sign)


def _differs_from_last(values: Tensor) -> Tensor:
    return torch.cat((values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]))
