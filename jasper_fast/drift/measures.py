"""Figures of two sets of embeddings of the same texts: cosines, lengths, and the order of neighbours."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import spearmanr

SIZE_TOLERANCE = 1e-3  # relative difference of lengths that rounding explains
ROTATED = 0.9  # mean cosine below which directions are others
GRID_TOLERANCE = 0.03  # of a step, for values that are int8 codes


@dataclass(frozen=True)
class Figures:
    """Figures of a comparison. Embeddings of different widths are compared over the narrower one's numbers.

    Args:
        widths: widths of A and B.
        cosine_mean: mean cosine of a text's two embeddings.
        cosine_min: smallest cosine.
        sizes: mean lengths of the vectors of A and B.
        same_nearest: fraction of texts with the same nearest neighbour among the texts.
        order: Spearman's correlation of the cosines of all pairs of texts.
    """

    widths: tuple[int, int]
    cosine_mean: float
    cosine_min: float
    sizes: tuple[float, float]
    same_nearest: float
    order: float

    def as_dict(self) -> dict[str, object]:
        """Return the figures as plain data."""
        return asdict(self)


def unit(rows: np.ndarray) -> np.ndarray:
    """Normalise rows to unit length, (n, D) float64. A zero row stays zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosines of rows (n,), over the first numbers if the widths differ."""
    width = min(first.shape[1], second.shape[1])
    return (unit(first[:, :width]) * unit(second[:, :width])).sum(axis=1)


def measure(first: np.ndarray, second: np.ndarray) -> Figures:
    """Compare embeddings of the same texts.

    Args:
        first: (n, D) rows of A.
        second: (n, E) rows of B.
    """
    close = cosines(first, second)
    same, order = neighbour_order(first, second)
    sizes = tuple(float(np.linalg.norm(rows, axis=1).mean()) for rows in (first, second))
    widths = (first.shape[1], second.shape[1])
    return Figures(widths, float(close.mean()), float(close.min()), sizes, same, order)  # type: ignore[arg-type]


def neighbour_order(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the fraction of texts with the same nearest neighbour, and Spearman's correlation of all pairs.

    Neighbours whose cosines differ by less than 1e-6 count as equal. With fewer than three texts, both are 1.
    """
    count = len(first)
    if count < 3:
        return 1.0, 1.0
    scores = [unit(rows) @ unit(rows).T for rows in (first, second)]
    for square in scores:
        np.fill_diagonal(square, -2.0)
    nearest = scores[1].argmax(axis=1)
    same = scores[0][np.arange(count), nearest] >= scores[0].max(axis=1) - 1e-6
    upper = np.triu_indices(count, 1)
    pairs = [square[upper] for square in scores]
    constant = any(np.ptp(values) == 0 for values in pairs)
    return float(same.mean()), 0.0 if constant else float(spearmanr(*pairs).statistic)


def same_products(first: np.ndarray, second: np.ndarray) -> bool:
    """Return True if embeddings have the same cosines with each other, but not the same directions."""
    grams = [unit(rows) @ unit(rows).T for rows in (first, second)]
    return float(cosines(first, second).mean()) < ROTATED and bool(np.abs(grams[0] - grams[1]).max() <= SIZE_TOLERANCE)


def sizes_differ(first: np.ndarray, second: np.ndarray) -> bool:
    """Return True if the lengths of rows differ by more than rounding."""
    a, b = (np.linalg.norm(rows, axis=1) for rows in (first, second))
    return bool((np.abs(a - b) > SIZE_TOLERANCE * np.maximum(a, b)).any())


def is_unit(rows: np.ndarray) -> bool:
    """Return True if all rows have unit length."""
    return bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=SIZE_TOLERANCE))


def int8_codes(rows: np.ndarray, reference: np.ndarray) -> bool:
    """Return True if rows are int8 codes, or codes times a scale for each row or for all of them.

    Args:
        rows: (n, D) rows to judge.
        reference: rows of the other side, which must not be codes themselves.
    """
    return _on_grid(rows) and not _on_grid(reference)


def _on_grid(rows: np.ndarray) -> bool:
    if np.array_equal(rows, np.round(rows)) and 1 < np.abs(rows).max() <= 255:
        return True
    for largest in (np.abs(rows).max(), np.abs(rows).max(axis=1, keepdims=True)):
        codes = rows / np.maximum(largest, 1e-12) * 127
        if np.abs(codes - np.round(codes)).max() < GRID_TOLERANCE and np.abs(codes).max() > 1:
            return True
    return False


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two differences (n, D) over texts, without the means that all texts share.

    Any change of weights may shift all texts in one direction, so the means say little. 0 if a difference is constant.
    """
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / size if size else 0.0
