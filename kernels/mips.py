"""Inner-product search: the scan, whose scores are compared with thresholds and never kept.

Few queries are multiplied in registers, by a tile of 128 rows and 16 queries. Corpus rows are the left factor, so one
query has a tensor core's 16 columns. Many queries have chunks of scores by `mips_chunks`, which the same kernel reads.
`lower_bounds` keeps the highest proven lower bound of a true score in every bin of 64 rows. `collect` keeps each row
whose upper bound reaches a query's threshold. `mips_prologue` has the steps before the scan, and `mips_epilogue` and
`mips_rescore` those after it.

Cost: few queries read the rows once, 0.5 ms for 1M x 1024 in bfloat16 at 4.3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.mips_chunks import chunked, chunks

BIN = tl.constexpr(64)  # as in jasper_fast.mips.segment
ROUNDING = 2.0**-8 * (1 + 2.0**-6)  # relative error of a bfloat16 score, which has 8 bits, with a margin
ROUNDED = tl.constexpr(ROUNDING)
INTERPRETED = triton.knobs.runtime.interpret

# Rows, queries and depth of a block's part of a product, by bytes of an element. Scores of a chunk have no depth.
TILE = {"BLOCK_M": 128, "BLOCK_N": 16, "num_warps": 4}
TILES = {
    4: {**TILE, "BLOCK_K": 64, "num_stages": 3},
    2: {**TILE, "BLOCK_K": 128, "num_stages": 3},
    1: {**TILE, "BLOCK_K": 128, "num_stages": 4},
}
CHUNK_TILE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1}
RESULTS = ("BOUNDS", "THRESHOLDS", "COUNTS", "WANTED", "SCORES", "ROWS")  # of a scan, None unless given


@triton.jit
def _products(
    CORPUS, QUERIES, m0, n0, N, Q, D, stride_c, stride_q, SUMS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return products of rows m0.. and queries n0.. (BLOCK_M, BLOCK_N) in the dtype of their sums."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUMS)
    if DESCRIPTORS:
        for start in range(0, D, BLOCK_K):
            c = CORPUS.load([m0, start])
            q = QUERIES.load([n0, start])
            acc = tl.dot(c, q.T, acc, input_precision=PRECISION, out_dtype=SUMS)
    else:
        # 64-bit scalars, 32-bit offsets inside a tile.
        left, right = CORPUS + m0.to(tl.int64) * stride_c, QUERIES + n0.to(tl.int64) * stride_q
        c_offsets = m[:, None] * stride_c + k[None, :]
        q_offsets = n[None, :] * stride_q + k[:, None]
        for start in range(0, D, BLOCK_K):
            inside = start + k < D
            c = tl.load(left + c_offsets, mask=(m[:, None] < N - m0) & inside[None, :], other=0)
            q = tl.load(right + q_offsets, mask=(n[None, :] < Q - n0) & inside[:, None], other=0)
            acc = tl.dot(c, q, acc, input_precision=PRECISION, out_dtype=SUMS)
            left += BLOCK_K
            right += BLOCK_K
    return acc


@triton.jit
def scan_kernel(
    CORPUS,  # (N, D), a descriptor if DESCRIPTORS; or int16, bits of bfloat16 scores of rows first.. (N - first, Q)
    QUERIES,  # (Q, D), likewise; or None for scores
    ROW_SCALES,  # (N,) fp32 of int8 codes, or None
    QUERY_SCALES,  # (Q,) fp32 of int8 codes, or None
    VALID,  # (N,) or (Q, N) uint8, or None
    NORMS,  # (ceil(N / ROWS_PER_NORM),) fp32
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    BOUNDS,  # (Q, width) fp32 results for bins; or None to collect
    THRESHOLDS,  # (Q,) fp32; this and all below None for bins
    COUNTS,  # (Q,) int32, zeros; number of rows collected, which may exceed the width
    WANTED,  # int32, 0 if there is nothing to do; or None
    SCORES,  # (Q, width) fp32
    ROWS,  # (Q, width) int32
    width,  # bins, or rows that a query can collect
    first,
    N,
    Q,
    D,
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
    """Write the highest (score - error) of every bin of 64 rows, -inf for a bin without valid rows.

    Or write each row whose (score + error) reaches the query's threshold, in no order, from an atomic counter on.
    """
    if WANTED is not None:
        Q = tl.where(tl.load(WANTED) > 0, Q, 0)
    across, down = tl.cdiv(Q, BLOCK_N), tl.cdiv(N - first, BLOCK_M)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        m0, n0 = first + tile // across * BLOCK_M, tile % across * BLOCK_N
        rows, queries = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)  # in the tile
        m, n = m0 + rows, n0 + queries
        inside = (m[:, None] < N) & (n[None, :] < Q)
        if QUERIES is None:
            scores = CORPUS + (m0 - first).to(tl.int64) * stride_c + n0
            bits = tl.load(scores + (rows[:, None] * stride_c + queries[None, :]), mask=inside, other=0)
            score = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            # Sums of integer codes are exact.
            score = _products(
                CORPUS, QUERIES, m0, n0, N, Q, D, stride_c, stride_q, tl.float32 if ROW_SCALES is None else tl.int32,
                DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            ).to(tl.float32)  # fmt: skip
        if ROW_SCALES is not None:
            score *= tl.load(ROW_SCALES + m, mask=m < N, other=0.0)[:, None]
        if QUERY_SCALES is not None:
            score *= tl.load(QUERY_SCALES + n, mask=n < Q, other=0.0)[None, :]
        norm = tl.load(NORMS + m // ROWS_PER_NORM, mask=m < N, other=0.0)
        relative = tl.load(RELATIVE + n, mask=n < Q, other=0.0)
        error = norm[:, None] * relative[None, :] + tl.load(ABSOLUTE + n, mask=n < Q, other=0.0)[None, :]
        if QUERIES is None:
            error += tl.abs(score) * ROUNDED
        found = inside
        if BOUNDS is None:  # before the mask is read, which leaves more registers for it
            found &= score + error >= tl.load(THRESHOLDS + n, mask=n < Q, other=float("inf"))[None, :]
        if VALID is not None:
            # A mask for all queries has stride 0.
            mask = VALID + n0.to(tl.int64) * stride_v + m0 + (queries[None, :] * stride_v + rows[:, None])
            found &= tl.load(mask, mask=inside, other=0) != 0
        if BOUNDS is not None:
            # Not 0, which would exceed negative scores.
            bound = tl.where(found, score - error, float("-inf"))
            best = tl.max(tl.reshape(bound, (BLOCK_M // BIN, BIN, BLOCK_N)), axis=1)
            b = m0 // BIN + tl.arange(0, BLOCK_M // BIN)
            to = BOUNDS + n[None, :].to(tl.int64) * width + b[:, None]
            tl.store(to, best, mask=(n[None, :] < Q) & (b[:, None] < width))
        else:
            # Over both axes at once, which Triton 3.6 can compile for sm_100.
            if tl.max(found.to(tl.int32)) > 0:
                counters = tl.broadcast_to(COUNTS + n[None, :], (BLOCK_M, BLOCK_N))
                place = tl.atomic_add(counters, 1, mask=found, sem="relaxed")
                written = found & (place < width)
                place += n[None, :] * width
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
        norms: float32 norms of rows (N,) or of bins of 64 rows.
        limits: errors relative to the norm and absolute errors, (Q,) float32 each, without those of rounded scores.
        descriptors: use tensor descriptors. None uses them if the hardware has them.
    """

    rows: Tensor
    queries: Tensor
    scales: tuple[Tensor | None, Tensor | None]
    mask: Tensor | None
    norms: Tensor
    limits: tuple[Tensor, Tensor]
    descriptors: bool | None = None

    def launch(self, narrow: bool, **results: Any) -> None:
        """Launch a scan, in registers if it is ``narrow`` or has few queries, with results by name."""
        rows, queries, mask = self.rows, self.queries, self.mask
        common = (*self.scales, None if mask is None else mask.view(torch.uint8), self.norms, *self.limits)
        options: dict[str, Any] = dict.fromkeys(RESULTS) | results
        options |= {"Q": len(queries), "D": rows.shape[1], "stride_q": 0, "DESCRIPTORS": False}
        options["stride_v"] = mask.stride(0) if mask is not None and mask.dim() == 2 else 0
        options["ROWS_PER_NORM"] = 1 if len(self.norms) == len(rows) else BIN.value
        options["PRECISION"] = "ieee" if INTERPRETED else "tf32x3"
        if chunked(len(queries)) and not narrow:
            for first, scores in chunks(rows, queries):
                options |= {"first": first, "N": first + len(scores), "stride_c": scores.stride(0)}
                programs = _tiles(len(scores), len(queries), CHUNK_TILE)
                scan_kernel[(programs,)](scores.view(torch.int16), None, *common, **options, **CHUNK_TILE)
            return
        tile, factors = TILES[rows.element_size()], (rows, queries)
        if supports_descriptors(rows, queries) if self.descriptors is None else self.descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor

            options["DESCRIPTORS"] = True
            boxes = ([tile[side], tile["BLOCK_K"]] for side in ("BLOCK_M", "BLOCK_N"))
            factors = tuple(map(TensorDescriptor.from_tensor, factors, boxes))
        options |= {"first": 0, "N": len(rows), "stride_c": rows.stride(0), "stride_q": queries.stride(0)}
        programs = min(_tiles(len(rows), len(queries), tile), _programs(rows.device))
        scan_kernel[(programs,)](*factors, *common, **options, **tile)


