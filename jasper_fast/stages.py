"""One stage of a run: what trains, what the losses compare, and how the learning rate moves."""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jasper_fast.average import keep_average
from jasper_fast.codes import straight_through
from jasper_fast.config import StageConfig
from jasper_fast.errors import JasperError
from jasper_fast.loss_config import LossWeights
from jasper_fast.loss_table import LOSSES, TEMPERATURE
from jasper_fast.losses import CombinedLoss, LossOutput
from jasper_fast.losses.arguments import LossOptions
from jasper_fast.model import Student
from jasper_fast.sharding import own_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def trained_names(student: Student, stage: StageConfig) -> list[str]:
    """Names of the parameters that a stage trains, in the model's order.

    Heads that the stage does not use are left out even where a glob names them: no loss would reach them.

    Raises:
        JasperError: a glob matches no parameter, or more layers are asked for than there are.
    """
    every = [name for name, _ in student.named_parameters()]
    chosen: set[str] = set()
    for glob in stage.train:
        matched = fnmatch.filter(every, glob)
        if not matched:
            raise JasperError(
                f"stage {stage.name!r}: `train` glob {glob!r} matches no parameter; names look like "
                f"{every[0]!r} and {every[-1]!r} (`--dry-run` lists them)"
            )
        chosen.update(matched)
    if stage.vision is not None:
        return _names_of_the_tower(student, stage, [name for name in every if name in chosen])
    if stage.last_layers > student.num_layers:
        raise JasperError(
            f"stage {stage.name!r}: last_layers {stage.last_layers}, but the student has {student.num_layers} layers"
        )
    if stage.last_layers:
        chosen.update(student.layer_parameters(stage.last_layers))
    used = {str(width) for width in stage.heads}
    independent = len(student.heads) > 1  # prefix heads are all the widest one's
    idle = [f"heads.{width}." for width in student.heads if independent and width not in used]
    idle.append("vision.")  # a stage of texts does not reach it
    names = [name for name in every if name in chosen and not any(name.startswith(prefix) for prefix in idle)]
    if not names:
        raise JasperError(f"stage {stage.name!r}: the parameters it names belong only to heads that it does not use")
    return names


def _names_of_the_tower(student: Student, stage: StageConfig, chosen: list[str]) -> list[str]:
    """What a vision stage trains: the captions' vectors are computed once, so nothing of the text side may move."""
    text = [name for name in chosen if not name.startswith("vision.")]
    if text:
        raise JasperError(
            f"stage {stage.name!r} learns from pictures while the text side is frozen, but would train {text[0]!r}; "
            'use train: ["vision.tower.*"] (and "vision.marks" for the embeddings around a picture)'
        )
    last = set(student.seeing.layer_parameters(stage.last_layers)) if stage.last_layers else set()
    return [name for name, _ in student.named_parameters() if name in last or name in chosen]


def set_trained(student: Student, names: Iterable[str]) -> None:
    """Let exactly the named parameters require a gradient."""
    wanted = set(names)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None


def frozen_digest(student: Student) -> str:
    """A digest of every weight that must not change in the current stage; of sharded ones, what lies here."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            part = own_part(parameter.detach())
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_optimizer(student: Student, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over what trains; biases and norms (fewer than two dimensions) are not decayed.

    It keeps the moving average of the weights too where the stage asks for one.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, fused=True)
    if stage.average:
        keep_average(optimizer, stage.average)
    return optimizer


def learning_rate(stage: StageConfig, step: int) -> float:
    """The learning rate of one step (counted from 0): linear warm-up, then the stage's schedule down to 0."""
    warmup = round(stage.warmup * stage.steps)
    if step < warmup:
        return stage.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, stage.steps - warmup)
    if stage.schedule == "linear":
        return stage.lr * (1.0 - done)
    if stage.schedule == "cosine":
        return stage.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return stage.lr


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
        self.own_target = stage.narrow_target == "self"
        self.together = not self.own_target and stage.narrow_weights is None
        self.wide = jasper_loss(stage.weights, stage, group, rows)
        narrow = stage.narrow_weights or stage.weights
        self.narrow = jasper_loss(narrow, stage, group, rows)
        self.codes, self.codes_weight, self.group = stage.codes, stage.codes_weight, group
        if stage.codes:
            pointwise = {loss.name: 0.0 for loss in LOSSES if loss.equal_widths}
            self.coded = jasper_loss(narrow.model_copy(update=pointwise), stage, group, rows)

    def forward(self, students: Mapping[int, Tensor], teacher: Tensor) -> LossOutput:
        """Compute the losses of a batch.

        Args:
            students: embeddings (B, width) by width.
            teacher: unit target embeddings (B, D).
        """
        output = self._of_floats(students, teacher)
        target = students[self.widest].detach() if self.own_target else teacher
        for precision in self.codes:
            codes = {width: straight_through(v, precision, self.group) for width, v in students.items()}
            coded = self.coded(codes, target)
            output = LossOutput(output.loss + self.codes_weight * coded.loss, output.parts)
        return output

    def _of_floats(self, students: Mapping[int, Tensor], teacher: Tensor) -> LossOutput:
        if self.together:
            return self.wide(students, teacher)
        narrow = {width: vectors for width, vectors in students.items() if width != self.widest}
        outputs: list[LossOutput] = []
        if self.widest in students:
            outputs.append(self.wide({self.widest: students[self.widest]}, teacher))
        if narrow:
            outputs.append(self.narrow(narrow, students[self.widest].detach() if self.own_target else teacher))
        sums: dict[str, Tensor] = {}
        for output in outputs:
            for name, value in output._asdict().items():
                sums[name] = sums[name] + value if name in sums else value
        return LossOutput(sums.pop("loss"), sums)


def jasper_loss(
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
