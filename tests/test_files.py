"""What is written is whole or absent."""

import errno
import os

import pytest

from jasper_fast.errors import JasperError
from jasper_fast.files import publish_dir, sweep_unfinished, write_atomic


def test_a_folder_appears_only_when_the_block_ends_well(tmp_path):
    target = tmp_path / "deep" / "there"
    with pytest.raises(RuntimeError), publish_dir(target) as temporary:
        (temporary / "a").write_text("1")
        raise RuntimeError
    assert not target.exists() and not list(target.parent.iterdir())
    with publish_dir(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    with publish_dir(tmp_path / "x") as temporary:
        (temporary / "old").touch()
    with pytest.raises(JasperError, match="exists already"), publish_dir(tmp_path / "x"):
        pass
    with publish_dir(tmp_path / "x", replace=True) as temporary:
        (temporary / "new").touch()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_said_and_leaves_the_old_content(tmp_path, monkeypatch):
    write_atomic(tmp_path / "f", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JasperError, match="disk is full"):
        write_atomic(tmp_path / "f", "new")
    with pytest.raises(JasperError, match="disk is full"), publish_dir(tmp_path / "d") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    (tmp_path / ".unfinished-a").mkdir()
    (tmp_path / ".unfinished-a" / "x").touch()
    (tmp_path / ".unfinished-b").touch()
    (tmp_path / "kept").touch()
    sweep_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
