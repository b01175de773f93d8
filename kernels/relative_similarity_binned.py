"""The two passes of the binned relative similarity loss on CUDA, over strips of scores by cuBLAS.

Scores and the gradient are products of float16 copies of the unit rows, with float32 sums. The copies keep 11 bits,
rounded to nearest. That moves a cosine by about 1e-5 (D = 1024), a hundredth of a bin and less than a thousandth of the
margin. It moves the gradient by 2e-4 of itself, a tenth of the bins' error. TF32 has as many bits, but tensor cores cut
float32 operands off instead of rounding them, which shrinks every cosine by 7e-4 of itself. The exact form needs
float32 scores. The first pass adds integers to tables in the L2 cache, so its result does not depend on the order.

Cost for B = 32768, D = 1024 on one H200 (5.4e8 pairs): scores take 2.2 TFLOP twice, 7 ms, and 17 GB through memory, 4
ms. 1.6e9 additions in the cache take 20 ms, 4.3e9 table reads 12 ms, the gradient's 2.2 TFLOP 4 ms: 47 ms in all. Extra
memory: strips of 128, 128 and 64 MiB and tables of 4 MiB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.strips import empty_strip
from jasper_fast.ops.products import multiply

COLUMNS = 1024  # of a strip that a program takes
LARGEST_WEIGHT = 2.0**14  # in float16; those of 2^-28 of it still count


@triton.jit
def _bin_position(SCORES, at, mask, GRID, AXIS: tl.constexpr, last):
    """Return scores, and their positions in fine bins. NaN goes to 0, because the loss becomes NaN elsewhere."""
    scores = tl.load(SCORES + at, mask=mask, other=0.0)
    place = (scores - tl.load(GRID + AXIS)) * tl.load(GRID + AXIS + 1)
    return scores, tl.minimum(tl.where(place > 0.0, place, 0.0), last)


@triton.jit
def histogram_kernel(
    STUDENT,  # (h, w) fp32 scores
    TEACHER,  # (h, w) fp32
    GRID,  # (5,) fp32: origin and fine bins per unit of the student's axis, of the teacher's; a typical score
    COUNTS,  # (K, K) int32 by teacher and student bin
    FINE_STUDENT,  # (F,) int32
    FINE_TEACHER,  # (F,) int32 or None
    w,
    stride,
    bins,
    shift,
    last,
    BLOCK: tl.constexpr,
):
    """Count the pairs of a row, right of the diagonal."""
    row, first = tl.program_id(0), tl.program_id(1) * BLOCK
    if first + BLOCK - 1 > row:
        columns = first + tl.arange(0, BLOCK)
        new = (columns > row) & (columns < w)
        at = row.to(tl.int64) * stride + columns
        _, at_x = _bin_position(STUDENT, at, new, GRID, 0, last)
        _, at_t = _bin_position(TEACHER, at, new, GRID, 2, last)
        fine_x, fine_t = at_x.to(tl.int32), at_t.to(tl.int32)
        one = tl.full((BLOCK,), 1, tl.int32)
        tl.atomic_add(COUNTS + (fine_t >> shift) * bins + (fine_x >> shift), one, mask=new, sem="relaxed")
        tl.atomic_add(FINE_STUDENT + fine_x, one, mask=new, sem="relaxed")
        if FINE_TEACHER is not None:
            tl.atomic_add(FINE_TEACHER + fine_t, one, mask=new, sem="relaxed")


@triton.jit
def _interpolate(TABLE, i, part):
    near = tl.load(TABLE + i)
    return near + part * (tl.load(TABLE + i + 1) - near)


@triton.jit
def coefficients_kernel(
    STUDENT,  # (h, w) fp32 scores
    TEACHER,  # (h, w) fp32 scores
    WEIGHTS,  # (h, w) fp16 coefficients, scaled
    GRID,  # (5,) fp32
    NODES,  # (K + 1, K + 1) fp32
    OWN,  # (F + 1,) fp32
    RANK,  # (F + 1,) fp32
    SUMS,  # (h, blocks) fp32: of coefficient * (score - centre), right of the diagonal
    weight_scale,
    w,
    stride,
    bins,
    bins_per_fine,
    last,
    BLOCK: tl.constexpr,
):
    """Look up coefficients, 0 on the diagonal."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < w
    at = row.to(tl.int64) * stride + columns
    x, at_x = _bin_position(STUDENT, at, inside, GRID, 0, last)
    _, at_t = _bin_position(TEACHER, at, inside, GRID, 2, last)
    fine_x, fine_t = at_x.to(tl.int32), at_t.to(tl.int32)
    weights = _interpolate(OWN, fine_x, at_x - fine_x.to(tl.float32)) - _interpolate(
        RANK, fine_t, at_t - fine_t.to(tl.float32)
    )
    u, v = at_x * bins_per_fine, at_t * bins_per_fine
    bin_x, bin_t = u.to(tl.int32), v.to(tl.int32)
    corner = NODES + bin_t * (bins + 1)
    part = u - bin_x.to(tl.float32)
    near = _interpolate(corner, bin_x, part)
    weights += near + (v - bin_t.to(tl.float32)) * (_interpolate(corner + bins + 1, bin_x, part) - near)
    weights = tl.where(columns == row, 0.0, weights)
    tl.store(WEIGHTS + at, (weights * weight_scale).to(tl.float16), mask=inside)
    total = tl.sum(tl.where(inside & (columns > row), weights * (x - tl.load(GRID + 4)), 0.0), axis=0)
    tl.store(SUMS + row * tl.num_programs(1) + tl.program_id(1), total)


