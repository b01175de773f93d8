"""``SignIndex``: one bit an element, for shortlists. Vectors are as near as the signs they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.inputs import QUERIES, as_tensor, check_rows
from jasper_fast.mips.search import SCRATCH

ADDED_AT_ONCE = 4096  # rows


class SignIndex:
    """Nearest sign patterns by Hamming distance, on a CPU; what `funnel` takes as its narrow index.

    Args:
        dim: width of the vectors. Sign bits keep angles of centred vectors, so wider ones make better shortlists.
        scratch: bytes that a search may use beside the patterns, queries and results.
    """

    def __init__(self, dim: int, *, scratch: int = SCRATCH) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be a whole number of at least 1, got {dim!r}")
        self.dim = dim
        self.scratch = scratch
        self._blocks: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def __repr__(self) -> str:
        return f"SignIndex({len(self)} rows, dim={self.dim})"

    def add(self, x: Any) -> None:
        """Append rows; their ids go on from len(self). All are added, or none.

        Args:
            x: (n, dim) float32, bfloat16, float16 or float64 tensor or array.

        Raises:
            ValueError: wrong shape, or a row that holds NaN or infinity.
            TypeError: wrong dtype.
        """
        rows = self._checked(x, "x")
        self._blocks += [patterns(rows[at : at + ADDED_AT_ONCE]) for at in range(0, len(rows), ADDED_AT_ONCE)]

    def search(self, q: Any, k: int) -> tuple[Any, Any]:
        """The k rows that share most signs with each query, ties by the lower id.

        Args:
            q: (Q, dim) tensor or array; its kind is the results' kind.
            k: how many, at least 1.

        Returns:
            scores (Q, k) float32, shared signs less others, which is the inner product of the signs, and ids (Q, k);
            with fewer than k rows the rest is −inf and −1.

        Raises:
            ValueError: wrong shapes, k below 1, or a query with NaN or infinity.
        """
        queries = self._checked(q, "q")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        k, missing = min(k, len(self)), max(0, k - len(self))
        asked = patterns(queries)
        group = max(1, self.scratch // (2 * 8 * max(1, len(self))))  # keys of all rows, and numpy's copy of them
        found = np.empty((len(asked), k), dtype=np.int64)
        for start in range(0, len(asked), group):
            keys = self._keys(asked[start : start + group])
            if k < len(self):
                keys = np.partition(keys, k - 1, axis=1)[:, :k]
            found[start : start + group] = np.sort(keys, axis=1)
        distances, ids = np.divmod(found, max(1, len(self)))
        scores = np.pad((self.dim - 2 * distances).astype(np.float32), ((0, 0), (0, missing)), constant_values=-np.inf)
        ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=-1)
        if isinstance(q, Tensor):
            return torch.from_numpy(scores).to(q.device), torch.from_numpy(ids).to(q.device)
        return scores, ids

    def _keys(self, asked: np.ndarray) -> np.ndarray:
        """distance · rows + id, so that one number orders both. (Q, N)"""
        keys = np.empty((len(asked), len(self)), dtype=np.int64)
        first = 0
        for block in self._blocks:
            ids = np.arange(first, first + len(block))
            for query, out in zip(asked, keys, strict=True):
                distance = np.bitwise_count(block ^ query).sum(axis=1, dtype=np.int64)
                out[first : first + len(block)] = distance * len(self) + ids
            first += len(block)
        return keys

    def _checked(self, x: Any, name: str) -> Tensor:
        rows = as_tensor(x, name)
        check_rows(rows, name, QUERIES)
        if rows.shape[1] != self.dim:
            raise ValueError(f"{name} has width {rows.shape[1]}, the index {self.dim}")
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise ValueError(f"{name}: row {int(bad[0])} holds NaN or infinity")
        return rows


def patterns(rows: Tensor) -> np.ndarray:
    """Signs of (n, D) rows, positive or not, as (n, ceil(D / 64)) uint64."""
    bits = np.packbits((rows > 0).cpu().numpy(), axis=1)
    bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    return np.ascontiguousarray(bits).view(np.uint64)
