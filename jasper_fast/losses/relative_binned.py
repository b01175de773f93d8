"""The relative similarity loss in O(B D + K^2) memory: scores are counted in bins, never stored.

A pair with teacher score t and student score x enters the gradient with g = up - low (`relative_exact.pair_counts`).
Let X and R count the student and teacher scores below a value. Let A(t, y) count the pairs with a teacher score below t
and a student score above y. Let C(t, y) count those with a teacher score above t and a student score below y. Then

    g(t, x) = X(x + m) + X(x - m) - 2 R(t) + A(t, x + m) - C(t, x - m).

X and R belong to one axis, so they have fine tables. A and C need both axes (K x K bins). They count only pairs that
the student misplaces by more than the margin. As the student gets better they vanish, and with them the error of a
coarse table. The margin is a whole number of student bins if possible. Then the nodes of the K x K table are exact, and
only a smooth function is interpolated between them, along both axes.

One pass over blocks of scores counts. A second pass computes the scores again, looks up g and multiplies it into the
gradient. Equal teacher scores count as if spread over their fine bin, which is ties="label" on average.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jasper_fast.losses.relative_exact import multiply
from jasper_fast.ops.dispatch import uses_triton
from jasper_fast.ops.native import native

BINS = 512  # K. docs/binned.md has the errors of other numbers
FINE = 2**15  # bins of a table over one axis
SAMPLE = 128  # rows whose scores decide the range of the axes
BLOCK_SCORES = {"cpu": 2**18}  # scores in a block
DEVICE_BLOCK_SCORES = 2**25
MAX_TABLES = 16  # largest number of threads that count, each into its own table
EXACT_MEMORY = 2 * 2**30  # bytes: method="auto" uses no more for the exact form


def preferred(rows: int, heads: int) -> bool:
    """Return True if method="auto" takes the binned form: the exact one would need more than EXACT_MEMORY.

    The exact form stores about 48 + 8 H bytes for each of B (B - 1) / 2 pairs. It also stores a B x B matrix of 4-byte
    scores. That is 2 GiB at B = 8,100 with one head and 7,300 with three. Below that it is chosen because its gradient
    has no error, although the binned form is faster from about B = 1,000 on.

    Args:
        rows: batch size B.
        heads: number H of heads.
    """
    return rows * (rows - 1) // 2 * (56 + 8 * heads) > EXACT_MEMORY


@torch.library.custom_op("jasper_fast::relative_similarity_binned", mutates_args=())
def relative_similarity(
    students: list[Tensor], teacher: Tensor, margin: float, gradient: bool, bins: int = BINS
) -> tuple[Tensor, list[Tensor]]:
    """Compute the losses (H,) of unit rows against one teacher in bins and, if wanted, their gradients.

    Args:
        students: H tensors (B, D_h) of unit rows.
        teacher: unit rows (B, E), a constant.
        margin: difference of two cosines.
        gradient: whether the students' gradients are wanted. An unwanted one is an empty tensor.
        bins: number K of bins, a power of two, at most FINE.
    """
    with torch.cuda.device_of(teacher):  # kernels are launched on the current device
        return _relative_similarity(students, teacher, margin, gradient, bins)


def _relative_similarity(
    students: list[Tensor], teacher: Tensor, margin: float, gradient: bool, bins: int
) -> tuple[Tensor, list[Tensor]]:
    rows, heads = teacher.shape[0], len(students)
    pairs = rows * (rows - 1) // 2
    students, teacher = [s.contiguous() for s in students], teacher.contiguous()
    gradients = [torch.zeros_like(s) if gradient else s.new_empty(0) for s in students]
    if pairs < 2:
        return teacher.new_zeros(heads), gradients
    teacher_axis = _axis(teacher, 0.0, bins)
    axes = [_axis(student, margin, bins) for student in students]
    grids = [torch.stack((a.origin, a.scale, teacher_axis.origin, teacher_axis.scale, a.centre)) for a in axes]
    threads = min(torch.get_num_threads(), MAX_TABLES) if native(teacher) else 1
    counts = teacher.new_zeros((heads, threads, bins, bins), dtype=torch.int32)
    fine = teacher.new_zeros((heads, threads, FINE), dtype=torch.int32)
    fine_teacher = teacher.new_zeros((threads, FINE), dtype=torch.int32)
    nothing = teacher.new_empty(0, dtype=torch.int32)
    (*factors, teacher_factor), weight_scale = _factors([*students, teacher])
    for begin, end in _blocks(teacher):
        target = _scores(teacher_factor, begin, end)
        for h, factor in enumerate(factors):
            of_teacher = nothing if h else fine_teacher
            _histogram(_scores(factor, begin, end), target, grids[h], counts[h], fine[h], of_teacher)
    rank = _count_below(fine_teacher.sum(0))
    tables = [_tables(counts[h].sum(0), fine[h].sum(0), rank, margin / axes[h].width) for h in range(heads)]
    del counts, fine
    totals = teacher.new_zeros(heads, dtype=torch.float64)
    for begin, end in _blocks(teacher):
        target = _scores(teacher_factor, begin, end)
        for h, factor in enumerate(factors):
            weights, total = _coefficients(_scores(factor, begin, end), target, grids[h], tables[h], weight_scale)
            totals[h] += total
            if gradient:
                multiply(weights, factor[begin:], gradients[h][begin:end])
                multiply(weights[:, end - begin :].T, factor[begin:end], gradients[h][end:])
    terms = pairs * (pairs - 1) / 2
    low = torch.stack([table.low for table in tables])
    # NaN falls into some bin too. The loss must not come out finite.
    nan_guard = torch.stack([(student.sum() + teacher.sum()) * 0.0 for student in students])
    losses = ((totals + margin * low) / terms).to(teacher.dtype) + nan_guard
    if gradient:
        for h, part in enumerate(gradients):
            part.mul_(1.0 / (terms * weight_scale)).add_(nan_guard[h])
    return losses, gradients


@relative_similarity.register_fake
def _(
    students: list[Tensor], teacher: Tensor, margin: float, gradient: bool, bins: int = BINS
) -> tuple[Tensor, list[Tensor]]:
    return teacher.new_empty(len(students)), [torch.empty_like(s) if gradient else s.new_empty(0) for s in students]


def _blocks(unit: Tensor) -> list[tuple[int, int]]:
    rows = unit.shape[0]
    height = max(16, min(rows, BLOCK_SCORES.get(unit.device.type, DEVICE_BLOCK_SCORES) // rows))
    return [(begin, min(begin + height, rows)) for begin in range(0, rows, height)]


class _Axis(NamedTuple):
    """One axis of the tables, as scalars on the device."""

    origin: Tensor  # beginning of bin 0
    width: Tensor  # of one of K bins
    scale: Tensor  # fine bins per unit
    centre: Tensor  # mean score


def _axis(unit: Tensor, margin: float, bins: int) -> _Axis:
    """Return equal bins over the range of a sample of scores. The few scores beyond it count at its ends."""
    rows = unit.shape[0]
    chosen = torch.arange(0, rows, max(1, rows // SAMPLE), device=unit.device)[:, None]  # (n, 1)
    scores = multiply(unit[chosen[:, 0]], unit.T)
    scores.scatter_(1, chosen, scores.gather(1, (chosen + 1) % rows))  # a row and itself are not a pair
    low, high = scores.aminmax()
    slack = 0.02 * (high - low) + 1e-6
    width = (high - low + 2.0 * slack) / bins
    if margin:
        steps = torch.floor(abs(margin) / width)
        width = torch.where(steps >= 1.0, abs(margin) / steps, width)
    return _Axis(low - slack, width, FINE / (bins * width), scores.mean())


class _Tables(NamedTuple):
    nodes: Tensor  # (K + 1, K + 1) A(t, x + m) - C(t, x - m)
    own: Tensor  # (FINE + 1,) X(x + m) + X(x - m)
    rank: Tensor  # (FINE + 1,) 2 R(t)
    low: Tensor  # () sum of low over all pairs, float64


def _count_below(histogram: Tensor) -> Tensor:
    """Count what is below each edge. (n,) counts -> (n + 1,) float64."""
    return torch.nn.functional.pad(histogram.cumsum(0, dtype=torch.int64).to(torch.float64), (1, 0))


def _tables(counts: Tensor, fine: Tensor, rank: Tensor, steps: Tensor) -> _Tables:
    """Make the tables of one head.

    Args:
        counts: pairs (K, K) by teacher and student bin.
        fine: pairs (FINE,) by fine student bin.
        rank: teacher scores (FINE + 1,) below each edge.
        steps: the margin in student bins.
    """
    bins = counts.shape[0]
    both = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32), (1, 0, 1, 0))
    up, down = _shift(both[:, -1:] - both, steps), _shift(both[-1:] - both, -steps)  # A and C at the nodes, moved
    del both
    nodes = (up - down).float()
    below, fine_steps = _count_below(fine), steps * (FINE / bins)
    ahead, behind = _shift(below, fine_steps), _shift(below, -fine_steps)
    # up + low = X(x + m) - X(x - m) + A + C, and the sum of up is the sum of low.
    across = up.add_(down)
    corners = (across[1:, 1:], across[1:, :-1], across[:-1, 1:], across[:-1, :-1])
    band = ahead - behind
    within = sum((counts * corner).sum() for corner in corners) / 4.0
    low = (within + (fine * (band[1:] + band[:-1]) / 2.0).sum()) / 2.0
    return _Tables(nodes, (ahead + behind).float(), 2.0 * rank.float(), low)


def _shift(table: Tensor, steps: Tensor) -> Tensor:
    """Return table[..., i + steps], linear between entries and constant beyond them."""
    last = table.shape[-1] - 1
    place = (torch.arange(last + 1, device=table.device) + steps.to(torch.float64)).clamp(0, last)
    place = place.nan_to_num(0.0)
    i = place.long().clamp(max=last - 1)
    part = place - i
    moved = table[..., i] * (1.0 - part)
    return moved.addcmul_(table[..., i + 1].to(moved.dtype), part)


# The two passes over a block: rows [b, b + h) and columns [b, B). A pair (row, column) is new if column > row.


def _factors(embeddings: list[Tensor]) -> tuple[list[Tensor], float]:
    """Return the factors of scores and gradients, and the scale of coefficients that are multiplied.

    On a GPU these are float16 copies, which put nearly all pairs into the same bins. A coefficient is at most the
    number of pairs.
    """
    if not uses_triton(embeddings):
        return embeddings, 1.0
    from jasper_fast.kernels import relative_similarity_binned as kernels

    rows = len(embeddings[0])
    return [kernels.rounded(unit) for unit in embeddings], kernels.LARGEST_WEIGHT / (rows * (rows - 1) // 2)


def _scores(unit: Tensor, begin: int, end: int) -> Tensor:
    if uses_triton([unit]):
        from jasper_fast.kernels import relative_similarity_binned as kernels

        return kernels.scores(unit, begin, end)
    return unit[begin:end] @ unit[begin:].T


def _histogram(
    scores: Tensor, target: Tensor, grid: Tensor, counts: Tensor, fine: Tensor, fine_teacher: Tensor
) -> None:
    """Add the new pairs to counts (T, K, K) and fine (T, FINE), and to fine_teacher (T, FINE) unless it is empty."""
    if uses_triton([scores]):
        from jasper_fast.kernels import relative_similarity_binned as kernels

        kernels.histogram(scores, target, grid, counts[0], fine[0], fine_teacher[0] if len(fine_teacher) else None)
        return
    if native(scores):
        torch.ops.jasper_fast_native.binned_histogram(scores, target, grid, counts, fine, fine_teacher)
        return
    new = torch.ones_like(scores, dtype=torch.bool).triu_(1)
    x, t = _bin_position(scores[new], grid[0], grid[1]).long(), _bin_position(target[new], grid[2], grid[3]).long()
    bins = counts.shape[-1]
    shift = (FINE // bins).bit_length() - 1
    one = torch.ones((), dtype=torch.int32, device=scores.device).expand(len(x))
    counts.view(-1).index_add_(0, (t >> shift) * bins + (x >> shift), one)
    fine.view(-1).index_add_(0, x, one)
    if fine_teacher.numel():
        fine_teacher.view(-1).index_add_(0, t, one)


def _coefficients(
    scores: Tensor, target: Tensor, grid: Tensor, tables: _Tables, weight_scale: float
) -> tuple[Tensor, Tensor]:
    """Return g times the scale, 0 on the diagonal, and the sum of g (x - centre) over the new pairs in float64."""
    if uses_triton([scores]):
        from jasper_fast.kernels import relative_similarity_binned as kernels

        return kernels.coefficients(scores, target, grid, *tables[:3], weight_scale)
    if native(scores):
        total = torch.ops.jasper_fast_native.binned_coefficients(scores, target, grid, *tables[:3]).sum()
        return scores, total  # replaced in place
    x, t = _bin_position(scores, grid[0], grid[1]), _bin_position(target, grid[2], grid[3])
    ratio = (tables.nodes.shape[0] - 1) / FINE
    u, v = x * ratio, t * ratio
    i, j = v.long(), u.long()
    near = torch.lerp(tables.nodes[i, j], tables.nodes[i, j + 1], (u - j).float())
    far = torch.lerp(tables.nodes[i + 1, j], tables.nodes[i + 1, j + 1], (u - j).float())
    g = torch.lerp(near, far, (v - i).float()) + _interpolate(tables.own, x) - _interpolate(tables.rank, t)
    g = g.to(scores.dtype).fill_diagonal_(0.0)
    return g, (g * (scores - grid[4])).triu(1).sum(dtype=torch.float64)


def _bin_position(scores: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    """Return places in units of fine bins, NaN as 0. The last place stays below its bin's upper end."""
    return ((scores - origin) * scale).nan_to_num(0.0).clamp(0.0, FINE - 1.0 / 128.0)


def _interpolate(table: Tensor, place: Tensor) -> Tensor:
    i = place.long()
    return torch.lerp(table[i], table[i + 1], (place - i).float())
