"""Data of a segment from which a GPU search sets its thresholds: float32 norms and a random sample of rows.

Both are computed once for a `Segment`, whose rows never change. Added or overwritten rows make a new segment. A segment
of an index keeps thin samples only, of at most one row in 16. Together they take less than an eighth of what a scan
reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jasper_fast.mips.segment import BIN, UNIT_ROUNDOFF, Segment

MIN_CACHED_STEP = 16  # Samples of one row in 16, or thinner, are small enough to keep.


@dataclass(frozen=True)
class Sample:
    """Sampled rows in rising order.

    Args:
        numbers: (n,) int64 row numbers.
        rows: (n, D) rows in the form that scans read.
        norms: (n,) float32 norms of the rows' bins.
        scales: (n,) float32 scales of int8 rows. None for other dtypes.
    """

    numbers: Tensor
    rows: Tensor
    norms: Tensor
    scales: Tensor | None


def float32_norms(segment: Segment) -> Tensor:
    """Return ``segment.norms`` as float32, rounded up: (bins,)."""

    def make() -> Tensor:
        assert segment.norms is not None
        return (segment.norms * (1 + 2 * UNIT_ROUNDOFF)).float()  # The factor makes rounding go up.

    return _cached(segment, "norms", make)


def sample(segment: Segment, rows: Tensor, step: int) -> Sample:
    """Draw one row in every ``step`` at random. Repeated calls return the same rows.

    Args:
        segment: segment to sample.
        rows: (N, D) rows of the segment in the form that scans read.
        step: number of rows that one sampled row represents.
    """

    def make() -> Sample:
        numbers = _random_rows(len(segment), step, rows.device)
        scales = segment.scales[numbers] if segment.rows.dtype == torch.int8 else None
        return Sample(numbers, rows[numbers], float32_norms(segment)[numbers // BIN], scales)

    if segment.persistent and step < MIN_CACHED_STEP:
        return make()
    return _cached(segment, (step, rows.dtype), make)


def prepare(segment: Segment, rows: Tensor, step: int) -> None:
    """Compute what a search with this step keeps, and let the current stream wait for it. Arguments as in `sample`."""
    float32_norms(segment)
    if step > 1:
        sample(segment, rows, step)


def _cached(segment: Segment, key: object, make: Callable[[], Any]) -> Any:
    """Return the result of ``make``, computed once for a segment on any stream."""
    if key not in segment.derived:
        value, made = make(), None
        if segment.rows.is_cuda:
            made = torch.cuda.Event()
            made.record()
        segment.derived[key] = (value, made)
    value, made = segment.derived[key]
    if made is not None and not torch.cuda.is_current_stream_capturing():  # `prepare` waits before a graph
        made.wait()  # The device waits, not the host.
    return value


def _random_rows(rows: int, step: int, device: torch.device) -> Tensor:
    """Draw (rows // step,) int64 row numbers, one in each run of ``step`` rows."""
    generator = torch.Generator(device).manual_seed(0)
    count = rows // step
    return torch.arange(count, device=device) * step + torch.randint(
        0, step, (count,), generator=generator, device=device
    )
