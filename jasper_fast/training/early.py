"""An early end (``train --finish``): a model of what the last checkpoint has learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jasper_fast.config.run import Config
from jasper_fast.models.encode import pool_texts
from jasper_fast.models.student import Student
from jasper_fast.training.ema import load_ema
from jasper_fast.training.head_init import PRINCIPAL_ROWS, start_at_principal_axes
from jasper_fast.training.optim import make_optimizer
from jasper_fast.training.parameters import set_trained
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.run.folder import CHECKPOINTS, RunFolder
from jasper_fast.training.run.run import Run
from jasper_fast.training.stages.base import build_stage
from jasper_fast.utils.errors import JasperError


def check_can_finish(path: Path) -> None:
    """Check, before anything is read or written, that a run has something to finish with.

    Args:
        path: the folder of the run.

    Raises:
        JasperError: it has no checkpoint, or was finished early at its newest checkpoint.
    """
    steps = [int(folder.name.removeprefix("step-")) for folder in (path / CHECKPOINTS).glob("step-*")]
    if RunFolder(path).finished:
        return
    if not steps:
        raise JasperError(
            f"--finish: {path} has no checkpoint (got no folder {CHECKPOINTS}/step-*, expected a run that was stopped "
            "or failed). Fix: train without --finish first, or give the run's folder as --out"
        )
    early = RunFolder(path).finished_early
    if early is not None and early["step"] == max(steps):
        raise JasperError(
            f"{path} is finished early already, after step {early['step']} of {early['steps']}: see "
            f"{path / 'report.md'}. Fix: run the command without --finish to train on"
        )


def load_average(run: Run, student: Student, position: Position) -> None:
    """Load the moving average of the weights, with which a stage ends, if the run was stopped within such a stage.

    All ranks must call it.

    Args:
        run: the run, which has loaded its checkpoint.
        student: the student of the checkpoint.
        position: the progress of the run.
    """
    if not position.stage_step or run.checkpoint is None:
        return
    stage = build_stage(run.config, position.stage)
    set_trained(student, stage.trained_names(student, stage.config))
    optimizer = make_optimizer(student, stage.config)
    run.checkpoint.load_state(optimizer)
    load_ema(optimizer)


def early_end(config: Config, position: Position, student: Student) -> dict[str, Any] | None:
    """Describe at which step a run ends early. None: all stages were trained.

    Args:
        config: the run's configuration.
        position: the progress of the run.
        student: the student.

    Returns:
        the step and the number of steps, the stages that were cut short or did not run, and the widths of untrained
        heads.
    """
    if position.stage >= len(config.stages):
        return None
    begun = position.stage + (position.stage_step > 0)
    trained: set[str] = set()
    for index, stage in enumerate(config.stages[:begun]):
        trained.update(build_stage(config, index).trained_names(student, stage))
    untrained = [w for w in student.widths if f"heads.{w}.weight" not in trained and str(w) in student.heads]
    return {
        "step": position.step,
        "steps": sum(stage.steps for stage in config.stages),
        "cut_short": [stage.name for stage in config.stages[position.stage : begun]],
        "not_run": [stage.name for stage in config.stages[begun:]],
        "untrained_heads": untrained,
    }


def set_untrained_heads(run: Run, student: Student, untrained: Sequence[int], texts: Any) -> list[int]:
    """Set narrow heads that no step has trained to the principal axes of the widest embeddings.

    Args:
        run: the run.
        student: the whole student, on one process.
        untrained: widths of the heads.
        texts: the training texts, with columns ``text`` and ``role``. A sample of them gives the axes.

    Returns:
        the widths that were set. Heads wider than the number of texts keep their initial weights.
    """
    narrow = [width for width in untrained if width != student.widths[0] and width <= len(texts)]
    if not narrow:
        return []
    rows = np.unique(np.linspace(0, len(texts) - 1, min(PRINCIPAL_ROWS, max(2048, 4 * narrow[0]))).astype(np.int64))
    chosen = texts[rows.tolist()]
    student.to(run.device)
    parts = pool_texts(student, chosen["text"], chosen["role"], student.max_length, run.device, run.precision)
    states = torch.from_numpy(np.concatenate(list(parts)))
    start_at_principal_axes(student, narrow, states, run.config.seed)
    return narrow


def early_line(early: dict[str, Any]) -> str:
    """Return a sentence on an early end, for the terminal, the report and the model card.

    Args:
        early: the facts of :func:`early_end`, with ``principal_heads`` from :func:`set_untrained_heads`.
    """
    parts = [f"finished early, after step {early['step']} of {early['steps']}"]
    if early["cut_short"]:
        parts.append(f"stage {early['cut_short'][0]} was cut short")
    if early["not_run"]:
        parts.append(f"not run: {', '.join(early['not_run'])}")
    if early["principal_heads"]:
        parts.append(
            f"untrained heads of width {', '.join(map(str, early['principal_heads']))} are principal axes of the "
            "widest embeddings"
        )
    random = [width for width in early["untrained_heads"] if width not in early["principal_heads"]]
    if random:
        parts.append(f"heads of width {', '.join(map(str, random))} keep their initial weights")
    return "; ".join(parts)
