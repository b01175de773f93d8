"""Reduce teacher embeddings to the width of the student's widest head.

The projection keeps inner products best: its columns are the leading right singular vectors of training-text
embeddings, without centring. It is fitted once and kept in the cache, so a resumed run has the same targets.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jasper_fast.utils.atomic import locked, write_atomic
from jasper_fast.utils.fingerprint import content_digest

FIT_ROWS = 20_000  # texts
CHUNK = 2048  # rows
NEIGHBOUR_ROWS, NEIGHBOURS = 1000, 10  # texts and neighbours in the measure of what the projection keeps

Read = Callable[[np.ndarray], np.ndarray]  # (n,) row numbers -> (n, D) float32 unit rows


class Reduction(NamedTuple):
    """A projection of embeddings to fewer dimensions.

    Attributes:
        matrix: (D, k) float32, orthonormal columns.
        variance: kept fraction of the squared length of the embeddings.
        overlap: fraction of the ten nearest neighbours that stay the same.
    """

    matrix: np.ndarray
    variance: float
    overlap: float

    @property
    def fingerprint(self) -> str:
        """Identity of the projection."""
        return content_digest([self.matrix.tobytes().hex()])

    def line(self) -> str:
        """Describe the reduction in one line."""
        full, width = self.matrix.shape
        return (
            f"the teacher's {full:,} dimensions are reduced to {width:,} by PCA; that keeps {self.variance:.1%} of the "
            f"variance and {self.overlap:.0%} of the {NEIGHBOURS} nearest neighbours"
        )


def spread_rows(rows: int, most: int) -> np.ndarray:
    """Return at most ``most`` row numbers, evenly spread, (n,) int64."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64))


def fit_reduction(read: Read, rows: int, width: int, start: Read | None = None) -> Reduction:
    """Fit a projection to the embeddings of up to 20,000 texts.

    With fewer texts than ``width``, the projection keeps these texts' inner products exactly.

    Args:
        read: function that returns the embeddings of some rows.
        rows: number of texts.
        width: k, fewer dimensions than the embeddings have.
        start: function that returns the untrained student's widest embeddings of some rows, (n, k). The projection is
            then rotated towards them, which changes no inner product. None: it is not rotated.
    """
    chosen = spread_rows(rows, FIT_ROWS)
    full_width = read(chosen[:1]).shape[1]
    moments = np.zeros((full_width, full_width))
    for first in range(0, len(chosen), CHUNK):
        part = read(chosen[first : first + CHUNK]).astype(np.float64)
        moments += part.T @ part
    values, vectors = np.linalg.eigh(moments)
    matrix = vectors[:, ::-1][:, :width]  # (D, k), the largest first
    sample = spread_rows(rows, NEIGHBOUR_ROWS)
    full = read(sample).astype(np.float64)
    if start is not None:
        left, _, right = np.linalg.svd((full @ matrix).T @ start(sample).astype(np.float64))
        matrix = matrix @ left @ right  # orthogonal Procrustes
    variance = float(values[::-1][:width].sum() / values.sum())
    return Reduction(matrix.astype(np.float32), variance, _overlap(full, full @ matrix))


def stored_reduction(file: Path, fit: Callable[[], Reduction]) -> Reduction:
    """Read a projection from the cache, or fit and store it. Other processes wait for the first one."""
    with locked(file):
        try:
            with np.load(file, allow_pickle=False) as stored:
                return Reduction(stored["matrix"], float(stored["variance"]), float(stored["overlap"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # missing or damaged
        reduction, content = fit(), io.BytesIO()
        np.savez(content, **reduction._asdict())
        write_atomic(file, content.getvalue())
        return reduction


def _overlap(full: np.ndarray, reduced: np.ndarray) -> float:
    """Return the fraction of each row's nearest neighbours that both forms have in common."""
    k = min(NEIGHBOURS, len(full) - 1)
    if k < 1:
        return 1.0
    near = [_neighbours(vectors, k) for vectors in (full, reduced)]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)]))


def _neighbours(vectors: np.ndarray, k: int) -> list[list[int]]:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest: list[list[int]] = np.argpartition(-cosines, k - 1, axis=1)[:, :k].tolist()
    return nearest
