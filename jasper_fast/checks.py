"""What would spoil a run, found as early as it can be: impossible stages, and numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jasper_fast.batches import Batch
from jasper_fast.config import Config, StageConfig
from jasper_fast.errors import JasperError, Problems
from jasper_fast.loss_table import LOSSES, titles
from jasper_fast.model import Student
from jasper_fast.models import first_line
from jasper_fast.pretrained import check_max_length
from jasper_fast.ranks import Ranks
from jasper_fast.stages import frozen_digest, set_trained, trained_names


def check_stages(config: Config, student: Student, ranks: int) -> None:
    """Refuse impossible stages now, not hours later.

    Raises:
        JasperError: every problem found, of all stages.
    """
    problems = Problems()
    if any(stage.vision is not None for stage in config.stages):
        with problems:
            _check_sight(student)
    for position, stage in enumerate(config.stages):
        with problems:
            names = trained_names(student, stage)
            set_trained(student, names)
            if stage.narrow_start == "principal":
                problems += _principal_problems(config, stage, student, names)
            try:
                student.set_gradient_checkpointing(stage.gradient_checkpointing)
            except JasperError as error:
                problems.append(f"stage {stage.name!r}: {error}")
        student.set_gradient_checkpointing(False)
        if stage.max_length is not None:
            with problems:
                check_max_length(student.encoder, stage.max_length, f"stages.{position}.max_length")
        problems += _sharing_problems(config, stage, ranks)
    problems.tell()


@torch.no_grad()
def _check_sight(student: Student) -> None:
    """Let one picture pass: whether a tower and a text encoder fit each other shows nowhere else."""
    seeing, training = student.seeing, student.training
    student.eval()
    try:
        student.pool(torch.zeros(1, 3, seeing.side, seeing.side))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise JasperError(
            f"student.vision: no picture can pass from {type(seeing.tower).__name__} through "
            f"{type(student.encoder).__name__} ({first_line(error)}). The tower must give `last_hidden_state`, and the "
            "text encoder take `inputs_embeds`; choose another student.vision.model or student.model"
        ) from error
    finally:
        student.train(training)


def _sharing_problems(config: Config, stage: StageConfig, ranks: int) -> list[str]:
    """What keeps several processes from training a stage together."""
    problems = []
    if stage.batch_size < ranks:
        problems.append(
            f"a batch of {stage.batch_size} texts cannot be shared by {ranks} processes; raise batch_size or start "
            "fewer"
        )
    if config.parallel.mode == "fsdp" and stage.vision is not None and ranks > 1:
        problems.append("a vision stage cannot shard its student (parallel.mode: fsdp); set parallel.mode: ddp")
    if config.parallel.mode == "fsdp" and stage.micro_tokens is not None and ranks > 1:
        problems.append(
            "micro_tokens cuts each rank's texts into another number of forward passes, and sharded ranks must make "
            "equally many; use micro_batch, or parallel.mode: ddp"
        )
    return [f"stage {stage.name!r}: {problem}" for problem in problems]


def _principal_problems(config: Config, stage: StageConfig, student: Student, trained: list[str]) -> list[str]:
    """What keeps narrow heads from a start at the widest one's principal axes."""
    narrow = [width for width in stage.heads if width != student.widths[0]]
    problems = []
    if config.student.head_type == "prefix":
        problems.append("prefix heads are the widest head's own")
    if any(name.startswith("encoder.") for name in trained):
        problems.append("it trains the encoder, whose vectors would move away")
    if not narrow:
        problems.append("it has no narrow head")
    texts = stage.batch_size * (stage.steps if stage.batches == "random" else 1)  # groups of neighbours may come again
    if texts < max(narrow, default=0):
        problems.append(
            f"the head of width {max(narrow)} has more axes than there are texts, {texts}; raise "
            + ("batch_size or steps" if stage.batches == "random" else "batch_size")
        )
    return [f"stage {stage.name!r}: narrow_start: principal is not possible, as {problem}" for problem in problems]


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


def check_frozen(student: Student, stage: StageConfig, before: str) -> None:
    """Raise where a weight that does not train in the stage has changed."""
    if frozen_digest(student) != before:
        raise JasperError(f"stage {stage.name!r}: a frozen weight changed; this is a bug, please report it")


def is_finite(numbers: Mapping[str, float]) -> bool:
    """Whether every loss, part and norm is a number."""
    return all(math.isfinite(value) for value in numbers.values())


def not_finite(
    stage: StageConfig,
    stage_step: int,
    step: int,
    numbers: Mapping[str, float],
    batch: Batch,
    bad: Tensor,
    ranks: Ranks,
) -> JasperError:
    """The error that stops a run before an update that would spoil the weights. All ranks must call it alike.

    Args:
        stage_step, step: steps done, this one included, of the stage and of the run.
        numbers: the losses of this rank, and ``grad_norm``.
        bad: (b,) bool, this rank's texts of which a vector is not finite.
    """
    parts = [k for k, v in numbers.items() if not math.isfinite(v) and k not in ("loss", "grad_norm")]
    if parts:
        what = f"loss part {', '.join(parts)}"
    else:
        what = "the gradient" if math.isfinite(numbers["loss"]) else "the loss"
    own = (what if not is_finite(numbers) else "", batch.rows[np.flatnonzero(bad.cpu().numpy())].tolist())
    told = []
    for rank, (problem, rows) in enumerate(ranks.gather(own)):
        if problem:
            what = problem
        if rows:
            named = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
            told.append(f"rank {rank}: the vectors of training texts {named} are not finite")
    where = "; ".join(told) or "all vectors of the batch are finite"
    return JasperError(
        f"stage {stage.name!r}, step {stage_step} (step {step} of the run): {what} is not finite ({where}); "
        "nothing was updated and the last checkpoint is sound. Lower the stage's lr or set clip, and start the "
        "command again with another --out"
    )


def bad_texts(vectors: Mapping[int, Tensor], teacher: Tensor) -> Tensor:
    """(b,) bool: rows of which the student's or the teacher's vector is not finite."""
    every = [*vectors.values(), teacher]
    return torch.stack([~row.detach().isfinite().all(dim=1) for row in every]).any(dim=0)
