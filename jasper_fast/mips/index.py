"""``FlatIPIndex``: a corpus that is kept, in memory or memory-mapped from disk, and searched exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jasper_fast.mips import storage
from jasper_fast.mips.inputs import QUERIES, as_tensor, check_rows
from jasper_fast.mips.pieces import BIN, Piece, Plane, bin_maxima, bin_norms, int8_codes
from jasper_fast.mips.search import SCRATCH, Precision, search

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
Devices = str | torch.device | Sequence[str | torch.device]
PIECE_BYTES = 256 << 20  # reserved, and touched as rows come
ADDED_AT_ONCE = 4096  # rows


class FlatIPIndex:
    """Exact inner-product search over stored vectors.

    Args:
        dim: width of the vectors.
        device: where they are stored and searched; several, ``["cuda:0", "cuda:1"]``, share the vectors, in turn in
            pieces of 256 MB and more, and a search merges what each finds.
        dtype: how they are stored, and with that what their scores are: "bfloat16" and "int8" (codes and a scale per
            row) round what is added; "float32" keeps it, and beside it what scans read: on a CPU an int8 plane (5
            bytes an element in all) that makes few queries fast, on a GPU a bfloat16 one (6 bytes).
        scratch: bytes that a search may use beside the vectors, queries and results.
    """

    def __init__(
        self,
        dim: int,
        *,
        device: Devices = "cpu",
        dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16",
        scratch: int = SCRATCH,
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be a whole number of at least 1, got {dim!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        self.dim = dim
        named = [device] if isinstance(device, str | torch.device) else list(device)
        if not named:
            raise ValueError("device must name at least one device, got none")
        self.devices = [torch.device(name) for name in named]
        self.device = self.devices[0]
        self.dtype = dtype
        self.scratch = scratch
        self._full: list[Piece] = []
        self._open: _Growing | None = None
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and copy keep: the rows, without the room for more, which a copy must not share."""
        pieces = [piece.compact() for _, piece in self.pieces()]
        return {**self.__dict__, "_full": pieces, "_open": None}

    def __repr__(self) -> str:
        return f"FlatIPIndex({len(self)} rows, dim={self.dim}, dtype={self.dtype!r}, device={str(self.device)!r})"

    def add(self, x: Any) -> None:
        """Append rows; their ids go on from len(self). All are added, or none.

        Args:
            x: (n, dim) float32, bfloat16, float16 or float64 tensor or array.

        Raises:
            ValueError: wrong shape, or a row that holds NaN or infinity or is too large for the dtype.
            TypeError: wrong dtype.
        """
        rows = as_tensor(x, "x")
        check_rows(rows, "x", QUERIES)
        if rows.shape[1] != self.dim:
            raise ValueError(f"x has width {rows.shape[1]}, the index {self.dim}")
        stored = torch.float32 if self.dtype == "int8" else DTYPES[self.dtype]
        for start in range(0, len(rows), ADDED_AT_ONCE):
            finite = rows[start : start + ADDED_AT_ONCE].to(stored).isfinite().all(dim=1)
            if not bool(finite.all()):
                bad = start + int((~finite).nonzero()[0])
                raise ValueError(f"x: row {bad} holds NaN, infinity or a number too large for {self.dtype}")
        for start in range(0, len(rows), ADDED_AT_ONCE):
            left = rows[start : start + ADDED_AT_ONCE].to(self.device)
            while len(left):
                if self._open is None:
                    self._open = _Growing(
                        self.dim, DTYPES[self.dtype], self._next_device(), (len(rows) - start) // len(self.devices)
                    )
                taken = self._open.take(left)
                left = left[taken:]
                self._rows += taken
                if self._open.room == 0:
                    self._full.append(self._open.piece())
                    self._open = None

    def search(self, q: Any, k: int, *, valid: Any = None, precision: Precision = "certified") -> tuple[Any, Any]:
        """The k stored rows of highest inner product for every query, best first, ties by the lower id.

        Args, returns and errors are those of ``topk``.
        """
        queries = as_tensor(q, "q")
        check_rows(queries, "q", QUERIES)
        if queries.shape[1] != self.dim:
            raise ValueError(f"q has width {queries.shape[1]}, the index {self.dim}")
        pieces = list(self.pieces())
        scores, ids = search(
            lambda: pieces, len(self), queries.to(self.device), k, precision, valid, self.scratch, self.devices
        )
        scores, ids = scores.to(queries.device), ids.to(queries.device)
        return (scores, ids) if isinstance(q, Tensor) else (scores.numpy(), ids.numpy())

    def reconstruct(self, i: int) -> Tensor:
        """The stored vector of an id, (dim,) float32."""
        if not 0 <= i < len(self):
            raise IndexError(f"id {i} is not in an index of {len(self)} rows")
        for first, piece in self.pieces():
            if i < first + len(piece):
                return piece.values(i - first, i - first + 1, torch.float32)[0].clone()
        raise AssertionError("unreachable: every id below len(self) lies in a piece")

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """(id of the first row, rows as stored), in order of ids."""
        first = 0
        for piece in [*self._full, *([self._open.piece()] if self._open is not None else [])]:
            yield first, piece
            first += len(piece)

    def _next_device(self) -> torch.device:
        return self.devices[len(self._full) % len(self.devices)]

    def save(self, path: str | Path) -> None:
        """Write the index as a folder: whole or not at all; an index that is there already gives way.

        Raises:
            JasperError: the disk is full or the place cannot be written, or something else stands there.
        """
        storage.save(path, self.dim, self.dtype, [piece for _, piece in self.pieces()])

    @classmethod
    def load(
        cls, path: str | Path, *, device: Devices = "cpu", verify: bool = True, scratch: int = SCRATCH
    ) -> FlatIPIndex:
        """Open a saved index. On a CPU the vectors stay memory-mapped: they are read as searches need them.

        Args:
            path: the folder.
            device: where to search.
            verify: read every file once and compare its checksum.
            scratch: as for a new index.

        Raises:
            JasperError: no index there, or it is damaged.
        """
        dim, dtype, pieces = storage.load(path, verify, DTYPES)
        index = cls(dim, device=device, dtype=dtype, scratch=scratch)  # type: ignore[arg-type]
        for piece in pieces:
            place = index._next_device()
            kept = piece if place.type == "cpu" else piece.to(place)
            kept.lasting = True
            index._full.append(kept)
        index._rows = sum(map(len, pieces))
        return index


