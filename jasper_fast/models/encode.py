"""Student embeddings of many texts: device, precision, and micro-batches sorted by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jasper_fast.models.micro_batches import EVAL_MICRO_BATCH, MicroBatches
from jasper_fast.models.student import Student
from jasper_fast.utils.device import compiles_each_shape


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
            parts = MicroBatches.of(token_ids, EVAL_MICRO_BATCH, few_shapes=compiles_each_shape(device, precision))
            yield parts.pool(student, device, precision).cpu().numpy()
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
        states = torch.from_numpy(pooled)
        if widths is None:
            return {pooled.shape[1]: torch.nn.functional.normalize(states, dim=1).numpy()}
        return project_states(student, states.to(device), widths)

    return encode


@torch.no_grad()
def project_states(student: Student, states: Tensor, widths: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the embeddings of pooled states, without dropout.

    Args:
        student: the student.
        states: (n, H) float32, on the student's device.
        widths: widths of the heads.

    Returns:
        {width: (n, width) float32 unit rows}
    """
    training = student.training
    student.eval()
    embeddings = student.project(states, widths)
    student.train(training)
    return {w: torch.nn.functional.normalize(e.float(), dim=1).cpu().numpy() for w, e in embeddings.items()}
