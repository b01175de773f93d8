"""A run's folder: one writer at a time, one configuration for its whole life, and a mark when it is finished."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jasper_fast.config import Config, config_difference, dump_config, stored_config
from jasper_fast.config_text import read_yaml
from jasper_fast.errors import ConfigError, JasperError
from jasper_fast.files import disk_errors, sweep_unfinished, write_atomic
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
    """Describe how ``config`` differs from the one the folder was started with, where that would change the numbers.

    A run that was rejected before its first line of log has started nothing: its folder takes any configuration.

    Raises:
        JasperError: the stored configuration cannot be read, or is of a version that this one does not understand.
    """
    old_file = path / CONFIG
    with disk_errors(path):
        if not old_file.exists() or not any((path / started).exists() for started in (LOG, CHECKPOINTS, RESULTS)):
            return []
    try:
        tree = read_yaml(old_file, str(old_file))
    except ConfigError as error:
        raise JasperError(f"{error}\nFix: restore it as the run wrote it, or use --out DIR for a new run") from None
    return stored_difference(tree, config, str(old_file))


def stored_difference(tree: Any, config: Config, where: str) -> list[str]:
    """Describe how a stored configuration differs from ``config``, where that would change the numbers.

    Args:
        tree: a dumped configuration, or its part that decides, of this version or an older one.
        config: the configuration to resume with.
        where: the place of the stored one in messages.

    Raises:
        JasperError: this version does not know a field of the stored configuration, or rejects a value.
    """
    try:
        old = stored_config(dict(tree), where)
    except (ConfigError, TypeError, ValueError) as error:
        raise JasperError(
            f"{error}\n{where} is of another version of jasper_fast, or was edited. "
            "Fix: resume with the version that began the run, or use --out DIR for a new run"
        ) from None
    return config_difference(what_decides(old), what_decides(config))


def what_decides(config: Config) -> dict[str, Any]:
    """Return the configuration without the sections that do not touch the numbers."""
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
            + "\nFix: use the old one to resume, or --out DIR for a new run"
        )
    try:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - held until the block ends
    except OSError as error:
        raise JasperError(
            f"the run's folder {path} cannot be written: {error.strerror}. Fix: choose another --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JasperError(f"another process is at work in {path}; wait for it or choose another --out") from None
        sweep_unfinished(path)
        write_atomic(path / CONFIG, dump_config(config))
        yield RunFolder(path)
