"""The log of a run: a progress bar, printed lines, ``log.jsonl`` with every step, and experiment trackers."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from jasper_fast.config.losses import LOGGED_LOSSES
from jasper_fast.config.run import Config, LogConfig
from jasper_fast.training.run.progress import Progress
from jasper_fast.utils.atomic import disk_errors, write_atomic
from jasper_fast.utils.errors import JasperError

LOG = "log.jsonl"
IDENTITY = "tracking-id"  # the file by which a resumed run is the same run for trackers
SPIKE, SPIKE_WINDOW = 3.0, 16  # a loss of SPIKE times the median of the last SPIKE_WINDOW steps is marked


class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Record the numbers of a step."""
        ...

    def close(self) -> None:
        """End the record."""
        ...


class RunLog:
    """Progress bar, terminal lines, ``log.jsonl`` and trackers of one run.

    Args:
        folder: the run's folder.
        config: the run's configuration.
        total: steps over all stages.
        done: steps done before a resume. Later lines of the old log are dropped.
        trackers: trackers that record what is printed, as from :func:`start_trackers`.
        progress: the planned phases of the run. None: the time to go is unknown.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        total: int,
        done: int,
        trackers: Sequence[Tracker] = (),
        progress: Progress | None = None,
    ) -> None:
        from tqdm import tqdm

        self.path = folder / LOG
        self.every = config.log.every
        self.recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.stage = ""
        self._forget_after(done)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self.trackers = trackers
        self.progress = progress or Progress()
        shape = "{percentage:3.0f} %|{bar:20}| {desc}"  # the description has the only clock
        self.bar = tqdm(  # a log file gets no bar
            total=total, initial=done, dynamic_ncols=True, file=sys.stderr, disable=None, bar_format=shape
        )

    def info(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def step(self, stage: str, record: dict[str, Any], last: bool) -> None:
        """Record one step, and print it every few steps and at the end of a stage.

        Args:
            stage: the name of the stage.
            record: the numbers of the step.
            last: whether it is the last step of the stage.
        """
        spike = self._spike(stage, record["loss"])
        if spike is not None:
            record = {**record, "spike": spike}
            self.info(f"{stage} {record['stage_step']}: the loss jumped to {spike:.1f} times its recent median")
        to_go = self.progress.advance(stage, 1, record.get("seconds"))
        self.event("step", stage=stage, **record, **({} if to_go is None else {"to_go": to_go}))
        self.bar.set_description_str(self.progress.line(stage, record["stage_step"]), refresh=False)
        self.bar.update(1)
        if last or record["stage_step"] % self.every == 0:
            self.info(_line(stage, record))
            numbers = {k: v for k, v in record.items() if isinstance(v, float)}
            for tracker in self.trackers:
                tracker.log({f"{stage}/{k}": v for k, v in numbers.items()}, record["step"])

    def pooled(self, stage: str, texts: int, done: int, seconds: float | None) -> None:
        """Count pooled texts of a stage on the progress bar.

        Args:
            stage: the name of the stage.
            texts: the further texts.
            done: all texts so far.
            seconds: the seconds that the further texts took. None: they were pooled before.
        """
        phase = f"{stage}: pooling"
        self.progress.advance(phase, texts, seconds)
        self.bar.set_description_str(self.progress.line(phase, done))

    def event(self, event: str, **facts: Any) -> None:
        """Append one line to ``log.jsonl``.

        Raises:
            JasperError: the disk is full.
        """
        with disk_errors(self.path):
            self.file.write(json.dumps({"event": event, **facts}) + "\n")
            self.file.flush()

    def close(self) -> None:
        """End the progress bar and the file."""
        self.bar.close()
        with suppress(OSError):  # a full disk was reported before
            self.file.close()

    def _spike(self, stage: str, loss: float) -> float | None:
        """Return the ratio of the loss to its recent median if it is a spike, else None."""
        if stage != self.stage:
            self.stage = stage
            self.recent.clear()
        usual = statistics.median(self.recent) if len(self.recent) == SPIKE_WINDOW else 0.0
        self.recent.append(loss)
        return loss / usual if usual > 0 and loss > SPIKE * usual else None

    def _forget_after(self, done: int) -> None:
        """Drop lines of steps that will be repeated, and an incomplete last line."""
        if not self.path.exists():
            return
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("step", 0) <= done:
                lines.append(line + "\n")
        write_atomic(self.path, "".join(lines))


class SilentLog(RunLog):
    """The log of the other ranks, which print and write nothing."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.bar = tqdm(disable=True)

    def info(self, line: str) -> None:
        """Print nothing."""

    def step(self, stage: str, record: dict[str, Any], last: bool) -> None:
        """Record nothing."""

    def pooled(self, stage: str, texts: int, done: int, seconds: float | None) -> None:
        """Count nothing."""

    def event(self, event: str, **facts: Any) -> None:
        """Record nothing."""

    def close(self) -> None:
        """Do nothing: there is no file."""


