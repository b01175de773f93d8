"""Store a table of embeddings in bytes, each of which selects four numbers of a codebook.

The first layer of bytes approximates each row. A second layer approximates what is missing, for rows that matter more.
So a number takes two bits, or four. This is additive vector quantization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ENTRIES = 256  # of a codebook, as many as a byte has values
BLOCK = 4  # numbers for each byte
LEARNED_BLOCKS = 30_000  # drawn to learn a codebook from
ROUNDS = 12  # of k-means
BLOCKS_AT_ONCE = 65_536
SMALLEST = 1e-6  # of a scale, because float16 has no number between zero and 6e-8


@dataclass(frozen=True)
class Layer:
    """One byte for each four numbers of a row.

    Args:
        codebook: (256, block) float32.
        codes: (v, D / block) uint8, rows of the codebook.
        scales: (v, 1) float16.
    """

    codebook: np.ndarray
    codes: np.ndarray
    scales: np.ndarray

    def rows(self) -> np.ndarray:
        """Return the rows that the layer encodes, (v, D) float32."""
        return self.codebook[self.codes].reshape(len(self.codes), -1) * self.scales.astype(np.float32)


@dataclass(frozen=True)
class CodedTable:
    """A table of embeddings in bytes.

    Args:
        centre: (D,) float32, the mean row.
        spread: (D,) float32, the standard deviation of each dimension.
        layers: two layers. A row is ``centre + spread * (sum of its layers)``.
    """

    centre: np.ndarray
    spread: np.ndarray
    layers: tuple[Layer, Layer]


def code_table(rows: np.ndarray) -> CodedTable:
    """Find the codebooks and bytes of a table.

    Args:
        rows: (v, D) float32.

    Example:
        >>> table = code_table(np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32))
        >>> table.layers[0].codes.shape
        (300, 2)
    """
    centre, spread = rows.mean(axis=0), np.maximum(rows.std(axis=0), SMALLEST)
    left = (rows - centre) / spread
    first = _layer(left)
    return CodedTable(centre, spread, (first, _layer(left - first.rows())))


def _layer(rows: np.ndarray) -> Layer:
    scales = np.maximum(np.sqrt((rows**2).mean(axis=1, keepdims=True)), SMALLEST).astype(np.float16)
    blocks = (rows / scales.astype(np.float32)).reshape(-1, math.gcd(BLOCK, rows.shape[1]))
    codebook = _codebook(blocks)
    codes = _nearest(blocks, codebook).astype(np.uint8).reshape(len(rows), -1)
    return Layer(codebook, codes, scales)


def _codebook(blocks: np.ndarray) -> np.ndarray:
    """Return the centres of k-means. An empty cluster keeps its centre."""
    generator = np.random.default_rng(0)
    drawn = blocks[generator.choice(len(blocks), size=min(LEARNED_BLOCKS, len(blocks)), replace=False)]
    centres = drawn[generator.choice(len(drawn), size=ENTRIES, replace=len(drawn) < ENTRIES)].copy()
    for _ in range(ROUNDS):
        nearest = _nearest(drawn, centres)
        counts = np.bincount(nearest, minlength=ENTRIES)
        for dimension in range(centres.shape[1]):
            sums = np.bincount(nearest, weights=drawn[:, dimension], minlength=ENTRIES)
            centres[:, dimension] = np.where(counts > 0, sums / np.maximum(counts, 1), centres[:, dimension])
    return centres.astype(np.float32)


def _nearest(blocks: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the nearest centre of each block, (n,) int64."""
    lengths = (centres**2).sum(axis=1) / 2
    parts = [
        (blocks[start : start + BLOCKS_AT_ONCE] @ centres.T - lengths).argmax(axis=1)
        for start in range(0, len(blocks), BLOCKS_AT_ONCE)
    ]
    return np.concatenate(parts)
