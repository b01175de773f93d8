"""Inner-product search: the scan, one matrix product whose scores are filtered in registers and never written.

Corpus rows are the left factor and queries the right one. So one schedule serves a single query (16 columns of a tensor
core, bandwidth-bound) and thousands. The programs are persistent, one or two on each multiprocessor. They take tiles in
an order in which a few corpus tiles meet all queries while they are in the L2 cache.

`lower_bounds` keeps the highest proven lower bound of a true score in every bin of 64 rows. `collect` keeps each row
whose upper bound reaches a query's threshold. `jasper_fast.mips.cuda` calls both. `mips_prologue` has the steps before
the scan, and `mips_epilogue` and `mips_rescore` those after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.configs import Tile
from jasper_fast.kernels.mips_tile import allowed, errors, tile_origin, tile_scores
from jasper_fast.kernels.registry import TYPES, Form, unaligned, with_ones

BIN = tl.constexpr(64)  # as in jasper_fast.mips.segment
GROUP = 16  # corpus tiles that meet all queries together
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def lower_bounds_kernel(
    CORPUS,  # (N, D), a descriptor if DESCRIPTORS
    QUERIES,  # (Q, D), likewise
    ROW_SCALES,  # (N,) fp32 of int8 codes, or None
    QUERY_SCALES,  # (Q,) fp32 of int8 codes, or None
    VALID,  # (N,) or (Q, N) uint8, or None
    NORMS,  # (ceil(N / ROWS_PER_NORM),) fp32
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    OUT,  # (Q, bins) fp32
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
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the highest (score - error) of every bin of 64 rows, -inf for a bin without valid rows."""
    across, down = tl.cdiv(Q, BLOCK_N), tl.cdiv(N, BLOCK_M)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        m0, n0 = tile_origin(tile, across, down, GROUP, BLOCK_M, BLOCK_N)
        score = tile_scores(
            CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, N, Q, D, stride_c, stride_q, DESCRIPTORS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        score -= errors(NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q, ROWS_PER_NORM, BLOCK_M, BLOCK_N)
        # Not 0, which would exceed negative scores.
        score = tl.where(allowed(VALID, m0, n0, N, Q, stride_v, BLOCK_M, BLOCK_N), score, float("-inf"))
        best = tl.max(tl.reshape(score, (BLOCK_M // BIN, BIN, BLOCK_N)), axis=1)
        n, b = n0 + tl.arange(0, BLOCK_N), m0 // BIN + tl.arange(0, BLOCK_M // BIN)
        wanted = (n[None, :] < Q) & (b[:, None] < bins)
        tl.store(OUT + n[None, :].to(tl.int64) * bins + b[:, None], best, mask=wanted)


@triton.jit
def store_hits(score, m0, n0, common, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write the rows of a tile that reach their thresholds, at places taken from an atomic counter."""
    VALID, NORMS, RELATIVE, ABSOLUTE, THRESHOLDS, COUNTS, SCORES, ROWS, N, Q, capacity, stride_v = common
    n = n0 + tl.arange(0, BLOCK_N)
    threshold = tl.load(THRESHOLDS + n, mask=n < Q, other=float("inf"))
    reached = score + errors(NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q, BIN, BLOCK_M, BLOCK_N) >= threshold[None, :]
    reached &= allowed(VALID, m0, n0, N, Q, stride_v, BLOCK_M, BLOCK_N)
    # Over both axes at once, which Triton 3.6 can compile for sm_100. Most tiles have few such rows or none.
    if tl.max(reached.to(tl.int32)) > 0:
        m = m0 + tl.arange(0, BLOCK_M)
        counters = tl.broadcast_to(COUNTS + n[None, :], (BLOCK_M, BLOCK_N))
        place = tl.atomic_add(counters, 1, mask=reached, sem="relaxed")
        written = reached & (place < capacity)
        place += n[None, :] * capacity
        tl.store(SCORES + place, score, mask=written)
        tl.store(ROWS + place, tl.broadcast_to(m[:, None], (BLOCK_M, BLOCK_N)), mask=written)


@triton.jit
def collect_kernel(
    CORPUS,  # (N, D), a descriptor if DESCRIPTORS
    QUERIES,  # (Q, D), likewise
    ROW_SCALES,  # (N,) fp32 of int8 codes, or None
    QUERY_SCALES,  # (Q,) fp32 of int8 codes, or None
    VALID,  # (N,) or (Q, N) uint8, or None
    NORMS,  # (ceil(N / 64),) fp32
    RELATIVE,  # (Q,) fp32
    ABSOLUTE,  # (Q,) fp32
    THRESHOLDS,  # (Q,) fp32
    COUNTS,  # (Q,) int32, zeros; number of such rows, which may exceed the capacity
    SCORES,  # (Q, capacity) fp32
    ROWS,  # (Q, capacity) int32
    N,
    Q,
    D,
    capacity,
    stride_c,
    stride_q,
    stride_v,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write every row whose (score + error) reaches the query's threshold, in no order."""
    across, down = tl.cdiv(Q, BLOCK_N), tl.cdiv(N, BLOCK_M)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        m0, n0 = tile_origin(tile, across, down, GROUP, BLOCK_M, BLOCK_N)
        score = tile_scores(
            CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, N, Q, D, stride_c, stride_q, DESCRIPTORS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        common = (VALID, NORMS, RELATIVE, ABSOLUTE, THRESHOLDS, COUNTS, SCORES, ROWS, N, Q, capacity, stride_v)
        if BLOCK_N > 64:
            # Halves in turn, because places and addresses of a whole tile would not fit the registers.
            halves = tl.permute(tl.reshape(score, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            store_hits(left, m0, n0, common, BLOCK_M, BLOCK_N // 2)
            store_hits(right, m0, n0 + BLOCK_N // 2, common, BLOCK_M, BLOCK_N // 2)
        else:
            store_hits(score, m0, n0, common, BLOCK_M, BLOCK_N)


# Rows, queries, depth of a step. The first is for thousands of queries, the last for up to 16.
TILES_16_BIT = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 16, 128, 4, 3))
TILES_8_BIT = (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 8, 3), Tile(128, 16, 128, 4, 4))
TILES_32_BIT = (Tile(128, 64, 32, 8, 3), Tile(128, 16, 64, 4, 3))


def tiles(dtype: torch.dtype, masked: bool) -> tuple[Tile, ...]:
    """Return the tiles for corpus rows of a dtype. A mask of the widest would not fit the registers."""
    candidates = {4: TILES_32_BIT, 2: TILES_16_BIT, 1: TILES_8_BIT}[dtype.itemsize]
    return tuple(tile for tile in candidates if tile.n <= 64) if masked else candidates


def choose(dtype: torch.dtype, size: int, masked: bool) -> Tile:
    """Return the narrowest tile that holds all queries, else the widest."""
    candidates = tiles(dtype, masked)
    return next((tile for tile in reversed(candidates) if size <= tile.n), candidates[0])


def supports_descriptors(rows: Tensor, queries: Tensor) -> bool:
    """Return True if tensor descriptors can read both: from Hopper on, with rows at multiples of 16 bytes."""
    aligned = all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (rows, queries))
    return aligned and (INTERPRETED or torch.cuda.get_device_capability(rows.device) >= (9, 0))


def _launch(kernel: Any, rows: Tensor, queries: Tensor, tile: Tile, descriptors: bool | None) -> tuple[Any, ...]:
    if descriptors is None:
        descriptors = supports_descriptors(rows, queries)
    corpus: Any = rows
    factor: Any = queries
    if descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        corpus = TensorDescriptor.from_tensor(rows, [tile.m, tile.k])
        factor = TensorDescriptor.from_tensor(queries, [tile.n, tile.k])
    count = triton.cdiv(len(rows), tile.m) * triton.cdiv(len(queries), tile.n)
    grid = (min(count, _programs(rows.device, tile)),)
    constants = {"DESCRIPTORS": descriptors, "PRECISION": "ieee" if INTERPRETED else "tf32x3", "GROUP": GROUP}
    return kernel[grid], corpus, factor, {**constants, **tile.launch}


@lru_cache
def _programs(device: torch.device, tile: Tile) -> int:
    if device.type != "cuda":
        return 3
    # Narrow tiles wait for memory, which more of them at a time hide.
    return torch.cuda.get_device_properties(device).multi_processor_count * (1 if tile.n > 64 else 2)


def lower_bounds(
    rows: Tensor,
    queries: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    valid: Tensor | None,
    norms: Tensor,
    limits: tuple[Tensor, Tensor],
    rows_per_norm: int,
    descriptors: bool | None = None,
) -> Tensor:
    """Return the highest (score - error) in each bin of 64 rows, -inf for a bin without valid rows.

    Args:
        rows: (N, D) float32, bfloat16, float16 or int8 rows, contiguous.
        queries: (Q, D) queries of the same dtype, contiguous.
        scales: (N,) and (Q,) float32 scales of int8 rows and queries. None for other dtypes.
        valid: (N,) or (Q, N) bool mask, contiguous. None allows all rows.
        norms: (ceil(N / rows_per_norm),) float32 norms.
        limits: errors relative to the norm and absolute errors, (Q,) float32 each.
        rows_per_norm: number of rows for each norm, 1 or 64.
        descriptors: use tensor descriptors. None uses them if the hardware has them.

    Returns:
        (Q, ceil(N / 64)) float32.
    """
    tile = choose(rows.dtype, len(queries), valid is not None)
    bins = triton.cdiv(len(rows), BIN.value)
    out = torch.empty(len(queries), bins, dtype=torch.float32, device=rows.device)
    run, corpus, factor, options = _launch(lower_bounds_kernel, rows, queries, tile, descriptors)
    mask = None if valid is None else valid.view(torch.uint8)
    run(
        corpus, factor, *scales, mask, norms, *limits, out, *rows.shape[:1], len(queries), rows.shape[1], bins,
        rows.stride(0), queries.stride(0), _mask_stride(valid), ROWS_PER_NORM=rows_per_norm, **options,
    )  # fmt: skip
    return out


def collect(
    rows: Tensor,
    queries: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    valid: Tensor | None,
    norms: Tensor,
    limits: tuple[Tensor, Tensor],
    thresholds: Tensor,
    counts: Tensor,
    capacity: int,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Collect the rows with score + error >= threshold, unordered.

    Args:
        rows: (N, D) float32, bfloat16, float16 or int8 rows, contiguous.
        queries: (Q, D) queries of the same dtype, contiguous.
        scales: (N,) and (Q,) float32 scales of int8 rows and queries. None for other dtypes.
        valid: (N,) or (Q, N) bool mask, contiguous. None allows all rows.
        norms: (ceil(N / 64),) float32 norms.
        limits: errors relative to the norm and absolute errors, (Q,) float32 each.
        thresholds: (Q,) float32 thresholds.
        counts: (Q,) int32 zeros, set to the numbers of rows.
        capacity: maximum number of rows kept for a query. More are counted only. Q times capacity is below 2^31.
        descriptors: use tensor descriptors. None uses them if the hardware has them.

    Returns:
        scores (Q, capacity) float32 and row numbers (Q, capacity) int32.
    """
    size = len(queries)
    assert size * capacity < 2**31
    scores = torch.empty(size, capacity, dtype=torch.float32, device=rows.device)
    numbers = torch.empty(size, capacity, dtype=torch.int32, device=rows.device)
    tile = choose(rows.dtype, size, valid is not None)
    run, corpus, factor, options = _launch(collect_kernel, rows, queries, tile, descriptors)
    mask = None if valid is None else valid.view(torch.uint8)
    run(
        corpus, factor, *scales, mask, norms, *limits, thresholds, counts, scores, numbers, len(rows), size,
        rows.shape[1], capacity, rows.stride(0), queries.stride(0), _mask_stride(valid), **options,
    )  # fmt: skip
    return scores, numbers


def _mask_stride(valid: Tensor | None) -> int:
    return valid.stride(0) if valid is not None and valid.dim() == 2 else 0


def forms() -> Iterator[Form]:
    """Yield the forms of this module's kernels. See `registry`."""
    kinds = {**TYPES, "int8": "i8"}
    for (name, kind), masked, descriptors in itertools.product(kinds.items(), ("", " masked"), (True, False)):
        for tile in tiles(getattr(torch, name), bool(masked)):
            types = {"CORPUS": f"*{kind}:16", "QUERIES": f"*{kind}:16"}
            if descriptors:
                types = {
                    "CORPUS": f"tensordesc<{kind}[{tile.m}, {tile.k}]>",
                    "QUERIES": f"tensordesc<{kind}[{tile.n}, {tile.k}]>",
                }
            types |= dict.fromkeys(("NORMS", "RELATIVE", "ABSOLUTE"), "*fp32:16")
            types |= {"N": "i32", "Q": "i32", **dict.fromkeys(("D", "stride_c", "stride_q"), "i32:16")}
            constants: dict[str, Any] = {"DESCRIPTORS": descriptors, "PRECISION": "tf32x3", "GROUP": GROUP}
            constants |= tile.constants
            if kind == "i8":
                types |= {"ROW_SCALES": "*fp32:16", "QUERY_SCALES": "*fp32:16"}
            else:
                constants |= {"ROW_SCALES": None, "QUERY_SCALES": None}
            if masked:
                types |= {"VALID": "*u8:16", "stride_v": "i32"}
            else:
                constants["VALID"] = None
                types["stride_v"] = "i32:16"  # 0
            label = f"{kind}{masked} {'descriptors' if descriptors else 'pointers'}, {tile}"
            rest: dict[str, Any] = {"warps": tile.warps, "stages": tile.stages}
            # The forms that make test compiles: the tiles for most queries and for one.
            rest["quick"] = not masked and (kind, descriptors, tile.n) in (
                ("bf16", True, 128), ("bf16", False, 128), ("bf16", True, 16), ("i8", True, 128)
            )  # fmt: skip
            rest["architectures"] = (90, 100) if descriptors else (80, 90, 100)
            # Pointers keep an address for every element. With descriptors, only odd widths need them.
            rest["stack"] = {90: 48 if masked and kind == "i8" else 0} if descriptors else {80: 384, 90: 384, 100: 192}
            # On sm_100 Triton multiplies integers with the older instruction.
            rest["tensor_cores"] = (80, 90) if kind == "i8" else True
            collecting = Form(
                label,
                collect_kernel,
                types
                | {"THRESHOLDS": "*fp32:16", "COUNTS": "*i32:16", "SCORES": "*fp32:16", "ROWS": "*i32:16"}
                | {"capacity": "i32:16"},
                constants,
                **rest,
            )
            yield collecting
            for rows_per_norm in (1, BIN.value):
                bounding = Form(
                    f"{label}, norm of {rows_per_norm}",
                    lower_bounds_kernel,
                    types | {"OUT": "*fp32:16", "bins": "i32"},
                    {**constants, "ROWS_PER_NORM": rows_per_norm},
                    **{
                        **rest,
                        "quick": rest["quick"]
                        and descriptors
                        and rows_per_norm == 1
                        and (kind, tile.n) == ("bf16", 128),
                    },
                )
                yield bounding
            if masked:
                continue  # A mask changes the end of a kernel only. The forms below vary its beginning.
            # With descriptors, pointers are for such widths.
            yield from (unaligned(collecting, "stride_v"), unaligned(bounding, "stride_v"))
            if tile.n == 16:
                yield from (with_ones(collecting, "Q"), with_ones(bounding, "Q"), with_ones(bounding, "Q", "bins"))
                if not descriptors:
                    width = ("D", "stride_c", "stride_q")
                    yield from (with_ones(collecting, *width), with_ones(bounding, *width))
