"""Contiguous segments of a corpus: stored rows, what scans read in their place, and the errors between the two."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from jasper_fast.ops.dispatch import uses_triton

BIN = 64  # corpus rows that share one error bound; csrc/mips.h has the same number
UNIT_ROUNDOFF = 2.0**-24  # of float32
BLOCK_ROWS = 4096  # rows that the preparation of a segment processes together
STEP_DIMS, STEP_BYTES = 8, 256  # of the coarse plane; csrc/mips.h has the same numbers
MIN_ROTATION_ROWS, ROTATION_SAMPLE = 16, 64  # rows that decide whether the codes of a segment are those of rotated rows
MAX_ROTATED_ERROR = 0.8  # They are, if this makes the errors of 4-bit codes smaller than this part.
MAX_PLANES_WIDTH = 1 << 19  # The sums of wider rows would not fit 32 bits.


def on_gpu(rows: Tensor) -> bool:
    """Return True if the GPU kernels can process these rows."""
    return uses_triton([rows])


def _empty(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


@dataclass
class Planes:
    """7-bit codes of (N, D) float32 rows on a CPU in two planes: the high four bits, and the low three.

    Args:
        coarse: (ceil(N / 64), ceil(D / 8) · 256) uint8, two codes a byte.
        fine: (N, ceil(D / 4) + ceil(D / 8)) uint8. The first bytes have two bits of four dimensions each, the others
            the last bits of eight.
        coarse_scales: (ceil(N / 64), 64) float32.
        coarse_errors: (ceil(N / 64), 64) float32 norms of the coarse codes' errors, rounded up.
        fine_scales: (N,) float32.
        fine_errors: (N,) float32 norms of the 7-bit codes' errors, rounded up.
        residuals: (ceil(N / 64),) float64 highest error of a bin's coarse or 7-bit codes.
        rotated: (1,) uint8. With 1, the codes are those of rotated rows.
    """

    coarse: Tensor
    fine: Tensor
    coarse_scales: Tensor
    coarse_errors: Tensor
    fine_scales: Tensor
    fine_errors: Tensor
    residuals: Tensor
    rotated: Tensor

    @staticmethod
    def shapes(rows: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shapes and dtypes of the tensors by name."""
        bins = -(-rows // BIN)
        return {
            "coarse": ((bins, -(-width // STEP_DIMS) * STEP_BYTES), torch.uint8),
            "fine": ((rows, -(-width // 4) + -(-width // 8)), torch.uint8),
            "coarse_scales": ((bins, BIN), torch.float32),
            "coarse_errors": ((bins, BIN), torch.float32),
            "fine_scales": ((rows,), torch.float32),
            "fine_errors": ((rows,), torch.float32),
            "residuals": ((bins,), torch.float64),
            "rotated": ((1,), torch.uint8),
        }

    @classmethod
    def empty(cls, rows: int, width: int) -> Planes:
        """Return planes with room for rows, which `encode` fills."""
        planes = cls(
            **{name: torch.empty(shape, dtype=kind) for name, (shape, kind) in cls.shapes(rows, width).items()}
        )
        planes.residuals.zero_()
        planes.rotated.zero_()
        return planes

    @classmethod
    def of(cls, rows: Tensor) -> Planes | None:
        """Return the planes of (N, D) rows, or None if the compiled loops do not take them."""
        if not takes_planes(rows):
            return None
        planes = cls.empty(*rows.shape)
        planes.encode(rows, 0)
        return planes

    def encode(self, rows: Tensor, start: int) -> None:
        """Write the codes of float32 rows (n, D) from row ``start`` on. The first rows decide if all are rotated."""
        if start == 0:
            self.rotated.fill_(rotation_pays(rows))
        self._write(rows, start)

    def _write(self, rows: Tensor, start: int) -> None:
        torch.ops.jasper_fast_native.mips_encode(rows.contiguous(), start, *self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def take(self, numbers: Tensor) -> Planes:
        """Return some of the rows as new planes.

        Args:
            numbers: (n,) int64 row numbers, n ≥ 1.
        """
        bins, places = numbers // BIN, numbers % BIN
        steps, missing = self.coarse.shape[1] // STEP_BYTES, -len(numbers) % BIN
        pieces = self.coarse.view(-1, steps, STEP_BYTES).view(torch.int32)[bins, :, places]  # four bytes of a step each
        coarse = torch.nn.functional.pad(pieces, (0, 0, 0, missing)).view(-1, BIN, steps).transpose(1, 2).contiguous()
        scales, errors = (
            torch.nn.functional.pad(part[bins, places], (0, missing)).view(-1, BIN)
            for part in (self.coarse_scales, self.coarse_errors)
        )
        return Planes(
            coarse.view(torch.uint8).flatten(1),
            self.fine[numbers],
            scales,
            errors,
            self.fine_scales[numbers],
            self.fine_errors[numbers],
            torch.maximum(errors.amax(dim=1), bin_maxima(self.fine_errors[numbers])).double(),
            self.rotated.clone(),
        )

    def slice(self, start: int, stop: int) -> Planes:
        """Return rows from ``start``, a multiple of 64, to before ``stop``, as views."""
        bins, rows = slice(start // BIN, -(-stop // BIN)), slice(start, stop)
        by_row = ("fine", "fine_scales", "fine_errors")
        own = {name: part[rows if name in by_row else bins] for name, part in self.tensors().items()}
        return Planes(**own | {"rotated": self.rotated})


def rotation_pays(rows: Tensor) -> bool:
    """Return True if 4-bit codes of rotated rows have smaller errors, as for one-hot or heavy-tailed rows.

    Args:
        rows: (n, D) float32 rows on a CPU, of which a sample is tried. Few rows say too little to be rotated.
    """
    if len(rows) < MIN_ROTATION_ROWS:
        return False
    sample = rows[:: -(-len(rows) // ROTATION_SAMPLE)]
    norms = sample.double().norm(dim=1)
    totals = []
    for rotated in (0, 1):
        planes = Planes.empty(*sample.shape)
        planes.rotated.fill_(rotated)
        planes._write(sample, 0)
        totals.append(float((planes.coarse_errors.flatten()[: len(sample)] / norms.clamp(min=1e-300)).sum()))
    return totals[1] < MAX_ROTATED_ERROR * totals[0]


def takes_planes(rows: Tensor) -> bool:
    """Return True if rows can have planes: float32 on a CPU with the compiled extension."""
    from jasper_fast.ops.native import in_use

    return rows.dtype == torch.float32 and rows.shape[1] <= MAX_PLANES_WIDTH and in_use(rows)


@dataclass
class Segment:
    """Rows as stored. Exact scores are those of these rows.

    Args:
        rows: (N, D) float32, bfloat16 or int8 rows, contiguous.
        scales: (N,) float32 scales of int8 rows, with value = code · scale. Empty for other dtypes.
        norms: (ceil(N / 64),) float64 longest row of each bin, rounded up. None until they are computed.
        scan_copy: (N, D) bfloat16 copy of float32 rows on a GPU, for scans. None elsewhere.
        planes: codes of float32 rows on a CPU, for scans. None elsewhere, and without the compiled extension.
        persistent: True for a segment that is searched repeatedly, so that data derived by searches is kept.
        longest: maximum of ``norms``. None until it is needed.
        derived: data that searches keep for this segment. See threshold.py.
    """

    rows: Tensor
    scales: Tensor = field(default_factory=lambda: _empty(torch.float32))
    norms: Tensor | None = None
    scan_copy: Tensor | None = None
    planes: Planes | None = None
    persistent: bool = False
    longest: float | None = None
    derived: dict[object, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def nbytes(self) -> int:
        """Return the bytes of the rows, their copies for scans, and what bounds need."""
        tensors = [self.rows, self.scales, *(self.planes.tensors().values() if self.planes is not None else ())]
        tensors += [part for part in (self.norms, self.scan_copy) if part is not None]
        return sum(tensor.nbytes for tensor in tensors)

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
            segment.scan_copy = segment.rows.bfloat16()
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
        copy, planes = self.scan_copy, self.planes
        return Segment(
            _compact(self.rows),
            _compact(self.scales),
            norms,
            copy if copy is None else _compact(copy),
            planes and Planes(*map(_compact, planes.tensors().values())),
            self.persistent,
        )

    def take(self, numbers: Tensor) -> Segment:
        """Return some of the rows as a new segment, with the bounds of its new bins.

        Args:
            numbers: (n,) int64 row numbers on the CPU, n ≥ 1.
        """
        numbers = numbers.to(self.rows.device)
        segment = Segment(self.rows[numbers], self.scales[numbers] if len(self.scales) else self.scales)
        segment.norms = bin_norms(segment)
        if self.planes is not None:
            segment.planes = self.planes.take(numbers)
        if self.scan_copy is not None:
            segment.scan_copy = self.scan_copy[numbers]
        return segment

    def slice(self, start: int, stop: int) -> Segment:
        """Return rows from ``start``, a multiple of 64, to before ``stop``, as views."""
        assert start % BIN == 0
        bins = slice(start // BIN, -(-stop // BIN))
        return Segment(
            self.rows[start:stop],
            self.scales[start:stop] if self.rows.dtype == torch.int8 else self.scales,
            None if self.norms is None else self.norms[bins],
            None if self.scan_copy is None else self.scan_copy[start:stop],
            self.planes and self.planes.slice(start, stop),
        )


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


def set_norms(segment: Segment, norms: Tensor, first_id: int) -> None:
    """Set the segment's norms, or raise ValueError for a row with NaN or infinity."""
    bad = not_finite(segment, norms)
    if bad is not None:
        raise ValueError(f"corpus: row {first_id + bad} holds NaN or infinity")
    segment.norms, segment.longest = norms, None
    segment.derived.clear()


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
