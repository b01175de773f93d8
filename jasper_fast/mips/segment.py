"""Contiguous pieces of a corpus: what is stored, what is scanned, and the error bounds that tie the two together."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BIN = 64  # corpus rows that share one error bound; csrc/mips.h has the same number
UNIT = 2.0**-24  # half a unit in the last place of float32
TRITON = importlib.util.find_spec("triton") is not None
BLOCK_ROWS = 4096  # rows that preparing a piece looks at together


def on_gpu(rows: Tensor) -> bool:
    """Whether our GPU kernels can work on these."""
    return TRITON and rows.is_cuda


def _none(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


@dataclass
class Plane:
    """A shorter form of float rows for scans: on a CPU int8 codes, on a GPU the rows rounded to bfloat16.

    Args:
        codes: (N, D) int8 or bfloat16.
        scales: (N,) float32; row ≈ codes · scale; empty for bfloat16.
        residuals: (ceil(N / 64),) float64, the longest ‖row − codes · scale‖ of each bin, rounded up; empty for
            bfloat16, whose rounding is bounded by the rows' norms.
    """

    codes: Tensor
    scales: Tensor
    residuals: Tensor


@dataclass
class Piece:
    """Rows as stored; scores are true of exactly these.

    Args:
        rows: (N, D) float32, bfloat16 or int8, contiguous.
        scales: (N,) float32 for int8 rows, whose value is code · scale; else empty.
        norms: (ceil(N / 64),) float64, the longest row of each bin, rounded up; None: not known yet.
        plane: of float32 rows, or None.
        lasting: whether it is searched again, so that what a search derives from it may stay.
    """

    rows: Tensor
    scales: Tensor = field(default_factory=lambda: _none(torch.float32))
    norms: Tensor | None = None
    plane: Plane | None = None
    lasting: bool = False
    longest: float | None = None  # of norms, once it was asked for
    derived: dict[object, Any] = field(default_factory=dict, repr=False)  # see sample.py

    def __len__(self) -> int:
        return self.rows.shape[0]

    def values(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows as floats, (stop − start, D); no copy where they are stored so."""
        rows = self.rows[start:stop].to(dtype)
        if self.rows.dtype == torch.int8:
            rows *= self.scales[start:stop, None]
        return rows

    def exact(self, queries: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """fp64 dot products of pairs (query numbers, row numbers), each (M,); equal rows score equally. (M,)"""
        if on_gpu(self.rows):  # one order of summation for all that searches a device
            from jasper_fast.kernels import mips as kernels

            with torch.cuda.device_of(self.rows):  # on which kernels are launched
                return kernels.rescore(queries, self.rows, self.scales if len(self.scales) else None, *pairs)
        products = self.rows[pairs[1]].double() * queries[pairs[0]]  # exact: 24 + 24 bits fit 53
        width = products.shape[1]
        while width > 1:  # pairwise, in an order that depends on the width alone
            half = (width + 1) // 2
            products[:, : width - half] += products[:, half:width]
            width = half
        total = products[:, 0]
        return total * self.scales[pairs[1]].double() if self.rows.dtype == torch.int8 else total

    def to(self, device: torch.device) -> Piece:
        """The same rows on another device, with the plane that is used there."""
        norms = None if self.norms is None else self.norms.to(device)
        piece = Piece(self.rows.to(device), self.scales.to(device), norms)
        if piece.rows.is_cuda and piece.rows.dtype == torch.float32:
            piece.plane = Plane(piece.rows.bfloat16(), _none(torch.float32), _none(torch.float64))
        return piece

    def largest_norm(self) -> float:
        """Of all rows, rounded up; waits for the device once."""
        if self.longest is None:
            assert self.norms is not None
            self.longest = float(self.norms.max())
        return self.longest

    def compact(self) -> Piece:
        """Return the same rows without memory around them, and without what searches derived."""
        norms = None if self.norms is None else _compact(self.norms)
        plane = self.plane and Plane(*map(_compact, (self.plane.codes, self.plane.scales, self.plane.residuals)))
        return Piece(_compact(self.rows), _compact(self.scales), norms, plane, self.lasting)

    def slice(self, start: int, stop: int) -> Piece:
        """Rows from ``start``, a multiple of 64, to before ``stop``; views."""
        assert start % BIN == 0
        bins = slice(start // BIN, -(-stop // BIN))
        plane = self.plane and Plane(
            self.plane.codes[start:stop],
            self.plane.scales[start:stop] if len(self.plane.scales) else self.plane.scales,
            self.plane.residuals[bins] if len(self.plane.residuals) else self.plane.residuals,
        )
        scales = self.scales[start:stop] if self.rows.dtype == torch.int8 else self.scales
        return Piece(self.rows[start:stop], scales, None if self.norms is None else self.norms[bins], plane)


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor, copied if it is a view of larger memory, which pickle would write out whole."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def bin_norms(piece: Piece) -> Tensor:
    """Upper bounds of the row norms of each bin, (bins,) float64; not finite where a row holds NaN or infinity."""
    from jasper_fast import extension

    if extension.extension_path() is not None and piece.rows.device.type == "cpu":
        return torch.ops.jasper_fast_native.mips_norms(piece.rows, piece.scales)
    blocks = [piece.values(at, at + BLOCK_ROWS, torch.float64) for at in range(0, len(piece), BLOCK_ROWS)]
    return torch.cat([bin_maxima(block.square().sum(dim=1).sqrt()) for block in blocks]) * (1 + 1e-9)


def bin_maxima(values: Tensor) -> Tensor:
    """(N,) -> (ceil(N / 64),); NaN stays NaN."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BIN))
    return padded.view(-1, BIN).amax(dim=1)


def not_finite(piece: Piece, norms: Tensor) -> int | None:
    """The first row that holds NaN or infinity, or None."""
    for bin_number in (~norms.isfinite()).nonzero()[:, 0].tolist():
        rows = piece.values(bin_number * BIN, (bin_number + 1) * BIN, torch.float64)
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        if len(bad):
            return bin_number * BIN + int(bad[0])
    return None


def int8_codes(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of finite float rows: codes −127…127 (N, D), scales (N,) float32, the norm of what rounding left (N,) float64."""
    values = rows.double()
    scales = (values.abs().amax(dim=1) / 127).float()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (values / scales.double()[:, None]).round_().clamp_(-127, 127)
    left = torch.addcmul(values, codes, scales.double()[:, None], value=-1.0).square_().sum(dim=1).sqrt_()
    return codes.to(torch.int8), scales, left * (1 + 1e-9)


def int8_plane(rows: Tensor) -> Plane:
    """A CPU's plane of a piece's rows, on any device, made block by block; it is on the CPU."""
    n, width = rows.shape
    codes, scales = torch.empty(n, width, dtype=torch.int8), torch.empty(n)
    residuals = torch.empty(-(-n // BIN), dtype=torch.float64)
    for start in range(0, n, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n)
        codes[start:stop], scales[start:stop], left = int8_codes(rows[start:stop])
        residuals[start // BIN : -(-stop // BIN)] = bin_maxima(left)
    return Plane(codes, scales, residuals)
