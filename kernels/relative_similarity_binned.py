"""The two passes of the binned relative similarity loss on CUDA (see jasper_fast/losses/relative_binned.py).

Scores are products of float16 copies of the unit rows, scaled by a power of two. These keep 11 bits, rounded to
nearest, which moves a cosine by about 1e-5 (D = 1024). It is a hundredth of a bin and less than a thousandth of the
margin. TF32 has as many bits, but tensor cores cut float32 operands off instead of rounding them, which shrinks every
cosine by 7e-4 of itself. The exact form needs float32 scores. The first pass keeps a tile of student and of teacher
scores in registers. It adds integers to tables in the L2 cache, so its result does not depend on the order. The second
pass writes row blocks of scores and replaces them by coefficients from eight table entries each. Their float32 product
with the student is left to `product.py`. Coefficients looked up in registers spilled.

Estimate for B = 32768, D = 1024 on one H200 (5.4e8 pairs): each pass does 2.2 TFLOP at 300 TFLOP/s, 7 ms. 1.6e9
additions in the cache take 20 ms. 4.3e9 table reads and 11 GB through memory take 15 ms. The gradient's 2.2 TFLOP in
float32 take 45 ms, 95 ms in all. Extra memory is two row blocks of 128 MiB and tables of 4 MiB. Compiled and
interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.registry import Form, with_ones

SCALE = 2.0**15  # of the copies: the largest that keeps elements of up to 1 in float16
UNSCALE = tl.constexpr(SCALE**-2)
TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}
WARPS, STAGES = 8, 3
COLUMNS = 1024  # of a row block that a program looks up


@triton.jit
def _scores(
    X,  # (B, D) fp16, scaled
    rows,
    columns,
    B,
    D,
    stride_xb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a tile of cosines: (BLOCK_M,), (BLOCK_N,) -> (BLOCK_M, BLOCK_N)."""
    k = tl.arange(0, BLOCK_K)
    left = X + rows.to(tl.int64)[:, None] * stride_xb + k[None, :]
    right = X + columns.to(tl.int64)[None, :] * stride_xb + k[:, None]
    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + k < D
        a = tl.load(left + start, mask=(rows < B)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + start, mask=inside[:, None] & (columns < B)[None, :], other=0.0)
        scores = tl.dot(a, b, scores)
    return scores * UNSCALE


@triton.jit
def _bin_position(scores, GRID, AXIS: tl.constexpr, last):
    """Return positions in fine bins. NaN goes to 0, because the loss becomes NaN elsewhere."""
    place = (scores - tl.load(GRID + AXIS)) * tl.load(GRID + AXIS + 1)
    return tl.minimum(tl.where(place > 0.0, place, 0.0), last)


