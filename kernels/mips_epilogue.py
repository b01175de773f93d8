"""Inner-product search, what comes after the scan: from the rows it collected to the k best, exactly scored.

`select` finds each query's proven k-th best bound, and keeps the rows that reach it; `rescore_kept` gives their fp64
products; `rank` counts for every row those ahead of it, which is its place among the k best. Three launches, because
between them the work is dealt out anew: with one query, each of its rows to a program of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.mips import BIN, DEPTH, PAIRS, exact_products
from jasper_fast.kernels.mips_start import just_below, kth_largest, warps
from jasper_fast.kernels.registry import TYPES, Form, odd, with_ones

BLOCKS = (1024, 2048, 4096, 8192)  # candidates that one program holds
RIVALS = 32  # rows that are compared with as many at once
FILL = 1024  # programs that keep a GPU busy


@triton.jit
def select_kernel(
    COUNTS,  # (Q,) int32: rows collected, which may be more than the capacity
    SCORES,  # (Q, capacity) fp32
    ROWS,  # (Q, capacity) int32
    THRESHOLDS,  # (Q,) fp32 that they were collected by
    CUTOFFS,  # (Q,) fp64
    NORMS,  # (ceil(N / 64),) fp32
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    MISSED,  # (Q,) uint8, set to 1 where something that matters may have been left out
    KEPT,  # (Q,) int32
    KEPT_SCORES,  # (Q, room) fp32
    KEPT_ROWS,  # (Q, room) int32
    k,
    capacity,
    room,
    BLOCK: tl.constexpr,
):
    """Keeps the rows whose upper bounds reach the k-th best lower bound, in no order; none of a query that missed."""
    q = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    count = tl.load(COUNTS + q)
    there = place < tl.minimum(count, capacity)
    first = q.to(tl.int64) * capacity
    score = tl.load(SCORES + first + place, mask=there, other=0.0)
    row = tl.load(ROWS + first + place, mask=there, other=0)
    norm = tl.load(NORMS + row // BIN, mask=there, other=0.0)
    error = norm * tl.load(RELATIVE + q) + tl.load(ABSOLUTE + q)
    kth = kth_largest(tl.where(there, score - error, float("-inf")), k)
    cutoff = tl.maximum(kth, just_below(tl.load(CUTOFFS + q)))
    keep = there & (score + error >= cutoff)
    kept = tl.sum(keep.to(tl.int32), axis=0)
    missed = (count > capacity) | (tl.load(THRESHOLDS + q) > cutoff) | (kept > room)
    if missed:
        tl.store(MISSED + q, 1)
        tl.store(KEPT + q, 0)
    else:
        out = q.to(tl.int64) * room + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(KEPT_SCORES + out, score, mask=keep)
        tl.store(KEPT_ROWS + out, row, mask=keep)
        tl.store(KEPT + q, kept)


@triton.jit
def rescore_kept_kernel(
    QUERIES,  # (Q, D) fp64
    CORPUS,  # (N, D)
    ROW_SCALES,  # (N,) fp32 of int8 codes, or None
    NORMS,  # (ceil(N / 64),) fp32
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    KEPT,  # (Q,) int32
    KEPT_SCORES,  # (Q, room) fp32
    KEPT_ROWS,  # (Q, room) int32
    BEST,  # (Q, k, 2) int64: bits of a score, id
    HELD,  # (Q,) int64: how many of them there are
    BROKEN,  # (Q,) uint8, set to 1 where a score lay outside its bound
    TOTALS,  # (Q,) int32
    TRUE,  # (Q, room + k) fp64
    IDS,  # (Q, room + k) int64
    D,
    k,
    room,
    first_id,
    PROVEN: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """A query's candidates: the kept rows, exactly scored if ``PROVEN``, and behind them what it held before."""
    q = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    kept = tl.load(KEPT + q)
    out = q * (room + k)
    for start in range(part * PAIRS, kept, parts * PAIRS):
        place = start + tl.arange(0, PAIRS)
        inside = place < kept
        score = tl.load(KEPT_SCORES + q * room + place, mask=inside, other=0.0)
        row = tl.load(KEPT_ROWS + q * room + place, mask=inside, other=0)
        if PROVEN:
            asked = QUERIES + (q + tl.zeros((1, 1), tl.int64)) * D
            true = exact_products(asked, CORPUS, ROW_SCALES, row.to(tl.int64), inside, D, PAIRS, BLOCK_K)
            norm = tl.load(NORMS + row // BIN, mask=inside, other=0.0)
            error = norm * tl.load(RELATIVE + q) + tl.load(ABSOLUTE + q)
            wrong = inside & (tl.abs(true - score.to(tl.float64)) > error.to(tl.float64))
            if tl.max(wrong.to(tl.int32), axis=0) > 0:
                tl.store(BROKEN + q, 1)
        else:
            true = score.to(tl.float64)
        tl.store(TRUE + out + place, true, mask=inside)
        tl.store(IDS + out + place, row.to(tl.int64) + first_id, mask=inside)
    held = tl.load(HELD + q).to(tl.int32)
    for start in range(part * RIVALS, held, parts * RIVALS):
        place = start + tl.arange(0, RIVALS)
        before = BEST + (q * k + place) * 2
        score = tl.load(before, mask=place < held, other=0)
        tl.store(TRUE + out + kept + place, score.to(tl.float64, bitcast=True), mask=place < held)
        tl.store(IDS + out + kept + place, tl.load(before + 1, mask=place < held, other=0), mask=place < held)
    if part == 0:
        tl.store(TOTALS + q, kept + held)


@triton.jit
def rank_kernel(
    TOTALS,  # (Q,) int32
    TRUE,  # (Q, width) fp64
    IDS,  # (Q, width) int64
    BEST,  # (Q, k, 2) int64: bits of a score, id
    HELD,  # (Q,) int64
    CUTOFFS,  # (Q,) fp64
    k,
    width,
    RIVALS: tl.constexpr,
):
    """The k best of a query's candidates from worst to best, how many they are, and the cutoff if they are k."""
    q = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    total = tl.load(TOTALS + q)
    count = tl.minimum(total, k)
    cutoff = tl.load(CUTOFFS + q)
    for start in range(part * RIVALS, total, parts * RIVALS):
        place = start + tl.arange(0, RIVALS)
        inside = place < total
        score = tl.load(TRUE + q * width + place, mask=inside, other=float("-inf"))
        number = tl.load(IDS + q * width + place, mask=inside, other=0)
        rank = tl.zeros((RIVALS,), tl.int32)
        for other in range(0, total, RIVALS):
            there = other + tl.arange(0, RIVALS)
            rival = tl.load(TRUE + q * width + there, mask=there < total, other=float("-inf"))[None, :]
            named = tl.load(IDS + q * width + there, mask=there < total, other=0)[None, :]
            # A row that came twice takes two places, so that each place is taken.
            before = (named < number[:, None]) | ((named == number[:, None]) & (there[None, :] < place[:, None]))
            ahead = (rival > score[:, None]) | ((rival == score[:, None]) & before)
            rank += tl.sum(ahead.to(tl.int32), axis=1)
        wins = inside & (rank < k)
        out = BEST + (q * k + count - 1 - rank) * 2
        tl.store(out, score.to(tl.int64, bitcast=True), mask=wins)
        tl.store(out + 1, number, mask=wins)
        # Of all programs, one has the last of k.
        tl.store(CUTOFFS + q + tl.zeros((RIVALS,), tl.int32), tl.maximum(score, cutoff), mask=wins & (rank == k - 1))
    if part == 0:
        tl.store(HELD + q, count.to(tl.int64))


@dataclass(frozen=True)
class Collected:
    """What a scan collected, and how far its scores may be from the true ones.

    Args:
        counts: (Q,) int32: how many rows, which may be more than there was room for.
        scores: (Q, capacity) float32.
        rows: (Q, capacity) int32 row numbers.
        thresholds: (Q,) float32 that they were collected by.
        norms: (ceil(N / 64),) float32.
        limits: error relative to the norm, and absolute; (Q,) float32 each.
    """

    counts: Tensor
    scores: Tensor
    rows: Tensor
    thresholds: Tensor
    norms: Tensor
    limits: tuple[Tensor, Tensor]


def finish(
    found: Collected,
    queries: Tensor,
    corpus: Tensor,
    scales: Tensor | None,
    first_id: int,
    room: int,
    proven: bool,
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Brings what was collected into what the search remembers; see `jasper_fast.mips.state.State`.

    Args:
        found: with a capacity of at most `BLOCKS`[-1], and no less than k.
        queries: (Q, D) float64, contiguous.
        corpus: (N, D) contiguous.
        scales: (N,) float32 for int8 rows.
        first_id: id of the first row.
        room: rows of a query that are rescored at most; with more it has missed something.
        proven: whether to rescore; without, scores stay as they are.
        state: best (Q, k, 2) int64, counts (Q,) int64, cutoffs (Q,) float64, broken and missed (Q,) bool, contiguous.
    """
    best, held, cutoffs, broken, missed = state
    size, k, device = len(queries), best.shape[1], corpus.device
    capacity = found.scores.shape[1]
    kept = torch.empty(size, dtype=torch.int32, device=device)
    scores = torch.empty(size, room, dtype=torch.float32, device=device)
    rows = torch.empty(size, room, dtype=torch.int32, device=device)
    block = next(block for block in BLOCKS if block >= capacity)
    select_kernel[(size,)](
        found.counts, found.scores, found.rows, found.thresholds, cutoffs, found.norms, *found.limits,
        missed.view(torch.uint8), kept, scores, rows, k, capacity, room, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    totals = torch.empty(size, dtype=torch.int32, device=device)
    true = torch.empty(size, room + k, dtype=torch.float64, device=device)
    ids = torch.empty(size, room + k, dtype=torch.int64, device=device)
    rescore_kept_kernel[(size, _parts(size, room, PAIRS))](
        queries, corpus, scales, found.norms, *found.limits, kept, scores, rows, best, held, broken.view(torch.uint8),
        totals, true, ids, corpus.shape[1], k, room, first_id, PROVEN=proven, PAIRS=PAIRS, BLOCK_K=DEPTH,
        RIVALS=RIVALS, num_warps=4,
    )  # fmt: skip
    rank_kernel[(size, _parts(size, room + k, RIVALS))](
        totals, true, ids, best, held, cutoffs, k, room + k, RIVALS=RIVALS, num_warps=4
    )


def _parts(size: int, places: int, each: int) -> int:
    """Programs for a query: one where there are many queries, else as many as there are blocks of places."""
    return max(1, min(triton.cdiv(places, each), FILL // size))


def forms() -> Iterator[Form]:
    """See `registry`."""
    numbers = {"NORMS": "*fp32:16", "RELATIVE": "*fp32:16", "ABSOLUTE": "*fp32:16", "KEPT": "*i32:16"}
    numbers |= {"KEPT_SCORES": "*fp32:16", "KEPT_ROWS": "*i32:16"}
    state = {"BEST": "*i64:16", "HELD": "*i64:16"}
    for block in BLOCKS:
        types = {**numbers, "COUNTS": "*i32:16", "SCORES": "*fp32:16", "ROWS": "*i32:16", "THRESHOLDS": "*fp32:16"}
        types |= {"CUTOFFS": "*fp64:16", "MISSED": "*u8:16", "k": "i32", "capacity": "i32:16", "room": "i32"}
        form = Form(f"{block}", select_kernel, types, {"BLOCK": block}, warps=warps(block), quick=block == BLOCKS[0])
        yield form
        if block == BLOCKS[0]:
            yield with_ones(form, "k")
    for kind in (*TYPES.values(), "i8"):
        for proven in (True, False):
            types = {**numbers, **state, "QUERIES": "*fp64:16", "CORPUS": f"*{kind}:16", "BROKEN": "*u8:16"}
            types |= {"TOTALS": "*i32:16", "TRUE": "*fp64:16", "IDS": "*i64:16"}
            types |= {"D": "i32:16", "k": "i32", "room": "i32", "first_id": "i32"}
            types |= {"ROW_SCALES": "*fp32:16"} if kind == "i8" else {}
            constants: dict[str, Any] = {"PROVEN": proven, "PAIRS": PAIRS, "BLOCK_K": DEPTH, "RIVALS": RIVALS}
            constants |= {} if kind == "i8" else {"ROW_SCALES": None}
            label = f"{kind}, {'proven' if proven else 'fast'}"
            form = Form(label, rescore_kept_kernel, types, constants, quick=proven and kind in ("bf16", "i8"))
            yield form
            if proven:
                yield from (odd(form), with_ones(form, "k"), with_ones(form, "D"), with_ones(form, "D", "k"))
                far = {**types, "first_id": "i64"}  # beyond 2^31 rows
                yield Form(f"{label}, far", rescore_kept_kernel, far, constants)
    types = {**state, "TOTALS": "*i32:16", "TRUE": "*fp64:16", "IDS": "*i64:16", "CUTOFFS": "*fp64:16"}
    types |= {"k": "i32", "width": "i32"}
    form = Form(f"{RIVALS}", rank_kernel, types, {"RIVALS": RIVALS}, quick=True)
    yield from (form, with_ones(form, "k"))
