"""``python -m tests.kernels.ptx.full_size``: addresses of launches that no CPU could hold.

The first, the middle and the last programs of each launch run on tensors without memory. Every access must be inside
its tensor. A planted overflow must be found.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.kernels.ptx import driver
from tests.kernels.ptx.driver import Grid
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.virtual import VirtualTensor as V

Launch = tuple[str, Callable[[], object]]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
I8, U8, I16, I32, I64 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64
ROWS = 65_536  # the largest batch
PAIRS = 2**30 - 1  # the most that the exact counts take


def ends(grid: Grid) -> Iterator[Grid]:
    """Return the first, the middle and the last programs in every dimension."""
    return itertools.product(*(sorted({0, n // 2, n - 1}) for n in grid))  # type: ignore[return-value]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def strips() -> Iterator[Launch]:
    from jasper_fast.kernels import info_nce, pair_losses

    columns = pair_losses.COLUMNS
    for height in (256, 8192):
        width = ROWS if height == 256 else 8192
        products, weights = V((height, width), F32), V((height, width), BF16)
        rows, other = V((height,), F32), V((width,), F32)
        blocks = _ceil(width, columns)

        def difference(s=products, w=weights, r=rows, c=other, h=height, n=width, blocks=blocks):
            sums = V((h, blocks), F32)
            pair_losses.difference_kernel[(h, blocks)](s, s, r, r, c, c, w, sums, h, n, n, 1.0, BLOCK=columns)

        def divergence(s=products, w=weights, r=rows, c=other, h=height, n=width):
            pair_losses.divergence_kernel[(h,)](s, s, r, r, c, c, w, r, n - h, n, n, 1.0, 1.0, BLOCK=columns)

        def contrast(s=products, w=weights, r=rows, c=other, h=height, n=width):
            numbers, own = V((n,), I64), V((h,), I64)
            info_nce.contrast_kernel[(h,)](
                s, s, r, r, c, c, numbers, own, r, own, r, r, w, n, n, 1.0, BLOCK=info_nce.COLUMNS
            )

        for label, launch in (("difference", difference), ("divergence", divergence), ("contrast", contrast)):
            yield f"{label}, {height} x {width}", launch


def scores() -> Iterator[Launch]:
    from jasper_fast.kernels import pairs

    tile = pairs.TILE
    x, packed = V((ROWS, 1024), F32), V((ROWS * (ROWS - 1) // 2,), F32)
    grid = (_ceil(ROWS, tile["BLOCK_M"]) * _ceil(ROWS, tile["BLOCK_N"]),)
    yield "pair_scores", lambda: pairs.pair_scores_kernel[grid](x, packed, ROWS, 1024, 1024, **tile)
    counts, matrix, tiles = V((ROWS * (ROWS - 1) // 2,), I32), V((ROWS, ROWS), F32), _ceil(ROWS, pairs.SIDE)
    yield (
        "unpack",
        lambda: pairs.unpack_kernel[(tiles * tiles,)](counts, matrix, 1.0, ROWS, tiles, SIDE=pairs.SIDE, num_warps=8),
    )


def counting() -> Iterator[Launch]:
    from jasper_fast.kernels import dominance_counts as counts

    total = 2 * PAIRS
    tiles, shift = _ceil(total, counts.BLOCK), (PAIRS - 1).bit_length() - 2
    events, table = V((total,), I32), V((8 * tiles,), I32)
    numbers, options = (total, tiles, shift, 3), {"BLOCK": counts.BLOCK, "num_warps": counts.WARPS["distribute"]}
    yield "digit_counts", lambda: counts.digit_counts_kernel[(tiles,)](events, table, *numbers, **options)

    def distribute(last: bool) -> Callable[[], object]:
        own = (total, tiles, counts.LEAF_BITS if last else shift, 3, 2**31 // counts.BLOCK)
        out = V((total,), I32), V((total,), I32)
        return lambda: counts.distribute_kernel[(tiles,)](
            events, events, table, *out, *own, FIRST=False, LAST=last, **options
        )

    yield "distribute", distribute(False)
    yield "distribute, last", distribute(True)
    # More pairs than an event holds: a leaf's first place no longer fits 32 bits.
    for label, pairs in (("leaf", PAIRS), ("planted overflow of leaf", 2**31 + 256)):
        both, places, grid = V((2 * pairs,), I32), V((pairs,), I32), (_ceil(pairs, counts.LEAF),)

        def leaf(both=both, places=places, pairs=pairs, grid=grid):
            counts.leaf_kernel[grid](both, both, places, places, pairs, LEAF=counts.LEAF, num_warps=4)

        yield label, leaf


def binned() -> Iterator[Launch]:
    from jasper_fast.kernels import relative_similarity_binned as kernels

    fine, bins, height = 2**15, 512, 2**25 // ROWS
    block, grid = V((height, ROWS), F32), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    counts, *tables = (torch.zeros(shape, dtype=I32) for shape in ((bins, bins), (fine,), (fine,)))
    nodes, edges = V((bins + 1, bins + 1), F32), V((fine + 1,), F32)
    columns, last, weights = _ceil(ROWS, kernels.COLUMNS), fine - 1 / 128, V((height, ROWS), F16)
    sums, options = V((height, columns), F32), {"BLOCK": kernels.COLUMNS}
    yield (
        "histogram",
        lambda: kernels.histogram_kernel[(height, columns)](
            block, block, grid, counts, *tables, ROWS, ROWS, bins, 6, last, **options
        ),
    )
    yield (
        "coefficients",
        lambda: kernels.coefficients_kernel[(height, columns)](
            block, block, weights, grid, nodes, edges, edges, sums, 1.0, ROWS, ROWS, bins, bins / fine, last, **options
        ),
    )


def search() -> Iterator[Launch]:
    from jasper_fast.kernels import mips

    rows, capacity, chunk = 2**23, 1024, 2048
    for width, queries, dtype, tile, masked in (
        (1024, 4096, None, mips.CHUNK_TILE, False), (1024, 3, BF16, mips.TILES[2], False),
        (1024, 48, I8, mips.TILES[1], False), (64, 48, BF16, mips.TILES[2], True),
        (64, 60, None, mips.CHUNK_TILE, True),
    ):  # fmt: skip
        mask = V((queries, rows), U8) if masked else None
        norms, limits = V((rows // 64,), F32), [V((queries,), F32) for _ in range(3)]
        counts, scores, numbers = V((queries,), I32), V((queries, capacity), F32), V((queries, capacity), I32)
        bounds, bins = V((queries, rows // 64), F32), rows // 64
        first = 0 if dtype else rows - chunk  # the last chunk
        programs = mips._tiles(rows - first, queries, tile)
        scales = (V((rows,), F32), V((queries,), F32)) if dtype == I8 else (None, None)
        for descriptors in (False,) if masked or dtype is None else (True, False):
            factors: list[Any] = [V((chunk, queries), I16), None]
            strides = (queries, 0)
            if dtype is not None:
                factors, strides = [V((rows, width), dtype), V((queries, width), dtype)], (width, width)
            if descriptors:
                from triton.tools.tensor_descriptor import TensorDescriptor

                boxes = ([tile[side], tile["BLOCK_K"]] for side in ("BLOCK_M", "BLOCK_N"))
                factors = [
                    TensorDescriptor(t, list(t.shape), [width, 1], box) for t, box in zip(factors, boxes, strict=True)
                ]
            operands = (*factors, *scales, mask, norms)
            options = {"ROWS_PER_NORM": 64, "DESCRIPTORS": descriptors, "PRECISION": "tf32x3", **tile}
            stride_v = rows if mask else 0

            def collect(
                programs=programs, operands=operands, limits=limits,
                outputs=(None, limits[2], counts, None, scores, numbers),
                shape=(capacity, first, rows, queries, width, *strides, stride_v), options=options,
            ):  # fmt: skip
                mips.scan_kernel[(programs,)](*operands, *limits[:2], *outputs, *shape, **options)

            def bound(
                programs=programs, operands=operands, limits=limits, bounds=bounds,
                shape=(bins, first, rows, queries, width, *strides, stride_v), options=options,
            ):  # fmt: skip
                results = bounds, *[None] * 5
                mips.scan_kernel[(programs,)](*operands, *limits[:2], *results, *shape, **options)

            kind = "scores" if dtype is None else f"{dtype}, {'descriptors' if descriptors else 'pointers'}"
            form = f"{queries} queries, {kind}"
            yield f"collect, {form}", collect
            yield f"lower_bounds, {form}", bound


GROUPS = (strips, scores, counting, binned, search)


def main(names: list[str]) -> int:
    """Run the launches whose labels contain one of the names, or all. Return the number of wrong outcomes."""
    emulator = driver.install(90)
    emulator.races, emulator.programs = False, ends
    wrong = 0
    for label, launch in itertools.chain.from_iterable(group() for group in GROUPS):
        if names and not any(name in label for name in names):
            continue
        try:
            launch()
            fault = None
        except Fault as error:
            fault = str(error)
        wrong += (fault is not None) != ("planted" in label)
        print(f"{label}: {fault or 'all addresses are inside'}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
