"""The folder of a run: one writer at a time, one configuration for its whole life, and a mark when it is finished."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jasper_fast.config.diff import config_difference
from jasper_fast.config.load import dump_config, stored_config
from jasper_fast.config.run import Config
from jasper_fast.config.yaml import read_yaml
from jasper_fast.training.run.log import LOG
from jasper_fast.utils.atomic import disk_errors, sweep_unfinished, write_atomic
from jasper_fast.utils.errors import ConfigError, JasperError

EARLY = "finished_early"  # the key of results.json by which a run can train on
CONFIG, RESULTS, CHECKPOINTS, POOLED, LOCK = "config.yaml", "results.json", "checkpoints", "pooled", ".lock"
NEUTRAL_SECTIONS = ("log", "checkpoint", "parallel")  # sections that do not change the numbers


class RunFolder:
    """The paths of a run, which :func:`open_run` locks.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"
        self.pooled = path / POOLED  # states of frozen encoders, by stage

    @property
    def finished(self) -> bool:
        """True after the run has written its results, unless it was finished early and can train on."""
        return (self.path / RESULTS).exists() and self.finished_early is None

    @property
    def finished_early(self) -> dict[str, Any] | None:
        """At which step the run was finished early. None: it was not."""
        try:
            results = json.loads((self.path / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # damaged results are no reason to train again
            return None
        return results.get(EARLY) if isinstance(results, dict) else None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file into the folder, whole or not at all."""
        write_atomic(self.path / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def existing_difference(path: Path, config: Config) -> list[str]:
    """Describe how ``config`` differs from the folder's configuration in fields that change the numbers.

    A run that was rejected before its first log line has started nothing, so its folder takes any configuration.

    Args:
        path: the folder of the run.
        config: the configuration to resume with.

    Raises:
        JasperError: the stored configuration cannot be read, or this version does not understand it.
    """
    old_file = path / CONFIG
    with disk_errors(path):
        if not _started(path):
            return []
    try:
        tree = read_yaml(old_file, str(old_file))
    except ConfigError as error:
        raise JasperError(f"{error}\nFix: restore it as the run wrote it, or use --out DIR for a new run") from None
    return stored_difference(tree, config, str(old_file))


def stored_difference(tree: Any, config: Config, where: str) -> list[str]:
    """Describe how a stored configuration differs from ``config`` in fields that change the numbers.

    Args:
        tree: a dumped configuration, or the sections that change the numbers, of this version or an older one.
        config: the configuration to resume with.
        where: the place of the stored configuration in messages.

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
    return config_difference(result_settings(old), result_settings(config))


def keep_older_meaning(path: Path, config: Config) -> Config:
    """Return the configuration as an older version meant it, if the folder's run was started with one.

    Older versions held out no documents, read each column as a separate text, and did not refit heads. Only fields that
    the user did not set are changed, so that the same command resumes the same run.

    Args:
        path: the folder of the run.
        config: the configuration to resume with.
    """
    try:
        tree = read_yaml(path / CONFIG, str(path / CONFIG)) if _started(path) else {}
        stored = tree["data"] if tree else None
        sources = [source.get("join", False) for source in stored["sources"]] if stored else []
    except (ConfigError, OSError, KeyError, TypeError, AttributeError):
        return config  # `existing_difference` explains what is wrong
    if not stored or len(sources) != len(config.data.sources):
        return config
    data = config.data
    changes: dict[str, Any] = {}
    if "held_out" not in data.model_fields_set and not stored.get("held_out", 0):
        changes["held_out"] = 0
    changes["sources"] = [
        source if join or "join" in source.model_fields_set else source.model_copy(update={"join": False})
        for source, join in zip(data.sources, sources, strict=True)
    ]
    update: dict[str, Any] = {"data": data.model_copy(update=changes)}
    if "refit" not in config.model_fields_set and not tree.get("refit", False):
        update["refit"] = False
    return config.model_copy(update=update)


def _started(path: Path) -> bool:
    return (path / CONFIG).exists() and any((path / started).exists() for started in (LOG, CHECKPOINTS, RESULTS))


def result_settings(config: Config) -> dict[str, Any]:
    """Return the configuration without the sections that do not change the numbers."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in NEUTRAL_SECTIONS}


@contextmanager
def open_run(path: Path, config: Config) -> Iterator[RunFolder]:
    """Lock the folder of a run for this process, and write the configuration into it.

    Args:
        path: the folder, which is made if it is missing.
        config: the run's configuration.

    Raises:
        JasperError: another process has the lock, the folder was started with another configuration, or it cannot be
            written.
    """
    difference = existing_difference(path, config)
    if difference:
        raise JasperError(
            f"{path} was started with another configuration:\n  - "
            + "\n  - ".join(difference)
            + "\nFix: use the old one to resume, or --out DIR for a new run"
        )
    with hold_folder(path):
        write_atomic(path / CONFIG, dump_config(config))
        yield RunFolder(path)


@contextmanager
def hold_folder(path: Path) -> Iterator[None]:
    """Lock a folder for this process, and delete what a killed process left unpublished in it.

    Args:
        path: the folder, which is made if it is missing.

    Raises:
        JasperError: another process has the lock, or the folder cannot be written.
    """
    try:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path / LOCK)
    except BlockingIOError:
        raise JasperError(f"another process is at work in {path}. Fix: wait for it, or choose another --out") from None
    except OSError as error:
        raise JasperError(
            f"the run's folder {path} cannot be written: {error.strerror}. Fix: choose another --out"
        ) from error
    try:
        sweep_unfinished(path)
        yield
    finally:
        with suppress(OSError):  # before it is released, so that `_lock` sees that the file is gone
            (path / LOCK).unlink()
        with suppress(OSError):  # it holds something
            path.rmdir()
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _lock(file: Path) -> int:
    """Lock a file, which whoever releases the lock deletes, and return its descriptor.

    Another process may delete the file after this one has opened it. The lock of a deleted file excludes nobody, so
    the new file is locked instead.

    Raises:
        BlockingIOError: another process has the lock.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
