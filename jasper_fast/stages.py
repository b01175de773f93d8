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
from jasper_fast.config import TEMPERATURE, LossWeights, StageConfig
from jasper_fast.errors import JasperError
from jasper_fast.losses import AnyOutput, JasperLoss, JasperLossOutput, NeighbourhoodLossOutput
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
    """A stage's losses: FC1 against the teachers, the narrow heads against the teachers or the student's FC1 vector.

    Codes are trained beside the floats by the narrow heads' losses without the cosine: signs cannot point where a
    teacher's vector does. They add to the loss, not to its parts.

    Args:
        stage: weights, margin, temperature, codes, and what teaches the narrow heads.
        widest: the width of FC1.
        group: whose ranks' batches make one batch; None: this process's alone.
        rows: how many of the stage's ``batch_size`` texts each rank of the group has.
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
            self.coded = jasper_loss(narrow.model_copy(update={"cosine": 0.0}), stage, group, rows)

    def forward(self, students: Mapping[int, Tensor], teacher: Tensor) -> AnyOutput:
        """Losses of a batch.

        Args:
            students: width -> (B, width) vectors.
            teacher: (B, D) unit target vectors.
        """
        output = self._of_floats(students, teacher)
        target = students[self.widest].detach() if self.own_target else teacher
        for precision in self.codes:
            codes = {width: straight_through(v, precision, self.group) for width, v in students.items()}
            coded = self.coded(codes, target)
            output = output._replace(loss=output.loss + self.codes_weight * coded.loss)
        return output

    def _of_floats(self, students: Mapping[int, Tensor], teacher: Tensor) -> AnyOutput:
        if self.together:
            return self.wide(students, teacher)
        narrow = {width: vectors for width, vectors in students.items() if width != self.widest}
        outputs: list[AnyOutput] = []
        if self.widest in students:
            outputs.append(self.wide({self.widest: students[self.widest]}, teacher))
        if narrow:
            outputs.append(self.narrow(narrow, students[self.widest].detach() if self.own_target else teacher))
        parts: dict[str, Tensor] = {}
        for output in outputs:
            for name, part in output._asdict().items():
                parts[name] = parts[name] + part if name in parts else part
        return NeighbourhoodLossOutput(**parts) if "neighbourhood" in parts else JasperLossOutput(**parts)


def jasper_loss(
    weights: LossWeights, stage: StageConfig, group: ProcessGroup | None, rows: Sequence[int] | None
) -> JasperLoss:
    """The losses with a stage's margin and temperature; see :class:`StageLoss` for ``group`` and ``rows``, which one
    process alone has no use for."""
    return JasperLoss(
        weights=(weights.cosine, weights.similarity, weights.relative_similarity),
        margin=stage.margin,
        neighbourhood=weights.neighbourhood,
        temperature=temperature_of(stage),
        group=group,
        rows=rows if group is not None else None,
    )


def temperature_of(stage: StageConfig) -> float | dict[int, float]:
    """Of the stage's heads; those that it does not name have the default."""
    if not isinstance(stage.temperature, dict):
        return stage.temperature
    return {width: stage.temperature.get(width, TEMPERATURE) for width in stage.heads}
