"""The lock of a run's folder."""

from __future__ import annotations

import fcntl

import pytest

from jasper_fast.config.load import load_config
from jasper_fast.training.run import folder as module
from jasper_fast.training.run.folder import LOCK, open_run
from jasper_fast.utils.errors import JasperError


def test_one_process_at_a_time_and_no_lock_afterwards(tmp_path):
    config = load_config(None)
    for _ in range(2):
        with open_run(tmp_path / "run", config):
            assert (tmp_path / "run" / LOCK).exists()
            with pytest.raises(JasperError, match="another process is at work"), open_run(tmp_path / "run", config):
                pass
            assert (tmp_path / "run" / LOCK).exists()  # the other attempt leaves it
        assert not (tmp_path / "run" / LOCK).exists()


def test_the_lock_of_a_deleted_file_is_not_enough(tmp_path, monkeypatch):
    """Another process deletes the file between opening and locking, and then holds a new one."""
    file, honest, calls = tmp_path / LOCK, fcntl.flock, []

    def flock(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            file.unlink()
            file.touch()
        honest(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    descriptor = module._lock(file)
    monkeypatch.undo()
    assert len(calls) == 2 and module.os.fstat(descriptor).st_ino == file.stat().st_ino
    with pytest.raises(BlockingIOError):
        module._lock(file)
