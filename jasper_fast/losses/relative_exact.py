"""The exact relative similarity loss: counts by the compiled extension, or by sorts and `dominance` in torch.

`dominance` counts with kernels on a GPU. They are launched on the current CUDA device. Each operator makes the device
of its tensors the current one inside, where torch.compile does not look. Counts on a GPU take about 60 bytes for each
pair of one student, for any number of students, and nothing waits for the device.

For ties="exclude" a group of equal teacher scores is put in descending order of student score (ascending for a margin
that is not positive). Then the counts inside the group follow from places alone and are subtracted. All of a pair's
equals above it are active, except those of its score if fl(x - m) = x.

Predicted for B = 8192 on one H200 (33.5 M pairs, D = 1024): 26 ms in all, and 7 ms for B = 4096. Scores take 2.6 ms.
Sorts, searches and gathers take 13, `dominance` 7, and the gradient's product by cuBLAS 3. A sort is CUB's radix sort,
which moves 24 bytes for each pair and pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.ops import products
from jasper_fast.ops.dispatch import fake_unit_gradients, uses_triton
from jasper_fast.ops.native import extension_path, native

MAX_PAIRS = 2**31 - 1  # counts are int32
MAX_PLACES = 2**30  # below this an event holds place and kind in 32 bits, as the kernels need


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
    return count_pairs(scores, teacher, margin, exclude_ties)


@pair_counts.register_fake
def _(scores: Tensor, teacher: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads = scores.shape[0]
    return (
        torch.empty_like(scores, dtype=torch.int32, memory_format=torch.contiguous_format),
        scores.new_empty((heads,), dtype=torch.int64),
        scores.new_empty((heads,), dtype=torch.float64),
    )


def count_pairs(scores: Tensor, teacher: Tensor, margin: float, exclude_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count as `pair_counts` does, in torch and `dominance`, one student after the other."""
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
    dtype = torch.int32 if pairs < MAX_PLACES else torch.int64
    place = torch.empty(pairs, dtype=dtype, device=x.device)
    place[pair_at] = torch.arange(pairs, dtype=dtype, device=x.device)
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
    """Merge scores and thresholds in ascending order, scores first if equal.

    Args:
        student_sorted: (P,) scores in ascending order, NaN last.
        place: (P,) integer places of their pairs in teacher order.
        margin: margin of the loss, the distance of a threshold below its score.

    Returns:
        (2P,) events, place << 1 | kind, in the dtype of the places. Kind 0 is a score, 1 a threshold.
    """
    scores = student_sorted.nan_to_num(torch.inf, torch.inf, -torch.inf)  # searchsorted cannot order NaN
    thresholds = scores - margin
    short = place.dtype == torch.int32
    position = torch.arange(len(scores), dtype=place.dtype, device=scores.device)
    events = torch.empty(2 * len(scores), dtype=place.dtype, device=scores.device)
    events[torch.searchsorted(thresholds, scores, out_int32=short).add_(position)] = place << 1
    events[torch.searchsorted(scores, thresholds, right=True, out_int32=short).add_(position)] = place << 1 | 1
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


def dominance(events: Tensor) -> tuple[Tensor, Tensor]:
    """Count the thresholds below each score at greater places, and the scores above each threshold at smaller ones.

    Args:
        events: (2P,) result of `merged`.

    Returns:
        up (P,) and low (P,) int32 by place.
    """
    if len(events) and events.dtype == torch.int32 and uses_triton([events]):
        from jasper_fast.kernels import dominance_counts

        return dominance_counts.dominance(events)
    position = torch.arange(len(events) // 2, device=events.device)
    is_threshold = events & 1 == 1
    at_score, at_threshold = (~is_threshold).nonzero()[:, 0], is_threshold.nonzero()[:, 0]
    places = (events[at_score] >> 1).long()  # (P,) in the order of scores, and so of thresholds
    reached, passed = at_score - position, at_threshold - position  # thresholds before a score, scores before one
    bounds = torch.stack((places + 1, places))  # a place's own threshold may be below its score
    below_reached, below_passed = _count_below(places, torch.stack((reached, passed)), bounds)
    counts = torch.empty(2, len(places), dtype=torch.int32, device=events.device)
    counts[:, places] = torch.stack((reached - below_reached, places - below_passed)).to(torch.int32)
    return counts[0], counts[1]


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
        return products.multiply(a, x, into, add=into is not None)
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
