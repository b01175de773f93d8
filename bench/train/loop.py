"""The training loop for benchmarks: stages with given batches, and a log that keeps every step in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from jasper_fast.config.data import DataConfig, SourceConfig
from jasper_fast.config.models import TeacherConfig
from jasper_fast.config.run import Config
from jasper_fast.config.stage import StageConfig
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch, Precision, Teachers, TrainingData
from jasper_fast.training.loop import train_stage
from jasper_fast.training.prefetch import batches_of
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.run.log import SilentLog
from jasper_fast.training.run.run import Run
from jasper_fast.training.sampler import BatchPlan
from jasper_fast.training.stages.base import Stage
from jasper_fast.training.stages.text import TextStage


class StepRecorder(SilentLog):
    """A log that keeps the records of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []

    def step(self, stage: str, record: dict[str, Any], last: bool) -> None:
        """Keep the record of a step."""
        self.steps.append(record)


class PlannedStage(TextStage):
    """A stage of texts with a given plan of batches.

    Args:
        config: configuration from :func:`one_stage`.
        texts: a dataset with columns ``text`` and ``role``.
        teachers: the teacher embeddings.
        rows: the plan of batches.
    """

    def __init__(self, config: Config, texts: Any, teachers: Teachers, rows: BatchPlan) -> None:
        super().__init__(config, 0, TrainingData(texts), teachers)
        self.rows = rows

    def plan(self, run: Run) -> BatchPlan:
        """Return the given plan."""
        return self.rows


class PreparedStage(TextStage):
    """A stage with given batches, one per step.

    Args:
        config: configuration from :func:`one_stage`.
        prepared: the batches.
    """

    def __init__(self, config: Config, prepared: Sequence[Batch]) -> None:
        super().__init__(config, 0)
        self.prepared = prepared

    def plan(self, run: Run) -> BatchPlan:
        """Return the rows of the given batches."""
        return lambda step: self.prepared[step].rows

    def pool(self, run: Run, student: Student, plan: BatchPlan) -> None:
        """Pool nothing: the batches are complete."""

    def batches(self, first_step: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, batch)."""
        return batches_of(lambda step: self.prepared[step], first_step, self.config.steps, self._student.device)


def one_stage(student: Student, stage: StageConfig, precision: Precision) -> Config:
    """Return the configuration of a run of one stage, whose teachers and texts are given otherwise."""
    return Config(
        name="bench",
        precision=precision,
        student=student.config.model_copy(update={"heads": stage.heads}),
        teachers=[TeacherConfig(model="given")],
        data=DataConfig(sources=[SourceConfig(path="given")]),
        stages=[stage],
    )


def recorded_steps(config: Config, student: Student, stage: Stage, device: torch.device) -> list[dict[str, Any]]:
    """Train a stage and return the log records of its steps. On a GPU every part of a step waits for the one before."""
    log = StepRecorder()
    train_stage(Run.local(config, device, log, synchronize=True), student, stage, Position(0, 0, 0))
    return log.steps
