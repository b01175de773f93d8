"""The description of a kernel's tile.

B and D are never compile-time constants. A new shape may choose another tile, but recompiles no compiled form.
"""

from __future__ import annotations

from dataclasses import dataclass


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
