"""Two-dimensional dominance counts by a counting radix sort: half of the exact relative similarity loss.

N pairs have a place 0..N-1 in teacher order, a score x and a threshold y = fl(x - m). Scores and thresholds in
ascending order (a score first if equal) are 2N events. They are distributed by their pair's place, most significant
digit first, and each pass keeps the order. This is a radix sort from student order to teacher order. In each pass an
event counts the earlier events of the other kind in its node with a digit on its far side. A score counts thresholds at
greater digits, a threshold counts scores at smaller ones. Events that end in one node of LEAF places are compared there
directly. So

    up[p]  = #{q: place_q > place_p, y_q < x_p}                = the sum of a score's counts,
    low[q] = #{p: place_p < place_q, x_p > y_q} = place_q      - the sum of a threshold's counts.

Every place has exactly two events, so a node of 2^k places begins at an event that is a multiple of 2^(k+1). No tile
straddles two nodes, and no node needs an offset. All counts are integers and nothing is atomic, so repeated runs give
the same bits.

Bytes for N = 33.5 M (B = 8192): a pass reads 0.27 GB to count digits and moves 1.07 GB. Four passes and the leaves move
6 GB, 1.5 ms at 4.3 TB/s. A pass does about 10 operations for each event and digit, 2e10 in all, 3 ms at a fifth of an
H200's integer rate. The leaves do 256 comparisons per event, 2 ms. The estimate is 15 ms in all. Compiled and
interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.registry import Form, with_ones

DIGIT_BITS = 5
LEAF_BITS = 7
BLOCK = 512  # events; at most those of the smallest distributed node, 2^(LEAF_BITS + 2)
WARPS = {"counts": 8, "distribute": 16, "leaf": 8}
CHUNK = 16  # events that the events of a leaf are compared with at once
MAX_PLACES = 2**30  # an event holds place and kind in 32 bits


@triton.jit
def digit_counts_kernel(
    EVENTS,  # (2N,) int32: place << 1 | kind; kind 0 is a score, 1 a threshold
    COUNTS,  # (2, RADIX, tiles) int32
    events,
    tiles,
    shift,
    digit_mask,
    RADIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the scores and thresholds of each tile with each digit."""
    tile = tl.program_id(0)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < events
    event = tl.load(EVENTS + offsets, mask=inside, other=0)
    digit = ((event >> 1) >> shift) & digit_mask
    digits = tl.arange(0, RADIX)
    # Both kinds in one number: scores in the low half, thresholds in the high one.
    one = tl.where(inside, 1 + (event & 1) * 65535, 0)
    counts = tl.sum(tl.where(digit[:, None] == digits[None, :], one[:, None], 0), axis=0)  # (RADIX,)
    rows = digits.to(tl.int64)  # of COUNTS: first the scores', then the thresholds'
    tl.store(COUNTS + rows * tiles + tile, counts & 0xFFFF)
    tl.store(COUNTS + (rows + RADIX) * tiles + tile, counts >> 16)


