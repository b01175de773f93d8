"""A run's folder: one writer at a time, one configuration for its whole life, and a mark when it is finished."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jasper_fast.config import Config, config_difference, dump_config
from jasper_fast.config_text import read_yaml
from jasper_fast.errors import ConfigError, JasperError
from jasper_fast.files import sweep_unfinished, write_atomic
from jasper_fast.log import LOG

CONFIG, RESULTS, CHECKPOINTS = "config.yaml", "results.json", "checkpoints"
MAY_CHANGE = ("log", "checkpoint", "parallel")  # sections that do not touch the numbers


class RunFolder:
    """Paths of a run and what is known of it. See :func:`open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.model = path / "model"

    @property
    def finished(self) -> bool:
        return (self.path / RESULTS).exists()

    def write_json(self, name: str, content: Any) -> None:
        write_atomic(self.path / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def existing_difference(path: Path, config: Config) -> list[str]:
    """How ``config`` differs from the one the folder was started with, where that would change the numbers.

    A run that was refused before its first line of log has started nothing: its folder takes any configuration.

    Raises:
        JasperError: what the folder keeps of it cannot be read.
    """
    old_file = path / CONFIG
    if not old_file.exists() or not any((path / started).exists() for started in (LOG, CHECKPOINTS, RESULTS)):
        return []
    try:
        old = read_yaml(old_file, str(old_file))
    except ConfigError as error:
        raise JasperError(f"{error}\nrestore it as the run wrote it, or use --out DIR for a new run") from None
    return config_difference({k: v for k, v in old.items() if k not in MAY_CHANGE}, what_decides(config))


def what_decides(config: Config) -> dict[str, Any]:
    """The configuration without the sections that do not touch the numbers."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in MAY_CHANGE}


@contextmanager
def open_run(path: Path, config: Config) -> Iterator[RunFolder]:
    """Hold the run's folder for this process.

    Raises:
        JasperError: another process holds it, or it was started with another configuration (the difference is named).
    """
    difference = existing_difference(path, config)
    if difference:
        raise JasperError(
            f"{path} was started with another configuration:\n  - "
            + "\n  - ".join(difference)
            + "\nuse the old one to go on, or --out DIR for a new run"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115 - held until the block ends
    except OSError as error:
        raise JasperError(
            f"the run's folder {path} cannot be written: {error.strerror}; choose another --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JasperError(f"another process is at work in {path}; wait for it or choose another --out") from None
        sweep_unfinished(path)
        write_atomic(path / CONFIG, dump_config(config))
        yield RunFolder(path)
