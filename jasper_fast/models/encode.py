"""Student embeddings of many texts: device, precision, and micro-batches sorted by length."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jasper_fast.env import cpu_bf16_is_fast
from jasper_fast.model import Student

EVAL_MICRO_BATCH = 32
PASS_TOKENS = 64  # fixed cost of a forward pass, in tokens: a few milliseconds of calls and small operations


def pick_device() -> torch.device:
    """Return this process's GPU (``LOCAL_RANK`` under torchrun, else the first GPU), or the CPU without a GPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> AbstractContextManager[object]:
    """Return a bf16 autocast context if the precision resolves to bf16 on the device, else a null context."""
    bf16 = used_precision(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def used_precision(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
    """Resolve ``auto`` to bf16 on a device with fast bf16, and to fp32 elsewhere."""
    if precision == "auto":
        return "bf16" if _bf16_is_fast(device) else "fp32"
    return precision


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_bf16_is_fast()


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
    ) -> MicroBatches:
        """Sort texts by length (stable) and cut them into micro-batches at the lowest cost.

        Args:
            token_ids: token ids of B texts.
            micro_batch: maximum number of texts in a micro-batch.
            micro_tokens: maximum number of tokens in a micro-batch, padding included. A longer text is a micro-batch
                of its own. None means no limit.
            passes: exact number of micro-batches, with equal numbers of texts up to rounding. It replaces both limits.
                None means that the lowest cost decides.
        """
        lengths = np.array([len(ids) for ids in token_ids])
        order = np.argsort(lengths, kind="stable")
        if passes is None:
            cuts = cheapest_cuts(lengths[order], micro_batch, micro_tokens)
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
            int(sum(lengths[part].max() * len(part) for part in parts)),
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
    lengths: np.ndarray, micro_batch: int, micro_tokens: int | None = None, per_pass: int = PASS_TOKENS
) -> list[int]:
    """Cut texts, sorted by length, to minimise padded tokens plus the fixed cost of each pass.

    Args:
        lengths: (n,) number of tokens of each text, ascending.
        micro_batch: maximum number of texts in a part.
        micro_tokens: maximum number of tokens in a part, padding included. A longer text is a part of its own. None
            means no limit.
        per_pass: fixed cost of a forward pass, in tokens.

    Returns:
        Ascending cut positions from 0 to n. Part i is ``lengths[cuts[i]:cuts[i + 1]]``.
    """
    n = len(lengths)
    cost = np.zeros(n + 1)  # lowest cost of the first i texts
    start = np.zeros(n + 1, dtype=np.int64)  # first text of their last part
    for stop in range(1, n + 1):
        begin = np.arange(max(0, stop - micro_batch), stop)
        if micro_tokens is not None:
            begin = begin[-max(1, micro_tokens // int(lengths[stop - 1])) :]
        total = cost[begin] + lengths[stop - 1] * (stop - begin)
        best = int(total.argmin())
        cost[stop], start[stop] = total[best] + per_pass, begin[best]
    cuts = [n]
    while cuts[-1]:
        cuts.append(int(start[cuts[-1]]))
    return cuts[::-1]


@torch.no_grad()
def pool_texts(
    student: Student,
    texts: Sequence[str],
    roles: Sequence[str],
    max_length: int,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
    chunk: int = 4096,
) -> Iterator[np.ndarray]:
    """Yield the pooled states of many texts, chunk by chunk in the texts' order, without gradients.

    Args:
        student: the student, which is in evaluation mode meanwhile.
        texts: N texts.
        roles: "query" or "document" for each text.
        max_length: maximum number of tokens per text.
        device: device of the student.
        precision: autocast precision.
        chunk: number of texts per chunk.

    Yields:
        (chunk, H) float32.
    """
    training = student.training
    student.eval()
    try:
        for start in range(0, len(texts), chunk):
            token_ids = student.tokenize(texts[start : start + chunk], roles[start : start + chunk], max_length)
            yield MicroBatches.of(token_ids, EVAL_MICRO_BATCH).pool(student, device, precision).cpu().numpy()
    finally:
        student.train(training)


def student_encoder(
    student: Student,
    widths: Sequence[int] | None,
    max_length: int,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
) -> Callable[[list[str], str], dict[int, np.ndarray]]:
    """Return an encode function that computes each text's embeddings of all widths in one pass.

    Args:
        student: the student.
        widths: widths of the heads. None means the pooled states without a head, as before training.
        max_length: maximum number of tokens per text.
        device: device of the student.
        precision: autocast precision of the encoder.

    Returns:
        A function from n texts and their role ("query" or "document") to {width: (n, width) float32 unit rows}.
    """

    @torch.no_grad()
    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        pooled = np.concatenate(list(pool_texts(student, texts, [role] * len(texts), max_length, device, precision)))
        if widths is None:
            embeddings = {pooled.shape[1]: torch.from_numpy(pooled)}
        else:
            training = student.training
            student.eval()
            embeddings = student.project(torch.from_numpy(pooled).to(device), widths)
            student.train(training)
        return {w: torch.nn.functional.normalize(e.float(), dim=1).cpu().numpy() for w, e in embeddings.items()}

    return encode
