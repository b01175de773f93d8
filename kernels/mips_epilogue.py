"""Inner-product search, after the scan: from the collected rows to the k best, exactly scored.

`select` finds each query's proven k-th best bound and keeps the rows that reach it. `rescore_kept` computes their fp64
products. `rank` counts the rows ahead of every row, which gives its place among the k best. The three launches divide
the work differently: with one query, each of its rows goes to a separate program. Cost: 0.1 ms, and 0.5 ns a result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.mips import BIN
from jasper_fast.kernels.mips_prologue import just_below, kth_largest, warps
from jasper_fast.kernels.mips_rescore import DEPTH, PAIRS, exact_products

BLOCKS = (1024, 2048, 4096, 8192)  # candidates that one program holds
RIVALS = 32  # rows that are compared with as many at once
TARGET_PROGRAMS = 1024  # that keep a GPU busy


@triton.jit
def select_kernel(
    COUNTS,  # (Q,) int32: rows collected, which may be more than the capacity
    SCORES,  # (Q, capacity) fp32
    ROWS,  # (Q, capacity) int32
    THRESHOLDS,  # (Q,) fp32 thresholds of the scan, inf for queries that were not scanned
    SPARES,  # (Q,) fp32: lower thresholds, for queries with fewer than k rows
    CUTOFFS,  # (Q,) fp64
    NORMS,  # (ceil(N / 64),) fp32
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    MISSED,  # (Q,) uint8, set to 1 if a top-k row may be missing
    KEPT,  # (Q,) int32
    KEPT_SCORES,  # (Q, max_kept) fp32
    KEPT_ROWS,  # (Q, max_kept) int32
    BEFORE,  # (Q,) fp64: copy of the cutoffs, which `rank_kernel` overwrites
    AGAIN,  # (Q,) fp32: the threshold with which another scan may complete a missed query, inf for others
    rounding,  # fp32: error of a score relative to itself
    k,
    capacity,
    max_kept,
    BLOCK: tl.constexpr,
):
    """Keep the rows whose upper bounds reach the k-th best lower bound, in no order, and none of a missed query."""
    q = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    count = tl.load(COUNTS + q)
    inside = place < tl.minimum(count, capacity)
    first = q.to(tl.int64) * capacity
    score = tl.load(SCORES + first + place, mask=inside, other=0.0)
    row = tl.load(ROWS + first + place, mask=inside, other=0)
    norm = tl.load(NORMS + row // BIN, mask=inside, other=0.0)
    error = norm * tl.load(RELATIVE + q) + tl.load(ABSOLUTE + q) + tl.abs(score) * rounding
    kth = kth_largest(tl.where(inside, score - error, float("-inf")), k)
    before = tl.load(CUTOFFS + q)
    tl.store(BEFORE + q, before)
    cutoff = tl.maximum(kth, just_below(before))
    keep = inside & (score + error >= cutoff)
    kept = tl.sum(keep.to(tl.int32), axis=0)
    threshold = tl.load(THRESHOLDS + q)
    missed = (threshold < float("inf")) & ((count > capacity) | (threshold > cutoff) | (kept > max_kept))
    # Any k rows prove a bound of the k-th best.
    again = tl.where(count < k, tl.load(SPARES + q), cutoff)
    tl.store(AGAIN + q, tl.where(missed, again, float("inf")))
    if missed:
        tl.store(MISSED + q, 1)
        tl.store(KEPT + q, 0)
    else:
        out = q.to(tl.int64) * max_kept + tl.cumsum(keep.to(tl.int32), axis=0) - 1
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
    KEPT_SCORES,  # (Q, max_kept) fp32
    KEPT_ROWS,  # (Q, max_kept) int32
    BEST,  # (Q, k, 2) int64: bits of a score, id
    HELD,  # (Q,) int64: number of held rows
    BROKEN,  # (Q,) uint8, set to 1 if a score was outside its bound
    TOTALS,  # (Q,) int32
    TRUE,  # (Q, max_kept + k) fp64
    IDS,  # (Q, max_kept + k) int64
    rounding,  # fp32: error of a score relative to itself
    D,
    k,
    max_kept,
    first_id,
    PROVEN: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """Write a query's candidates: the kept rows, exactly scored if ``PROVEN``, then its rows held so far."""
    q = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    kept = tl.load(KEPT + q)
    out = q * (max_kept + k)
    for start in range(part * PAIRS, kept, parts * PAIRS):
        place = start + tl.arange(0, PAIRS)
        inside = place < kept
        score = tl.load(KEPT_SCORES + q * max_kept + place, mask=inside, other=0.0)
        row = tl.load(KEPT_ROWS + q * max_kept + place, mask=inside, other=0)
        if PROVEN:
            query = QUERIES + (q + tl.zeros((1, 1), tl.int64)) * D
            true = exact_products(query, CORPUS, ROW_SCALES, row.to(tl.int64), inside, D, PAIRS, BLOCK_K)
            norm = tl.load(NORMS + row // BIN, mask=inside, other=0.0)
            error = norm * tl.load(RELATIVE + q) + tl.load(ABSOLUTE + q) + tl.abs(score) * rounding
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
    BEFORE,  # (Q,) fp64 cutoffs so far
    CUTOFFS,  # (Q,) fp64
    k,
    width,
    RIVALS: tl.constexpr,
):
    """Write the k best of a query's candidates from worst to best, their number, and the cutoff if they are k."""
    q = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    total = tl.load(TOTALS + q)
    count = tl.minimum(total, k)
    cutoff = tl.load(BEFORE + q)
    for start in range(part * RIVALS, total, parts * RIVALS):
        place = start + tl.arange(0, RIVALS)
        inside = place < total
        score = tl.load(TRUE + q * width + place, mask=inside, other=float("-inf"))
        number = tl.load(IDS + q * width + place, mask=inside, other=0)
        rank = tl.zeros((RIVALS,), tl.int32)
        for other in range(0, total, RIVALS):
            other_place = other + tl.arange(0, RIVALS)
            rival = tl.load(TRUE + q * width + other_place, mask=other_place < total, other=float("-inf"))[None, :]
            rival_id = tl.load(IDS + q * width + other_place, mask=other_place < total, other=0)[None, :]
            # A repeated row takes two places, so that every place is filled.
            first = (rival_id < number[:, None]) | (
                (rival_id == number[:, None]) & (other_place[None, :] < place[:, None])
            )
            ahead = (rival > score[:, None]) | ((rival == score[:, None]) & first)
            rank += tl.sum(ahead.to(tl.int32), axis=1)
        wins = inside & (rank < k)
        out = BEST + (q * k + count - 1 - rank) * 2
        tl.store(out, score.to(tl.int64, bitcast=True), mask=wins)
        tl.store(out + 1, number, mask=wins)
        # One of all programs has the k-th row.
        tl.store(CUTOFFS + q + tl.zeros((RIVALS,), tl.int32), tl.maximum(score, cutoff), mask=wins & (rank == k - 1))
    if part == 0:
        tl.store(HELD + q, count.to(tl.int64))


