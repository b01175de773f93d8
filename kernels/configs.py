"""Which tile a kernel takes: by shape and dtype, or by measuring, where ``JASPER_FAST_AUTOTUNE=1`` asks for it.

B and D are never compile-time constants: a new shape may choose another tile, but compiles nothing that was compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A block's share of a product: rows, columns, and the depth of one step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels' arguments call them."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    @property
    def launch(self) -> dict[str, int]:
        """`constants`, and what a launch takes besides."""
        return {**self.constants, "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


# The first is for ordinary batches, the last for those too small to fill a GPU with large tiles.
TILES_16_BIT = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3))
# Three TF32 products for one keep their operands' halves in registers: smaller steps.
TILES_32_BIT = (Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3))
# An online softmax keeps four numbers of each row and column beside the tile.
TILES_SOFTMAX = (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3))

_measured: dict[tuple[Any, ...], Tile] = {}


def choose(candidates: tuple[Tile, ...], m: int, n: int) -> Tile:
    """The largest tile of which an (m, n) result has at least 128, else the last."""
    for tile in candidates:
        if triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n) >= 128:
            return tile
    return candidates[-1]


def tuned(
    key: tuple[Any, ...], candidates: tuple[Tile, ...], usual: Tile, run: Callable[[Tile], object], out: Tensor
) -> Tile:
    """The usual tile; under JASPER_FAST_AUTOTUNE=1 the fastest of all, measured once for each key.

    Args:
        key: what decides the best tile, shapes rounded up to powers of two.
        candidates: to choose among.
        usual: without measuring.
        run: one launch; it must be harmless to repeat.
        out: any tensor of the launch; only on CUDA, and not while a CUDA graph is captured, is anything measured.
    """
    if os.environ.get("JASPER_FAST_AUTOTUNE") != "1" or not out.is_cuda or torch.cuda.is_current_stream_capturing():
        return usual
    if key not in _measured:
        times = {tile: triton.testing.do_bench(lambda tile=tile: run(tile), warmup=5, rep=20) for tile in candidates}
        _measured[key] = min(times, key=times.__getitem__)
    return _measured[key]
