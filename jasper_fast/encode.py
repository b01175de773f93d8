"""Running the student's encoder over many texts: the device, its precision, micro-batches sorted by length."""

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
PASS_TOKENS = 64  # what a pass costs beside its tokens, in tokens: some milliseconds of calls and small operations


def pick_device() -> torch.device:
    """This process's GPU (``LOCAL_RANK`` under torchrun, else the first) where there is one, else the CPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> AbstractContextManager[object]:
    """bf16 autocast where it is asked for, or where ``auto`` finds a device that is fast at it."""
    bf16 = used_precision(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def used_precision(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
    """What ``auto`` comes to on a device."""
    if precision == "auto":
        return "bf16" if _bf16_is_fast(device) else "fp32"
    return precision


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_bf16_is_fast()


@dataclass(frozen=True)
class MicroBatches:
    """Texts of one batch in order of length, the longest first, cut into micro-batches, with the way back.

    Passes that grow would take more memory than they need: what an earlier one freed is too small for the next.

    Args:
        token_ids: per micro-batch, the token ids of its texts.
        order: (B,) int64; the batch's texts in order of length.
        inverse: (B,) int64; ``sorted[inverse]`` is the batch's own order.
        tokens: tokens without padding.
        padded: tokens with each micro-batch padded to its longest text.
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
        """Sort by length (stable) and cut where that costs least, into parts of at most ``micro_batch`` texts.

        With ``micro_tokens`` a part holds at most so many tokens, padding included, but always one text. With
        ``passes`` there are exactly so many parts, of as equal numbers of texts as can be.
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
        """Mean-pooled encoder states of the whole batch in its own order, (B, hidden), at least fp32."""
        pooled = []
        with autocast(device, precision):  # one context: weights are cast once for all micro-batches
            for ids in self.token_ids:
                before_pass()
                pooled.append(student.pool(ids, device))
        return torch.cat(pooled)[self.inverse.to(device)]


def cheapest_cuts(
    lengths: np.ndarray, micro_batch: int, micro_tokens: int | None = None, per_pass: int = PASS_TOKENS
) -> list[int]:
    """Where to cut texts in order of length so that padded tokens plus the cost of each pass are fewest.

    Args:
        lengths: (n,) tokens, ascending.
        micro_batch: texts per part at most.
        micro_tokens: tokens per part at most, padding included; a longer text makes a part of its own.
        per_pass: what one more forward pass costs, in tokens.

    Returns:
        positions from 0 to n; part i is ``lengths[cuts[i]:cuts[i + 1]]``.
    """
    n = len(lengths)
    cost = np.zeros(n + 1)  # of the first i texts, cut best
    start = np.zeros(n + 1, dtype=np.int64)  # where their last part begins
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
    """Pooled states of many texts without a graph, chunk after chunk in the texts' order, (chunk, hidden) float32."""
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
    """A function (texts, role) -> {width: (n, width) unit vectors} that reads each text once for all widths.

    ``widths`` None gives the pooled states themselves, normalised: the student before it has heads.
    """

    @torch.no_grad()
    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        pooled = np.concatenate(list(pool_texts(student, texts, [role] * len(texts), max_length, device, precision)))
        if widths is None:
            vectors = {pooled.shape[1]: torch.from_numpy(pooled)}
        else:
            training = student.training
            student.eval()
            vectors = student.project(torch.from_numpy(pooled).to(device), widths)
            student.train(training)
        return {w: torch.nn.functional.normalize(v.float(), dim=1).cpu().numpy() for w, v in vectors.items()}

    return encode
