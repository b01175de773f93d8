"""Choice of a kernel's tile by shape and dtype, or by measurement with ``JASPER_FAST_AUTOTUNE=1``.

B and D are never compile-time constants. A new shape may choose another tile, but recompiles no compiled form.
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
    """A block's part of a product: rows, columns, and the depth of one step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """Constants under the names of the kernels' arguments."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    @property
    def launch(self) -> dict[str, int]:
        """`constants` and the other options of a launch."""
        return {**self.constants, "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


# The first is for ordinary batches, the last for batches too small to fill a GPU with large tiles.
TILES_16_BIT = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3))
# Three TF32 products in place of one keep their operands' halves in registers, so steps are smaller.
TILES_32_BIT = (Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3))
# An online softmax keeps four numbers of each row and column in addition to the tile.
TILES_SOFTMAX = (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3))

_measured: dict[tuple[Any, ...], Tile] = {}


def choose(candidates: tuple[Tile, ...], m: int, n: int) -> Tile:
    """Return the first tile of which an (m, n) result has at least 128, else the last."""
    for tile in candidates:
        if triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n) >= 128:
            return tile
    return candidates[-1]


def tuned(
    key: tuple[Any, ...], candidates: tuple[Tile, ...], usual: Tile, run: Callable[[Tile], object], out: Tensor
) -> Tile:
    """Return the default tile, or with JASPER_FAST_AUTOTUNE=1 the fastest one, measured once for each key.

    Nothing is measured on a CPU or during the capture of a CUDA graph.

    Args:
        key: properties that decide the best tile, with shapes rounded up to powers of two.
        candidates: tiles to measure.
        usual: default tile.
        run: function of one launch, safe to repeat.
        out: any tensor of the launch.
    """
    if os.environ.get("JASPER_FAST_AUTOTUNE") != "1" or not out.is_cuda or torch.cuda.is_current_stream_capturing():
        return usual
    if key not in _measured:
        times = {tile: triton.testing.do_bench(lambda tile=tile: run(tile), warmup=5, rep=20) for tile in candidates}
        _measured[key] = min(times, key=times.__getitem__)
    return _measured[key]
