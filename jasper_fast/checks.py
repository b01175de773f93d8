"""Check of a run's losses against the widths of its teachers."""

from __future__ import annotations

from collections.abc import Sequence

from jasper_fast.config import Config
from jasper_fast.errors import JasperError
from jasper_fast.loss_table import LOSSES, titles


def check_losses(config: Config, teachers: Sequence[int]) -> None:
    """Reject losses that would be left out because they need equal widths, and heads that no loss trains.

    Args:
        config: the run's configuration.
        teachers: width of each teacher's embeddings.

    Raises:
        JasperError: the first problem found.
    """
    widest, target = config.student.heads[0], sum(teachers)
    for stage in config.stages:
        if stage.vision is not None:  # each head is taught by its own width
            continue
        pointwise = [loss for loss in stage.weights.weighted() if loss.equal_widths]
        if widest in stage.heads and pointwise and widest != target:
            widths = " + ".join(map(str, teachers)) + (f" = {target}" if len(teachers) > 1 else "")
            zero = " and ".join(f"weights.{loss.name}: 0" for loss in pointwise)
            raise JasperError(
                f"stage {stage.name!r} has a {titles(pointwise)} loss, which needs equal widths (got FC1, the "
                f"student's widest head, {widest} wide and the teachers' embeddings {widths}). Fix: let student.heads "
                f"begin with {target}, cut a wider teacher with truncate_dim, or set the stage's {zero}"
            )
        for width in stage.heads:
            weights = stage.weights if width == widest else stage.narrow_weights or stage.weights
            against = widest if stage.narrow_target == "self" and width != widest else target
            if not weights.compares(stage.batch_size) and width != against:
                comparing = titles([loss for loss in LOSSES if not loss.equal_widths])
                raise JasperError(
                    f"stage {stage.name!r} would leave its head {width} untrained: its target is {against} wide, which "
                    f"leaves out losses that need equal widths, and no other loss learns from {stage.batch_size} "
                    f"texts. Fix: give narrow_weights a {comparing} loss, or leave the head out"
                )
