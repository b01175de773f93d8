"""Sums over pairs of embeddings, from which maps and principal axes are computed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BLOCK = 4096  # rows that are in float64 at once
NAMES = ("count", "source", "cross", "target")


class PairStatistics:
    """Second moments of pairs of embeddings, in float64, summed over any number of rows.

    The sums take O(h² + h d + d²) memory. Rows are added in blocks, in any order, from files larger than memory too.

    Args:
        source_width: width h of the embeddings to map, such as the student's.
        target_width: width d of the embeddings to reach, such as the teacher's.

    Attributes:
        count: number of added pairs.
        source: (h, h) float64, the sum SᵀS.
        cross: (h, d) float64, the sum SᵀT.
        target: (d, d) float64, the sum TᵀT.

    Raises:
        ValueError: a width is not a whole number of at least 1.

    Example:
        >>> import numpy as np
        >>> statistics = PairStatistics(2, 1)
        >>> statistics.add(np.eye(2, dtype=np.float32), np.ones((2, 1), dtype=np.float32))
        >>> statistics.count, statistics.cross.tolist()
        (2, [[1.0], [1.0]])
    """

    def __init__(self, source_width: int, target_width: int) -> None:
        for name, width in (("source_width", source_width), ("target_width", target_width)):
            if isinstance(width, bool) or not isinstance(width, int | np.integer) or width < 1:
                raise ValueError(
                    f"{name}: got {width!r}, expected a whole number of at least 1. Fix: give the embeddings' width"
                )
        self.count = 0
        self.source = np.zeros((source_width, source_width))
        self.cross = np.zeros((source_width, target_width))
        self.target = np.zeros((target_width, target_width))

    def add(self, source: np.ndarray, target: np.ndarray) -> None:
        """Add pairs of rows. After an error, the sums are as they were.

        Args:
            source: (n, h) floats, memory-mapped or not. Products are computed and summed in float64.
            target: (n, d) floats. Row i belongs to row i of ``source``.

        Raises:
            ValueError: wrong shapes, values that are not floats, or a row with NaN or infinity.
        """
        source_width, target_width = self.cross.shape
        _check_rows("source", source, source_width)
        _check_rows("target", target, target_width)
        if len(source) != len(target):
            raise ValueError(
                f"pairs: got {len(source)} source rows and {len(target)} target rows, expected equally many. "
                "Fix: give both embeddings of the same texts in the same order"
            )
        sums = [np.zeros_like(part) for part in (self.source, self.cross, self.target)]
        for start in range(0, len(source), BLOCK):
            left = _finite_block("source", source, start)
            right = _finite_block("target", target, start)
            sums[0] += left.T @ left
            sums[1] += left.T @ right
            sums[2] += right.T @ right
        self.source += sums[0]
        self.cross += sums[1]
        self.target += sums[2]
        self.count += len(source)

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return the sums as arrays for a file, such as safetensors.

        Args:
            prefix: start of each name. With different prefixes, one file holds several statistics.

        Returns:
            ``count`` (1,) int64, ``source`` (h, h), ``cross`` (h, d) and ``target`` (d, d) float64.
        """
        values = (np.array([self.count], dtype=np.int64), self.source, self.cross, self.target)
        return {prefix + name: value for name, value in zip(NAMES, values, strict=True)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> PairStatistics:
        """Return statistics from the arrays of ``arrays``.

        Args:
            arrays: arrays by name. Other names are ignored.
            prefix: start of each name.

        Raises:
            ValueError: an array is missing, has another shape or dtype, or is not finite.
        """
        missing = [prefix + name for name in NAMES if prefix + name not in arrays]
        if missing:
            raise ValueError(f"statistics: {', '.join(missing)} missing. Fix: compute the statistics again")
        count, source, cross, target = (np.asarray(arrays[prefix + name]) for name in NAMES)
        if count.size != 1 or count.dtype.kind not in "iu" or int(count.reshape(-1)[0]) < 0:
            raise ValueError(
                f"{prefix}count: got {count}, expected one whole number. Fix: compute the statistics again"
            )
        if cross.ndim != 2 or 0 in cross.shape:
            raise ValueError(
                f"{prefix}cross: got shape {cross.shape}, expected (h, d). Fix: compute the statistics again"
            )
        statistics = cls(*cross.shape)
        for name, value in zip(NAMES[1:], (source, cross, target), strict=True):
            expected = getattr(statistics, name).shape
            if value.shape != expected or value.dtype != np.float64 or not np.isfinite(value).all():
                raise ValueError(
                    f"{prefix}{name}: got shape {value.shape} and {value.dtype}, expected {expected} finite float64. "
                    "Fix: compute the statistics again"
                )
            setattr(statistics, name, value.copy())
        statistics.count = int(count.reshape(-1)[0])
        return statistics


def _check_rows(name: str, rows: np.ndarray, width: int) -> None:
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
        kind = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise ValueError(f"{name}: got {kind}, expected an array of floats. Fix: convert it with .astype(np.float32)")
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(
            f"{name}: got shape {rows.shape}, expected (n, {width}). Fix: give embeddings of the model that the "
            "statistics are for"
        )


def _finite_block(name: str, rows: np.ndarray, start: int) -> np.ndarray:
    """Return the next rows in float64, or raise for one with NaN or infinity."""
    block = rows[start : start + BLOCK].astype(np.float64)
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name}: row {start + int(np.argmin(finite))} holds NaN or infinity, expected finite numbers. "
            "Fix: encode its text again, or leave it out"
        )
    return block
