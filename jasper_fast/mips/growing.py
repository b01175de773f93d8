"""A segment that can take more rows."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.mips.segment import BIN, ScanCopy, Segment, bin_maxima, bin_norms, int8_codes

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
