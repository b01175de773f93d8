"""Rows of all ranks as one batch: one collective forward, none backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def split_rows(total: int, ranks: int) -> list[int]:
    """How many of ``total`` rows each rank has: equally many, and the first ones one more where they do not divide."""
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def gather_rows(tensors: Sequence[Tensor], group: ProcessGroup, rows: Sequence[int] | None = None) -> list[Tensor]:
    """All ranks' rows of each tensor, in the ranks' order, with a single all-gather.

    The gradient of a rank's own rows is what comes in for them, times the number of ranks: where every rank computes
    the same loss of all rows, averaging the parameters' gradients over ranks (as DDP and FSDP do) gives the global one.

    Args:
        tensors: (b, D_i), of one dtype and device.
        rows: how many rows each rank has; None: as many as this one.

    Returns:
        (sum of rows, D_i) of each.

    Raises:
        ValueError: ``rows`` does not fit this rank's tensors.
    """
    own = tensors[0].shape[0]
    counts = list(rows) if rows is not None else [own] * group.size()
    if len(counts) != group.size() or counts[group.rank()] != own:
        raise ValueError(
            f"rows: expected a number for each of {group.size()} ranks, {own} for rank {group.rank()}; got {counts}"
        )
    return list(_GatherRows.apply(group, counts, *tensors))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, counts: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.first, ctx.own = group.size(), sum(counts[: group.rank()]), counts[group.rank()]
        longest = max(counts)
        widths = [tensor.shape[1] for tensor in tensors]
        sent = tensors[0].new_zeros(longest, sum(widths))  # (b, sum of D_i), padded to the longest rank
        torch.cat(tensors, dim=1, out=sent[: ctx.own])
        received = sent.new_empty(len(counts) * longest, sum(widths))
        parts = list(received.split(longest))
        torch.distributed.all_gather(parts, sent, group=group)
        if min(counts) != longest:
            received = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return tuple(part.contiguous() for part in received.split(widths, dim=1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[part.narrow(0, ctx.first, ctx.own) * ctx.ranks for part in incoming]