def rounded(unit: Tensor) -> Tensor:
    """Return the float16 copy of unit rows (B, D). Its least step of 2^-24 is far below 2^-12 / sqrt(D)."""
    return unit.to(torch.float16)


def scores(unit: Tensor, begin: int, end: int) -> Tensor:
    """Return scores of `rounded` rows begin to end with all from begin on, (end - begin, B - begin) float32."""
    out = empty_strip(end - begin, len(unit) - begin, torch.float32, unit.device)
    return multiply(unit[begin:end], unit[begin:].T, out)


def histogram(
    student: Tensor, teacher: Tensor, grid: Tensor, counts: Tensor, fine: Tensor, fine_teacher: Tensor | None
) -> None:
    """Count the new pairs of `scores` into int32 counts (K, K), fine (F,) and, unless None, fine_teacher (F,)."""
    height, width = student.shape
    shift = (len(fine) // len(counts)).bit_length() - 1
    numbers = width, student.stride(0), len(counts), shift, _last(fine)
    histogram_kernel[(height, triton.cdiv(width, COLUMNS))](
        student, teacher, grid, counts, fine, fine_teacher, *numbers, BLOCK=COLUMNS
    )


def coefficients(
    student: Tensor, teacher: Tensor, grid: Tensor, nodes: Tensor, own: Tensor, rank: Tensor, weight_scale: float
) -> tuple[Tensor, Tensor]:
    """Return float16 coefficients times weight_scale, and the float64 sum of coefficient * (score - centre)."""
    height, width = student.shape
    sums = torch.empty(height, triton.cdiv(width, COLUMNS), dtype=torch.float32, device=student.device)
    weights = empty_strip(height, width, torch.float16, student.device)
    bins = len(nodes) - 1
    numbers = width, student.stride(0), bins, bins / (len(own) - 1), _last(own[1:])
    coefficients_kernel[sums.shape](
        student, teacher, weights, grid, nodes, own, rank, sums, weight_scale, *numbers, BLOCK=COLUMNS
    )
    return weights, sums.sum(dtype=torch.float64)


def _last(fine: Tensor) -> float:
    return len(fine) - 1.0 / 128.0  # below the upper end of its bin in float32, at 2^15 bins
