"""A sample of the training texts, which the end of a run encodes once for the refit of the heads and for PCA."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jasper_fast.config.run import Config
from jasper_fast.evaluation.label_free import MIN_DOCUMENTS
from jasper_fast.evaluation.score import STUDENT_PCA_ROWS
from jasper_fast.models.encode import pool_texts
from jasper_fast.models.student import Student
from jasper_fast.training.data import TrainingData
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.run.run import Run
from jasper_fast.training.stages.base import build_stage

REFIT_TEXTS = 10_000  # most texts of the refit
# Sampled texts per text that passes through the encoder in training. A training step takes about four times as long as
# encoding its texts, so the sample takes about 5 % of the training time. It does not depend on the clock, so a run can
# be repeated.
SAMPLED = 0.2


class Sample(NamedTuple):
    """Training texts and their pooled states.

    Attributes:
        rows: (n,) int64, positions among the training texts, ascending and evenly spread.
        states: (n, H) float32, pooled states of the trained student.
    """

    rows: np.ndarray
    states: Tensor


def can_refit(config: Config, documents: int) -> bool:
    """Return whether a run may refit its heads: it has heads, enough held-out documents, and no images."""
    return config.refit and config.student.head_type != "none" and config.images is None and documents >= MIN_DOCUMENTS


def most_sampled(config: Config, data: TrainingData) -> int:
    """Return the largest number of texts to sample. 0: nothing needs a sample."""
    held_out = len(data.held_out_texts) if data.held_out_texts is not None else 0
    if can_refit(config, held_out):
        return REFIT_TEXTS
    return STUDENT_PCA_ROWS if config.evaluate or held_out else 0


def sample_size(texts: int, most: int, trained: int) -> int:
    """Return the number of texts to sample.

    Args:
        texts: number of training texts.
        most: the largest number to sample.
        trained: texts that pass through the encoder in training, repeated ones included.
    """
    return min(texts, most, max(STUDENT_PCA_ROWS, round(SAMPLED * trained)))


def trained_texts(config: Config, student: Student, data: TrainingData, position: Position) -> int:
    """Return the number of texts that passed through the encoder in training, up to a position."""
    trained = 0
    for index, stage in enumerate(config.stages[: position.stage + 1]):
        steps = stage.steps if index < position.stage else position.stage_step
        if not build_stage(config, index, data).pooled_rows(student):
            trained += steps * stage.batch_size
    return trained


def take_sample(run: Run, student: Student, data: TrainingData, position: Position) -> Sample | None:
    """Encode a sample of the training texts. None: nothing needs one.

    Args:
        run: the run.
        student: the whole student, which moves to the run's device.
        data: the training data.
        position: the progress of the run.
    """
    texts: Any = data.texts
    most = most_sampled(run.config, data)
    trained = trained_texts(run.config, student, data, position) if most > STUDENT_PCA_ROWS else 0
    count = sample_size(len(texts), most, trained)
    if not count:
        return None
    rows = np.unique(np.linspace(0, len(texts) - 1, count).astype(np.int64))
    chosen, device = texts[rows.tolist()], run.device
    parts = pool_texts(student.to(device), chosen["text"], chosen["role"], student.max_length, device, run.precision)
    return Sample(rows, torch.from_numpy(np.concatenate(list(parts))))
