"""Experiment trackers: TensorBoard, Weights & Biases and trackio.

A run is one curve over all of its stages: `train/loss`, `train/lr` and the other numbers of a step, by global step.
`train/stage` is the index of the stage. At the end, `eval/SET/METRIC@WIDTH` has the student's scores.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from jasper_fast.config.run import Config, LogConfig
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError

IDENTITY = "tracking-id"  # the file by which a resumed run is the same run for trackers


class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Record numbers at a step."""
        ...

    def close(self) -> None:
        """End the record."""
        ...


def check_trackers(config: LogConfig) -> None:
    """Check that every configured tracker is installed.

    Raises:
        JasperError: one is not.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise JasperError(f"log.trackers asks for {name!r}, which is not installed. Fix: pip install {name}")


@contextmanager
def start_trackers(folder: Path, config: Config, done: int = 0) -> Iterator[list[Tracker]]:
    """Start the configured trackers and close them after the block. A resumed run is the same run for them.

    Args:
        folder: the run's folder, which stores its identity.
        config: the run's configuration.
        done: steps done before a resume. What was recorded of later steps is replaced, if the tracker can do so.

    Raises:
        JasperError: one does not start, for example without a login.
    """
    with ExitStack() as started:
        trackers: list[Tracker] = []
        for name in config.log.trackers:
            trackers.append(_TensorBoard(folder, done) if name == "tensorboard" else _WandbLike(name, folder, config))
            started.callback(trackers[-1].close)
        yield trackers


def score_curves(rows: Sequence[Mapping[str, Any]], model: str) -> dict[str, float]:
    """Return the scores of a model as tracker values ``eval/SET/METRIC@WIDTH``.

    Args:
        rows: rows of results.json.
        model: the name of the model in them.
    """
    return {
        f"eval/{key}@{row['width']}": float(score)
        for row in rows
        if row["model"] == model
        for key, score in row["scores"].items()
    }


def _identity(folder: Path) -> str:
    """Return the run's unique name."""
    file = folder / IDENTITY
    if not file.is_file():
        write_atomic(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text(encoding="utf-8").strip()


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.make, self.done = str(folder / "tensorboard"), SummaryWriter, done
        self.writer: SummaryWriter | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        if self.writer is None:  # drops what an earlier process wrote of later steps
            self.writer = self.make(self.folder, purge_step=self.done + 1)
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
