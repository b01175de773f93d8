"""``FlatIPIndex``: exact search over a corpus in memory or memory-mapped from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jasper_fast.mips import storage
from jasper_fast.mips.growing import Growing
from jasper_fast.mips.ids import RowIds
from jasper_fast.mips.inputs import QUERIES, as_tensor, check_dim, check_rows, check_width
from jasper_fast.mips.segment import Segment
from jasper_fast.mips.top_k import SCRATCH, Precision, search

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
Devices = str | torch.device | Sequence[str | torch.device]
ADD_CHUNK_ROWS = 4096


class FlatIPIndex:
    """Exact inner-product search over stored embeddings.

    Args:
        dim: width of the embeddings.
        device: device that stores and searches them. Several devices, such as ``["cuda:0", "cuda:1"]``, take turns in
            storing segments of at least 256 MB. A search merges the results of all devices.
        dtype: storage dtype. Scores are those of the stored values. The default, "bfloat16", takes 2 bytes per element.
            It rounds the added rows to 8 significant bits. So scores of unit rows change by up to 0.004, and near-ties
            may change places. "int8" (codes and a scale per row) takes 1 byte.
            "float32" keeps the rows, together with shorter codes for scans. On a CPU these are two planes of 4 and 3
            bits, which makes 4.9 bytes per element at width 384. On a GPU they are bfloat16 (6 bytes).
        scratch: bytes that a search may use in addition to the embeddings, queries and results.

    Raises:
        ValueError: a width below 1, an unknown dtype, or no device.

    Example:
        >>> import numpy as np
        >>> index = FlatIPIndex(3, dtype="float32")
        >>> index.add(np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]))
        >>> scores, ids = index.search(np.array([[0.25, 0.75, 0]]), k=2)
        >>> scores.tolist(), ids.tolist()
        ([[0.75, 0.25]], [[1, 0]])
        >>> index.remove([1])
        >>> index.search(np.array([[0.25, 0.75, 0]]), k=1)[1].tolist(), index.ids.tolist()
        ([[0]], [0, 2])

        Ids that the user gives:

        >>> index = FlatIPIndex(2)
        >>> index.add(np.eye(2), ids=[700, 42])
        >>> index.search(np.array([[0.0, 1]]), k=1)[1].tolist()
        [[42]]
    """

    def __init__(
        self,
        dim: int,
        *,
        device: Devices = "cpu",
        dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16",
        scratch: int = SCRATCH,
    ) -> None:
        self.dim = check_dim(dim)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        devices = [device] if isinstance(device, str | torch.device) else list(device)
        if not devices:
            raise ValueError("device must name at least one device, got none")
        self.devices = [torch.device(name) for name in devices]
        self.device = self.devices[0]
        self.dtype = dtype
        self.scratch = scratch
        self._full: list[Segment] = []
        self._open: Growing | None = None
        self._rows = 0
        self._ids = RowIds()
        self._searched: tuple[int, int, list[Tensor]] | None = None

    def __len__(self) -> int:
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and copy: the rows without reserved memory, which a copy must not share."""
        segments = [segment.compact() for _, segment in self.segments()]
        return {**self.__dict__, "_full": segments, "_open": None}

    def __repr__(self) -> str:
        return f"FlatIPIndex({len(self)} rows, dim={self.dim}, dtype={self.dtype!r}, device={str(self.device)!r})"

    @property
    def ids(self) -> Tensor:
        """Ids of the rows in their order, (N,) int64 on the CPU."""
        return self._ids.numbers(len(self))

    def ids_of(self, rows: Tensor) -> Tensor:
        """Return the ids of row numbers, int64 of the same shape. −1 stays −1."""
        return self._ids.of_rows(rows)

    def rows_of(self, ids: Tensor) -> Tensor:
        """Return the row numbers of ids, int64 of the same shape, and −1 for unknown ids."""
        found, rows = self._ids.find(ids, len(self))
        return torch.where(found, rows, -1)

    def add(self, x: Any, ids: Any = None) -> None:
        """Append rows. All rows are added, or none.

        Args:
            x: (n, dim) float32, bfloat16, float16 or float64 tensor or array.
            ids: (n,) integers that are not negative, one new id per row. An index takes ids at every ``add`` or at
                none. None numbers the rows from 0. The numbers of removed rows are not used again.

        Raises:
            ValueError: wrong shape, a row with NaN, infinity or a number too large for the dtype, or an unusable id.
            TypeError: wrong dtype.
        """
        rows = as_tensor(x, "x")
        check_rows(rows, "x", QUERIES)
        check_width(rows, "x", self.dim)
        stored = torch.float32 if self.dtype == "int8" else DTYPES[self.dtype]
        for start in range(0, len(rows), ADD_CHUNK_ROWS):
            chunk = rows[start : start + ADD_CHUNK_ROWS].to(stored)
            if not bool(torch.stack(chunk.aminmax()).isfinite().all()):
                bad = start + int((~chunk.isfinite().all(dim=1)).nonzero()[0])
                raise ValueError(f"x: row {bad} holds NaN, infinity or a number too large for {self.dtype}")
        self._ids.append(len(self), len(rows), ids)
        for start in range(0, len(rows), ADD_CHUNK_ROWS):
            chunk = rows[start : start + ADD_CHUNK_ROWS].to(self.device)
            while len(chunk):
                if self._open is None:
                    self._open = Growing(
                        self.dim, DTYPES[self.dtype], self._next_device(), (len(rows) - start) // len(self.devices)
                    )
                taken = self._open.take(chunk)
                chunk = chunk[taken:]
                self._rows += taken
                if self._open.free == 0:
                    self._full.append(self._open.segment())
                    self._open = None

    def search(self, q: Any, k: int, *, valid: Any = None, precision: Precision = "certified") -> tuple[Any, Any]:
        """Return the k stored rows of highest inner product for every query, best first.

        Ties go to the row that was added first.

        Args:
            q: (Q, dim) float queries, a tensor or array. Results are of the same kind.
            k: number of rows to return, at least 1.
            valid: rows that may be returned: bool, (N,) or (Q, N) in the order of ``ids``, or ids, (n,) integers. None
                allows all rows.
            precision: "certified", "exact" or "fast", as in ``topk``.

        Returns:
            scores (Q, k) float32 and ids (Q, k) int64. With fewer than k (valid) rows the rest is −inf and −1.

        Raises:
            ValueError: wrong shapes, k below 1, an unknown precision or id, or a query with NaN or infinity.
            TypeError: an unsupported dtype.
        """
        queries = as_tensor(q, "q")
        check_rows(queries, "q", QUERIES)
        check_width(queries, "q", self.dim)
        segments = list(self.segments())
        valid = self._ids.valid_rows(valid, len(self))
        survivors: list[Tensor] = []
        scores, rows = search(
            lambda: segments, len(self), queries.to(self.device), k, precision, valid, self.scratch, self.devices,
            survivors, lasting=True,
        )  # fmt: skip
        self._searched = len(queries), len(self), survivors
        scores, ids = scores.to(queries.device), self._ids.of_rows(rows).to(queries.device)
        return (scores, ids) if isinstance(q, Tensor) else (scores.numpy(), ids.numpy())

    def stats(self) -> dict[str, float]:
        """Return how much the last search of a float32 index on a CPU read. Empty before the first search.

        Returns:
            ``queries`` and ``rows``, and means per query: ``coarse``, the rows that the 4-bit scores kept, and
            ``rescored``, the rows that were then rescored in fp64. If most rows are rescored, as with near-ties, the
            following ones are rescored at once, and count as kept. Both are 0 for queries that were searched without
            4-bit codes. These are queries of other dtypes or devices, in ``exact``, with few valid rows, and without
            the compiled extension. They are also 0 for queries left to matrix products, because the first of them
            showed that 4-bit codes keep most rows.

        Example:
            >>> index = FlatIPIndex(4, dtype="float32")
            >>> index.stats()
            {}
        """
        if self._searched is None:
            return {}
        size, rows, survivors = self._searched
        coarse, rescored = (sum(int(part[:, kind].sum()) for part in survivors) / max(1, size) for kind in (0, 1))
        return {"queries": size, "rows": rows, "coarse": coarse, "rescored": rescored}

    def reconstruct(self, i: int) -> Tensor:
        """Return the stored embedding of an id as a tensor, (dim,) float32 on the index's device.

        It is a copy, as rounded by the storage dtype. Use ``.numpy()`` for an array.

        Args:
            i: id of a row.

        Raises:
            IndexError: no such row.
        """
        try:
            row = int(self._ids.rows([i], len(self))[0])
        except (TypeError, ValueError):
            raise IndexError(f"id {i} is not in an index of {len(self)} rows") from None
        for first, segment in self.segments():
            if row < first + len(segment):
                return segment.values(row - first, row - first + 1, torch.float32)[0].clone()
        raise AssertionError("unreachable: every row below len(self) is in a segment")

    def remove(self, ids: Any, *, renumber: bool = False) -> None:
        """Remove rows. All of them are removed, or none. The ids of the other rows stay the same.

        The rows that are left are copied in each segment that loses some.

        Args:
            ids: (n,) integers: the ids to remove, each once.
            renumber: number the rows that are left from 0 again. The index must have no ids of the user's own.

        Raises:
            ValueError: an id is not in the index, or is given twice, or the ids are the user's own and ``renumber`` is
                True.
            TypeError: the ids are no integers.
        """
        rows = self._ids.rows(ids, len(self))
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[rows] = False
        self._ids.keep(keep, renumber)
        left: list[Segment] = []
        for first, segment in self.segments():
            part = keep[first : first + len(segment)]
            if part.any():
                left.append(segment if part.all() else segment.take(part.nonzero()[:, 0]))
        self._full, self._open, self._rows = [], None, int(keep.sum())
        for segment in left:  # Searches on several devices expect the segments in turn.
            target = self._next_device()
            self._full.append(segment if segment.rows.device == target else segment.to(target))
            self._full[-1].persistent = True

    def segments(self) -> Iterator[tuple[int, Segment]]:
        """Yield (number of the first row, rows as stored), in order."""
        first = 0
        for segment in [*self._full, *([self._open.segment()] if self._open is not None else [])]:
            yield first, segment
            first += len(segment)

    def _next_device(self) -> torch.device:
        return self.devices[len(self._full) % len(self.devices)]

    def save(self, path: str | Path) -> None:
        """Write the index as a folder, atomically.

        Args:
            path: folder to write. An index at this path is replaced, as `faiss.write_index` replaces a file. A folder
                with anything else is an error.

        Raises:
            JasperError: the disk is full, the folder cannot be written, or the path holds something else.
        """
        storage.save(path, self.dim, self.dtype, [segment for _, segment in self.segments()], self._ids)

    @classmethod
    def load(
        cls, path: str | Path, *, device: Devices = "cpu", verify: bool = True, scratch: int = SCRATCH
    ) -> FlatIPIndex:
        """Open a saved index. On a CPU the embeddings stay memory-mapped, and searches read them as needed.

        Args:
            path: folder of the index.
            device: device that searches the index, or several.
            verify: read every file once and compare its checksum.
            scratch: bytes that a search may use, as for a new index.

        Raises:
            JasperError: the folder has no index, or a damaged one.
        """
        dim, dtype, segments, ids = storage.load(path, verify, DTYPES)
        index = cls(dim, device=device, dtype=dtype, scratch=scratch)  # type: ignore[arg-type]
        for segment in segments:
            target = index._next_device()
            moved = segment if target.type == "cpu" else segment.to(target)
            moved.persistent = True
            index._full.append(moved)
        index._rows, index._ids = sum(map(len, segments)), ids
        return index
