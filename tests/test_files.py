"""What is written is whole or absent."""

import errno
import os
import shutil
import signal
from collections import namedtuple

import pytest
from filelock import FileLock, Timeout
from processes import exit_code
from safetensors import SafetensorError

from jasper_fast.errors import JasperError
from jasper_fast.files import check_room, check_writable, locked, publish_dir, sweep_unfinished, write_atomic


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


def replace_x(folder, at, strike):
    """Replace the folder ``x`` that holds ``old`` by one that holds ``new``; ``strike`` before the rename ``at``."""
    renames, rename = [], os.rename

    def struck(source, target):
        renames.append(target)
        if len(renames) == at:
            strike()
        rename(source, target)

    os.rename = struck
    try:
        with publish_dir(folder / "x", replace=True) as temporary:
            (temporary / "new").touch()
    finally:
        os.rename = rename
        assert len(renames) >= at


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def old_x(tmp_path):
    with publish_dir(tmp_path / "x") as temporary:
        (temporary / "old").touch()
    return tmp_path


@pytest.mark.parametrize(("at", "left"), [(1, "old"), (2, "old"), (3, "new")])
def test_an_interrupted_replacement_leaves_a_whole_folder(old_x, at, left):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_x(old_x, at, interrupt)
    assert [p.name for p in old_x.iterdir()] == ["x"] and [p.name for p in (old_x / "x").iterdir()] == [left]


@pytest.mark.parametrize(("at", "left"), [(1, "old"), (2, "old"), (3, "new")])
@pytest.mark.parametrize("after", ["sweep", "publish"])
def test_a_replacement_that_was_killed_is_ended(old_x, at, left, after):
    assert exit_code(replace_x, old_x, at, die) == -signal.SIGKILL
    assert (old_x / "x").exists() == (at != 2)
    if after == "sweep":
        sweep_unfinished(old_x)
        assert [p.name for p in old_x.iterdir()] == ["x"]
    else:
        with publish_dir(old_x / "y"):  # another folder's replacement is not its business
            pass
        assert (old_x / "x").exists() == (at != 2)
        with pytest.raises(JasperError, match="exists already"), publish_dir(old_x / "x"):
            pass
    assert [p.name for p in (old_x / "x").iterdir()] == [left]


def test_what_cannot_be_written_tells_the_mend(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(JasperError, match="a file is where a folder should be"):
            check_writable(place)
        with pytest.raises(JasperError, match="a file is where a folder should be"), locked(place / "x"):
            pass
        with pytest.raises(JasperError, match="a file is where a folder should be"):
            write_atomic(place / "x", "")
        with pytest.raises(JasperError, match="a file is where a folder should be"), publish_dir(place / "x"):
            pass
    with pytest.raises(JasperError, match="the name is too long"):
        write_atomic(tmp_path / ("x" * 300), "")
    with pytest.raises(JasperError, match="a folder is where a file should be"):
        write_atomic(tmp_path, "")
    check_writable(tmp_path / "deep" / "there")
    assert not list((tmp_path / "deep" / "there").iterdir())


def test_one_at_a_time_holds_a_lock(tmp_path):
    other = FileLock(tmp_path / ".locks" / "x.lock", timeout=0)
    with locked(tmp_path / "x"), pytest.raises(Timeout):
        other.acquire()
    with other:
        pass


def test_safetensors_own_word_for_a_full_disk_is_understood(tmp_path):
    with pytest.raises(JasperError, match="the disk is full"), publish_dir(tmp_path / "x"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="header"), publish_dir(tmp_path / "x"):
        raise SafetensorError("Error while deserializing header: header too large")
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_refused(tmp_path, monkeypatch):
    def usage(place):
        assert place == tmp_path  # the nearest folder that is there
        return namedtuple("usage", "free")(10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_room(tmp_path / "run" / "deeper", 10**9, "checkpoints", "or think again")
    with pytest.raises(JasperError, match=r"deeper: checkpoints need 2.0 GB and 1.0 GB are free; free some space, or"):
        check_room(tmp_path / "run" / "deeper", 2 * 10**9, "checkpoints", "or think again")


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
