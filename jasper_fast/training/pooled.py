"""Batches for one stage: rows by the stateless sampler, texts tokenised, frozen encoders pooled once."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jasper_fast.config import Config, StageConfig
from jasper_fast.encode import MicroBatches, pool_texts
from jasper_fast.errors import JasperError
from jasper_fast.files import write_atomic
from jasper_fast.model import Student
from jasper_fast.neighbours import kept_graph
from jasper_fast.ranks import Ranks
from jasper_fast.sampler import BatchPlan, neighbour_batches, random_batches
from jasper_fast.sharding import is_sharded
from jasper_fast.stages import frozen_digest

if TYPE_CHECKING:
    from jasper_fast.vision_batches import ImageBatches
    from jasper_fast.vision_loss import Told

AHEAD = 2  # batches prepared while one trains
POOL_CHUNK = 4096  # texts per published piece of the pooled states
ALONE = Ranks()


class Teachers(Protocol):
    """What batches need of the teachers' vectors."""

    fingerprint: str
    width: int
    revisions: list[str | None]

    def read(self, rows: np.ndarray) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """This rank's part of one batch: how to get its pooled states, and its targets."""

    rows: np.ndarray  # (B,) int64, among the training texts
    teacher: Tensor  # (B, D) fp32 unit vectors
    texts: MicroBatches | ImageBatches | None  # None: the states are pooled already
    pooled: Tensor | None  # (B, hidden) fp32
    tokens: int
    padded: int
    wait: float  # seconds that training waited for it
    told: Told | None = None  # to a vision stage's loss, beside the teacher


def check_sizes(config: Config, texts: Any, pictures: int = 0) -> None:
    """Refuse a run whose batches are larger than what the stage may draw from.

    Args:
        texts: the training texts.
        pictures: how many training pictures there are.

    Raises:
        JasperError: names every such stage.
    """
    small = []
    for stage in config.stages:
        there, kind = (len(texts), "texts") if stage.vision is None else (pictures, "pictures")
        there = min(there, stage.texts or there)
        if stage.max_chars is not None:
            there, kind = len(rows_up_to(texts, there, stage.max_chars)), f"texts of up to {stage.max_chars} characters"
        narrow = [width for width in stage.heads if width != max(config.student.heads)]
        if there < stage.batch_size:
            small.append(f"stage {stage.name!r}: a batch of {stage.batch_size} from {there} {kind}")
        elif stage.narrow_start == "principal" and there < max(narrow, default=0):
            small.append(f"stage {stage.name!r}: {max(narrow)} principal axes from {there} {kind}")
    if small:
        raise JasperError(
            f"too little to train on ({'; '.join(small)}); give more, or lower batch_size, or leave narrow_start out"
        )


def rows_up_to(texts: Any, n: int, max_chars: int) -> np.ndarray:
    """Which of the first n texts have at most so many characters, int64 ascending."""
    import pyarrow.compute as pc

    columns = texts.select_columns(["text"]).select(range(n)).with_format("arrow")
    lengths = [pc.utf8_length(part.column("text")).to_numpy() for part in columns.iter(65_536)]
    return np.flatnonzero(np.concatenate(lengths) <= max_chars) if lengths else np.zeros(0, np.int64)


def batch_plan(config: Config, index: int, source: Any, teachers: Teachers, say: Callable[[str], None]) -> BatchPlan:
    """The stage's rows for every step.

    Args:
        index: the stage's position in the configuration.
        source: the training texts, or pictures.

    Raises:
        JasperError: too few texts differ for a batch of neighbours.
    """
    stage = config.stages[index]
    n = min(len(source), stage.texts or len(source))
    if stage.max_chars is not None:
        short = rows_up_to(source, n, stage.max_chars)
        positions = random_batches(len(short), stage.batch_size, config.seed, index)
        return lambda step: short[positions(step)]
    if stage.batches == "random":
        return random_batches(n, stage.batch_size, config.seed, index)
    graph = kept_graph(config.data.cache, teachers, n, stage.neighbours, say)
    try:
        return neighbour_batches(graph, stage.batch_size, config.seed, index, stage.random_share)
    except ValueError as error:
        raise JasperError(
            f"stage {stage.name!r}: {error}; lower batch_size, give more text, or set batches: random"
        ) from None


