"""The run that stages are trained in: its folder, ranks, log, checkpoints, trackers and signals."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jasper_fast.config.diff import config_difference
from jasper_fast.config.run import Config
from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import shard
from jasper_fast.distributed.ranks import Ranks, join_ranks
from jasper_fast.models.student import Student
from jasper_fast.ops.native import code_digest
from jasper_fast.training.data import Batch, Precision, TrainingData
from jasper_fast.training.memory import memory_advice
from jasper_fast.training.run.checkpoint import Checkpoint, Position, Saver, latest_checkpoint
from jasper_fast.training.run.folder import CHECKPOINTS, RunFolder, keep_older_meaning, open_run, stored_difference
from jasper_fast.training.run.log import RunLog, SilentLog
from jasper_fast.training.run.phases import Phases
from jasper_fast.training.run.progress import Progress
from jasper_fast.training.run.signals import FINISH, RESUME, Stopped, leave_on_sigterm, stop_on_signal
from jasper_fast.training.run.trackers import Tracker, start_trackers
from jasper_fast.utils.device import pick_device
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.output import tolerant_output


@dataclass
class Run:
    """State of a run that its stages use. See :meth:`open` and :meth:`local`.

    Args:
        config: the run's configuration.
        device: the device of this rank.
        ranks: the processes of the run.
        folder: the run's folder. None: nothing is saved.
        log: the log.
        synchronize: whether a step waits for a GPU before it reads the clock, as benchmarks do.
    """

    config: Config
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    folder: RunFolder | None = None
    log: RunLog = field(default_factory=SilentLog)
    synchronize: bool = False

    def __post_init__(self) -> None:
        self.phases = Phases()  # before the first step
        self.checkpoint: Checkpoint | None = None  # from which the run resumes
        self.facts: dict[str, Any] = {}  # what must be equal when it resumes
        self.progress = Progress()  # planned phases, empty without a plan
        self.planned_seconds: dict[str, float] = {}  # by part of the run, and "in all"
        self.stop_requested: Callable[[], bool] = lambda: False
        self._saver: Saver | None = None
        self._trackers: list[Tracker] = []
        self._held = ExitStack()  # the folder's lock and the trackers, until the run is finished
        self._joined = ExitStack()  # the process group, until training ends
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    @contextmanager
    def open(cls, config: Config, out: str | Path | None = None) -> Iterator[Run]:
        """Join the ranks and lock the run's folder until the block ends.

        Args:
            config: the run's configuration.
            out: the folder of the run. None: ``runs/NAME``.

        Raises:
            JasperError: ranks differ or do not find each other, or the folder belongs to another process or run.
        """
        path = Path(out) if out is not None else Path("runs") / config.name
        with tolerant_output(), leave_on_sigterm(), ExitStack() as held, ExitStack() as joined:
            ranks = joined.enter_context(join_ranks(config.parallel.timeout))
            sections = config.model_dump(mode="json", exclude={"log"})
            ranks.check_consistent({**sections, "code": code_digest(), "torch": torch.__version__, "out": str(path)})
            config = ranks.on_main(lambda: keep_older_meaning(path, config))
            folder = ranks.on_main(lambda: held.enter_context(open_run(path, config)))
            run = cls(config, pick_device(), ranks, folder)
            run._held, run._joined = held, joined
            yield run

    @classmethod
    def local(
        cls, config: Config, device: torch.device | None = None, log: RunLog | None = None, synchronize: bool = False
    ) -> Run:
        """Return a run in memory: one rank, no folder, no checkpoints.

        Args:
            config: the run's configuration.
            device: the device that trains. None: this process's GPU, or the CPU.
            log: the log. None: nothing is logged.
            synchronize: whether a step waits for a GPU before it reads the clock.

        Example:
            >>> run = Run.local(config)
            >>> train_stage(run, student, stage, Position(0, 0, 0))
        """
        return cls(config, device or pick_device(), log=log or SilentLog(), synchronize=synchronize)

    @property
    def precision(self) -> Precision:
        """The precision of encoder passes."""
        return self.config.precision

    @property
    def path(self) -> Path:
        """The run's folder."""
        assert self.folder is not None, "this run is in memory"
        return self.folder.path

    def is_finished(self) -> bool:
        """Return True if the run has written its results before. All ranks must call it."""
        return self.ranks.on_main(lambda: self.folder is not None and self.folder.finished)

    def report_finished(self) -> Path:
        """Print where the results of a finished run are, and return its folder."""
        if self.ranks.is_main:
            print(f"{self.path} is finished: see {self.path / 'report.md'}; use --out DIR for a new run")
        return self.path

    def print(self, line: str) -> None:
        """Print a line on the first rank, before the log is open."""
        if self.ranks.is_main:
            print(line, flush=True)

    # Before the first step.

    def find_checkpoint(self) -> Position:
        """Find the newest complete checkpoint, and return the position to start or resume from."""
        folder = self.path / CHECKPOINTS
        self.checkpoint = self.ranks.on_main(lambda: latest_checkpoint(folder))
        return self.checkpoint.position if self.checkpoint is not None else Position(0, 0, 0)

    def check_unchanged(self, facts: dict[str, Any]) -> None:
        """Reject texts, teachers or settings that differ between ranks, or from the checkpoint's.

        Args:
            facts: fingerprints of all that changes the numbers, with the settings under ``config``.

        Raises:
            JasperError: something differs, or this version does not understand the checkpoint's settings.
        """
        self.ranks.check_consistent(facts)
        self.facts = facts
        if self.checkpoint is None:
            return
        path, stored = self.checkpoint.path, self.checkpoint.facts
        before, now = ({key: fact for key, fact in of.items() if key != "config"} for of in (stored, facts))
        settings = stored_difference(stored.get("config"), self.config, f"{path} (its settings)")
        changed = "; ".join(config_difference(before, now) + settings)
        if changed:
            raise JasperError(
                f"{path} was trained on other texts, teacher vectors or settings ({changed}). Fix: restore them, or "
                "use --out DIR for a new run"
            )

    def start_trackers(self) -> None:
        """Start the experiment trackers, before the long work since they may need a login.

        Raises:
            JasperError: one does not start.
        """
        done = self.checkpoint.position.step if self.checkpoint is not None else 0
        self.ranks.on_main(
            lambda: self._trackers.extend(self._held.enter_context(start_trackers(self.path, self.config, done)))
        )

    def track(self, values: dict[str, float], step: int) -> None:
        """Record numbers in the trackers, after training."""
        for tracker in self._trackers:
            tracker.log(values, step)

    @contextmanager
    def resume(self, student: Student) -> Iterator[Position]:
        """Load the checkpoint, then log and save until the block ends.

        Args:
            student: the student before training, on the CPU. It moves to the device, sharded if configured.

        Yields:
            the position to train from. In the block a signal stops the run after a step.
        """
        self._place(student)
        position = Position(0, 0, 0)
        if self.checkpoint is not None:
            self.checkpoint.load_model(student)
            position = self.checkpoint.position
        if self.ranks.is_main:
            self._delete_pooled(position)
        total = sum(stage.steps for stage in self.config.stages)
        if self.ranks.is_main:
            self.log = RunLog(self.path, self.config, total, position.step, self._trackers, self.progress)
        if self.planned_seconds:
            self.log.event("planned", planned_seconds=self.planned_seconds)
        if position.stage < len(self.config.stages):
            self.progress.advance(self.config.stages[position.stage].name, position.stage_step, None)
        self.log.event("preparation", seconds=self.phases.in_all, phases=self.phases.seconds)
        for note in self.config.notes:
            self.log.event("note", text=note)
        early = self.folder.finished_early if self.folder is not None else None
        if early is not None and self.ranks.is_main:
            self.log.info(f"this run was finished early, after step {early['step']}; its model and report are replaced")
        if position.step:
            self.log.info(f"resuming after step {position.step} of {total}")
        self._saver = Saver(self.path / CHECKPOINTS, self.config.checkpoint.keep, self.ranks.is_main)
        try:
            with stop_on_signal() as self.stop_requested:
                yield position
        finally:
            try:
                self._saver.close()
            finally:
                self.log.close()

    def log_texts(self, data: TrainingData, position: Position) -> None:
        """Write what became of the texts into the log, if the run starts from its first step."""
        if position.step == 0:
            counts = data.counts.to_dict() if data.counts is not None else {}
            self.log.event("texts", line=data.texts_line, **counts)

    def _place(self, student: Student) -> None:
        if self.config.parallel.mode == "fsdp" and self.ranks.world > 1:
            shard(student, self.device, self.ranks.world)
        else:
            student.to(self.device)

    def _delete_pooled(self, position: Position) -> None:
        """Delete pooled states that a killed run left behind for finished stages."""
        ahead = {stage.name for stage in self.config.stages[position.stage :]}
        for path in self.pooled_folder.glob("*"):
            if path.name not in ahead:
                shutil.rmtree(path, ignore_errors=True)

    # During a stage.

    @property
    def pooled_folder(self) -> Path:
        """The folder of pooled states, a temporary one for a run in memory."""
        if self.folder is not None:
            return self.folder.pooled
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="jasper-pooled-")
        return Path(self._scratch.name)

    def count_pooled(self, stage: str, phase: str = "pooling", unit: str = "texts") -> Callable[[int], None]:
        """Return a function that counts the pooled texts of a stage on the progress bar.

        Its first call gives the texts that were pooled before. It raises :class:`Stopped` if a signal asked to stop.

        Args:
            stage: the stage's name.
            phase: what is done before its first step.
            unit: what is counted, in the plural.
        """
        done, clock = 0, None

        def count(rows: int) -> None:
            nonlocal done, clock
            now = time.perf_counter()
            done += rows
            self.log.pooled(stage, rows, done, None if clock is None else now - clock, phase)
            clock = now
            if self.stop_requested():
                raise Stopped(f"stopped after {phase} {done} {unit} as requested. {RESUME}")

        return count

    def restore(self, optimizer: torch.optim.Optimizer, start: Position) -> None:
        """Seed the random numbers of a stage, or restore them and the optimizer in the middle of one."""
        torch.manual_seed(self.config.seed * 1000 + start.stage)
        if start.stage_step and self.checkpoint is not None:
            self.checkpoint.load_state(optimizer)

    @contextmanager
    def explain_errors(self, student: Student, stage: StageConfig, batch: Batch, where: str) -> Iterator[None]:
        """Turn lost ranks and missing memory in a step into errors that say what to do.

        Args:
            student: the student that trains.
            stage: the stage's settings.
            batch: this rank's part of the batch.
            where: the name of the step in messages.

        Raises:
            JasperError: a rank was lost, or memory did not suffice.
        """
        with self.ranks.name_lost_ranks(where), memory_advice(student, batch, stage, self.device, self.precision):
            yield

    def save(self, position: Position, student: Student, optimizer: torch.optim.Optimizer | None) -> None:
        """Save a checkpoint in the background. All ranks must call it.

        Args:
            position: the progress of the run.
            student: the student.
            optimizer: the optimizer. None: the end of a stage.

        Raises:
            JasperError: the previous checkpoint could not be written.
        """
        if self._saver is not None:
            self._saver.save(position, student, optimizer, self.facts)

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            JasperError: it could not be written.
        """
        if self._saver is not None:
            self._saver.wait()

    def stop(self, position: Position) -> None:
        """End the run as a signal requested, once its checkpoint is on disk.

        Raises:
            Stopped: always, on every rank.
        """
        self.ranks.on_main(self.wait_for_checkpoint)  # a rank that left earlier would end the others while they write
        raise Stopped(f"stopped after step {position.step} as requested. {RESUME}, or {FINISH}")

    def leave_ranks(self) -> bool:
        """Leave the process group at the end of training, and return whether this rank finalizes the run alone."""
        self._joined.close()
        return self.ranks.is_main
