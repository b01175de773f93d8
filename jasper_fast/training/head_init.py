"""Initial weights of narrow heads: the principal axes of the widest head's embeddings, rotated at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jasper_fast.distributed.fsdp import copy_full_tensor, full_tensor
from jasper_fast.models.student import Student

PRINCIPAL_ROWS = 16_384  # texts from which the axes are computed


def start_at_principal_axes(student: Student, widths: Sequence[int], states: Tensor, seed: int) -> None:
    """Set narrow heads to the principal axes of the widest head's embeddings.

    All ranks of a sharded student must call it.

    Args:
        student: the student.
        widths: the widths of the heads. The widest head is left as it is.
        states: (n, H) pooled states from which the axes are computed.
        seed: the seed of the rotations.
    """
    narrow = [width for width in widths if width != student.widths[0]]
    linear: Any = student.heads[str(student.widths[0])]
    weight, bias = full_tensor(linear.weight.detach()).cpu(), full_tensor(linear.bias.detach()).cpu()
    for width, (axes, shift) in principal_heads(states, weight, bias, narrow, seed).items():
        linear = student.heads[str(width)]
        copy_full_tensor(linear.weight, axes)
        copy_full_tensor(linear.bias, shift)


def principal_heads(
    states: Tensor, weight: Tensor, bias: Tensor, widths: Sequence[int], seed: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return linear maps from pooled states to the principal coordinates of the widest head's embeddings, by width.

    The axes of each width are rotated at random. That changes no inner product, and spreads the variance over all
    coordinates, so that signs lose less of it.

    Args:
        states: (n, H) pooled states, n at least the largest width.
        weight: (D, H) weight of the widest head.
        bias: (D,) bias of the widest head.
        widths: widths below D.
        seed: the seed of the rotations.

    Returns:
        {width: (weight (width, H), bias (width,))}, float32.

    Raises:
        ValueError: there are too few states, or a width is not below D.
    """
    if not widths or max(widths) >= len(weight) or max(widths) > len(states):
        raise ValueError(
            f"widths {list(widths)}: no principal axes from {len(states)} embeddings of width {len(weight)}"
        )
    weight, bias = weight.double(), bias.double()
    embeddings = states.double() @ weight.T + bias  # (n, D)
    length = embeddings.norm(dim=1).mean()  # one for all rows: the map must be linear
    weight, bias = weight / length, bias / length
    centred = (embeddings - embeddings.mean(dim=0)) / length
    bias = bias - embeddings.mean(dim=0) / length
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T  # (D, D), largest first
    heads = {}
    for width in widths:
        generator = torch.Generator().manual_seed(seed * 100_003 + width)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
        chosen = rotation @ axes[:width]  # (width, D)
        heads[width] = ((chosen @ weight).float(), (chosen @ bias).float())
    return heads
