"""All-gather of rows across ranks: one collective in the forward pass, none in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def split_rows(total: int, ranks: int) -> list[int]:
    """Split ``total`` rows evenly over the ranks. The first ranks get one extra row for the remainder.

    Args:
        total: number of rows.
        ranks: number of ranks.

    Returns:
        The number of rows of each rank.
    """
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def gather_rows(tensors: Sequence[Tensor], group: ProcessGroup, rows: Sequence[int] | None = None) -> list[Tensor]:
    """Gather the rows of each tensor from all ranks, in rank order, with a single all-gather.

    The gradient of a rank's own rows is multiplied by the number of ranks. If every rank computes the same loss over
    all rows, the mean of the parameter gradients over ranks (DDP, FSDP) is then the global gradient.

    Args:
        tensors: (b, D_i) tensors of one dtype and device, where b is this rank's number of rows.
        group: process group.
        rows: number of rows of each rank. None means that all ranks have b rows.

    Returns:
        (sum of rows, D_i) for each tensor.

    Raises:
        ValueError: ``rows`` does not match the group or this rank's tensors.
    """
    local_rows = tensors[0].shape[0]
    counts = list(rows) if rows is not None else [local_rows] * group.size()
    if len(counts) != group.size() or counts[group.rank()] != local_rows:
        raise ValueError(
            f"gather_rows: `rows` does not match the tensors (got {counts}, expected a number for each of "
            f"{group.size()} ranks, {local_rows} for rank {group.rank()}). Fix: pass every rank's number of rows"
        )
    return list(_GatherRows.apply(group, counts, *tensors))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, counts: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.first, ctx.rows = group.size(), sum(counts[: group.rank()]), counts[group.rank()]
        longest = max(counts)
        widths = [tensor.shape[1] for tensor in tensors]
        sent = tensors[0].new_zeros(longest, sum(widths))  # (b, sum of D_i), padded to the rank with most rows
        torch.cat(tensors, dim=1, out=sent[: ctx.rows])
        received = sent.new_empty(len(counts) * longest, sum(widths))
        parts = list(received.split(longest))
        torch.distributed.all_gather(parts, sent, group=group)
        if min(counts) != longest:
            received = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return tuple(part.contiguous() for part in received.split(widths, dim=1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[part.narrow(0, ctx.first, ctx.rows) * ctx.ranks for part in incoming]
