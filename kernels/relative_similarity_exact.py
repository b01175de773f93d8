"""The exact relative similarity counts on CUDA: sorts, the merged order of scores and thresholds, and counts.

torch sorts (CUB's radix sort moves 24 bytes per pair and pass, 1.5 ms for 33.5 M pairs). Nothing here waits for the
device. Memory is about 60 bytes for each pair of one student, for any number of students.

For ties="exclude" a group of equal teacher scores is put in descending order of student score (ascending for a margin
that is not positive). Then the counts inside the group follow from places alone and are subtracted. All of a pair's
equals above it are active, except those of its score if fl(x - m) = x.

Scores and gradient are products of `product`. The TF32 products that users may allow in cuBLAS would change the order
of nearly equal scores.

Estimate for B = 8192 on one H200 (33.5 M pairs, D = 1024): 33 ms in all. Three float32 products take 6 ms, two sorts
4 ms, searches and gathers 8 ms, and `dominance_counts` 15 ms. Interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.kernels.dominance_counts import MAX_PLACES, dominance
from jasper_fast.kernels.product import multiply
from jasper_fast.kernels.tie_correction import subtract_ties


def supports(pairs: int) -> bool:
    """Return True if the events of `dominance` can hold this number of pairs."""
    return 1 <= pairs < MAX_PLACES


def cosines(unit: Tensor) -> Tensor:
    """Return cosines of all pairs of unit rows as float32, symmetric so that equal rows tie: (B, D) -> (B, B).

    A float32 product made of three is not symmetric to the last bit. Its mean with the transpose is.
    """
    gram = multiply(unit, unit.T)
    return torch.add(gram, gram.T).mul_(0.5)


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
    up, low = dominance(_merged(student_sorted, place[student_order], margin))
    del place, student_sorted, student_order
    score = x[pair_at]
    if exclude_ties and margin > 0:
        subtract_ties(up, low, teacher_sorted, score, margin)
    valid = ~score.isnan()
    low *= valid
    gradient[pair_at] = (up - low).mul_(valid)
    return low.sum(dtype=torch.int64)


def _merged(student_sorted: Tensor, place: Tensor, margin: float) -> Tensor:
    """Merge scores and thresholds in ascending order, scores first if equal. (P,), (P,) int32 -> (2P,) int32 events."""
    scores = student_sorted.nan_to_num(torch.inf, torch.inf, -torch.inf)  # searchsorted cannot order NaN
    thresholds = scores - margin
    position = torch.arange(len(scores), device=scores.device)
    events = torch.empty(2 * len(scores), dtype=torch.int32, device=scores.device)
    events[position + torch.searchsorted(thresholds, scores)] = place << 1
    events[position + torch.searchsorted(scores, thresholds, right=True)] = place << 1 | 1
    return events
