"""Contiguous segments of a corpus: stored rows, the copy that scans read, and the error bounds between the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jasper_fast.ops.dispatch import uses_triton

BIN = 64  # corpus rows that share one error bound; csrc/mips.h has the same number
UNIT_ROUNDOFF = 2.0**-24  # of float32
BLOCK_ROWS = 4096  # rows that the preparation of a segment processes together


def on_gpu(rows: Tensor) -> bool:
    """Return True if the GPU kernels can process these rows."""
    return uses_triton([rows])


def _empty(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


@dataclass
class ScanCopy:
    """A shorter form of float rows for scans: int8 codes on a CPU, bfloat16 rows on a GPU.

    Args:
        codes: (N, D) int8 or bfloat16 values.
        scales: (N,) float32 scales, row ≈ codes · scale. Empty for bfloat16.
        residuals: (ceil(N / 64),) float64 longest ‖row − codes · scale‖ of each bin, rounded up. Empty for bfloat16,
            whose rounding is bounded by the rows' norms.
    """

    codes: Tensor
    scales: Tensor
    residuals: Tensor


@dataclass
class Segment:
    """Rows as stored. Exact scores are those of these rows.

    Args:
        rows: (N, D) float32, bfloat16 or int8 rows, contiguous.
        scales: (N,) float32 scales of int8 rows, with value = code · scale. Empty for other dtypes.
        norms: (ceil(N / 64),) float64 longest row of each bin, rounded up. None until they are computed.
        scan_copy: shorter form of float32 rows. None for other dtypes.
        persistent: True for a segment that is searched repeatedly, so that data derived by searches is kept.
        longest: maximum of ``norms``. None until it is needed.
        derived: data that searches keep for this segment. See threshold.py.
    """

    rows: Tensor
    scales: Tensor = field(default_factory=lambda: _empty(torch.float32))
    norms: Tensor | None = None
    scan_copy: ScanCopy | None = None
    persistent: bool = False
    longest: float | None = None
    derived: dict[object, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def values(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows as floats, (stop − start, D), without a copy if they are stored in this dtype."""
        rows = self.rows[start:stop].to(dtype)
        if self.rows.dtype == torch.int8:
            rows *= self.scales[start:stop, None]
        return rows

    def exact(self, queries: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return fp64 dot products of pairs, (M,). Equal rows get equal scores.

        Args:
            queries: (Q, D) float64 queries.
            pairs: (M,) query numbers and (M,) row numbers.
        """
        if on_gpu(self.rows):  # one order of summation for all searches on a device
            from jasper_fast.kernels import mips_rescore

            with torch.cuda.device_of(self.rows):  # Kernels launch on the current device.
                return mips_rescore.rescore(queries, self.rows, self.scales if len(self.scales) else None, *pairs)
        products = self.rows[pairs[1]].double() * queries[pairs[0]]  # exact: 24 + 24 bits fit 53
        width = products.shape[1]
        while width > 1:  # pairwise, in an order that depends on the width alone
            half = (width + 1) // 2
            products[:, : width - half] += products[:, half:width]
            width = half
        total = products[:, 0]
        return total * self.scales[pairs[1]].double() if self.rows.dtype == torch.int8 else total

    def to(self, device: torch.device) -> Segment:
        """Return the same rows on another device, with the scan copy that is used there."""
        norms = None if self.norms is None else self.norms.to(device)
        segment = Segment(self.rows.to(device), self.scales.to(device), norms)
        if segment.rows.is_cuda and segment.rows.dtype == torch.float32:
            segment.scan_copy = ScanCopy(segment.rows.bfloat16(), _empty(torch.float32), _empty(torch.float64))
        return segment

    def largest_norm(self) -> float:
        """Return the largest norm of all rows, rounded up. Waits for the device once."""
        if self.longest is None:
            assert self.norms is not None
            self.longest = float(self.norms.max())
        return self.longest

    def compact(self) -> Segment:
        """Return the same rows without unused memory and without data derived by searches."""
        norms = None if self.norms is None else _compact(self.norms)
        copy = self.scan_copy
        copy = copy and ScanCopy(*map(_compact, (copy.codes, copy.scales, copy.residuals)))
        return Segment(_compact(self.rows), _compact(self.scales), norms, copy, self.persistent)

    def take(self, numbers: Tensor) -> Segment:
        """Return some of the rows as a new segment, with the bounds of its new bins.

        Args:
            numbers: (n,) int64 row numbers on the CPU, n ≥ 1.
        """
        numbers = numbers.to(self.rows.device)
        segment = Segment(self.rows[numbers], self.scales[numbers] if len(self.scales) else self.scales)
        segment.norms = bin_norms(segment)
        if self.scan_copy is not None and self.scan_copy.codes.dtype == torch.int8:
            segment.scan_copy = int8_scan_copy(segment.rows)
        elif self.scan_copy is not None:
            segment.scan_copy = ScanCopy(self.scan_copy.codes[numbers], _empty(torch.float32), _empty(torch.float64))
        return segment

    def slice(self, start: int, stop: int) -> Segment:
        """Return rows from ``start``, a multiple of 64, to before ``stop``, as views."""
        assert start % BIN == 0
        bins = slice(start // BIN, -(-stop // BIN))
        copy = self.scan_copy
        copy = copy and ScanCopy(
            copy.codes[start:stop],
            copy.scales[start:stop] if len(copy.scales) else copy.scales,
            copy.residuals[bins] if len(copy.residuals) else copy.residuals,
        )
        scales = self.scales[start:stop] if self.rows.dtype == torch.int8 else self.scales
        return Segment(self.rows[start:stop], scales, None if self.norms is None else self.norms[bins], copy)


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor, copied if it is a view of larger memory, which pickle would write out whole."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def bin_norms(segment: Segment) -> Tensor:
    """Return upper bounds of the row norms of each bin, (bins,) float64, not finite for bins with NaN or infinity."""
    from jasper_fast.ops.native import in_use

    if in_use(segment.rows):
        return torch.ops.jasper_fast_native.mips_norms(segment.rows, segment.scales)
    blocks = [segment.values(at, at + BLOCK_ROWS, torch.float64) for at in range(0, len(segment), BLOCK_ROWS)]
    return torch.cat([bin_maxima(block.square().sum(dim=1).sqrt()) for block in blocks]) * (1 + 1e-9)


def bin_maxima(values: Tensor) -> Tensor:
    """Return the maximum of each bin, (N,) -> (ceil(N / 64),). NaN stays NaN."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BIN))
    return padded.view(-1, BIN).amax(dim=1)


def not_finite(segment: Segment, norms: Tensor) -> int | None:
    """Return the first row with NaN or infinity, or None."""
    for bin_number in (~norms.isfinite()).nonzero()[:, 0].tolist():
        rows = segment.values(bin_number * BIN, (bin_number + 1) * BIN, torch.float64)
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        if len(bad):
            return bin_number * BIN + int(bad[0])
    return None


def int8_codes(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize finite float rows to int8.

    Args:
        rows: (N, D) float rows.

    Returns:
        codes −127…127 (N, D), scales (N,) float32, and norms of the rounding errors (N,) float64, rounded up.
    """
    values = rows.double()
    scales = (values.abs().amax(dim=1) / 127).float()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (values / scales.double()[:, None]).round_().clamp_(-127, 127)
    error = torch.addcmul(values, codes, scales.double()[:, None], value=-1.0).square_().sum(dim=1).sqrt_()
    return codes.to(torch.int8), scales, error * (1 + 1e-9)


def int8_scan_copy(rows: Tensor) -> ScanCopy:
    """Return the CPU scan copy of rows on any device, made block by block. It is on the CPU."""
    n, width = rows.shape
    codes, scales = torch.empty(n, width, dtype=torch.int8), torch.empty(n)
    residuals = torch.empty(-(-n // BIN), dtype=torch.float64)
    for start in range(0, n, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n)
        codes[start:stop], scales[start:stop], error = int8_codes(rows[start:stop])
        residuals[start // BIN : -(-stop // BIN)] = bin_maxima(error)
    return ScanCopy(codes, scales, residuals)