def write_npy(path: Path, array: np.ndarray) -> None:
    """Save an array so that a reader sees all of it or none."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())


class PooledStates:
    """Pooled states of a frozen encoder for exactly the rows that a stage will ask for, computed once.

    Pieces are published one by one under ``folder``, so an interrupted run goes on where it was; pieces of another
    encoder, length or other texts are thrown away.

    Args:
        folder: where the pieces lie until the stage is over.
        rows: (R,) int64, ascending.
        key: what decides the states besides the rows.
        ranks: who share the work, through one file system.
    """

    def __init__(self, folder: Path, rows: np.ndarray, key: str, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.folder = folder
        self.rows = rows
        self.pieces: list[np.ndarray] = []
        digest = hashlib.blake2b(f"{key} {POOL_CHUNK} ".encode() + rows.tobytes(), digest_size=16).hexdigest()

        def start() -> None:
            note = folder / "key"
            if not note.is_file() or note.read_text() != digest:
                shutil.rmtree(folder, ignore_errors=True)
                write_atomic(note, digest)

        ranks.lead(start)

    def compute(
        self, pool: Callable[[np.ndarray], np.ndarray], progress: Callable[[int], Any], together: bool = False
    ) -> None:
        """Fill in what is missing; ``pool`` maps rows to (rows, hidden) float32.

        Args:
            progress: told how many more rows are there; may raise to stop.
            together: whether ``pool`` needs every rank for every row, as a sharded encoder does.
        """
        pieces = [
            (start, self.folder / f"{start // POOL_CHUNK:06d}.npy") for start in range(0, len(self.rows), POOL_CHUNK)
        ]
        missing = self.ranks.lead(lambda: [piece for piece in pieces if not piece[1].exists()])
        progress(len(self.rows) - sum(len(self.rows[start : start + POOL_CHUNK]) for start, _ in missing))
        for start, path in missing if together else missing[self.ranks.rank :: self.ranks.world]:
            states = pool(self.rows[start : start + POOL_CHUNK])
            if not together or self.ranks.first:
                write_npy(path, states)
            progress(len(states))
        self.ranks.gather(None)  # until all have written theirs
        self.pieces = [np.load(path, mmap_mode="r") for _, path in pieces]

    def read(self, rows: np.ndarray) -> Tensor:
        """(B, hidden) fp32 states of rows that were computed."""
        at = np.searchsorted(self.rows, rows)
        return torch.from_numpy(np.stack([self.pieces[i // POOL_CHUNK][i % POOL_CHUNK] for i in at]))

    def discard(self) -> None:
        """Delete the pieces: the stage is over."""
        self.pieces = []
        if self.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)


def pooled_states(
    folder: Path,
    student: Student,
    stage: StageConfig,
    plan: BatchPlan,
    texts: Any,
    of_texts: str,
    device: torch.device,
    precision: Any,
    progress: Callable[[int], Any],
    ranks: Ranks,
) -> PooledStates:
    """Pool what the stage will read, with the encoder as it is now (frozen for the stage).

    Args:
        of_texts: a fingerprint of the texts.
        progress: told how many more rows are there; may raise to stop.
    """
    rows = np.unique(np.concatenate([plan(step) for step in range(stage.steps)]))
    length = stage.max_length or student.max_length
    states = PooledStates(folder, rows, f"{of_texts} {length} {precision} {frozen_digest(student)}", ranks)

    def pool(part: np.ndarray) -> np.ndarray:
        chosen = texts[part.tolist()]
        parts = pool_texts(student, chosen["text"], chosen["role"], length, device, precision, POOL_CHUNK)
        return np.concatenate(list(parts))

    states.compute(pool, progress, together=is_sharded(student))
    return states


def stage_batches(
    stage: StageConfig,
    first_step: int,
    plan: BatchPlan,
    texts: Any,
    teachers: Teachers,
    student: Student,
    pooled: PooledStates | None,
    ranks: Ranks,
) -> Iterator[tuple[int, Batch]]:
    """Yield (stage step, this rank's batch) from ``first_step`` to the end."""
    length = stage.max_length or student.max_length
    mine = ranks.rows(stage.batch_size)
    counts = ranks.counts(stage.batch_size)
    # Sharded layers come together in every pass, so all ranks make equally many.
    passes = min(-(-counts[0] // stage.micro_batch), counts[-1]) if is_sharded(student) else None

    def prepare(step: int) -> Batch:
        rows = plan(step)[mine]
        teacher = teachers.read(rows)
        if pooled is not None:
            return Batch(rows, teacher, None, pooled.read(rows), 0, 0, 0.0)
        chosen = texts[rows.tolist()]
        ids = student.tokenize(chosen["text"], chosen["role"], length)
        micro = MicroBatches.of(ids, stage.micro_batch, stage.micro_tokens, passes)
        return Batch(rows, teacher, micro, None, micro.tokens, micro.padded, 0.0)

    return batches_of(prepare, first_step, stage.steps, student.device)


def batches_of(
    prepare: Callable[[int], Batch], first_step: int, steps: int, device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, ``prepare(step)``) from ``first_step`` to before ``steps``.

    A thread prepares the next ones while a GPU is at work. On a CPU the step itself has all cores, and a thread beside
    it brings a team of OpenMP threads of its own: short steps took 1.4 times as long.
    """
    if device.type == "cpu":
        for step in range(first_step, steps):
            asked = time.perf_counter()
            batch = prepare(step)
            yield step, replace(batch, wait=time.perf_counter() - asked)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as worker:
        ahead: list[Future[Batch]] = []
        try:
            for step in range(first_step, steps):
                while len(ahead) < AHEAD and step + len(ahead) < steps:
                    ahead.append(worker.submit(prepare, step + len(ahead)))
                asked = time.perf_counter()
                batch = ahead.pop(0).result()
                yield step, replace(batch, wait=time.perf_counter() - asked)
        finally:
            for future in ahead:
                future.cancel()
