"""The losses of a stage, from the table of losses and the stage's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config.loss_weights import LossWeights
from jasper_fast.config.losses import CONTRASTIVE, LISTWISE, LOSSES, TEMPERATURE
from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.gather import gather_rows
from jasper_fast.losses import CombinedLoss, LossOutput
from jasper_fast.losses.arguments import LossOptions
from jasper_fast.losses.contrastive import Captions, Mixed, contrastive_loss
from jasper_fast.losses.info_nce import info_nce_loss
from jasper_fast.losses.listwise import listwise_loss
from jasper_fast.models.quantization import straight_through
from jasper_fast.training.data import NO_INPUTS, LossInputs, RankInputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class StageLoss(nn.Module):
    """The losses of a text stage.

    FC1, the widest head, learns from the teachers. Narrow heads learn from the teachers or from FC1's embedding.

    Quantized embeddings are trained next to the floats by the narrow heads' losses. Losses that compare with the
    teacher's embedding are left out, because signs cannot point in its direction. The rest adds to the loss, not to its
    parts.

    Args:
        stage: a text stage with its weights, margin, temperature, codes and the target of its narrow heads.
        widest: the width of FC1.
        group: process group whose ranks' batches make one batch. None means this process alone.
        rows: number of texts of each rank of the group, of the stage's ``batch_size``.
    """

    def __init__(
        self, stage: StageConfig, widest: int, group: ProcessGroup | None = None, rows: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.widest = widest
        self.target_is_student = stage.narrow_target == "self"
        self.joint = not self.target_is_student and stage.narrow_weights is None
        self.wide_loss = weighted_loss(stage.weights, stage, group, rows)
        narrow = stage.narrow_weights or stage.weights
        self.narrow_loss = weighted_loss(narrow, stage, group, rows)
        self.codes, self.codes_weight, self.group = stage.codes, stage.codes_weight, group
        if stage.codes:
            pointwise = {loss.name: 0.0 for loss in LOSSES if loss.equal_widths}
            self.quantized_loss = weighted_loss(narrow.model_copy(update=pointwise), stage, group, rows)

    def forward(self, students: Mapping[int, Tensor], teacher: Tensor) -> LossOutput:
        """Compute the losses of a batch.

        Args:
            students: embeddings (B, width) by width.
            teacher: unit target embeddings (B, D).
        """
        output = self._float_losses(students, teacher)
        target = students[self.widest].detach() if self.target_is_student else teacher
        for precision in self.codes:
            codes = {width: straight_through(v, precision, self.group) for width, v in students.items()}
            quantized = self.quantized_loss(codes, target)
            output = LossOutput(output.loss + self.codes_weight * quantized.loss, output.parts)
        return output

    def _float_losses(self, students: Mapping[int, Tensor], teacher: Tensor) -> LossOutput:
        if self.joint:
            return self.wide_loss(students, teacher)
        narrow = {width: vectors for width, vectors in students.items() if width != self.widest}
        outputs: list[LossOutput] = []
        if self.widest in students:
            outputs.append(self.wide_loss({self.widest: students[self.widest]}, teacher))
        if narrow:
            outputs.append(
                self.narrow_loss(narrow, students[self.widest].detach() if self.target_is_student else teacher)
            )
        sums: dict[str, Tensor] = {}
        for output in outputs:
            for name, value in output._asdict().items():
                sums[name] = sums[name] + value if name in sums else value
        return LossOutput(sums.pop("loss"), sums)


def weighted_loss(
    weights: LossWeights, stage: StageConfig, group: ProcessGroup | None, rows: Sequence[int] | None
) -> CombinedLoss:
    """Return the weighted losses with a stage's margin and temperature.

    Args:
        weights: weights of the losses.
        stage: the stage that has the options.
        group: see `StageLoss`.
        rows: see `StageLoss`. They are not used without a group.
    """
    options = LossOptions(stage.margin, temperature=temperature_of(stage))
    return CombinedLoss(weights.model_dump(), options, group=group, rows=rows if group is not None else None)


def temperature_of(stage: StageConfig) -> float | dict[int, float]:
    """Return the temperature of a stage: one number, or one for each of its heads, with the default filled in."""
    if not isinstance(stage.temperature, dict):
        return stage.temperature
    return {width: stage.temperature.get(width, TEMPERATURE) for width in stage.heads}


class RankLoss(nn.Module):
    """The losses of a ranking stage: those of a text stage over all texts, and two that rank documents for queries.

    Both are summed over the heads. InfoNCE leaves out documents that the teacher scores above the query's own.

    Args:
        stage: a ranking stage.
        widest: the width of FC1.
        group: process group whose ranks' batches make one batch. None means this process alone.
    """

    def __init__(self, stage: StageConfig, widest: int, group: ProcessGroup | None = None) -> None:
        super().__init__()
        assert stage.rank is not None
        self.rank, self.group = stage.rank, group
        self.text_loss = StageLoss(stage, widest)  # it gets the rows of all ranks

    def forward(self, students: Mapping[int, Tensor], teacher: Tensor, inputs: RankInputs) -> LossOutput:
        """Compute the losses of a batch.

        Args:
            students: embeddings (B, width) of this rank's queries and then documents, by width.
            teacher: unit target embeddings (B, D).
            inputs: candidates, scores and positives of the whole batch.
        """
        if self.group is not None:
            dtype = next(iter(students.values())).dtype
            rows = gather_rows([*students.values(), teacher.to(dtype)], self.group, inputs.counts)
            *vectors, teacher = [part[inputs.order] for part in rows]
            students = dict(zip(students, vectors, strict=True))
        output = self.text_loss(students, teacher)
        heads = [self._head(vectors, teacher, inputs) for vectors in students.values()]
        listwise, contrastive = (torch.stack(terms).sum() for terms in zip(*heads, strict=True))
        parts = output.parts | {CONTRASTIVE.name: contrastive, LISTWISE.name: listwise}
        return LossOutput(output.loss + self.rank.listwise * listwise + self.rank.contrastive * contrastive, parts)

    def _head(self, vectors: Tensor, teacher: Tensor, inputs: RankInputs) -> tuple[Tensor, Tensor]:
        """Return the listwise and the contrastive loss of a head. One without a weight is 0."""
        asked, rank = len(inputs.positives), self.rank
        queries, documents = vectors[:asked], vectors[asked:]
        listwise = contrastive = vectors.new_zeros((), dtype=torch.promote_types(vectors.dtype, torch.float32))
        if rank.listwise:
            temperatures = {"temperature": rank.temperature, "teacher_temperature": rank.score_temperature}
            listwise = listwise_loss(queries, documents, inputs.candidates, inputs.scores, **temperatures)
        answered = (inputs.positives >= 0).nonzero()[:, 0]
        if rank.contrastive and len(answered):
            contrastive = info_nce_loss(
                queries[answered],
                documents,
                inputs.positives[answered],
                temperature=rank.temperature,
                teacher_queries=teacher[:asked][answered],
                teacher_documents=teacher[asked:],
                margin=rank.margin,
            )
        return listwise, contrastive


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
            parts = captions.embeddings.split(stage.heads, dim=1)
            self.captions = {w: Captions(part, captions.image_ids) for w, part in zip(stage.heads, parts, strict=True)}
        self.head_loss = weighted_loss(stage.weights, stage, group, rows)

    def forward(self, students: Mapping[int, Tensor], teacher: Tensor, inputs: LossInputs = NO_INPUTS) -> LossOutput:
        """Compute the losses of a batch.

        Args:
            students: image embeddings (B, width) by width.
            teacher: unit embeddings of the captions (B, sum of the heads' widths), in the order of ``heads``.
            inputs: the captions' indices, if ``captions`` were given, and the images that are mixed in. The teacher
                of a mixed image is the weighted mean of both captions.
        """
        targets = self._by_head(teacher)
        mixed_targets = targets if inputs.mixed is None else self._by_head(inputs.mixed.captions)
        outputs = []
        for width, vectors in students.items():
            mixed = None if inputs.mixed is None else inputs.mixed._replace(captions=mixed_targets[width])
            outputs.append(self._head(width, vectors, targets[width], inputs.places, mixed))
        means = {name: torch.stack([output.parts[name] for output in outputs]).mean() for name in outputs[0].parts}
        return LossOutput(torch.stack([output.loss for output in outputs]).mean(), means)

    def _by_head(self, vectors: Tensor) -> dict[int, Tensor]:
        return dict(zip(self.heads, vectors.split(self.heads, dim=1), strict=True))

    def _head(
        self, width: int, images: Tensor, captions: Tensor, places: Tensor | None, mixed: Mixed | None
    ) -> LossOutput:
        mean = captions
        if mixed is not None:
            mean = F.normalize(mixed.fractions * captions + (1 - mixed.fractions) * mixed.captions, dim=1)
        output = self.head_loss({width: images}, mean)
        if not self.contrastive:
            return output
        parts = {"images": F.normalize(images.float(), dim=1), "captions": captions, "places": places}
        if mixed is not None:
            parts |= {"mixed": mixed.captions, "fractions": mixed.fractions, "mixed places": mixed.places}
        # Places become floats too, which are exact below 2**24.
        rows = {name: part.float().view(len(images), -1) for name, part in parts.items() if part is not None}
        if self.group is not None:
            rows = dict(zip(rows, gather_rows([*rows.values()], self.group, self.rows), strict=True))
        places, mixed_places = (
            rows[name][:, 0].long() if name in rows else None for name in ("places", "mixed places")
        )
        mixed = None if mixed is None else Mixed(rows["mixed"], rows["fractions"], mixed_places)
        term = contrastive_loss(
            rows["images"],
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