class _Growing:
    """A piece with room: memory is reserved at once and touched as rows come."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device, coming: int) -> None:
        capacity = max(4096, PIECE_BYTES // (dim * dtype.itemsize) // BIN * BIN)
        if device.type == "cuda":  # where every piece costs a search its launches, what comes at once stays together
            capacity = max(capacity, -(-coming // BIN) * BIN)
        self.filled, self.room = 0, capacity
        self.made: Piece | None = None  # of what is filled
        self.rows = torch.empty(capacity, dim, dtype=dtype, device=device)
        self.norms = torch.empty(capacity // BIN, dtype=torch.float64, device=device)
        self.scales = torch.empty(capacity if dtype == torch.int8 else 0, device=device)
        self.plane = (
            Plane(
                torch.empty(capacity, dim, dtype=torch.int8),
                torch.empty(capacity),
                torch.zeros(capacity // BIN, dtype=torch.float64),
            )
            if dtype == torch.float32 and device.type == "cpu"
            else None
        )
        if dtype == torch.float32 and device.type == "cuda":
            codes = torch.empty(capacity, dim, dtype=torch.bfloat16, device=device)
            self.plane = Plane(codes, torch.empty(0), torch.empty(0, dtype=torch.float64))

    def take(self, rows: Tensor) -> int:
        """Stores as many of the rows as fit; returns how many."""
        count = min(len(rows), self.room)
        start, stop = self.filled, self.filled + count
        new = slice(start, stop)
        if self.rows.dtype == torch.int8:
            self.rows[new], self.scales[new], _ = int8_codes(rows[:count])
        else:
            self.rows[new] = rows[:count]
        if self.plane is not None and self.plane.codes.dtype == torch.bfloat16:
            self.plane.codes[new] = self.rows[new]
        elif self.plane is not None:
            self.plane.codes[new], self.plane.scales[new], left = int8_codes(self.rows[new])
            # A bin that was begun earlier keeps what its first rows left.
            bins = slice(start // BIN, -(-stop // BIN))
            left = torch.nn.functional.pad(left, (start % BIN, 0))
            self.plane.residuals[bins] = torch.maximum(self.plane.residuals[bins], bin_maxima(left))
        begun = start // BIN * BIN
        self.norms[begun // BIN : -(-stop // BIN)] = bin_norms(self._view(begun, stop))
        self.filled, self.room = stop, self.room - count
        self.made = None
        return count

    def piece(self) -> Piece:
        """What is filled, as views; the same piece until rows come."""
        if self.made is None:
            self.made = self._filled()
        return self.made

    def _filled(self) -> Piece:
        piece = self._view(0, self.filled)
        piece.lasting = True
        bins = -(-self.filled // BIN)
        piece.norms = self.norms[:bins]
        if self.plane is not None:
            codes, scales = self.plane.codes[: self.filled], self.plane.scales[: self.filled]
            piece.plane = Plane(codes, scales, self.plane.residuals[:bins])  # scales and residuals may be empty
        return piece

    def _view(self, start: int, stop: int) -> Piece:
        return Piece(self.rows[start:stop], self.scales[start:stop] if len(self.scales) else self.scales)
