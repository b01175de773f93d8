"""The losses of the vision stage: each head's vector of a caption teaches the picture's vector of the same head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config import StageConfig
from jasper_fast.gather import gather_rows
from jasper_fast.losses import AnyOutput
from jasper_fast.stages import jasper_loss, temperature_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAME = 1e-4  # captions whose cosine is nearer to 1 count as one caption


class Captions(NamedTuple):
    """Every distinct caption that a stage may ask for: unit vectors of each head side by side, (n, sum of the heads'
    widths), and which captions are of one picture, (n,) int64: those of equal number."""

    vectors: Tensor
    pictures: Tensor


class VisionLoss(nn.Module):
    """Three losses per head, averaged over the heads (arXiv 2412.19048, stage 4), and a contrastive term if weighted.

    Args:
        stage: weights, margin, temperature, heads.
        group: whose ranks' batches make one batch; None: this process's alone.
        rows: how many of the stage's ``batch_size`` pictures each rank of the group has.
        captions: what a picture's caption is told from, float32 where the pictures' vectors are; None: the batch's.
    """

    def __init__(
        self,
        stage: StageConfig,
        group: ProcessGroup | None = None,
        rows: Sequence[int] | None = None,
        captions: Captions | None = None,
    ) -> None:
        super().__init__()
        assert stage.vision is not None
        self.heads = stage.heads
        self.contrastive, temperature = stage.vision.contrastive, temperature_of(stage)
        self.temperatures = temperature if isinstance(temperature, dict) else dict.fromkeys(stage.heads, temperature)
        self.group, self.rows = group, rows
        self.captions: dict[int, Captions] = {}  # by head
        if captions is not None:
            parts = captions.vectors.split(stage.heads, dim=1)
            self.captions = {w: Captions(own, captions.pictures) for w, own in zip(stage.heads, parts, strict=True)}
        self.one = jasper_loss(stage.weights, stage, group, rows)

    def forward(self, students: Mapping[int, Tensor], teacher: Tensor) -> AnyOutput:
        """Losses of a batch.

        Args:
            students: width -> (B, width) pictures' vectors.
            teacher: (B, sum of the heads' widths) captions' unit vectors of each head, in ``heads``' order.
        """
        targets = dict(zip(self.heads, teacher.split(self.heads, dim=1), strict=True))
        outputs = [self._head(width, vectors, targets[width]) for width, vectors in students.items()]
        return type(outputs[0])(*(torch.stack(parts).mean() for parts in zip(*outputs, strict=True)))

    def _head(self, width: int, pictures: Tensor, captions: Tensor) -> AnyOutput:
        output = self.one({width: pictures}, captions)
        if not self.contrastive:
            return output
        pictures = F.normalize(pictures.float(), dim=1)
        captions = captions.to(pictures.dtype)
        if self.group is not None:
            pictures, captions = gather_rows([pictures, captions], self.group, self.rows)
        term = contrastive_loss(pictures, captions, self.temperatures[width], self.captions.get(width))
        return output._replace(loss=output.loss + self.contrastive * term)


def contrastive_loss(pictures: Tensor, captions: Tensor, temperature: float, others: Captions | None = None) -> Tensor:
    """How badly each picture finds its caption, and each caption its picture among the batch's; the mean of both.

    A caption that equals another picture's is no wrong answer for it and is left out there.

    Args:
        pictures, captions: (B, D) unit vectors, row by row of one another.
        temperature: by which cosines are divided.
        others: (n, D) captions that a picture's is told from, the batch's among them, but for those of the same
            picture; None: the batch's alone.

    Returns:
        a scalar; 0 for a batch of one without others.
    """
    scores = pictures @ captions.T / temperature  # (B, B)
    same = captions @ captions.T > 1.0 - SAME
    same.fill_diagonal_(False)
    scores = scores.masked_fill(same, -torch.inf)
    own = torch.arange(len(scores), device=scores.device)
    back = F.cross_entropy(scores.T, own)
    if others is None:
        return (F.cross_entropy(scores, own) + back) / 2
    known = others.pictures[(captions @ others.vectors.T).argmax(dim=1)]  # (B,)
    right = known[:, None] == others.pictures[None, :]  # (B, n)
    wrong = (pictures @ others.vectors.T / temperature).masked_fill(right, -torch.inf)
    found = torch.cat([scores.diagonal()[:, None], wrong], dim=1)  # (B, 1 + n), its own first
    return (F.cross_entropy(found, torch.zeros_like(own)) + back) / 2
