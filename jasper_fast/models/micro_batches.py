"""Micro-batches of texts for one encoder pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jasper_fast.models.padding import padded_length
from jasper_fast.models.student import Student
from jasper_fast.utils.device import autocast

EVAL_MICRO_BATCH = 32
PASS_TOKENS = 64  # fixed cost of a forward pass, in tokens: a few milliseconds of calls and small operations


@dataclass(frozen=True)
class MicroBatches:
    """Texts of one batch, sorted by length and cut into micro-batches, with the permutation back.

    The longest texts come first. If passes grew, memory freed by one would be too small for the next.

    Args:
        token_ids: token ids of each text, for each micro-batch.
        order: (B,) int64 indices of the batch's texts, longest first.
        inverse: (B,) int64 inverse permutation. ``sorted[inverse]`` is the order of the batch.
        tokens: number of tokens without padding.
        padded: number of tokens with each micro-batch padded to its longest text.
    """

    token_ids: list[list[list[int]]]
    order: Tensor
    inverse: Tensor
    tokens: int
    padded: int

    @classmethod
    def of(
        cls,
        token_ids: Sequence[list[int]],
        micro_batch: int,
        micro_tokens: int | None = None,
        passes: int | None = None,
        few_shapes: bool = False,
    ) -> MicroBatches:
        """Sort texts by length (stable) and cut them into micro-batches at the lowest cost.

        Args:
            token_ids: token ids of B texts.
            micro_batch: maximum number of texts in a micro-batch.
            micro_tokens: maximum number of tokens in a micro-batch, padding included. A longer text is alone in
                its micro-batch. None means no limit.
            passes: exact number of micro-batches, with equal numbers of texts up to rounding. It replaces both limits.
                None means that the lowest cost decides.
            few_shapes: whether micro-batches have a small number of different sizes and padded lengths, for devices
                that compile the products of each new shape. :meth:`Student.pool` pads to the same lengths, up to its
                maximum.
        """
        lengths = np.array([len(ids) for ids in token_ids])
        order = np.argsort(lengths, kind="stable")
        padded = np.array([padded_length(length, few_shapes) for length in lengths.tolist()], dtype=np.int64)
        if passes is None:
            cuts = cheapest_cuts(padded[order], micro_batch, micro_tokens, few_sizes=few_shapes)
        else:
            cuts = [len(order) * part // passes for part in range(passes + 1)]
        order, cuts = order[::-1].copy(), [len(order) - cut for cut in reversed(cuts)]
        parts = [order[start:stop] for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
        inverse = np.empty(len(order), dtype=np.int64)
        inverse[order] = np.arange(len(order))
        return cls(
            [[token_ids[i] for i in part] for part in parts],
            torch.from_numpy(order),
            torch.from_numpy(inverse),
            int(lengths.sum()),
            int(sum(padded[part].max() * len(part) for part in parts)),
        )

    def pool(
        self,
        student: Student,
        device: torch.device,
        precision: Literal["auto", "fp32", "bf16"],
        before_pass: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return the mean-pooled encoder states of the batch, in its original order.

        Args:
            student: the student.
            device: device of the student.
            precision: autocast precision.
            before_pass: function to call before each micro-batch.

        Returns:
            (B, H), float32 or float64.
        """
        pooled = []
        with autocast(device, precision):  # one context casts the weights once for all micro-batches
            for ids in self.token_ids:
                before_pass()
                pooled.append(student.pool(ids, device))
        return torch.cat(pooled)[self.inverse.to(device)]


def cheapest_cuts(
    lengths: np.ndarray,
    micro_batch: int,
    micro_tokens: int | None = None,
    per_pass: int = PASS_TOKENS,
    few_sizes: bool = False,
) -> list[int]:
    """Cut texts, sorted by length, to minimise padded tokens plus the fixed cost of each pass.

    Args:
        lengths: (n,) number of tokens of each text, ascending.
        micro_batch: maximum number of texts in a part.
        micro_tokens: maximum number of tokens in a part, padding included. A longer text is alone in its part.
            None means no limit.
        per_pass: fixed cost of a forward pass, in tokens.
        few_sizes: whether each part has 1, 2, 3, 4, 6, 8, 12, … texts: a power of two, or three times one.

    Returns:
        Ascending cut positions from 0 to n. Part i is ``lengths[cuts[i]:cuts[i + 1]]``.
    """
    n = len(lengths)
    sizes = np.arange(min(micro_batch, n), 0, -1)
    if few_sizes:
        sizes = np.array([size for size in sizes if size // (size & -size) in (1, 3)])
    cost = np.zeros(n + 1)  # lowest cost of the first i texts
    start = np.zeros(n + 1, dtype=np.int64)  # first text of their last part
    for stop in range(1, n + 1):
        most = stop if micro_tokens is None else max(1, micro_tokens // int(lengths[stop - 1]))
        begin = stop - sizes[sizes <= min(stop, most)]
        total = cost[begin] + lengths[stop - 1] * (stop - begin)
        best = int(total.argmin())
        cost[stop], start[stop] = total[best] + per_pass, begin[best]
    cuts = [n]
    while cuts[-1]:
        cuts.append(int(start[cuts[-1]]))
    return cuts[::-1]


@dataclass(frozen=True)
class ImageBatches:
    """Images of one batch, cut into micro-batches, with the interface of :class:`MicroBatches`.

    Args:
        token_ids: per micro-batch, (b, 3, side, side) images.
        tokens_per_image: input embeddings per image, those around it included.
    """

    token_ids: list[Tensor]
    tokens_per_image: int

    @property
    def tokens(self) -> int:
        """Number of input embeddings of the whole batch."""
        return sum(map(len, self.token_ids)) * self.tokens_per_image

    @property
    def padded(self) -> int:
        """The same number with padding, which images of equal length do not have."""
        return self.tokens

    @property
    def order(self) -> Tensor:
        """(B,) int64. Images are encoded in the batch's own order."""
        return torch.arange(sum(map(len, self.token_ids)))

    def pool(
        self,
        student: Student,
        device: torch.device,
        precision: Literal["auto", "fp32", "bf16"],
        before_pass: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return the mean states of the images' tokens, (B, hidden), at least fp32."""
        pooled = []
        with autocast(device, precision):
            for pixels in self.token_ids:
                before_pass()
                pooled.append(student.pool(pixels, device))
        return torch.cat(pooled)
