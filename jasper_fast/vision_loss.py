"""The losses of a vision stage: each head's embedding of a caption teaches the image's embedding of the same head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config import StageConfig
from jasper_fast.gather import gather_rows
from jasper_fast.loss_table import CONTRASTIVE, LOSSES
from jasper_fast.losses import LossOutput
from jasper_fast.losses.contrastive import Captions, Mixed, contrastive_loss
from jasper_fast.stages import jasper_loss, temperature_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LossInputs(NamedTuple):
    """Inputs of the vision loss next to the embeddings of the batch's captions.

    The first field has the captions' indices among the stage's distinct ones, (B,) int64. None means that the loss does
    not use those. The second has the images that are mixed in, or None.
    """

    places: Tensor | None = None
    mixed: Mixed | None = None

    def to(self, device: torch.device) -> LossInputs:
        """Move all tensors to a device."""
        places = None if self.places is None else self.places.to(device)
        if self.mixed is None:
            return LossInputs(places)
        captions, shares, laid = self.mixed
        return LossInputs(places, Mixed(captions.to(device), shares.to(device), None if laid is None else laid.to(device)))


NO_INPUTS = LossInputs()


class VisionLoss(nn.Module):
    """The losses of each head, averaged over the heads (arXiv 2412.19048, stage 4), and a contrastive term if weighted.

    Args:
        stage: a vision stage with its weights, margin, temperature and heads.
        group: process group whose ranks' batches make one batch. None means this process alone.
        rows: number of images of each rank of the group, of the stage's ``batch_size``.
        captions: the captions among which an image's caption is to be recognized, float32 if the images' embeddings
            are. None means the batch's captions.
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
        self.contrastive, self.balance = stage.vision.contrastive, stage.vision.balance
        temperature = temperature_of(stage)
        self.temperatures = temperature if isinstance(temperature, dict) else dict.fromkeys(stage.heads, temperature)
        self.group, self.rows = group, rows
        self.captions: dict[int, Captions] = {}  # by head
        if captions is not None:
            parts = captions.vectors.split(stage.heads, dim=1)
            self.captions = {w: Captions(own, captions.pictures) for w, own in zip(stage.heads, parts, strict=True)}
        self.one = jasper_loss(stage.weights, stage, group, rows)

    def forward(self, students: Mapping[int, Tensor], teacher: Tensor, inputs: LossInputs = NO_INPUTS) -> LossOutput:
        """Compute the losses of a batch.

        Args:
            students: image embeddings (B, width) by width.
            teacher: unit embeddings of the captions (B, sum of the heads' widths), in the order of ``heads``.
            inputs: the captions' indices, if ``captions`` were given, and the images that are mixed in. The teacher of a
                mixed image is the weighted mean of both captions.
        """
        own = self._by_head(teacher)
        laid = own if inputs.mixed is None else self._by_head(inputs.mixed.captions)
        outputs = []
        for width, vectors in students.items():
            mixed = None if inputs.mixed is None else inputs.mixed._replace(captions=laid[width])
            outputs.append(self._head(width, vectors, own[width], inputs.places, mixed))
        means = {name: torch.stack([output.parts[name] for output in outputs]).mean() for name in outputs[0].parts}
        return LossOutput(torch.stack([output.loss for output in outputs]).mean(), means)

    def _by_head(self, vectors: Tensor) -> dict[int, Tensor]:
        return dict(zip(self.heads, vectors.split(self.heads, dim=1), strict=True))

    def _head(
        self, width: int, pictures: Tensor, captions: Tensor, places: Tensor | None, mixed: Mixed | None
    ) -> LossOutput:
        mean = captions
        if mixed is not None:
            mean = F.normalize(mixed.shares * captions + (1 - mixed.shares) * mixed.captions, dim=1)
        output = self.one({width: pictures}, mean)
        if not self.contrastive:
            return output
        parts = {"pictures": F.normalize(pictures.float(), dim=1), "captions": captions, "places": places}
        if mixed is not None:
            parts |= {"laid": mixed.captions, "shares": mixed.shares, "laid places": mixed.places}
        # Places become floats too, which are exact below 2**24.
        rows = {name: part.float().view(len(pictures), -1) for name, part in parts.items() if part is not None}
        if self.group is not None:
            rows = dict(zip(rows, gather_rows([*rows.values()], self.group, self.rows), strict=True))
        places, laid = (rows[name][:, 0].long() if name in rows else None for name in ("places", "laid places"))
        mixed = None if mixed is None else Mixed(rows["laid"], rows["shares"], laid)
        term = contrastive_loss(
            rows["pictures"],
            rows["captions"],
            self.temperatures[width],
            self.captions.get(width),
            places,
            mixed,
            self.balance,
        )
        # All losses are parts here, also those without a weight.
        parts = {loss.name: torch.zeros_like(term) for loss in LOSSES} | output.parts | {CONTRASTIVE.name: term}
        return LossOutput(output.loss + self.contrastive * term, parts)