@triton.jit
def distribute_kernel(
    EVENTS,  # (2N,) int32
    SUMS,  # (2N,) int32 counts of the events so far; not read if FIRST
    BEFORE,  # (2, RADIX, tiles) int32: exclusive running sums of COUNTS
    EVENTS_OUT,
    SUMS_OUT,
    events,
    tiles,
    tiles_in_node,
    shift,
    digit_mask,
    FIRST: tl.constexpr,
    RADIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run one pass: move every event to its digit's child node, and add to its counts."""
    tile = tl.program_id(0)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < events
    event = tl.load(EVENTS + offsets, mask=inside, other=0)
    kind = event & 1
    digit = ((event >> 1) >> shift) & digit_mask
    digits = tl.arange(0, RADIX)
    first = tile // tiles_in_node * tiles_in_node
    of_scores = BEFORE + digits.to(tl.int64) * tiles
    of_thresholds = BEFORE + (digits.to(tl.int64) + RADIX) * tiles
    scores = tl.load(of_scores + tile) - tl.load(of_scores + first)  # (RADIX,) in earlier tiles of the node
    thresholds = tl.load(of_thresholds + tile) - tl.load(of_thresholds + first)
    scores_below = tl.cumsum(scores, axis=0) - scores
    thresholds_above = tl.sum(thresholds, axis=0) - tl.cumsum(thresholds, axis=0)

    is_digit = digit[:, None] == digits[None, :]  # (BLOCK, RADIX)
    one = tl.where(inside, 1 + kind * 65535, 0)
    entered = tl.where(is_digit, one[:, None], 0)
    entered = tl.cumsum(entered, axis=0) - entered  # in this tile, before each event
    threshold = kind[:, None] == 1
    far = tl.where(threshold, digits[None, :] < digit[:, None], digits[None, :] > digit[:, None])
    counted = tl.sum(tl.where(far, entered, 0), axis=1)
    counted = tl.where(kind == 1, counted & 0xFFFF, counted >> 16)
    earlier = tl.where(threshold, scores_below[None, :], thresholds_above[None, :])
    counted += tl.sum(tl.where(is_digit, earlier, 0), axis=1)
    if not FIRST:
        counted += tl.load(SUMS + offsets, mask=inside, other=0)

    same = tl.sum(tl.where(is_digit, entered, 0), axis=1)
    place = (same & 0xFFFF) + (same >> 16) + tl.sum(tl.where(is_digit, (scores + thresholds)[None, :], 0), axis=1)
    to = first * BLOCK + (digit << (shift + 1)) + place
    tl.store(EVENTS_OUT + to, event, mask=inside)
    tl.store(SUMS_OUT + to, counted, mask=inside)


@triton.jit
def leaf_kernel(
    EVENTS,  # (2N,) int32
    SUMS,  # (2N,) int32; not read if FIRST
    UP,  # (N,) int32
    LOW,  # (N,) int32
    events,
    FIRST: tl.constexpr,
    LEAF: tl.constexpr,  # places; a program compares their 2 LEAF events
    CHUNK: tl.constexpr,
):
    """Compare all events of a leaf, and write the counts of its places."""
    base = tl.program_id(0) * (2 * LEAF)
    index = tl.arange(0, 2 * LEAF)
    inside = base + index < events
    event = tl.load(EVENTS + base + index, mask=inside, other=0)
    place, kind = event >> 1, event & 1
    counted = tl.zeros((2 * LEAF,), tl.int32)
    for start in range(0, 2 * LEAF, CHUNK):
        other_index = start + tl.arange(0, CHUNK)
        other = tl.load(EVENTS + base + other_index, mask=base + other_index < events, other=0)
        other_place, other_kind = other >> 1, other & 1
        far = tl.where(kind[:, None] == 1, other_place[None, :] < place[:, None], other_place[None, :] > place[:, None])
        earlier = (other_index[None, :] < index[:, None]) & (base + other_index < events)[None, :]
        counted += tl.sum((far & earlier & (other_kind[None, :] != kind[:, None])).to(tl.int32), axis=1)
    if not FIRST:
        counted += tl.load(SUMS + base + index, mask=inside, other=0)
    tl.store(UP + place, counted, mask=inside & (kind == 0))
    tl.store(LOW + place, place - counted, mask=inside & (kind == 1))


def dominance(events: Tensor) -> tuple[Tensor, Tensor]:
    """Count dominated pairs.

    Args:
        events: (2N,) int32 events, place << 1 | kind, in ascending order of score or threshold, with 1 <= N < 2**30.
            They are overwritten.

    Returns:
        up (N,) and low (N,) int32 by place.
    """
    total = len(events)
    bits = max(total // 2 - 1, 1).bit_length()
    sums, first = events, True  # not read before it is written
    spare = (torch.empty_like(events), torch.empty_like(events))
    shift = bits
    tiles = triton.cdiv(total, BLOCK)
    while shift > LEAF_BITS:
        passes = triton.cdiv(shift - LEAF_BITS, DIGIT_BITS)
        digit_bits = triton.cdiv(shift - LEAF_BITS, passes)  # evenly, so that no pass is nearly empty
        shift -= digit_bits
        radix, mask = 2**DIGIT_BITS, 2**digit_bits - 1
        counts = torch.empty(2 * radix * tiles, dtype=torch.int32, device=events.device)
        digit_counts_kernel[(tiles,)](
            events, counts, total, tiles, shift, mask, RADIX=radix, BLOCK=BLOCK, num_warps=WARPS["counts"]
        )
        before = counts.cumsum(0, dtype=torch.int32).sub_(counts)
        in_node = 2 ** (shift + digit_bits + 1) // BLOCK
        out = spare
        distribute_kernel[(tiles,)](
            events,
            sums,
            before,
            *out,
            total,
            tiles,
            in_node,
            shift,
            mask,
            FIRST=first,
            RADIX=radix,
            BLOCK=BLOCK,
            num_warps=WARPS["distribute"],
        )
        spare = (events, torch.empty_like(events) if first else sums)
        (events, sums), first = out, False
    up, low = torch.empty(2, total // 2, dtype=torch.int32, device=events.device)
    leaf = 2**LEAF_BITS
    leaves = triton.cdiv(total, 2 * leaf)
    leaf_kernel[(leaves,)](events, sums, up, low, total, FIRST=first, LEAF=leaf, CHUNK=CHUNK, num_warps=WARPS["leaf"])
    return up, low


def forms() -> Iterator[Form]:
    """Yield the forms of this module's kernels. See `registry`."""
    radix = 2**DIGIT_BITS
    numbers = {name: "i32" for name in ("events", "tiles", "shift", "digit_mask")}
    counts = Form(
        f"{BLOCK} x {radix}",
        digit_counts_kernel,
        {"EVENTS": "*i32:16", "COUNTS": "*i32:16", **numbers},
        {"RADIX": radix, "BLOCK": BLOCK},
        warps=WARPS["counts"],
        quick=True,
    )
    yield counts
    # 129 to 256 pairs, of 17 to 23 rows, are one tile and one bit.
    yield with_ones(counts, "tiles", "digit_mask", quick=True)
    for first in (True, False):
        label = f"{BLOCK} x {radix}, {'first' if first else 'later'} pass"
        pointers = {name: "*i32:16" for name in ("EVENTS", "SUMS", "BEFORE", "EVENTS_OUT", "SUMS_OUT")}
        distribute = Form(
            label,
            distribute_kernel,
            {**pointers, **numbers, "tiles_in_node": "i32"},
            {"FIRST": first, "RADIX": radix, "BLOCK": BLOCK},
            warps=WARPS["distribute"],
            quick=not first,
        )
        yield distribute
        if first:
            yield with_ones(distribute, "tiles", "tiles_in_node", "digit_mask", quick=True)
        yield Form(
            f"{2**LEAF_BITS} places, {'after no' if first else 'after a'} pass",
            leaf_kernel,
            {**{name: "*i32:16" for name in ("EVENTS", "SUMS", "UP", "LOW")}, "events": "i32"},
            {"FIRST": first, "LEAF": 2**LEAF_BITS, "CHUNK": CHUNK},
            warps=WARPS["leaf"],
            quick=not first,
        )
