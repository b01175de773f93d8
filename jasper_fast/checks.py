"""Check of a run's losses against the widths of its teachers."""

from __future__ import annotations

from collections.abc import Sequence

from jasper_fast.config import Config
from jasper_fast.errors import JasperError


def check_losses(config: Config, teachers: Sequence[int]) -> None:
    """Refuse a cosine loss that would be left out, and heads that no loss reaches: a cosine needs equal widths.

    Args:
        teachers: width of each teacher's vectors.

    Raises:
        JasperError: the first problem found.
    """
    widest, target = config.student.heads[0], sum(teachers)
    for stage in config.stages:
        if stage.vision is not None:  # each head is taught by its own width
            continue
        if widest in stage.heads and stage.weights.cosine and widest != target:
            told = " + ".join(map(str, teachers)) + (f" = {target}" if len(teachers) > 1 else "")
            raise JasperError(
                f"stage {stage.name!r} asks for a cosine loss, which needs equal widths, but FC1, the student's widest "
                f"head, is {widest} wide and the teachers' vectors {told}; let student.heads begin with {target}, cut "
                "a wider teacher with truncate_dim, or set the stage's weights.cosine: 0"
            )
        for width in stage.heads:
            weights = stage.weights if width == widest else stage.narrow_weights or stage.weights
            against = widest if stage.narrow_target == "self" and width != widest else target
            if not weights.compares(stage.batch_size) and width != against:
                raise JasperError(
                    f"stage {stage.name!r} would leave its head {width} untrained: a cosine loss needs equal widths, "
                    f"but what teaches it is {against} wide, and no other loss learns from {stage.batch_size} texts; "
                    "add narrow_weights with a similarity or neighbourhood loss, or leave the head out"
                )
