"""The losses of a stage: FC1 against the teachers, narrow heads against the teachers or FC1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from jasper_fast.codes import straight_through
from jasper_fast.config import TEMPERATURE, LossWeights, StageConfig
from jasper_fast.losses import AnyOutput, JasperLoss, JasperLossOutput, NeighbourhoodLossOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
