"""An existing index, as the migration reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jasper_fast.teachers.embedding_files import Keys

INNER_PRODUCT, L2 = "inner product", "L2"
MOST_ROWS = 20_000  # rows whose lengths are read
EQUAL = 1e-2  # largest relative spread of the lengths of rows that count as equally long

Read = Callable[[np.ndarray], np.ndarray]  # (n,) row numbers -> (n, width) float32


@dataclass(frozen=True)
class OldIndex:
    """Rows of an existing index, which stays as it is.

    Args:
        name: the file or folder, as given.
        kind: description of the format.
        rows: number of rows.
        width: coordinates of a decoded row.
        read: function from (n,) row numbers to (n, width) float32 rows as stored, with codes decoded.
        ids: id of each row as text. None: the rows have a position only.
        texts: keys of the rows by text. None: the rows have no text.
        metric: what the index ranks by, "inner product" or "L2".
        codes: "bits", "int8" or "uint8" if the rows are such codes. None: they are floats.
        notes: sentences about what the index lost or does not say.
        files: files whose order gives the positions of the rows.
        model: revision of the model that built the index. None: the index does not say.
    """

    name: str
    kind: str
    rows: int
    width: int
    read: Read
    ids: list[str] | None = None
    texts: Keys | None = None
    metric: str = INNER_PRODUCT
    codes: str | None = None
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    model: str | None = None


def usable_rows(vectors: np.ndarray) -> np.ndarray:
    """Return which rows are finite and not zero, (n,) bool.

    Args:
        vectors: (n, width) float rows.
    """
    return np.asarray(np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1))


def lengths_note(lengths: np.ndarray, metric: str) -> str | None:
    """Describe rows that are not unit vectors. None: they are.

    Args:
        lengths: (n,) float64 lengths of usable rows.
        metric: what the index ranks by.
    """
    low, middle, high = np.quantile(lengths, [0.05, 0.5, 0.95])
    if np.ptp(lengths) <= EQUAL * middle:
        if abs(middle - 1) <= EQUAL:
            return None
        scale = f"; multiply the questions by {middle:.3g} before an L2 search" if metric == L2 else ""
        return f"all rows have a length near {middle:.3g}. This does not change a ranking{scale}"
    if metric == L2:
        return (
            f"its rows are not normalised (lengths from {low:.3g} to {high:.3g}, median {middle:.3g}), and it ranks by "
            f"L2 distance. Multiply the questions by {middle:.3g} before a search. The table does so"
        )
    return (
        f"its rows are not normalised (lengths from {low:.3g} to {high:.3g}). Under inner products, long rows rank "
        "higher, and the table counts that. An engine that ranks by cosine ignores the lengths"
    )
