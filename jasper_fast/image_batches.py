"""Micro-batches of images, and the embeddings of many images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.encode import EVAL_MICRO_BATCH, autocast
from jasper_fast.image_data import Images
from jasper_fast.model import Student


@dataclass(frozen=True)
class ImageBatches:
    """Images of one batch, cut into micro-batches, with the interface of :class:`jasper_fast.encode.MicroBatches`.

    Args:
        token_ids: per micro-batch, (b, 3, side, side) images.
        each: input embeddings per image, those around it included.
    """

    token_ids: list[Tensor]
    each: int

    @property
    def tokens(self) -> int:
        """Number of input embeddings of the whole batch."""
        return sum(map(len, self.token_ids)) * self.each

    @property
    def padded(self) -> int:
        """The same number with padding, which images of equal length do not have."""
        return self.tokens

    @property
    def order(self) -> Tensor:
        """(B,) int64; images are encoded in the batch's own order."""
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


@torch.no_grad()
def image_embeddings(
    student: Student, images: Images, device: torch.device, precision: Literal["auto", "fp32", "bf16"]
) -> dict[int, np.ndarray]:
    """Return the unit embeddings of all images by width, {width: (n, width)}."""
    training = student.training
    student.eval()
    parts = []
    for start in range(0, len(images), EVAL_MICRO_BATCH):
        pixels = images.pixels(np.arange(start, min(start + EVAL_MICRO_BATCH, len(images))), student.seeing.side)
        parts.append(ImageBatches([pixels], 0).pool(student, device, precision))
    vectors = student.project(torch.cat(parts))
    student.train(training)
    return {width: F.normalize(v.float(), dim=1).cpu().numpy() for width, v in vectors.items()}
