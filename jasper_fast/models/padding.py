"""Padding of token ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

LENGTH_STEP = 8  # tokens


def padded_length(tokens: int, few_shapes: bool) -> int:
    """Return the length to which a text is padded: the next multiple of ``LENGTH_STEP`` if shapes should be few."""
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP if few_shapes else tokens


def pad(token_ids: Sequence[Sequence[int]], pad_id: int, length: int) -> tuple[Tensor, Tensor | None]:
    """Pad lists of ids on the right.

    Args:
        token_ids: B lists of ids.
        pad_id: id of the padding token.
        length: number of tokens L after padding, at least that of the longest list.

    Returns:
        Ids (B, L) int64, and a mask (B, L) bool that is True on tokens. The mask is None if nothing was padded.
    """
    lengths = torch.tensor([len(ids) for ids in token_ids])
    flat = torch.tensor(list(itertools.chain.from_iterable(token_ids)), dtype=torch.long)
    if int(lengths.min()) == length:
        return flat.view(len(token_ids), length), None
    mask = torch.arange(length) < lengths[:, None]  # (B, L)
    return torch.full(mask.shape, pad_id).masked_scatter_(mask, flat), mask
