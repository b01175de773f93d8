"""The log of a run: a progress bar, printed lines, and ``log.jsonl`` with every step."""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from jasper_fast.config.losses import LOGGED_LOSSES
from jasper_fast.config.run import Config
from jasper_fast.training.run.progress import Progress
from jasper_fast.training.run.trackers import Tracker
from jasper_fast.utils.atomic import disk_errors, write_atomic

LOG = "log.jsonl"
LINE_WIDTH = 100  # columns of a printed step
LINE_SECONDS = 2.0  # the least time between two printed steps of a stage
MIN_WAIT = 0.2  # fraction of a step that waits for data, from which it is printed
SPIKE, SPIKE_WINDOW = 3.0, 16  # a loss of SPIKE times the median of the last SPIKE_WINDOW steps is marked


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
        self.stages = [stage.name for stage in config.stages]
        self.steps = {stage.name: stage.steps for stage in config.stages}
        self._printed = -math.inf  # when the last step was printed
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
        """Record one step. Print it every few steps, at most every `LINE_SECONDS`, and at the end of a stage.

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
        due = last or record["stage_step"] % self.every == 0
        if due:
            for tracker in self.trackers:
                tracker.log(self._curves(stage, record), record["step"])
        if last or (due and time.monotonic() - self._printed >= LINE_SECONDS):
            self._printed = time.monotonic()
            self.info(step_line(stage, record, self.steps.get(stage)))

    def pooled(self, stage: str, texts: int, done: int, seconds: float | None, phase: str = "pooling") -> None:
        """Count pooled texts of a stage, or pairs that are scored, on the progress bar.

        Args:
            stage: the name of the stage.
            texts: the further texts.
            done: all texts so far.
            seconds: the seconds that the further texts took. None: they were pooled before.
            phase: what is done with them.
        """
        name = f"{stage}: {phase}"
        self.progress.advance(name, texts, seconds)
        self.bar.set_description_str(self.progress.line(name, done))

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

    def _curves(self, stage: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers of a step under the names that trackers show, as curves over all stages."""
        numbers = {f"train/{key}": value for key, value in record.items() if isinstance(value, float)}
        place = {"train/stage": float(self.stages.index(stage))} if stage in self.stages else {}
        return numbers | place

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

    def pooled(self, stage: str, texts: int, done: int, seconds: float | None, phase: str = "pooling") -> None:
        """Count nothing."""

    def event(self, event: str, **facts: Any) -> None:
        """Record nothing."""

    def close(self) -> None:
        """Do nothing: there is no file."""


def append_event(folder: Path, event: str, **facts: Any) -> None:
    """Append one line to the ``log.jsonl`` of a run whose log is closed.

    Args:
        folder: the run's folder.
        event: the name of the event.
        facts: its values.

    Raises:
        JasperError: the disk is full.
    """
    with disk_errors(folder / LOG), open(folder / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, **facts}) + "\n")


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


def step_line(stage: str, record: Mapping[str, Any], steps: int | None) -> str:
    """Return the printed line of a step, at most `LINE_WIDTH` columns wide.

    Losses of weight 0 and numbers that were not measured are left out. If the line is full, so are the last ones.

    Args:
        stage: the name of the stage.
        record: the numbers of the step.
        steps: the number of steps of the stage. None: unknown.
    """
    of_all = "" if steps is None else f"/{steps}"
    line = f"{stage} {record['stage_step']}{of_all}  loss {record['loss']:.4g}  {record['texts_per_s']:.0f} texts/s"
    losses = [f"{part.title} {record[part.name]:.3g}" for part in LOGGED_LOSSES if record.get(part.name)]
    wait = record["data_wait"]
    others = [
        f"lr {record['lr']:.1e}",
        f"{record['tokens_per_s']:.0f} tokens/s" if record["tokens_per_s"] else "",
        f"{record['memory_gb']:.1f} GB",
        f"data wait {100 * wait:.0f} %" if wait >= MIN_WAIT else "",
    ]
    for part in filter(None, [*losses, *others]):
        if len(line) + 2 + len(part) <= LINE_WIDTH:
            line += f"  {part}"
    return line if len(line) <= LINE_WIDTH else line[: LINE_WIDTH - 1] + "…"
