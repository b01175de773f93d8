"""The training loop: one stage of a run, step by step."""

from __future__ import annotations

import time

import torch

from jasper_fast.config.stage import StageConfig
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch
from jasper_fast.training.ema import load_ema
from jasper_fast.training.memory import measure_activations
from jasper_fast.training.optim import clip_gradients, set_learning_rate
from jasper_fast.training.parameters import check_frozen, frozen_digest
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.run.gpu_monitor import GpuMonitor
from jasper_fast.training.run.log import memory_gb
from jasper_fast.training.run.run import Run
from jasper_fast.training.stages.base import Stage, describe_stage
from jasper_fast.training.step import (
    StepReport,
    StepTimer,
    bad_rows,
    dropout_mask,
    not_finite,
    read_numbers,
    reduce_report,
    take_gradients,
)


def train_stage(run: Run, student: Student, stage: Stage, start: Position) -> None:
    """Train one stage from ``start.stage_step`` to its end.

    Args:
        run: the run. :meth:`Run.local` makes one without a folder.
        student: the student on the run's device. It is trained in place.
        stage: what trains, on which batches, with which loss.
        start: the position to start or resume from.

    Raises:
        ValueError: the position is one of another stage.
        Stopped: a signal asked to stop. A checkpoint was saved first.
        JasperError: a loss or gradient is not finite (before the update), a frozen weight changed, memory did not
            suffice, or a rank was lost.

    Example:
        >>> run = Run.local(config)
        >>> stage = build_stage(config, 0, TrainingData(texts), teachers)
        >>> train_stage(run, student, stage, Position(0, 0, 0))
    """
    if start.stage != stage.index:
        raise ValueError(f"stage {stage.index} cannot start at a position of stage {start.stage}: {start}")
    optimizer = stage.begin(run, student, start)
    run.restore(optimizer, start)
    frozen = frozen_digest(student)
    run.log.info(describe_stage(student, stage.config, start.stage_step))
    speed, stopping = ThroughputMeter(run, stage.config), False

    for step, batch in stage.batches(start.stage_step):
        position = start.at(step + 1)
        last = position.stage_step == stage.config.steps
        where = f"stage {stage.config.name!r}, step {position.stage_step}"
        run.ranks.barrier(where)
        if step == start.stage_step:
            log_activations(run, student, stage.config, batch)
        timer = StepTimer(run.device, run.synchronize)
        with run.explain_errors(student, stage.config, batch, where):
            report = train_step(run, student, stage, optimizer, step, batch, position, timer)
        numbers = {"step": position.step, "stage_step": position.stage_step, **report.numbers}
        numbers["lr"] = optimizer.param_groups[0]["lr"]
        run.log.step(stage.config.name, {**numbers, **speed.read(batch, report, timer, position)}, last)
        stopping = report.stop
        if not last and (stopping or position.stage_step % run.config.checkpoint.every == 0):
            run.save(position, student, optimizer)
        if not last and stopping:
            run.stop(position)

    load_ema(optimizer)
    check_frozen(student, stage.config, frozen)
    position = start.after(stage.config.steps)
    run.save(position, student, None)
    stage.end(run)
    if stopping and position.stage < len(run.config.stages):
        run.stop(position)


def train_step(
    run: Run,
    student: Student,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    step: int,
    batch: Batch,
    position: Position,
    timer: StepTimer,
) -> StepReport:
    """Take one optimizer step.

    Args:
        run: the run.
        student: the student.
        stage: the stage after ``begin``.
        optimizer: its optimizer.
        step: the step of the stage, counted from 0.
        batch: this rank's part of the batch.
        position: the position after the step.
        timer: the timer of the step's parts.

    Returns:
        losses, gradient norm and token counts, equal on all ranks.

    Raises:
        JasperError: a loss or gradient is not finite. All ranks raise it, before the update.
    """
    config, total = stage.config, batch.total or stage.config.batch_size
    set_learning_rate(optimizer, stage.learning_rate(step))
    dropout = dropout_mask(
        student.config.vector_dropout,
        (run.config.seed, stage.index, step),
        run.ranks.rows(total) if batch.places is None else batch.places,
        total,
        student.hidden_size,
        run.device,
    )
    output, embeddings = take_gradients(student, batch, config, stage.loss, run.device, run.precision, dropout, timer)
    with timer.part("communication"):
        run.ranks.average_gradients(student.parameters())
    with timer.part("optimiser"):
        norm = clip_gradients(student, config.clip)
        numbers = read_numbers(output, norm)
    with timer.part("communication"):
        report = reduce_report(run.ranks, numbers, batch, run.stop_requested())
    if not report.finite:
        bad = bad_rows(embeddings, batch.teacher.to(run.device))
        raise not_finite(config, position.stage_step, position.step, report.numbers, batch, bad, run.ranks)
    with timer.part("optimiser"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return report


def log_activations(run: Run, student: Student, stage: StageConfig, batch: Batch) -> None:
    """Log the memory of the graph, measured on the first batch."""
    facts = measure_activations(student, stage, batch, run.device, run.precision)
    if facts is not None:
        run.log.event("activations", stage=stage.name, encoded_twice=stage.gradient_caching, **facts)


class ThroughputMeter:
    """Speed, memory and GPU readings of a stage's steps, for the log.

    Args:
        run: the run.
        stage: the stage's settings.
    """

    def __init__(self, run: Run, stage: StageConfig) -> None:
        self.run, self.stage = run, stage
        self._monitor = GpuMonitor(run.device)
        self._texts = 0  # of this rank since the last GPU reading
        self._clock = time.perf_counter()

    def read(self, batch: Batch, report: StepReport, timer: StepTimer, position: Position) -> dict[str, float]:
        """Return the numbers of the step that just ended."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        total, done = batch.total or self.stage.batch_size, position.stage_step
        self._texts += len(batch.rows)
        gpu: dict[str, float] = {}
        if done == self.stage.steps or done % self.run.config.log.every == 0:
            gpu, self._texts = self._monitor.read(self._texts), 0
        return {
            "seconds": seconds,
            "texts_per_s": total / seconds,
            "tokens_per_s": report.tokens / seconds,
            "padding": 1.0 - report.tokens / report.padded if report.padded else 0.0,
            "data_wait": min(1.0, batch.wait / seconds),
            "memory_gb": memory_gb(self.run.device),
            **timer.fractions(seconds),
            **gpu,
        }
