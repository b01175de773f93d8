"""Maps W (h, d) from the student's space to the teacher's, in closed form from pair statistics.

Embeddings S (n, h) and T (n, d) appear only through the sums SᵀS, SᵀT and TᵀT. The cost does not depend on n.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from jasper_fast.fitting.statistics import PairStatistics


def start_map(statistics: PairStatistics, same_space: bool) -> np.ndarray:
    """Return the map that needs no fit: the identity within one space, otherwise the Procrustes map.

    Args:
        statistics: sums over pairs of embeddings. The identity does not depend on them.
        same_space: True if the student was trained in the teacher's space. With different widths, the Procrustes map
            is returned nevertheless.

    Returns:
        (h, d) float64.

    Raises:
        ValueError: the Procrustes map needs pairs, and there are none.
    """
    source_width, target_width = statistics.cross.shape
    if same_space and source_width == target_width:
        return np.eye(source_width)
    return procrustes_map(statistics)


def procrustes_map(statistics: PairStatistics) -> np.ndarray:
    """Return the scaled semi-orthogonal map with the largest sum of inner products between S W and T.

    A map with h ≤ d keeps all inner products, up to the scale: W Wᵀ = c² I. With h > d, Wᵀ W = c² I. The scale c > 0
    minimises the squared error. Directions without data are mapped to each other, in no particular order.

    Args:
        statistics: sums over at least one pair.

    Returns:
        (h, d) float64.

    Raises:
        ValueError: there are no pairs, or all inner products of the two sides are zero.
    """
    _check_pairs(statistics)
    left, values, right = np.linalg.svd(statistics.cross, full_matrices=False)
    rotation = left @ right
    length = float(np.einsum("ij,ik,kj->", rotation, statistics.source, rotation, optimize=True))
    if values.sum() <= 0 or length <= 0:
        raise ValueError(
            "statistics: got pairs without common directions, expected non-zero SᵀT. "
            "Fix: give embeddings with lengths > 0"
        )
    return rotation * (float(values.sum()) / length)


def ridge_map(statistics: PairStatistics, strength: float, start: np.ndarray | None = None) -> np.ndarray:
    """Return the map of least squared error, pulled towards a start: W0 + (SᵀS + λI)⁻¹ Sᵀ(T − S W0).

    It also works with fewer pairs than dimensions: directions without data keep the start.

    Args:
        statistics: sums over at least one pair.
        strength: λ > 0. A pair counts as 1, so λ compares with the number of pairs in a direction.
        start: (h, d) map W0. None: zeros.

    Returns:
        (h, d) float64.

    Raises:
        ValueError: there are no pairs. The strength is not a finite number > 0, or too small for float64. The start
            is not a finite (h, d) array.

    Example:
        >>> import numpy as np
        >>> statistics = PairStatistics(2, 2)
        >>> statistics.add(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))
        >>> ridge_map(statistics, 1.0, start=np.eye(2)).round(3).tolist()
        [[0.5, 0.5], [0.0, 1.0]]
    """
    begin, residual = _residual(statistics, start)
    return begin + _solve(statistics, strength, residual)


def low_rank_map(statistics: PairStatistics, strength: float, rank: int, start: np.ndarray | None = None) -> np.ndarray:
    """Return the ridge map whose difference from the start has at most a given rank.

    Among all C (h, d) of this rank, W0 + C minimises ‖T − S(W0 + C)‖² + λ‖C‖². With the full rank it is ``ridge_map``.

    Args:
        statistics: sums over at least one pair.
        strength: λ > 0, as in ``ridge_map``.
        rank: largest rank of the difference, from 1 to min(h, d).
        start: (h, d) map W0. None: zeros, so the map itself has this rank.

    Returns:
        (h, d) float64.

    Raises:
        ValueError: the rank is out of range, or an argument is wrong as in ``ridge_map``.
    """
    most = min(statistics.cross.shape)
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 1 <= rank <= most:
        raise ValueError(f"rank: got {rank!r}, expected a whole number from 1 to {most}. Fix: give one of these")
    begin, residual = _residual(statistics, start)
    change = _solve(statistics, strength, residual)
    _, axes = np.linalg.eigh(residual.T @ change)  # (d, d): Rᵀ (SᵀS + λI)⁻¹ R is symmetric
    kept = axes[:, -rank:]
    return begin + change @ kept @ kept.T


def _residual(statistics: PairStatistics, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the start W0 in float64 and the residual Sᵀ(T − S W0), both (h, d)."""
    _check_pairs(statistics)
    shape = statistics.cross.shape
    if start is None:
        return np.zeros(shape), statistics.cross
    start = np.asarray(start, dtype=np.float64)
    if start.shape != shape or not np.isfinite(start).all():
        raise ValueError(
            f"start: got shape {start.shape}, expected {shape} finite numbers. Fix: give a map between the same spaces"
        )
    return start, statistics.cross - statistics.source @ start


def _solve(statistics: PairStatistics, strength: float, right: np.ndarray) -> np.ndarray:
    """Return (SᵀS + λI)⁻¹ right by a Cholesky factor in float64."""
    if not (math.isfinite(strength) and strength > 0):
        raise ValueError(f"strength: got {strength}, expected a finite number > 0. Fix: give 1.0, for example")
    width = len(statistics.source)
    least = width * np.finfo(np.float64).eps * float(np.trace(statistics.source))  # rounding of the factor
    if strength < least:
        raise ValueError(
            f"strength: got {strength}, expected at least {least:.1e}, the rounding of SᵀS. Fix: give a larger one"
        )
    factor = torch.linalg.cholesky(torch.from_numpy(statistics.source + strength * np.eye(width)))
    solution: np.ndarray = torch.cholesky_solve(torch.from_numpy(right), factor).numpy()
    return solution


def _check_pairs(statistics: PairStatistics) -> None:
    if not statistics.count:
        raise ValueError("statistics: got no pairs, expected at least one. Fix: add embeddings first")
