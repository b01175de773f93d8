"""Two-dimensional dominance counts by a counting radix sort: half of the exact relative similarity loss.

N pairs have a place 0..N-1 in teacher order, a score x and a threshold y = fl(x - m). Scores and thresholds in
ascending order (a score first if equal) are 2N events. They are distributed by their pair's place, two bits at a time
and most significant ones first, and each pass keeps the order. This is a radix sort from student order to teacher
order. In each pass an event counts the earlier events of the other kind in its node with a digit on its far side. A
score counts thresholds at greater digits, a threshold counts scores at smaller ones. The last pass writes positions by
place, and a leaf of `LEAF` places compares its scores with its thresholds directly. So

    up[p]  = #{q: place_q > place_p, y_q < x_p}                = the sum of a score's counts,
    low[q] = #{p: place_p < place_q, x_p > y_q} = place_q      - the sum of a threshold's counts.

Every place has exactly two events, so a node of 2^k places begins at an event that is a multiple of 2^(k+1). No tile
straddles two nodes, and no node needs an offset. All counts are integers and nothing is atomic, so repeated runs give
the same bits.

Cost: with two bits, a tile's counters are four 16-bit fields of an int64, and one scan serves all digits. A block takes
1,260 cycles for 1,024 events in `distribute`, 520 in `digit_counts` and 1,900 for a leaf of 256. For N = 33.5 M (B =
8192) 9 passes take 0.55 ms each on an H200, and the leaves 2.2 ms, 7 ms in all. A pass moves 1.3 GB, 0.3 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAF_BITS = 7
LEAF = 2**LEAF_BITS  # places
BLOCK = 1024  # events; at most those of the smallest distributed node, 2^(LEAF_BITS + 2)
WARPS = {"distribute": 8, "leaf": 4}


@triton.jit
def _digits(EVENTS, events, shift, digit_mask, BLOCK: tl.constexpr):
    """Return a tile's events and digits, and a 1 in the digit's 16-bit field for each score and for each threshold."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < events
    event = tl.load(EVENTS + offsets, mask=inside, other=0)
    digit = ((event >> 1) >> shift) & digit_mask
    one = tl.where(inside, tl.full((BLOCK,), 1, tl.int64) << (digit * 16).to(tl.int64), 0)
    return offsets, event, digit, tl.where(event & 1 == 0, one, 0), tl.where(event & 1 == 1, one, 0)


@triton.jit
def digit_counts_kernel(
    EVENTS,  # (2N,) int32: place << 1 | kind; kind 0 is a score, 1 a threshold
    COUNTS,  # (2, 4, tiles) int32
    events,
    tiles,
    shift,
    digit_mask,
    BLOCK: tl.constexpr,
):
    """Count the scores and thresholds of each tile with each digit."""
    _, _, _, scores, thresholds = _digits(EVENTS, events, shift, digit_mask, BLOCK)
    digits = tl.arange(0, 4).to(tl.int64)
    to = COUNTS + digits * tiles + tl.program_id(0)
    tl.store(to, ((tl.sum(scores, axis=0) >> (16 * digits)) & 0xFFFF).to(tl.int32))
    tl.store(
        to + tl.full((), 4, tl.int64) * tiles, ((tl.sum(thresholds, axis=0) >> (16 * digits)) & 0xFFFF).to(tl.int32)
    )


@triton.jit
def _earlier(BEFORE, row: tl.constexpr, tiles, first):
    """Return how many events of a row of the counters are in earlier tiles of the node."""
    counter = BEFORE + tl.full((), row, tl.int64) * tiles
    return tl.load(counter + tl.program_id(0)) - tl.load(counter + first)


@triton.jit
def _choose(digit, a, b, c, d):
    return tl.where(digit < 2, tl.where(digit == 0, a, b), tl.where(digit == 2, c, d))


