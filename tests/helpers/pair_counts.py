"""Cases of the pair counts of the relative similarity loss."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from jasper_fast.losses import relative_exact  # noqa: E402

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3e38, -3e38)
EQUAL = (-0.5, 0.0, 0.25, 0.265, 0.28)
MARGINS = (0.015, 0.0, -0.1, 0.25, 1e-9, 1e30)


def count_as_on_the_cpu(
    values: list[tuple[float, float]], margin: float, exclude_ties: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Check the counts of (student, teacher) scores against the CPU's, which are tested by brute force."""
    x, t = (torch.tensor(column, dtype=dtype) for column in zip(*values, strict=True))
    students = torch.stack((x, x.flip(0)))
    wanted = relative_exact.pair_counts(students, t, margin, exclude_ties)
    with mock.patch.object(relative_exact, "uses_triton", lambda tensors: True):
        counts = relative_exact.count_pairs(students.to(DEVICE), t.to(DEVICE), margin, exclude_ties)
    assert torch.equal(counts[0].cpu(), wanted[0])
    assert torch.equal(counts[1].cpu(), wanted[1])
    size = (wanted[0] * students.double().nan_to_num(0.0, 0.0, 0.0)).abs().sum()
    torch.testing.assert_close(counts[2].cpu(), wanted[2], rtol=1e-12, atol=1e-12 * float(size), equal_nan=True)