@dataclass(frozen=True)
class Collected:
    """Collected rows of a scan, and the bounds of their scores' errors.

    Args:
        counts: (Q,) int32 numbers of rows, which may exceed the capacity.
        scores: (Q, capacity) float32 scores.
        rows: (Q, capacity) int32 row numbers.
        thresholds: (Q,) float32 thresholds of the scan.
        norms: (ceil(N / 64),) float32 norms of the bins.
        limits: errors relative to the norm and absolute errors, (Q,) float32 each.
        spares: (Q,) float32 lower thresholds for another scan, or the same.
        rounding: errors of scores relative to themselves.
    """

    counts: Tensor
    scores: Tensor
    rows: Tensor
    thresholds: Tensor
    norms: Tensor
    limits: tuple[Tensor, Tensor]
    spares: Tensor
    rounding: float = 0.0


def rerank(
    collected: Collected,
    queries: Tensor,
    corpus: Tensor,
    scales: Tensor | None,
    first_id: int,
    max_kept: int,
    proven: bool,
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """Merge collected rows into the state of a search. See `jasper_fast.mips.topk_state.TopKState`.

    Return the thresholds (Q,) float32 with which another scan may complete missed queries, inf for complete ones.

    Args:
        collected: candidates of the scan, with a capacity of k to `BLOCKS`[-1].
        queries: (Q, D) float64 queries, contiguous.
        corpus: (N, D) rows, contiguous.
        scales: (N,) float32 scales of int8 rows. None for other dtypes.
        first_id: id of the first row.
        max_kept: maximum number of rows rescored for a query. A query with more is marked as missed.
        proven: rescore in fp64. False keeps the scan's scores.
        state: best (Q, k, 2) int64, counts (Q,) int64, cutoffs (Q,) float64, broken and missed (Q,) bool, contiguous.
    """
    best, held, cutoffs, broken, missed = state
    size, k, device = len(queries), best.shape[1], corpus.device
    capacity = collected.scores.shape[1]
    kept, totals = (torch.empty(size, dtype=torch.int32, device=device) for _ in range(2))
    scores = torch.empty(size, max_kept, dtype=torch.float32, device=device)
    rows = torch.empty(size, max_kept, dtype=torch.int32, device=device)
    before, again = torch.empty_like(cutoffs), torch.empty_like(collected.thresholds)
    block = next(block for block in BLOCKS if block >= capacity)
    select_kernel[(size,)](
        collected.counts, collected.scores, collected.rows, collected.thresholds, collected.spares, cutoffs,
        collected.norms, *collected.limits, missed.view(torch.uint8), kept, scores, rows, before, again,
        collected.rounding, k, capacity, max_kept, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    true = torch.empty(size, max_kept + k, dtype=torch.float64, device=device)
    ids = torch.empty(size, max_kept + k, dtype=torch.int64, device=device)
    rescore_kept_kernel[(size, _parts(size, max_kept, PAIRS))](
        queries, corpus, scales, collected.norms, *collected.limits, kept, scores, rows, best, held,
        broken.view(torch.uint8), totals, true, ids, collected.rounding, corpus.shape[1], k, max_kept, first_id,
        PROVEN=proven, PAIRS=PAIRS, BLOCK_K=DEPTH, RIVALS=RIVALS, num_warps=4,
    )  # fmt: skip
    rank_kernel[(size, _parts(size, max_kept + k, RIVALS))](
        totals, true, ids, best, held, before, cutoffs, k, max_kept + k, RIVALS=RIVALS, num_warps=4
    )
    return again


def _parts(size: int, places: int, each: int) -> int:
    """Return the number of programs for a query: 1 for many queries, else up to one per block of places."""
    return max(1, min(triton.cdiv(places, each), TARGET_PROGRAMS // size))
