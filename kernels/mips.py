"""Inner-product search: the scan, whose scores are compared with thresholds and never kept.

Few queries are multiplied in registers, by a tile of 128 rows and 16 queries. Corpus rows are the left factor, so one
query has a tensor core's 16 columns. Many queries have chunks of scores by `mips_chunks`, which the same kernels read.
`lower_bounds` keeps the highest proven lower bound of a true score in every bin of 64 rows. `collect` keeps each row
whose upper bound reaches a query's threshold. `mips_prologue` has the steps before the scan, and `mips_epilogue` and
`mips_rescore` those after it.

Cost: few queries read the rows once, 0.5 ms for 1M x 1024 in bfloat16 at 4.3 TB/s. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.mips_chunks import chunked, chunks
from jasper_fast.kernels.mips_tile import BIN, Tile, allowed, errors, tile_scores

INTERPRETED = triton.knobs.runtime.interpret
# Rows, queries, depth of a step. Scores of a chunk have no depth.
TILES = {4: Tile(128, 16, 64, 4, 3), 2: Tile(128, 16, 128, 4, 3), 1: Tile(128, 16, 128, 4, 4)}  # by bytes of an element
CHUNK_TILE = Tile(64, 128, 16, 8, 1)


@triton.jit
def lower_bounds_kernel(
    CORPUS,  # (N, D), a descriptor if DESCRIPTORS; or int16 scores of rows first.. (N - first, Q)
    QUERIES,  # (Q, D), likewise; or None for scores
    ROW_SCALES,  # (N,) fp32 of int8 codes, or None
    QUERY_SCALES,  # (Q,) fp32 of int8 codes, or None
    VALID,  # (N,) or (Q, N) uint8, or None
    NORMS,  # (ceil(N / ROWS_PER_NORM),) fp32
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    OUT,  # (Q, bins) fp32
    first,
    N,
    Q,
    D,
    bins,
    stride_c,
    stride_q,
    stride_v,
    ROWS_PER_NORM: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the highest (score - error) of every bin of 64 rows, -inf for a bin without valid rows."""
    across, down = tl.cdiv(Q, BLOCK_N), tl.cdiv(N - first, BLOCK_M)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        m0, n0 = first + tile // across * BLOCK_M, tile % across * BLOCK_N
        score = tile_scores(
            CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, first, N, Q, D, stride_c, stride_q, DESCRIPTORS,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        score -= errors(
            score, NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q, ROWS_PER_NORM, QUERIES is None, BLOCK_M, BLOCK_N
        )
        # Not 0, which would exceed negative scores.
        score = tl.where(allowed(VALID, m0, n0, N, Q, stride_v, BLOCK_M, BLOCK_N), score, float("-inf"))
        best = tl.max(tl.reshape(score, (BLOCK_M // BIN, BIN, BLOCK_N)), axis=1)
        n, b = n0 + tl.arange(0, BLOCK_N), m0 // BIN + tl.arange(0, BLOCK_M // BIN)
        wanted = (n[None, :] < Q) & (b[:, None] < bins)
        tl.store(OUT + n[None, :].to(tl.int64) * bins + b[:, None], best, mask=wanted)


@triton.jit
def collect_kernel(
    CORPUS,  # (N, D), a descriptor if DESCRIPTORS; or int16 scores of rows first.. (N - first, Q)
    QUERIES,  # (Q, D), likewise; or None for scores
    ROW_SCALES,  # (N,) fp32 of int8 codes, or None
    QUERY_SCALES,  # (Q,) fp32 of int8 codes, or None
    VALID,  # (N,) or (Q, N) uint8, or None
    NORMS,  # (ceil(N / 64),) fp32
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    THRESHOLDS,  # (Q,) fp32
    COUNTS,  # (Q,) int32, zeros; number of such rows, which may exceed the capacity
    WANTED,  # int32, 0 if there is nothing to do; or None
    SCORES,  # (Q, capacity) fp32
    ROWS,  # (Q, capacity) int32
    first,
    N,
    Q,
    D,
    capacity,
    stride_c,
    stride_q,
    stride_v,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write every row whose (score + error) reaches the query's threshold, in no order, from an atomic counter on."""
    if WANTED is not None:
        Q = tl.where(tl.load(WANTED) > 0, Q, 0)
    across, down = tl.cdiv(Q, BLOCK_N), tl.cdiv(N - first, BLOCK_M)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        m0, n0 = first + tile // across * BLOCK_M, tile % across * BLOCK_N
        score = tile_scores(
            CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, first, N, Q, D, stride_c, stride_q, DESCRIPTORS,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        n = n0 + tl.arange(0, BLOCK_N)
        threshold = tl.load(THRESHOLDS + n, mask=n < Q, other=float("inf"))
        error = errors(score, NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q, BIN, QUERIES is None, BLOCK_M, BLOCK_N)
        reached = score + error >= threshold[None, :]
        reached &= allowed(VALID, m0, n0, N, Q, stride_v, BLOCK_M, BLOCK_N)
        # Over both axes at once, which Triton 3.6 can compile for sm_100.
        if tl.max(reached.to(tl.int32)) > 0:
            m = m0 + tl.arange(0, BLOCK_M)
            counters = tl.broadcast_to(COUNTS + n[None, :], (BLOCK_M, BLOCK_N))
            place = tl.atomic_add(counters, 1, mask=reached, sem="relaxed")
            written = reached & (place < capacity)
            place += n[None, :] * capacity
            tl.store(SCORES + place, score, mask=written)
            tl.store(ROWS + place, tl.broadcast_to(m[:, None], (BLOCK_M, BLOCK_N)), mask=written)


@dataclass(frozen=True)
class Scan:
    """Rows as a scan reads them, with queries for it and the errors of its scores.

    Args:
        rows: (N, D) float32, bfloat16, float16 or int8 rows, contiguous.
        queries: (Q, D) queries, contiguous: bfloat16 if they are `chunked`, else of the rows' dtype.
        scales: (N,) and (Q,) float32 scales of int8 rows and queries. None for other dtypes.
        mask: (N,) or (Q, N) bool mask, contiguous. None allows all rows.
        norms: float32 norms of rows or of bins of 64 rows.
        limits: errors relative to the norm and absolute errors, (Q,) float32 each, without those of rounded scores.
    """

    rows: Tensor
    queries: Tensor
    scales: tuple[Tensor | None, Tensor | None]
    mask: Tensor | None
    norms: Tensor
    limits: tuple[Tensor, Tensor]

    def launches(self, narrow: bool, descriptors: bool | None) -> Iterator[tuple[Any, ...]]:
        """Yield the launches of a scan: grid, first arguments, arguments on shapes by name, and options."""
        rows, queries, mask = self.rows, self.queries, self.mask
        common = (*self.scales, None if mask is None else mask.view(torch.uint8), self.norms, *self.limits)
        shape = {"Q": len(queries), "D": rows.shape[1], "stride_q": 0}
        shape["stride_v"] = mask.stride(0) if mask is not None and mask.dim() == 2 else 0
        constants = {"DESCRIPTORS": False, "PRECISION": "ieee" if INTERPRETED else "tf32x3"}
        if chunked(len(queries)) and not narrow:
            for first, scores in chunks(rows, queries):
                grid = triton.cdiv(len(scores), CHUNK_TILE.m) * triton.cdiv(len(queries), CHUNK_TILE.n)
                shape |= {"first": first, "N": first + len(scores), "stride_c": scores.stride(0)}
                bits = scores.view(torch.int16)
                yield (grid,), (bits, None, *common), shape, constants | CHUNK_TILE.launch
            return
        tile, corpus, factor = TILES[rows.element_size()], rows, queries
        if supports_descriptors(rows, queries) if descriptors is None else descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor

            constants["DESCRIPTORS"] = True
            corpus = TensorDescriptor.from_tensor(rows, [tile.m, tile.k])
            factor = TensorDescriptor.from_tensor(queries, [tile.n, tile.k])
        count = triton.cdiv(len(rows), tile.m) * triton.cdiv(len(queries), tile.n)
        shape |= {"first": 0, "N": len(rows), "stride_c": rows.stride(0), "stride_q": queries.stride(0)}
        yield (min(count, _programs(rows.device)),), (corpus, factor, *common), shape, constants | tile.launch


def supports_descriptors(rows: Tensor, queries: Tensor) -> bool:
    """Return True if tensor descriptors can read both: from Hopper on, with rows at multiples of 16 bytes."""
    aligned = all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (rows, queries))
    return aligned and (INTERPRETED or torch.cuda.get_device_capability(rows.device) >= (9, 0))


@lru_cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * 2


def lower_bounds(scan: Scan, rows_per_norm: int, descriptors: bool | None = None) -> Tensor:
    """Return the highest (score - error) in each bin of 64 rows, -inf for a bin without valid rows.

    Args:
        scan: rows and queries.
        rows_per_norm: number of rows for each norm, 1 or 64.
        descriptors: use tensor descriptors. None uses them if the hardware has them.

    Returns:
        (Q, ceil(N / 64)) float32.
    """
    bins = triton.cdiv(len(scan.rows), BIN.value)
    out = torch.empty(len(scan.queries), bins, dtype=torch.float32, device=scan.rows.device)
    for grid, operands, shape, options in scan.launches(False, descriptors):
        lower_bounds_kernel[grid](*operands, OUT=out, bins=bins, ROWS_PER_NORM=rows_per_norm, **shape, **options)
    return out


def collect(
    scan: Scan,
    thresholds: Tensor,
    counts: Tensor,
    capacity: int,
    descriptors: bool | None = None,
    wanted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Collect the rows with score + error >= threshold, unordered.

    Args:
        scan: rows with norms of bins, and queries.
        thresholds: (Q,) float32 thresholds.
        counts: (Q,) int32 zeros, set to the numbers of rows.
        capacity: maximum number of rows kept for a query. More are counted only. Q times capacity is below 2^31.
        descriptors: use tensor descriptors. None uses them if the hardware has them.
        wanted: int32 scalar, for a scan in registers that returns at once if it is 0. None scans in any case.

    Returns:
        scores (Q, capacity) float32 and row numbers (Q, capacity) int32.
    """
    size, device = len(scan.queries), scan.rows.device
    assert size * capacity < 2**31
    scores = torch.empty(size, capacity, dtype=torch.float32, device=device)
    numbers = torch.empty(size, capacity, dtype=torch.int32, device=device)
    results = {"THRESHOLDS": thresholds, "COUNTS": counts, "WANTED": wanted, "SCORES": scores, "ROWS": numbers}
    for grid, operands, shape, options in scan.launches(wanted is not None, descriptors):
        collect_kernel[grid](*operands, **results, capacity=capacity, **shape, **options)
    return scores, numbers
