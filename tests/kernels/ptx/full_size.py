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


def pair_tiles() -> Iterator[Launch]:
    from jasper_fast.kernels import configs, pair_tile

    tile = configs.TILES_16_BIT[0]
    for rows, width, begin, end in (
        (ROWS, 1024, 0, 1280), (ROWS, 1024, 64_000, ROWS), (8192, 12_288, 0, 8192), (ROWS, 12_288, 0, 1280)
    ):  # fmt: skip
        programs = _ceil(end - begin, tile.m) * _ceil(rows - begin, tile.n)
        embeddings, lengths = V((rows, width), BF16), V((rows,), F32)
        weights, partial = V((end - begin, rows), BF16), V((programs,), F32)

        def launch(
            grid=(programs,), x=embeddings, r=lengths, w=weights, p=partial, begin=begin, end=end, b=rows, d=width
        ):
            pair_tile.pair_tile_kernel[grid](
                x, x, r, r, None, None, None, w, p, None, 0.0, begin, end, b, d, d, d, 1, d, 1, 0, b,
                FIRST=True, FOLD=False, PRECISION="tf32x3", GROUP=8, **tile.launch,
            )  # fmt: skip

        yield f"pair_tile, {rows} x {width}, rows {begin} to {end}", launch


def packing() -> Iterator[Launch]:
    from jasper_fast.kernels import pairs

    matrix, packed = V((ROWS, ROWS), F32), V((ROWS * (ROWS - 1) // 2,), F32)
    grid = (ROWS, _ceil(ROWS, pairs.COLUMNS))
    yield "pack", lambda: pairs.pack_kernel[grid](matrix, packed, ROWS, ROWS, BLOCK=pairs.COLUMNS)
    counts, tiles = V((ROWS * (ROWS - 1) // 2,), I32), _ceil(ROWS, pairs.TILE)
    yield (
        "unpack",
        lambda: pairs.unpack_kernel[(tiles * tiles,)](counts, matrix, 1.0, ROWS, tiles, TILE=pairs.TILE, num_warps=8),
    )


def counting() -> Iterator[Launch]:
    from jasper_fast.kernels import dominance_counts as counts
    from jasper_fast.kernels import tie_correction as ties

    total, radix = 2 * PAIRS, 2**counts.DIGIT_BITS
    tiles, shift = _ceil(total, counts.BLOCK), (PAIRS - 1).bit_length() - counts.DIGIT_BITS
    events, table = V((total,), I32), V((2 * radix * tiles,), I32)
    places = [V((PAIRS,), I32) for _ in range(3)]
    constants = {"RADIX": radix, "BLOCK": counts.BLOCK}
    yield (
        "digit_counts",
        lambda: counts.digit_counts_kernel[(tiles,)](events, table, total, tiles, shift, radix - 1, **constants),
    )
    yield (
        "distribute",
        lambda: counts.distribute_kernel[(tiles,)](
            events,
            events,
            table,
            V((total,), I32),
            V((total,), I32),
            total,
            tiles,
            2**31 // counts.BLOCK,
            shift,
            radix - 1,
            FIRST=False,
            **constants,
            num_warps=counts.WARPS["distribute"],
        ),  # fmt: skip
    )
    leaf = 2**counts.LEAF_BITS
    yield (
        "leaf",
        lambda: counts.leaf_kernel[(_ceil(total, 2 * leaf),)](
            events, events, places[0], places[1], total, FIRST=False, LEAF=leaf, CHUNK=counts.CHUNK, num_warps=8
        ),
    )
    grid = (_ceil(PAIRS, ties.BLOCK),)
    yield "ends", lambda: ties.ends_kernel[grid](V((PAIRS,), I8), *places, PAIRS, BLOCK=ties.BLOCK)


def products() -> Iterator[Launch]:
    from jasper_fast.kernels import configs, product

    tile = configs.TILES_32_BIT[0]
    for name, m, n, k, a, x in (
        ("scores", 46_341, 46_341, 1024, (1024, 1), (1, 1024)),
        ("gradient", 46_341, 1024, 4096, (46_341, 1), (1024, 1)),
        ("transposed gradient", ROWS, 4096, 1024, (1, ROWS), (4096, 1)),
        # Rows so far apart are copied before a launch. Offsets inside a tile are 32-bit and must overflow.
        ("planted overflow", 256, 64, 16, (2**25, 1), (64, 1)),
    ):
        left, right, out = V((m, k), F32, a), V((k, n), F32, x), V((1, m, n), F32)

        def launch(left=left, right=right, out=out, m=m, n=n, k=k, a=a, x=x):
            grid = (_ceil(m, tile.m) * _ceil(n, tile.n), 1)
            product.product_kernel[grid](
                left, right, None, None, None, out, None, m, n, k, k, *a, *x, m * n, n, ACCUMULATE=False,
                PRECISION="tf32x3", GROUP=product.GROUP, **tile.launch,
            )  # fmt: skip

        yield f"product, {name}", launch


def binned() -> Iterator[Launch]:
    from jasper_fast.kernels import relative_similarity_binned as kernels

    width, fine, bins = 64, 2**15, 512
    tile, options = kernels.TILE, {"num_warps": kernels.WARPS, "num_stages": kernels.STAGES}
    rows, grid = V((ROWS, width), F16), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    tables = V((bins, bins), I32), V((fine,), I32), V((fine,), I32)
    programs = _ceil(ROWS, tile["BLOCK_M"]) * _ceil(ROWS, tile["BLOCK_N"])
    yield (
        "histogram",
        lambda: kernels.histogram_kernel[(programs,)](
            rows,
            rows,
            grid,
            *tables,
            ROWS,
            width,
            width,
            width,
            width,
            bins,
            6,
            fine - 1 / 128,
            WITH_TEACHER=True,
            **tile,
            **options,
        ),  # fmt: skip
    )
    height = 2**25 // ROWS
    block = V((height, ROWS), F32)
    programs_of_block = _ceil(height, tile["BLOCK_M"]) * _ceil(ROWS, tile["BLOCK_N"])
    yield (
        "scores",
        lambda: kernels.scores_kernel[(programs_of_block,)](
            rows, block, ROWS - height, ROWS, ROWS, width, width, **tile, **options
        ),
    )
    columns = _ceil(ROWS, kernels.COLUMNS)
    yield (
        "coefficients",
        lambda: kernels.coefficients_kernel[(height, columns)](
            block,
            V((height, ROWS), F32),
            grid,
            V((bins + 1, bins + 1), F32),
            V((fine + 1,), F32),
            V((fine + 1,), F32),
            V((height, columns), F32),
            ROWS,
            bins,
            bins / fine,
            fine - 1 / 128,
            BLOCK=kernels.COLUMNS,
        ),  # fmt: skip
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
        programs = _ceil(rows - first, tile.m) * _ceil(queries, tile.n)
        scales = (V((rows,), F32), V((queries,), F32)) if dtype == I8 else (None, None)
        for descriptors in (False,) if masked or dtype is None else (True, False):
            factors: list[Any] = [V((chunk, queries), I16), None]
            strides = (queries, 0)
            if dtype is not None:
                factors, strides = [V((rows, width), dtype), V((queries, width), dtype)], (width, width)
            if descriptors:
                from triton.tools.tensor_descriptor import TensorDescriptor

                boxes = ([tile.m, tile.k], [tile.n, tile.k])
                factors = [
                    TensorDescriptor(t, list(t.shape), [width, 1], box) for t, box in zip(factors, boxes, strict=True)
                ]
            operands = (*factors, *scales, mask, norms)
            options = {"DESCRIPTORS": descriptors, "PRECISION": "tf32x3", **tile.launch}
            stride_v = rows if mask else 0

            def collect(
                programs=programs, operands=operands, limits=limits, outputs=(counts, None, scores, numbers),
                shape=(first, rows, queries, width, capacity, *strides, stride_v), options=options,
            ):  # fmt: skip
                mips.collect_kernel[(programs,)](*operands, *limits, *outputs, *shape, **options)

            def bound(
                programs=programs, operands=operands, limits=limits, bounds=bounds,
                shape=(first, rows, queries, width, bins, *strides, stride_v), options=options,
            ):  # fmt: skip
                mips.lower_bounds_kernel[(programs,)](
                    *operands, *limits[:2], bounds, *shape, ROWS_PER_NORM=64, **options
                )

            kind = "scores" if dtype is None else f"{dtype}, {'descriptors' if descriptors else 'pointers'}"
            form = f"{queries} queries, {kind}"
            yield f"collect, {form}", collect
            yield f"lower_bounds, {form}", bound


GROUPS = (pair_tiles, packing, counting, products, binned, search)


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