@triton.jit
def histogram_kernel(
    STUDENT,  # (B, D) fp16, scaled
    TEACHER,  # (B, E) fp16, scaled
    GRID,  # (5,) fp32: origin and fine bins per unit of the student's axis, of the teacher's; a typical score
    COUNTS,  # (K, K) int32 by teacher and student bin
    FINE_STUDENT,  # (F,) int32
    FINE_TEACHER,  # (F,) int32; not written unless WITH_TEACHER
    B,
    D,
    E,
    stride_sb,
    stride_tb,
    bins,
    shift,
    last,
    WITH_TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Count the pairs of a tile, right of the diagonal."""
    tiles = tl.cdiv(B, BLOCK_N)
    first_row, first_column = tl.program_id(0) // tiles * BLOCK_M, tl.program_id(0) % tiles * BLOCK_N
    if first_column + BLOCK_N - 1 > first_row:
        rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        x = _scores(STUDENT, rows, columns, B, D, stride_sb, BLOCK_M, BLOCK_N, BLOCK_K)
        at_x = _bin_position(x, GRID, 0, last).to(tl.int32)
        t = _scores(TEACHER, rows, columns, B, E, stride_tb, BLOCK_M, BLOCK_N, BLOCK_K)
        at_t = _bin_position(t, GRID, 2, last).to(tl.int32)
        new = (columns[None, :] > rows[:, None]) & (columns < B)[None, :]
        one = tl.full((BLOCK_M, BLOCK_N), 1, tl.int32)
        tl.atomic_add(COUNTS + (at_t >> shift) * bins + (at_x >> shift), one, mask=new, sem="relaxed")
        tl.atomic_add(FINE_STUDENT + at_x, one, mask=new, sem="relaxed")
        if WITH_TEACHER:
            tl.atomic_add(FINE_TEACHER + at_t, one, mask=new, sem="relaxed")


@triton.jit
def _interpolate(TABLE, i, part):
    near = tl.load(TABLE + i)
    return near + part * (tl.load(TABLE + i + 1) - near)


@triton.jit
def scores_kernel(
    X,  # (B, D) fp16, scaled
    SCORES,  # (end - begin, B - begin) fp32
    begin,
    end,
    B,
    D,
    stride_xb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a tile of a row block of cosines."""
    tiles = tl.cdiv(B - begin, BLOCK_N)
    rows = begin + tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = begin + tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = _scores(X, rows, columns, B, D, stride_xb, BLOCK_M, BLOCK_N, BLOCK_K)
    to = SCORES + (rows - begin).to(tl.int64)[:, None] * (B - begin) + (columns - begin)[None, :]
    tl.store(to, scores, mask=(rows < end)[:, None] & (columns < B)[None, :])


@triton.jit
def coefficients_kernel(
    STUDENT,  # (h, w) fp32 scores, replaced by coefficients
    TEACHER,  # (h, w) fp32 scores
    GRID,  # (5,) fp32
    NODES,  # (K + 1, K + 1) fp32
    OWN,  # (F + 1,) fp32
    RANK,  # (F + 1,) fp32
    SUMS,  # (h, blocks) fp32: of coefficient * (score - centre), right of the diagonal
    w,
    bins,
    bins_per_fine,
    last,
    BLOCK: tl.constexpr,
):
    """Replace scores by coefficients, 0 on the diagonal."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < w
    x = tl.load(STUDENT + row.to(tl.int64) * w + columns, mask=inside, other=0.0)
    at_t = _bin_position(tl.load(TEACHER + row.to(tl.int64) * w + columns, mask=inside, other=0.0), GRID, 2, last)
    at_x = _bin_position(x, GRID, 0, last)
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
    tl.store(STUDENT + row.to(tl.int64) * w + columns, weights, mask=inside)
    total = tl.sum(tl.where(inside & (columns > row), weights * (x - tl.load(GRID + 4)), 0.0), axis=0)
    tl.store(SUMS + row * tl.num_programs(1) + tl.program_id(1), total)


def rounded(unit: Tensor) -> Tensor:
    """Return the scaled float16 copy of unit rows (B, D), from which scores are computed."""
    return torch.mul(unit, SCALE, out=torch.empty(unit.shape, dtype=torch.float16, device=unit.device))


def histogram(
    student: Tensor, teacher: Tensor, grid: Tensor, counts: Tensor, fine: Tensor, fine_teacher: Tensor | None
) -> None:
    """Count all pairs of `rounded` rows into int32 counts (K, K), fine (F,) and, unless None, fine_teacher (F,)."""
    rows, bins = len(student), len(counts)
    shift = (len(fine) // bins).bit_length() - 1
    histogram_kernel[(triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(rows, TILE["BLOCK_N"]),)](
        student,
        teacher,
        grid,
        counts,
        fine,
        fine if fine_teacher is None else fine_teacher,
        rows,
        student.shape[1],
        teacher.shape[1],
        student.stride(0),
        teacher.stride(0),
        bins,
        shift,
        _last(fine),
        WITH_TEACHER=fine_teacher is not None,
        **TILE,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def scores(vectors: Tensor, begin: int, end: int) -> Tensor:
    """Return scores of `rounded` rows begin to end with all from begin on, (end - begin, B - begin) float32."""
    rows = len(vectors)
    out = torch.empty(end - begin, rows - begin, dtype=torch.float32, device=vectors.device)
    programs = triton.cdiv(end - begin, TILE["BLOCK_M"]) * triton.cdiv(rows - begin, TILE["BLOCK_N"])
    scores_kernel[(programs,)](
        vectors,
        out,
        begin,
        end,
        rows,
        vectors.shape[1],
        vectors.stride(0),
        **TILE,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def coefficients(
    student: Tensor, teacher: Tensor, grid: Tensor, nodes: Tensor, student_table: Tensor, rank: Tensor
) -> Tensor:
    """Replace student scores by coefficients, and return the float64 sum of coefficient * (score - centre)."""
    height, width = student.shape
    sums = torch.empty(height, triton.cdiv(width, COLUMNS), dtype=torch.float32, device=student.device)
    coefficients_kernel[sums.shape](
        student,
        teacher,
        grid,
        nodes,
        student_table,
        rank,
        sums,
        width,
        len(nodes) - 1,
        (len(nodes) - 1) / (len(student_table) - 1),
        _last(student_table[1:]),
        BLOCK=COLUMNS,
    )
    return sums.sum(dtype=torch.float64)


def _last(fine: Tensor) -> float:
    return len(fine) - 1.0 / 128.0  # below the upper end of its bin in float32, at 2^15 bins


def forms() -> Iterator[Form]:
    """Yield the forms of this module's kernels. See `registry`."""
    vectors = {"STUDENT": "*fp16:16", "TEACHER": "*fp16:16", "GRID": "*fp32"}
    numbers = {name: "i32" for name in ("B", "D", "E", "stride_sb", "stride_tb", "bins")}
    aligned = {**numbers, "D": "i32:16", "E": "i32:16", "stride_sb": "i32:16", "stride_tb": "i32:16"}
    tile = "x".join(map(str, TILE.values()))
    for label, shape in (("any width", numbers), ("width a multiple of 16", aligned)):
        for with_teacher in (True, False):
            tables = {"COUNTS": "*i32:16", "FINE_STUDENT": "*i32:16", "FINE_TEACHER": "*i32:16"}
            counting = Form(
                f"{tile}, {label}, {'with' if with_teacher else 'without'} the teacher's axis",
                histogram_kernel,
                {**vectors, **tables, **shape, "shift": "i32", "last": "fp32"},
                {"WITH_TEACHER": with_teacher, **TILE},
                warps=WARPS,
                stages=STAGES,
                tensor_cores=True,
                quick=with_teacher and shape is aligned,
            )
            yield counting
            if shape is numbers:
                yield with_ones(counting, "D", "E", "stride_sb", "stride_tb")
        scoring = Form(
            f"{tile}, {label}",
            scores_kernel,
            {"X": "*fp16:16", "SCORES": "*fp32:16", "begin": "i32", "end": "i32"}
            | {"B": "i32", "D": shape["D"], "stride_xb": shape["stride_sb"]},
            TILE,
            warps=WARPS,
            stages=STAGES,
            tensor_cores=True,
            stack={100: 16} if shape is numbers else {},
            quick=shape is aligned,
        )
        yield scoring
        if shape is numbers:
            yield with_ones(scoring, "D", "stride_xb")
    pointers = {name: "*fp32:16" for name in ("STUDENT", "TEACHER", "GRID", "NODES", "OWN", "RANK", "SUMS")}
    sizes = {"w": "i32", "bins": "i32", "bins_per_fine": "fp32", "last": "fp32"}
    constants = {"BLOCK": COLUMNS}
    looking_up = Form(f"{COLUMNS}", coefficients_kernel, {**pointers, **sizes}, constants, stack={80: 8}, quick=True)
    yield from (looking_up, with_ones(looking_up, "w"))
