"""Pooled states of a frozen encoder, computed once per stage and kept on disk."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import is_sharded
from jasper_fast.distributed.ranks import Ranks
from jasper_fast.models.encode import pool_texts
from jasper_fast.models.student import Student
from jasper_fast.training.parameters import frozen_digest
from jasper_fast.training.sampler import BatchPlan
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.fingerprint import content_digest

if TYPE_CHECKING:
    from jasper_fast.training.run.run import Run

POOL_CHUNK = 4096  # texts per published piece
SINGLE_PROCESS = Ranks()


class PooledStates:
    """Pooled states of a frozen encoder for exactly the rows that a stage reads, computed once.

    Pieces are published one by one, so an interrupted run resumes after the last one. Pieces of another encoder, length
    or other texts are deleted.

    Args:
        folder: the folder of the pieces until the stage ends.
        rows: (R,) int64, ascending.
        key: the identity of the states without the rows.
        ranks: the ranks that divide the work, through one file system.
    """

    def __init__(self, folder: Path, rows: np.ndarray, key: str, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.ranks = ranks
        self.folder = folder
        self.rows = rows
        self.pieces: list[np.ndarray] = []
        digest = content_digest([f"{key} {POOL_CHUNK} ", rows.tobytes()])

        def start() -> None:
            note = folder / "key"
            if not note.is_file() or note.read_text() != digest:
                shutil.rmtree(folder, ignore_errors=True)
                write_atomic(note, digest)

        ranks.on_main(start)

    def compute(
        self, pool: Callable[[np.ndarray], np.ndarray], progress: Callable[[int], Any], collective: bool = False
    ) -> None:
        """Compute the missing pieces.

        Args:
            pool: a function from rows to (rows, hidden) float32 states.
            progress: a function that gets the number of further rows done, and may raise to stop.
            collective: whether ``pool`` needs every rank for every row, as a sharded encoder does.
        """
        pieces = [
            (start, self.folder / f"{start // POOL_CHUNK:06d}.npy") for start in range(0, len(self.rows), POOL_CHUNK)
        ]
        missing = self.ranks.on_main(lambda: [piece for piece in pieces if not piece[1].exists()])
        progress(len(self.rows) - sum(len(self.rows[start : start + POOL_CHUNK]) for start, _ in missing))
        for start, path in missing if collective else missing[self.ranks.rank :: self.ranks.world]:
            states = pool(self.rows[start : start + POOL_CHUNK])
            if not collective or self.ranks.is_main:
                write_npy(path, states)
            progress(len(states))
        self.ranks.wait_for_all()
        self.pieces = [np.load(path, mmap_mode="r") for _, path in pieces]

    def read(self, rows: np.ndarray) -> Tensor:
        """Return the states of computed rows, (B, hidden) float32."""
        at = np.searchsorted(self.rows, rows)
        return torch.from_numpy(np.stack([self.pieces[i // POOL_CHUNK][i % POOL_CHUNK] for i in at]))

    def discard(self) -> None:
        """Delete the pieces at the end of the stage."""
        self.pieces = []
        if self.ranks.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)


def pooled_states(
    run: Run,
    student: Student,
    stage: StageConfig,
    plan: BatchPlan,
    source: str,
    read: Callable[[np.ndarray], tuple[Sequence[str], Sequence[str]]],
) -> PooledStates:
    """Pool what a stage reads with the encoder as it is now, which stays frozen for the stage.

    Args:
        run: the run.
        student: the student at the start of the stage.
        stage: the stage's settings.
        plan: the rows of every step.
        source: the identity of what the rows count.
        read: a function from rows to texts and their roles.
    """
    rows = np.unique(np.concatenate([plan(step) for step in range(stage.steps)]))
    length = stage.max_length or student.max_length
    key = f"{source} {length} {run.precision} {frozen_digest(student)}"
    states = PooledStates(run.pooled_folder / stage.name, rows, key, run.ranks)

    def pool(part: np.ndarray) -> np.ndarray:
        texts, roles = read(part)
        return np.concatenate(list(pool_texts(student, texts, roles, length, run.device, run.precision, POOL_CHUNK)))

    states.compute(pool, run.count_pooled(stage.name), collective=is_sharded(student))
    return states


def write_npy(path: Path, array: np.ndarray) -> None:
    """Save an array so that a reader sees all of it or nothing."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())
