"""Inner-product search: one matrix product whose scores are judged where they are made, and never written.

Corpus rows are the left factor and queries the right one, so that one schedule serves a single query (16 columns of a
tensor core, bandwidth-bound) and thousands. Programs stay, one or two on each multiprocessor, and go from tile to tile
in an order in which a few corpus tiles meet all queries while they are in the L2 cache.

`lower_bounds` keeps, of every bin of 64 rows, the highest proven lower bound of a true score; `collect` keeps each row
whose upper bound reaches a query's threshold; `rescore` gives fp64 products of pairs. See `jasper_fast.mips.device`;
what comes before and after is in `mips_start` and `mips_finish`.
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
from jasper_fast.kernels.registry import TYPES, Form, odd, with_ones

BIN = tl.constexpr(64)  # as in jasper_fast.mips.pieces
GROUP = 16  # corpus tiles that meet all queries together
PAIRS, DEPTH = 8, 128  # products at once, elements of each
LEVELS = tl.constexpr(7)  # DEPTH is 2 to this power
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def tile_origin(tile, across, down, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First corpus row and first query of a tile: ``GROUP`` corpus tiles, then the next queries."""
    group = tile // (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    inside = tile % (GROUP * across)
    return (group * GROUP + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def tile_scores(
    CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, N, Q, D, stride_c, stride_q,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores of rows m0.. and queries n0.. (BLOCK_M, BLOCK_N) fp32; sums of integer codes are exact before scaling."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if ROW_SCALES is None else tl.int32)
    if DESCRIPTORS:
        for start in range(0, D, BLOCK_K):
            c = CORPUS.load([m0, start])
            q = QUERIES.load([n0, start])
            acc = tl.dot(c, q.T, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    else:
        # 64-bit scalars, 32-bit offsets inside a tile.
        left, right = CORPUS + m0.to(tl.int64) * stride_c, QUERIES + n0.to(tl.int64) * stride_q
        c_offsets = m[:, None] * stride_c + k[None, :]
        q_offsets = n[None, :] * stride_q + k[:, None]
        for start in range(0, D, BLOCK_K):
            inside = start + k < D
            c = tl.load(left + c_offsets, mask=(m[:, None] < N - m0) & inside[None, :], other=0)
            q = tl.load(right + q_offsets, mask=(n[None, :] < Q - n0) & inside[:, None], other=0)
            acc = tl.dot(c, q, acc, input_precision=PRECISION, out_dtype=acc.dtype)
            left += BLOCK_K
            right += BLOCK_K
    if ROW_SCALES is not None:
        row = tl.load(ROW_SCALES + m0 + m, mask=m < N - m0, other=0.0)
        query = tl.load(QUERY_SCALES + n0 + n, mask=n < Q - n0, other=0.0)
        return acc.to(tl.float32) * row[:, None] * query[None, :]
    else:
        return acc


@triton.jit
def allowed(VALID, m0, n0, N, Q, stride_v, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which places of a tile are rows and queries that exist and may be returned. (BLOCK_M, BLOCK_N)"""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (m0 + m[:, None] < N) & (n0 + n[None, :] < Q)
    if VALID is not None:
        # One mask for all queries has the stride 0.
        first = VALID + n0.to(tl.int64) * stride_v + m0
        inside &= tl.load(first + (n[None, :] * stride_v + m[:, None]), mask=inside, other=0) != 0
    return inside


@triton.jit
def errors(NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How far a tile's scores may be from the true ones; ``SHARE`` rows have one norm. (BLOCK_M, BLOCK_N)"""
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    norm = tl.load(NORMS + m // SHARE, mask=m < N, other=0.0)
    relative = tl.load(RELATIVE + n, mask=n < Q, other=0.0)
    absolute = tl.load(ABSOLUTE + n, mask=n < Q, other=0.0)
    return norm[:, None] * relative[None, :] + absolute[None, :]


@triton.jit
def lower_bounds_kernel(
    CORPUS,  # (N, D), a descriptor if DESCRIPTORS
    QUERIES,  # (Q, D), likewise
    ROW_SCALES,  # (N,) fp32 of int8 codes, or None
    QUERY_SCALES,  # (Q,) fp32 of int8 codes, or None
    VALID,  # (N,) or (Q, N) uint8, or None
    NORMS,  # (ceil(N / SHARE),) fp32
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
    SHARE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The highest (score - error) of every bin of 64 rows; -inf where none may be returned."""
    across, down = tl.cdiv(Q, BLOCK_N), tl.cdiv(N, BLOCK_M)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        m0, n0 = tile_origin(tile, across, down, GROUP, BLOCK_M, BLOCK_N)
        score = tile_scores(
            CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, N, Q, D, stride_c, stride_q, DESCRIPTORS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        score -= errors(NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q, SHARE, BLOCK_M, BLOCK_N)
        # Not 0, which would beat negative scores.
        score = tl.where(allowed(VALID, m0, n0, N, Q, stride_v, BLOCK_M, BLOCK_N), score, float("-inf"))
        best = tl.max(tl.reshape(score, (BLOCK_M // BIN, BIN, BLOCK_N)), axis=1)
        n, b = n0 + tl.arange(0, BLOCK_N), m0 // BIN + tl.arange(0, BLOCK_M // BIN)
        wanted = (n[None, :] < Q) & (b[:, None] < bins)
        tl.store(OUT + n[None, :].to(tl.int64) * bins + b[:, None], best, mask=wanted)


@triton.jit
def keep(score, m0, n0, common, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes the rows of a tile that reach their thresholds, at places that they draw one by one."""
    VALID, NORMS, RELATIVE, ABSOLUTE, THRESHOLDS, COUNTS, SCORES, ROWS, N, Q, capacity, stride_v = common
    n = n0 + tl.arange(0, BLOCK_N)
    threshold = tl.load(THRESHOLDS + n, mask=n < Q, other=float("inf"))
    found = score + errors(NORMS, RELATIVE, ABSOLUTE, m0, n0, N, Q, BIN, BLOCK_M, BLOCK_N) >= threshold[None, :]
    found &= allowed(VALID, m0, n0, N, Q, stride_v, BLOCK_M, BLOCK_N)
    # Over both axes at once, which Triton 3.6 can compile for sm_100. Most tiles hold nothing or next to nothing.
    if tl.max(found.to(tl.int32)) > 0:
        m = m0 + tl.arange(0, BLOCK_M)
        counters = tl.broadcast_to(COUNTS + n[None, :], (BLOCK_M, BLOCK_N))
        place = tl.atomic_add(counters, 1, mask=found, sem="relaxed")
        kept = found & (place < capacity)
        place += n[None, :] * capacity
        tl.store(SCORES + place, score, mask=kept)
        tl.store(ROWS + place, tl.broadcast_to(m[:, None], (BLOCK_M, BLOCK_N)), mask=kept)


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
    COUNTS,  # (Q,) int32, zeros; how many there were, which may be more than there was room for
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
    """Every row whose (score + error) reaches the query's threshold, in no order."""
    across, down = tl.cdiv(Q, BLOCK_N), tl.cdiv(N, BLOCK_M)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        m0, n0 = tile_origin(tile, across, down, GROUP, BLOCK_M, BLOCK_N)
        score = tile_scores(
            CORPUS, QUERIES, ROW_SCALES, QUERY_SCALES, m0, n0, N, Q, D, stride_c, stride_q, DESCRIPTORS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        common = (VALID, NORMS, RELATIVE, ABSOLUTE, THRESHOLDS, COUNTS, SCORES, ROWS, N, Q, capacity, stride_v)
        if BLOCK_N > 64:
            # One half after the other: places and addresses of a whole tile would not fit the registers.
            halves = tl.permute(tl.reshape(score, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            keep(left, m0, n0, common, BLOCK_M, BLOCK_N // 2)
            keep(right, m0, n0 + BLOCK_N // 2, common, BLOCK_M, BLOCK_N // 2)
        else:
            keep(score, m0, n0, common, BLOCK_M, BLOCK_N)


@triton.jit
def exact_products(
    QUERIES,  # pointers to queries of D fp64, (PAIRS, 1), or (1, 1) to one for all
    CORPUS,  # (N, D)
    ROW_SCALES,  # (N,) fp32, or None
    row,
    inside,
    D,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp64 products with rows (PAIRS,) int64. The order of a sum depends on D alone, in any kernel: equal rows tie.

    Columns first add up what lies BLOCK_K apart, then fold pair by pair: a sum over an axis would add in an order that
    follows from how the compiler spreads it over threads.
    """
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((PAIRS, BLOCK_K), tl.float64)
    for start in range(0, D, BLOCK_K):
        there = start + k[None, :] < D
        c = tl.load(CORPUS + row[:, None] * D + (start + k)[None, :], mask=inside[:, None] & there, other=0)
        q = tl.load(QUERIES + (start + k)[None, :], mask=there, other=0.0)
        if CORPUS.dtype.element_ty == tl.int8:
            c = c.to(tl.float32)
        acc = tl.fma(c.to(tl.float64), tl.broadcast_to(q, (PAIRS, BLOCK_K)), acc)
    for level in tl.static_range(LEVELS):
        even, uneven = tl.split(tl.reshape(acc, (PAIRS, BLOCK_K >> (level + 1), 2)))
        acc = even + uneven
    total = tl.reshape(acc, (PAIRS,))
    if ROW_SCALES is not None:
        total *= tl.load(ROW_SCALES + row, mask=inside, other=0.0).to(tl.float64)
    return total


@triton.jit
def rescore_kernel(
    QUERIES,  # (Q, D) fp64
    CORPUS,  # (N, D)
    ROW_SCALES,  # (N,) fp32, or None
    QUERY,  # (P,) int64
    ROW,  # (P,) int64, -1: none
    OUT,  # (P,) fp64
    P,
    D,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp64 products of pairs, -inf where there is none."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    query = tl.load(QUERY + pair, mask=pair < P, other=0)
    row = tl.load(ROW + pair, mask=pair < P, other=-1)
    total = exact_products(QUERIES + query[:, None] * D, CORPUS, ROW_SCALES, row, row >= 0, D, PAIRS, BLOCK_K)
    tl.store(OUT + pair, tl.where(row >= 0, total, float("-inf")), mask=pair < P)


# Rows, queries, depth of a step. The first is for queries in thousands, the last for those one tensor core takes.
TILES_16_BIT = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 16, 128, 4, 3))
TILES_8_BIT = (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 8, 3), Tile(128, 16, 128, 4, 4))
TILES_32_BIT = (Tile(128, 64, 32, 8, 3), Tile(128, 16, 64, 4, 3))


def tiles(dtype: torch.dtype, masked: bool) -> tuple[Tile, ...]:
    """The tiles for corpus rows of a dtype; the mask of the widest would not fit the registers."""
    found = {4: TILES_32_BIT, 2: TILES_16_BIT, 1: TILES_8_BIT}[dtype.itemsize]
    return tuple(tile for tile in found if tile.n <= 64) if masked else found


def choose(dtype: torch.dtype, size: int, masked: bool) -> Tile:
    """The narrowest tile that holds all queries, else the widest."""
    candidates = tiles(dtype, masked)
    return next((tile for tile in reversed(candidates) if size <= tile.n), candidates[0])


def described(rows: Tensor, queries: Tensor) -> bool:
    """Whether tensor descriptors can read both: Hopper and later, rows that begin at multiples of 16 bytes."""
    aligned = all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (rows, queries))
    return aligned and (INTERPRETED or torch.cuda.get_device_capability(rows.device) >= (9, 0))


def _launch(kernel: Any, rows: Tensor, queries: Tensor, tile: Tile, descriptors: bool | None) -> tuple[Any, ...]:
    if descriptors is None:
        descriptors = described(rows, queries)
    corpus: Any = rows
    asked: Any = queries
    if descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        corpus = TensorDescriptor.from_tensor(rows, [tile.m, tile.k])
        asked = TensorDescriptor.from_tensor(queries, [tile.n, tile.k])
    count = triton.cdiv(len(rows), tile.m) * triton.cdiv(len(queries), tile.n)
    grid = (min(count, _programs(rows.device, tile)),)
    constants = {"DESCRIPTORS": descriptors, "PRECISION": "ieee" if INTERPRETED else "tf32x3", "GROUP": GROUP}
    return kernel[grid], corpus, asked, {**constants, **tile.launch}


@lru_cache
def _programs(device: torch.device, tile: Tile) -> int:
    if device.type != "cuda":
        return 3
    # Narrow tiles wait for memory, and more of them at a time hide it.
    return torch.cuda.get_device_properties(device).multi_processor_count * (1 if tile.n > 64 else 2)


def lower_bounds(
    rows: Tensor,
    queries: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    valid: Tensor | None,
    norms: Tensor,
    limits: tuple[Tensor, Tensor],
    share: int,
    descriptors: bool | None = None,
) -> Tensor:
    """(Q, ceil(N / 64)) float32: the highest of (score - error) in each bin of 64 rows, -inf where no row is valid.

    Args:
        rows: (N, D) contiguous: float32, bfloat16, float16 or int8.
        queries: (Q, D) contiguous, of the same dtype.
        scales: of rows (N,) and queries (Q,), float32, for int8.
        valid: (N,) or (Q, N) bool, contiguous, or None.
        norms: (ceil(N / share),) float32.
        limits: error relative to the norm, and absolute; (Q,) float32 each.
        share: rows for each norm, 1 or 64.
        descriptors: whether to use tensor descriptors; by default where the hardware has them.
    """
    tile = choose(rows.dtype, len(queries), valid is not None)
    bins = triton.cdiv(len(rows), BIN.value)
    out = torch.empty(len(queries), bins, dtype=torch.float32, device=rows.device)
    run, corpus, asked, options = _launch(lower_bounds_kernel, rows, queries, tile, descriptors)
    mask = None if valid is None else valid.view(torch.uint8)
    run(
        corpus, asked, *scales, mask, norms, *limits, out, *rows.shape[:1], len(queries), rows.shape[1], bins,
        rows.stride(0), queries.stride(0), _mask_stride(valid), SHARE=share, **options,
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
    """Scores and numbers of rows with score + error >= threshold, (Q, capacity) each, unordered.

    Args:
        thresholds: (Q,) float32.
        counts: (Q,) int32, zeros, in which the rows are counted.
        capacity: room for each query; beyond it rows are counted and not kept. Q times capacity is below 2^31.

    The others are those of `lower_bounds`, with one norm for each 64 rows.
    """
    size = len(queries)
    assert size * capacity < 2**31
    scores = torch.empty(size, capacity, dtype=torch.float32, device=rows.device)
    numbers = torch.empty(size, capacity, dtype=torch.int32, device=rows.device)
    tile = choose(rows.dtype, size, valid is not None)
    run, corpus, asked, options = _launch(collect_kernel, rows, queries, tile, descriptors)
    mask = None if valid is None else valid.view(torch.uint8)
    run(
        corpus, asked, *scales, mask, norms, *limits, thresholds, counts, scores, numbers, len(rows), size,
        rows.shape[1], capacity, rows.stride(0), queries.stride(0), _mask_stride(valid), **options,
    )  # fmt: skip
    return scores, numbers


def rescore(queries: Tensor, rows: Tensor, scales: Tensor | None, query: Tensor, row: Tensor) -> Tensor:
    """float64 products of pairs, (P,).

    Args:
        queries: (Q, D) float64, contiguous.
        rows: (N, D) contiguous.
        scales: (N,) float32 for int8 rows.
        query: (P,) int64.
        row: (P,) int64; -1 gives -inf.
    """
    out = torch.empty(len(row), dtype=torch.float64, device=rows.device)
    if len(row):
        rescore_kernel[(triton.cdiv(len(row), PAIRS),)](
            queries,
            rows,
            scales,
            query.contiguous(),
            row.contiguous(),
            out,
            len(row),
            rows.shape[1],
            PAIRS=PAIRS,
            BLOCK_K=DEPTH,
            num_warps=4,
        )
    return out


def _mask_stride(valid: Tensor | None) -> int:
    return valid.stride(0) if valid is not None and valid.dim() == 2 else 0


def forms() -> Iterator[Form]:
    """See `registry`."""
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
            # What make test compiles: the tiles for most queries and for one.
            rest["quick"] = not masked and (kind, descriptors, tile.n) in (
                ("bf16", True, 128), ("bf16", False, 128), ("bf16", True, 16), ("i8", True, 128)
            )  # fmt: skip
            rest["architectures"] = (90, 100) if descriptors else (80, 90, 100)
            # Pointers keep an address for every element; where there are descriptors, only odd widths need them.
            rest["stack"] = {90: 48 if masked and kind == "i8" else 0} if descriptors else {80: 384, 90: 384, 100: 192}
            # On sm_100 Triton multiplies integers by the older instruction.
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
            for share in (1, BIN.value):
                bounding = Form(
                    f"{label}, norm of {share}",
                    lower_bounds_kernel,
                    types | {"OUT": "*fp32:16", "bins": "i32"},
                    {**constants, "SHARE": share},
                    **{
                        **rest,
                        "quick": rest["quick"] and descriptors and share == 1 and (kind, tile.n) == ("bf16", 128),
                    },
                )
                yield bounding
            if masked:
                continue  # which changes the end of a kernel alone: what follows is about its beginning
            # Where there are descriptors, pointers are for widths like these.
            yield from (odd(collecting, "stride_v"), odd(bounding, "stride_v"))
            if tile.n == 16:
                yield from (with_ones(collecting, "Q"), with_ones(bounding, "Q"), with_ones(bounding, "Q", "bins"))
                if not descriptors:
                    width = ("D", "stride_c", "stride_q")
                    yield from (with_ones(collecting, *width), with_ones(bounding, *width))
    for kind in kinds.values():
        scaled = {"ROW_SCALES": "*fp32:16"} if kind == "i8" else {}
        rescoring = Form(
            kind,
            rescore_kernel,
            {"QUERIES": "*fp64:16", "CORPUS": f"*{kind}:16", "QUERY": "*i64:16", "ROW": "*i64:16", "OUT": "*fp64:16"}
            | {"P": "i32", "D": "i32:16", **scaled},
            {"PAIRS": PAIRS, "BLOCK_K": DEPTH} | ({} if scaled else {"ROW_SCALES": None}),
            quick=kind == "bf16",
        )
        yield from (rescoring, odd(rescoring), with_ones(rescoring, "P"), with_ones(rescoring, "D"))
