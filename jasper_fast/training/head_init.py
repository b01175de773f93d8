"""Where narrow heads begin: the principal axes of full width's vectors, turned at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jasper_fast.config import StageConfig
from jasper_fast.model import Student
from jasper_fast.sharding import set_whole, whole

PRINCIPAL_ROWS = 16_384  # texts whose vectors give the axes


def start_at_principal_axes(student: Student, stage: StageConfig, states: Tensor, seed: int) -> None:
    """Set the stage's narrow heads to the principal axes of the widest head's vectors of some states, (n, H).

    All ranks of a sharded student must call it alike.
    """
    narrow = [width for width in stage.heads if width != student.widths[0]]
    linear: Any = student.heads[str(student.widths[0])]
    weight, bias = whole(linear.weight.detach()).cpu(), whole(linear.bias.detach()).cpu()
    for width, (axes, shift) in principal_heads(states, weight, bias, narrow, seed).items():
        linear = student.heads[str(width)]
        set_whole(linear.weight, axes)
        set_whole(linear.bias, shift)


def principal_heads(
    states: Tensor, weight: Tensor, bias: Tensor, widths: Sequence[int], seed: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Linear maps from states to the principal coordinates of the widest head's vectors, by width.

    The axes of each width are turned by a random rotation. It changes no inner product, and spreads over all
    coordinates what signs would otherwise lose in the large ones.

    Args:
        states: (n, H) pooled states, n at least the largest width.
        weight, bias: of the widest head, (D, H) and (D,).
        widths: below D.
        seed: of the rotations.

    Returns:
        {width: (weight (width, H), bias (width,))}, float32.

    Raises:
        ValueError: too few states, or a width that is not below D.
    """
    if not widths or max(widths) >= len(weight) or max(widths) > len(states):
        raise ValueError(f"widths {list(widths)} of {len(states)} vectors {len(weight)} wide have no principal axes")
    weight, bias = weight.double(), bias.double()
    vectors = states.double() @ weight.T + bias  # (n, D)
    length = vectors.norm(dim=1).mean()  # one for all rows: the map is to be linear
    weight, bias = weight / length, bias / length
    centred = (vectors - vectors.mean(dim=0)) / length
    bias = bias - vectors.mean(dim=0) / length
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T  # (D, D), largest first
    found = {}
    for width in widths:
        generator = torch.Generator().manual_seed(seed * 100_003 + width)
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
        chosen = turn @ axes[:width]  # (width, D)
        found[width] = ((chosen @ weight).float(), (chosen @ bias).float())
    return found