def _tiles(rows: int, queries: int, tile: dict[str, int]) -> int:
    return triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(queries, tile["BLOCK_N"])


def supports_descriptors(rows: Tensor, queries: Tensor) -> bool:
    """Return True if tensor descriptors can read both: from Hopper on, with rows at multiples of 16 bytes."""
    aligned = all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (rows, queries))
    return aligned and (INTERPRETED or torch.cuda.get_device_capability(rows.device) >= (9, 0))


@lru_cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * 2


def lower_bounds(scan: Scan) -> Tensor:
    """Return the highest (score - error) in each bin of 64 rows, -inf without valid rows: (Q, ceil(N / 64)) float32."""
    bins = triton.cdiv(len(scan.rows), BIN.value)
    out = torch.empty(len(scan.queries), bins, dtype=torch.float32, device=scan.rows.device)
    scan.launch(False, BOUNDS=out, width=bins)
    return out


def collect(
    scan: Scan, thresholds: Tensor, counts: Tensor, capacity: int, wanted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Collect the rows with score + error >= threshold, unordered.

    Args:
        scan: rows with norms of bins, and queries.
        thresholds: (Q,) float32 thresholds.
        counts: (Q,) int32 zeros, set to the numbers of rows.
        capacity: maximum number of rows kept for a query. More are counted only. Q times capacity is below 2^31.
        wanted: int32 scalar, for a scan in registers that returns at once if it is 0. None scans in any case.

    Returns:
        scores (Q, capacity) float32 and row numbers (Q, capacity) int32.
    """
    size, device = len(scan.queries), scan.rows.device
    assert size * capacity < 2**31
    scores = torch.empty(size, capacity, dtype=torch.float32, device=device)
    rows = torch.empty(size, capacity, dtype=torch.int32, device=device)
    results = {"THRESHOLDS": thresholds, "COUNTS": counts, "WANTED": wanted, "SCORES": scores, "ROWS": rows}
    scan.launch(wanted is not None, width=capacity, **results)
    return scores, rows