@triton.jit
def distribute_kernel(
    EVENTS,  # (2N,) int32
    SUMS,  # (2N,) int32 counts of the events so far; not read if FIRST
    BEFORE,  # (2, 4, tiles) int32: exclusive running sums of COUNTS
    EVENTS_OUT,  # (2N,) int32; if LAST, the events' positions by kind and place
    SUMS_OUT,  # (2N,) int32; if LAST, by kind and place too
    events,
    tiles,
    shift,
    digit_mask,
    tiles_in_node,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run one pass: move every event to its digit's child node, and add to its counts."""
    offsets, event, digit, scores, thresholds = _digits(EVENTS, events, shift, digit_mask, BLOCK)
    inside, threshold = offsets < events, event & 1 == 1
    first = tl.program_id(0) // tiles_in_node * tiles_in_node
    s0, s1 = _earlier(BEFORE, 0, tiles, first), _earlier(BEFORE, 1, tiles, first)
    s2, s3 = _earlier(BEFORE, 2, tiles, first), _earlier(BEFORE, 3, tiles, first)
    t0, t1 = _earlier(BEFORE, 4, tiles, first), _earlier(BEFORE, 5, tiles, first)
    t2, t3 = _earlier(BEFORE, 6, tiles, first), _earlier(BEFORE, 7, tiles, first)
    scores = tl.cumsum(scores, axis=0) - scores  # fields: in this tile, before each event
    thresholds = tl.cumsum(thresholds, axis=0) - thresholds
    field = (digit * 16).to(tl.int64)
    ones = 0x0001000100010001  # times this, a field is the sum of itself and those below
    below = ((scores * ones << 16) >> field) & 0xFFFF
    above = ((thresholds * ones >> 48) & 0xFFFF) - ((thresholds * ones >> field) & 0xFFFF)
    counted = tl.where(threshold, below, above).to(tl.int32)
    counted += tl.where(
        threshold,
        _choose(digit, 0, s0, s0 + s1, s0 + s1 + s2),
        _choose(digit, t1 + t2 + t3, t2 + t3, t3, 0),
    )
    if not FIRST:
        counted += tl.load(SUMS + offsets, mask=inside, other=0)
    same = (((scores + thresholds) >> field) & 0xFFFF).to(tl.int32)
    same += _choose(digit, s0 + t0, s1 + t1, s2 + t2, s3 + t3)
    to = first * BLOCK + (digit << (shift + 1)) + same
    if LAST:
        at = (event & 1) * (events // 2) + (event >> 1)
        tl.store(EVENTS_OUT + at, to, mask=inside)
        tl.store(SUMS_OUT + at, counted, mask=inside)
    else:
        tl.store(EVENTS_OUT + to, event, mask=inside)
        tl.store(SUMS_OUT + to, counted, mask=inside)


@triton.jit
def leaf_kernel(
    POSITIONS,  # (2, N) int32 of the scores and the thresholds by place, in ascending order within a leaf
    SUMS,  # (2, N) int32
    UP,  # (N,) int32
    LOW,  # (N,) int32
    places,
    LEAF: tl.constexpr,
):
    """Compare the scores and thresholds of a leaf. A thread holds one place and meets the others one by one."""
    base = tl.program_id(0) * LEAF
    p = tl.arange(0, LEAF)
    here = base + p < places
    scores, thresholds = POSITIONS + base, POSITIONS + places + base
    x = tl.load(scores + p, mask=here, other=0)
    y = tl.load(thresholds + p, mask=here, other=0)
    up = tl.load(SUMS + base + p, mask=here, other=0)
    low = base - tl.load(SUMS + places + base + p, mask=here, other=0)
    for q in tl.range(0, tl.minimum(LEAF, places - base), loop_unroll_factor=8):
        up += ((p < q) & (tl.load(thresholds + q) < x)).to(tl.int32)
        low += ((q < p) & (y < tl.load(scores + q))).to(tl.int32)
    tl.store(UP + base + p, up, mask=here)
    tl.store(LOW + base + p, low, mask=here)


def dominance(events: Tensor) -> tuple[Tensor, Tensor]:
    """Count as `jasper_fast.losses.relative_exact.dominance` does: (2N,) int32 events -> (N,), (N,) int32, N >= 1."""
    total = len(events)
    tiles = triton.cdiv(total, BLOCK)
    # At least one pass, which writes positions by place. Of a single leaf it deals no bits.
    shift = max((total // 2 - 1).bit_length(), LEAF_BITS)
    sums, first, last = events, True, False  # sums are not read before they are written
    while not last:
        bits = min(2 - (shift - LEAF_BITS) % 2, shift - LEAF_BITS)  # an odd bit first, while nodes are large
        shift -= bits
        last = shift == LEAF_BITS
        counts = torch.empty(8 * tiles, dtype=torch.int32, device=events.device)
        numbers = (total, tiles, shift, 2**bits - 1)
        digit_counts_kernel[(tiles,)](events, counts, *numbers, BLOCK=BLOCK, num_warps=WARPS["distribute"])
        before = counts.cumsum(0, dtype=torch.int32).sub_(counts)
        in_node = max(2 ** (shift + bits + 1) // BLOCK, 1)
        out = torch.empty_like(events), torch.empty_like(events)
        distribute_kernel[(tiles,)](
            events, sums, before, *out, *numbers, in_node, FIRST=first, LAST=last, BLOCK=BLOCK,
            num_warps=WARPS["distribute"],
        )  # fmt: skip
        (events, sums), first = out, False
    up, low = torch.empty(2, total // 2, dtype=torch.int32, device=events.device)
    leaves = triton.cdiv(total, 2 * LEAF)
    leaf_kernel[(leaves,)](events, sums, up, low, total // 2, LEAF=LEAF, num_warps=WARPS["leaf"])
    return up, low
