"""``FlatIPIndex``: exact search over a corpus in memory or memory-mapped from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jasper_fast.mips import storage
from jasper_fast.mips.inputs import QUERIES, as_tensor, check_dim, check_rows, check_width
from jasper_fast.mips.segment import BIN, ScanCopy, Segment, bin_maxima, bin_norms, int8_codes
from jasper_fast.mips.top_k import SCRATCH, Precision, search

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
Devices = str | torch.device | Sequence[str | torch.device]
SEGMENT_BYTES = 256 << 20  # reserved at once; the system provides the memory as rows are added
ADD_CHUNK_ROWS = 4096


class FlatIPIndex:
    """Exact inner-product search over stored embeddings.

    Args:
        dim: width of the embeddings.
        device: device that stores and searches them. Several devices, such as ``["cuda:0", "cuda:1"]``, take turns in
            storing segments of at least 256 MB. A search merges the results of all devices.
        dtype: storage dtype. Scores are those of the stored values. "bfloat16" and "int8" (codes and a scale per row)
            round the added rows. "float32" keeps them, together with a shorter copy for scans. The copy is int8 on a
            CPU (5 bytes per element in all) and bfloat16 on a GPU (6 bytes). On a CPU it makes few queries fast.
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
        self._open: _Growing | None = None
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and copy: the rows without reserved memory, which a copy must not share."""
        segments = [segment.compact() for _, segment in self.segments()]
        return {**self.__dict__, "_full": segments, "_open": None}

    def __repr__(self) -> str:
        return f"FlatIPIndex({len(self)} rows, dim={self.dim}, dtype={self.dtype!r}, device={str(self.device)!r})"

    def add(self, x: Any) -> None:
        """Append rows. Their ids continue from len(self). All rows are added, or none.

        Args:
            x: (n, dim) float32, bfloat16, float16 or float64 tensor or array.

        Raises:
            ValueError: wrong shape, or a row with NaN, infinity or a number too large for the dtype.
            TypeError: wrong dtype.
        """
        rows = as_tensor(x, "x")
        check_rows(rows, "x", QUERIES)
        check_width(rows, "x", self.dim)
        stored = torch.float32 if self.dtype == "int8" else DTYPES[self.dtype]
        for start in range(0, len(rows), ADD_CHUNK_ROWS):
            finite = rows[start : start + ADD_CHUNK_ROWS].to(stored).isfinite().all(dim=1)
            if not bool(finite.all()):
                bad = start + int((~finite).nonzero()[0])
                raise ValueError(f"x: row {bad} holds NaN, infinity or a number too large for {self.dtype}")
        for start in range(0, len(rows), ADD_CHUNK_ROWS):
            chunk = rows[start : start + ADD_CHUNK_ROWS].to(self.device)
            while len(chunk):
                if self._open is None:
                    self._open = _Growing(
                        self.dim, DTYPES[self.dtype], self._next_device(), (len(rows) - start) // len(self.devices)
                    )
                taken = self._open.take(chunk)
                chunk = chunk[taken:]
                self._rows += taken
                if self._open.free == 0:
                    self._full.append(self._open.segment())
                    self._open = None

    def search(self, q: Any, k: int, *, valid: Any = None, precision: Precision = "certified") -> tuple[Any, Any]:
        """Return the k stored rows of highest inner product for every query, best first. Ties go to the lower id.

        Args:
            q: (Q, dim) float queries, a tensor or array. Results are of the same kind.
            k: number of rows to return, at least 1.
            valid: rows that may be returned, as in ``topk``. None allows all rows.
            precision: "certified", "exact" or "fast", as in ``topk``.

        Returns:
            scores (Q, k) float32 and ids (Q, k) int64. With fewer than k (valid) rows the rest is −inf and −1.

        Raises:
            ValueError: wrong shapes, k below 1, an unknown precision, or a query with NaN or infinity.
            TypeError: an unsupported dtype.
        """
        queries = as_tensor(q, "q")
        check_rows(queries, "q", QUERIES)
        check_width(queries, "q", self.dim)
        segments = list(self.segments())
        scores, ids = search(
            lambda: segments, len(self), queries.to(self.device), k, precision, valid, self.scratch, self.devices
        )
        scores, ids = scores.to(queries.device), ids.to(queries.device)
        return (scores, ids) if isinstance(q, Tensor) else (scores.numpy(), ids.numpy())

    def reconstruct(self, i: int) -> Tensor:
        """Return the stored embedding of an id, (dim,) float32.

        Args:
            i: id of a row.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"id {i} is not in an index of {len(self)} rows")
        for first, segment in self.segments():
            if i < first + len(segment):
                return segment.values(i - first, i - first + 1, torch.float32)[0].clone()
        raise AssertionError("unreachable: every id below len(self) is in a segment")

    def segments(self) -> Iterator[tuple[int, Segment]]:
        """Yield (id of the first row, rows as stored), in order of ids."""
        first = 0
        for segment in [*self._full, *([self._open.segment()] if self._open is not None else [])]:
            yield first, segment
            first += len(segment)

    def _next_device(self) -> torch.device:
        return self.devices[len(self._full) % len(self.devices)]

    def save(self, path: str | Path) -> None:
        """Write the index as a folder, atomically.

        Args:
            path: folder to write. An index at this path is replaced.

        Raises:
            JasperError: the disk is full, the folder cannot be written, or the path holds something else.
        """
        storage.save(path, self.dim, self.dtype, [segment for _, segment in self.segments()])

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
        dim, dtype, segments = storage.load(path, verify, DTYPES)
        index = cls(dim, device=device, dtype=dtype, scratch=scratch)  # type: ignore[arg-type]
        for segment in segments:
            target = index._next_device()
            moved = segment if target.type == "cpu" else segment.to(target)
            moved.persistent = True
            index._full.append(moved)
        index._rows = sum(map(len, segments))
        return index


