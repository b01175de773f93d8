"""``SignIndex``: one bit per element, for shortlists. Rows are ranked by the number of equal signs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.inputs import QUERIES, as_tensor, check_dim, check_finite, check_rows, check_width
from jasper_fast.mips.top_k import SCRATCH

ADD_CHUNK_ROWS = 4096


class SignIndex:
    """Search of nearest sign patterns by Hamming distance on a CPU. It can be the narrow index of `funnel`.

    Args:
        dim: width of the embeddings. Sign bits keep angles of centred embeddings, so wider ones make better shortlists.
        scratch: bytes that a search may use in addition to the patterns, queries and results.

    Example:
        >>> import numpy as np
        >>> index = SignIndex(4)
        >>> index.add(np.array([[1.0, 1, 1, 1], [1, -1, -1, -1], [-1, -1, -1, -1]]))
        >>> scores, ids = index.search(np.array([[0.9, 0.8, 0.7, -0.1]]), k=2)
        >>> scores.tolist(), ids.tolist()
        ([[2.0, 0.0]], [[0, 1]])
    """

    def __init__(self, dim: int, *, scratch: int = SCRATCH) -> None:
        self.dim = check_dim(dim)
        self.scratch = scratch
        self._blocks: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def __repr__(self) -> str:
        return f"SignIndex({len(self)} rows, dim={self.dim})"

    def add(self, x: Any) -> None:
        """Append rows. Their ids continue from len(self). All rows are added, or none.

        Args:
            x: (n, dim) float32, bfloat16, float16 or float64 tensor or array.

        Raises:
            ValueError: wrong shape, or a row with NaN or infinity.
            TypeError: wrong dtype.
        """
        rows = self._checked(x, "x")
        self._blocks += [patterns(rows[at : at + ADD_CHUNK_ROWS]) for at in range(0, len(rows), ADD_CHUNK_ROWS)]

    def search(self, q: Any, k: int) -> tuple[Any, Any]:
        """Return the k rows with the most signs equal to those of each query. Ties go to the lower id.

        Args:
            q: (Q, dim) queries, a tensor or array. Results are of the same kind.
            k: number of rows to return, at least 1.

        Returns:
            scores (Q, k) float32 and ids (Q, k). A score is the inner product of the signs, the number of equal signs
            minus the number of different ones. With fewer than k rows the rest is −inf and −1.

        Raises:
            ValueError: wrong shapes, k below 1, or a query with NaN or infinity.
        """
        queries = self._checked(q, "q")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        k, missing = min(k, len(self)), max(0, k - len(self))
        query_patterns = patterns(queries)
        group = max(1, self.scratch // (2 * 8 * max(1, len(self))))  # keys of all rows, and numpy's copy of them
        best = np.empty((len(query_patterns), k), dtype=np.int64)
        for start in range(0, len(query_patterns), group):
            keys = self._keys(query_patterns[start : start + group])
            if k < len(self):
                keys = np.partition(keys, k - 1, axis=1)[:, :k]
            best[start : start + group] = np.sort(keys, axis=1)
        distances, ids = np.divmod(best, max(1, len(self)))
        scores = np.pad((self.dim - 2 * distances).astype(np.float32), ((0, 0), (0, missing)), constant_values=-np.inf)
        ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=-1)
        if isinstance(q, Tensor):
            return torch.from_numpy(scores).to(q.device), torch.from_numpy(ids).to(q.device)
        return scores, ids

    def _keys(self, query_patterns: np.ndarray) -> np.ndarray:
        """Return distance · rows + id, one number that orders by both: (Q, N)."""
        keys = np.empty((len(query_patterns), len(self)), dtype=np.int64)
        first = 0
        for block in self._blocks:
            ids = np.arange(first, first + len(block))
            for query, out in zip(query_patterns, keys, strict=True):
                distance = np.bitwise_count(block ^ query).sum(axis=1, dtype=np.int64)
                out[first : first + len(block)] = distance * len(self) + ids
            first += len(block)
        return keys

    def _checked(self, x: Any, name: str) -> Tensor:
        rows = as_tensor(x, name)
        check_rows(rows, name, QUERIES)
        check_width(rows, name, self.dim)
        check_finite(rows, name)
        return rows


def patterns(rows: Tensor) -> np.ndarray:
    """Return the signs of (n, D) rows, positive or not, as (n, ceil(D / 64)) uint64."""
    bits = np.packbits((rows > 0).cpu().numpy(), axis=1)
    bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    return np.ascontiguousarray(bits).view(np.uint64)
