"""Correction of `dominance_counts` for ties: subtract the counts between pairs of equal teacher score."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.registry import Form, with_ones

BLOCK = 1024


@triton.jit
def ends_kernel(
    STARTS,  # (N,) int8: 1 where a run begins
    RUN,  # (N,) int32 run of each place
    FIRST,  # (N,) int32 by run
    LAST,
    N,
    BLOCK: tl.constexpr,
):
    """Write the first and last place of each run. torch has no parallel cummax for one long row."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    run = tl.load(RUN + place, mask=inside, other=0)
    starts = tl.load(STARTS + place, mask=inside, other=0)
    next_starts = tl.load(STARTS + place + 1, mask=place + 1 < N, other=1)
    tl.store(FIRST + run, place, mask=inside & (starts != 0))
    tl.store(LAST + run, place, mask=inside & (next_starts != 0))


@triton.jit
def subtract_ties_kernel(
    UP,  # (N,) int32 by place
    LOW,
    MOVES,  # (N,) int8: fl(x - m) < x
    GROUP,  # (N,) int32: run of equal teacher scores
    GROUP_FIRST,  # by group
    GROUP_LAST,
    RUN,  # (N,) int32: run of equal teacher and student scores
    RUN_FIRST,  # by run
    RUN_LAST,
    N,
    BLOCK: tl.constexpr,
):
    """Subtract the counts inside each group of equal teacher scores.

    A pair is active with all pairs of its group with a greater score. If its threshold moves, it is also active with
    those of equal score.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    moves = tl.load(MOVES + place, mask=inside, other=0) != 0
    group = tl.load(GROUP + place, mask=inside, other=0)
    run = tl.load(RUN + place, mask=inside, other=0)
    before = tl.where(moves, place, tl.load(RUN_FIRST + run)) - tl.load(GROUP_FIRST + group)
    after = tl.load(GROUP_LAST + group) - tl.where(moves, place, tl.load(RUN_LAST + run))
    tl.store(LOW + place, tl.load(LOW + place, mask=inside) - before, mask=inside)
    tl.store(UP + place, tl.load(UP + place, mask=inside) - after, mask=inside)


def subtract_ties(up: Tensor, low: Tensor, teacher: Tensor, student: Tensor, margin: float) -> None:
    """Subtract, in place, the counts between pairs of equal teacher score.

    In a group of equal teacher scores, student scores must descend.

    Args:
        up: (N,) int32 counts by place.
        low: (N,) int32 counts by place.
        teacher: (N,) teacher scores by place.
        student: (N,) student scores by place.
        margin: margin of the loss, above 0.
    """
    groups, runs = _differs_from_last(teacher), _differs_from_last(student)
    runs |= groups
    moves = student - margin < student
    places = len(up)
    grid = (triton.cdiv(places, BLOCK),)
    ends = []
    for starts in (groups, runs):
        run = starts.cumsum(0, dtype=torch.int32).sub_(1)
        first, last = torch.empty(2, places, dtype=torch.int32, device=up.device)
        ends_kernel[grid](starts.view(torch.int8), run, first, last, places, BLOCK=BLOCK)
        ends += [run, first, last]
    subtract_ties_kernel[grid](up, low, moves.view(torch.int8), *ends, places, BLOCK=BLOCK)


def _differs_from_last(values: Tensor) -> Tensor:
    return torch.cat((values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]))


def forms() -> Iterator[Form]:
    """Yield the forms of this module's kernels. See `registry`."""
    names = ("RUN", "FIRST", "LAST")
    types = {"STARTS": "*i8:16", **{name: "*i32:16" for name in names}, "N": "i32"}
    ends = Form(f"{BLOCK}", ends_kernel, types, {"BLOCK": BLOCK}, quick=True)
    tables = ("UP", "LOW", "GROUP", "GROUP_FIRST", "GROUP_LAST", "RUN", "RUN_FIRST", "RUN_LAST")
    types = {"MOVES": "*i8:16", **{name: "*i32:16" for name in tables}, "N": "i32"}
    subtract = Form(f"{BLOCK}", subtract_ties_kernel, types, {"BLOCK": BLOCK}, quick=True)
    yield from (ends, with_ones(ends, "N"), subtract, with_ones(subtract, "N"))