def check_trackers(config: LogConfig) -> None:
    """Check that every configured tracker is installed.

    Raises:
        JasperError: one is not.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise JasperError(f"log.trackers asks for {name!r}, which is not installed. Fix: pip install {name}")


@contextmanager
def start_trackers(folder: Path, config: Config) -> Iterator[list[Tracker]]:
    """Start the configured trackers and close them after the block. A resumed run is the same run for them.

    Args:
        folder: the run's folder, which stores its identity.
        config: the run's configuration.

    Raises:
        JasperError: one does not start, for example without a login.
    """
    with ExitStack() as started:
        trackers: list[Tracker] = []
        for name in config.log.trackers:
            trackers.append(_TensorBoard(folder) if name == "tensorboard" else _WandbLike(name, folder, config))
            started.callback(trackers[-1].close)
        yield trackers


def seconds_spent(log: Path) -> dict[str, float]:
    """Return the wall-clock seconds of a ``log.jsonl`` by event, over all resumes. Repeated steps count once."""
    spent: dict[str, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        spent[record["event"]] = spent.get(record["event"], 0.0) + record.get("seconds", 0.0)
    return spent


def memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB: of the GPU, or of the process if the device is a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _line(stage: str, record: dict[str, Any]) -> str:
    parts = "  ".join(f"{part.name} {record[part.name]:.5f}" for part in LOGGED_LOSSES if part.name in record)
    speed = f"{record['texts_per_s']:.0f} texts/s  {record['tokens_per_s']:.0f} tokens/s"
    return (
        f"{stage} {record['stage_step']}  loss {record['loss']:.4f}  {parts}  |grad| {record['grad_norm']:.3f}  "
        f"lr {record['lr']:.2e}  {speed}  padding {100 * record['padding']:.0f} %  "
        f"data wait {100 * record['data_wait']:.0f} %  {record['memory_gb']:.2f} GB"
    )


def _identity(folder: Path) -> str:
    """Return the run's unique name."""
    file = folder / IDENTITY
    if not file.is_file():
        write_atomic(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text(encoding="utf-8").strip()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.make = str(folder / "tensorboard"), SummaryWriter
        self.writer: SummaryWriter | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        if self.writer is None:  # drops what an earlier process wrote of this step and later ones
            self.writer = self.make(self.folder, purge_step=step)
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _WandbLike:
    """Weights & Biases, or trackio, which has the same interface but identifies a run by its name instead of an id."""

    def __init__(self, name: str, folder: Path, config: Config) -> None:
        self.module = import_module(name)
        identity = _identity(folder)
        same = {"name": config.name, "id": identity} if name == "wandb" else {"name": f"{config.name}-{identity}"}
        try:
            self.module.init(project=config.log.project, config=config.model_dump(mode="json"), resume="allow", **same)
        except getattr(self.module, "Error", ()) as error:  # of W&B
            raise JasperError(f"{name}: {error}\nFix: type `{name} login`, or leave it out of log.trackers") from error

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()
