"""A segment that can take more rows."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.mips.segment import BIN, Planes, Segment, bin_norms, int8_codes, takes_planes

SEGMENT_BYTES = 256 << 20  # reserved at once; the system provides the memory as rows are added


class Growing:
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
        float_rows = dtype == torch.float32
        self.planes = Planes.empty(capacity, dim) if float_rows and takes_planes(self.rows) else None
        copied = float_rows and device.type == "cuda"
        self.scan_copy = torch.empty(capacity, dim, dtype=torch.bfloat16, device=device) if copied else None

    def take(self, rows: Tensor) -> int:
        """Store as many of the rows as fit, and return their number."""
        count = min(len(rows), self.free)
        start, stop = self.filled, self.filled + count
        new = slice(start, stop)
        if self.rows.dtype == torch.int8:
            self.rows[new], self.scales[new], _ = int8_codes(rows[:count])
        else:
            self.rows[new] = rows[:count]
        if self.scan_copy is not None:
            self.scan_copy[new] = self.rows[new]
        if self.planes is not None:
            self.planes.encode(self.rows[new], start)
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
        segment.norms = self.norms[: -(-self.filled // BIN)]
        segment.scan_copy = None if self.scan_copy is None else self.scan_copy[: self.filled]
        segment.planes = self.planes and self.planes.slice(0, self.filled)
        return segment

    def _view(self, start: int, stop: int) -> Segment:
        return Segment(self.rows[start:stop], self.scales[start:stop] if len(self.scales) else self.scales)
