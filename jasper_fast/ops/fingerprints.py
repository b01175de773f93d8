"""Numbers that are equal for equal rows, to find duplicates without comparing all pairs of rows."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**20  # elements of a temporary
MIX, STEP = 0x5851F42D4C957F2D, 0x14057B7EF767814F  # odd 63-bit constants
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_fingerprints(rows: Tensor) -> Tensor:
    """Return a number for each row: equal for equal rows, and for others with a chance of about 2^-60.

    Args:
        rows: floating-point numbers (B, D), any strides. 0.0 and -0.0 are equal.

    Returns:
        (B,) int64.
    """
    # Each element is mixed with its column's factor, so that neither order nor a few common values cancel.
    columns = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    factors = _mix(columns * STEP) | 1
    found = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    height = max(1, CHUNK // max(1, rows.shape[1]))
    for begin in range(0, len(rows), height):
        part = (rows[begin : begin + height] + 0.0).contiguous()  # -0.0 becomes 0.0
        bits = part.view(BITS[part.element_size()]).to(torch.int64)
        found[begin : begin + height] = _mix(bits.mul_(MIX)).mul_(factors).sum(dim=1)
    return found


def _mix(numbers: Tensor) -> Tensor:
    return (numbers ^ (numbers >> 32)) * MIX
