"""What a search on a GPU needs of a piece whatever is asked: short norms, and a random sample of its rows.

Computed once for a `Piece`, which stands for rows that do not change: rows that came or were overwritten are another.
A piece of an index, which is searched again and again, keeps thin samples only: one row in 16 at most, and with thinner
ones for other k and numbers of queries less than an eighth of what scans read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jasper_fast.mips.pieces import BIN, UNIT, Piece

KEPT_STEP = 16  # one row in so many, or fewer, is little enough to keep


@dataclass(frozen=True)
class Sample:
    """Rows in rising order.

    Args:
        numbers: (n,) int64.
        plane: (n, D), as they are scanned.
        norms: (n,) float32, of their bins.
        scales: (n,) float32 for int8 rows, else None.
    """

    numbers: Tensor
    plane: Tensor
    norms: Tensor
    scales: Tensor | None


def short_norms(piece: Piece) -> Tensor:
    """``piece.norms`` as float32, rounded up. (bins,)"""

    def make() -> Tensor:
        assert piece.norms is not None
        return (piece.norms * (1 + 2 * UNIT)).float()  # the factor makes rounding go up

    return _once(piece, "norms", make)


def sample(piece: Piece, plane: Tensor, step: int) -> Sample:
    """One row in every ``step``, at random; the same ones each time."""

    def make() -> Sample:
        numbers = _drawn(len(piece), step, plane.device)
        scales = piece.scales[numbers] if piece.rows.dtype == torch.int8 else None
        return Sample(numbers, plane[numbers], short_norms(piece)[numbers // BIN], scales)

    if piece.lasting and step < KEPT_STEP:
        return make()
    return _once(piece, (step, plane.dtype), make)


def _once(piece: Piece, key: object, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, computed once for a piece, on whatever stream that was."""
    if key not in piece.derived:
        value, made = make(), None
        if piece.rows.is_cuda:
            made = torch.cuda.Event()
            made.record()
        piece.derived[key] = (value, made)
    value, made = piece.derived[key]
    if made is not None:
        made.wait()  # which is for the device to do
    return value


def _drawn(rows: int, step: int, device: torch.device) -> Tensor:
    """(rows // step,) int64"""
    generator = torch.Generator(device).manual_seed(0)
    count = rows // step
    return torch.arange(count, device=device) * step + torch.randint(
        0, step, (count,), generator=generator, device=device
    )
