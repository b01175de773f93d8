"""The losses of a stage: FC1 against the teachers, narrow heads against the teachers or FC1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from jasper_fast.codes import straight_through
from jasper_fast.config import StageConfig
from jasper_fast.loss_config import LossWeights
from jasper_fast.loss_table import LOSSES, TEMPERATURE
from jasper_fast.losses import CombinedLoss, LossOutput
from jasper_fast.losses.arguments import LossOptions

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