class _Growing:
    """A segment that can take more rows. Its memory is reserved at once."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device, expected: int) -> None:
        capacity = max(4096, SEGMENT_BYTES // (dim * dtype.itemsize) // BIN * BIN)
        if device.type == "cuda":  # Each segment costs a search its launches, so rows added together stay together.
            capacity = max(capacity, -(-expected // BIN) * BIN)
        self.filled, self.free = 0, capacity
        self.made: Segment | None = None  # of the filled rows
        self.rows = torch.empty(capacity, dim, dtype=dtype, device=device)
        self.norms = torch.empty(capacity // BIN, dtype=torch.float64, device=device)
        self.scales = torch.empty(capacity if dtype == torch.int8 else 0, device=device)
        self.scan_copy = (
            ScanCopy(
                torch.empty(capacity, dim, dtype=torch.int8),
                torch.empty(capacity),
                torch.zeros(capacity // BIN, dtype=torch.float64),
            )
            if dtype == torch.float32 and device.type == "cpu"
            else None
        )
        if dtype == torch.float32 and device.type == "cuda":
            codes = torch.empty(capacity, dim, dtype=torch.bfloat16, device=device)
            self.scan_copy = ScanCopy(codes, torch.empty(0), torch.empty(0, dtype=torch.float64))

    def take(self, rows: Tensor) -> int:
        """Store as many of the rows as fit, and return their number."""
        count = min(len(rows), self.free)
        start, stop = self.filled, self.filled + count
        new = slice(start, stop)
        if self.rows.dtype == torch.int8:
            self.rows[new], self.scales[new], _ = int8_codes(rows[:count])
        else:
            self.rows[new] = rows[:count]
        if self.scan_copy is not None and self.scan_copy.codes.dtype == torch.bfloat16:
            self.scan_copy.codes[new] = self.rows[new]
        elif self.scan_copy is not None:
            self.scan_copy.codes[new], self.scan_copy.scales[new], error = int8_codes(self.rows[new])
            # A partly filled bin keeps the residual of its first rows.
            bins = slice(start // BIN, -(-stop // BIN))
            error = torch.nn.functional.pad(error, (start % BIN, 0))
            self.scan_copy.residuals[bins] = torch.maximum(self.scan_copy.residuals[bins], bin_maxima(error))
        begun = start // BIN * BIN
        self.norms[begun // BIN : -(-stop // BIN)] = bin_norms(self._view(begun, stop))
        self.filled, self.free = stop, self.free - count
        self.made = None
        return count

    def segment(self) -> Segment:
        """Return the filled rows as views. The segment stays the same until rows are added."""
        if self.made is None:
            self.made = self._filled()
        return self.made

    def _filled(self) -> Segment:
        segment = self._view(0, self.filled)
        segment.persistent = True
        bins = -(-self.filled // BIN)
        segment.norms = self.norms[:bins]
        if self.scan_copy is not None:
            codes, scales = self.scan_copy.codes[: self.filled], self.scan_copy.scales[: self.filled]
            segment.scan_copy = ScanCopy(
                codes, scales, self.scan_copy.residuals[:bins]
            )  # scales and residuals may be empty
        return segment

    def _view(self, start: int, stop: int) -> Segment:
        return Segment(self.rows[start:stop], self.scales[start:stop] if len(self.scales) else self.scales)
