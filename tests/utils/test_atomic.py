"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
from collections import namedtuple

import pytest
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from jasper_fast.utils.atomic import (
    check_disk_space,
    check_file,
    check_output_path,
    check_writable,
    locked,
    publish_dir,
    sweep_unfinished,
    write_atomic,
)
from jasper_fast.utils.errors import JasperError
from tests.helpers.processes import exit_code


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
    check_disk_space(tmp_path / "run" / "deeper", 10**9, "checkpoints", "or think again")
    with pytest.raises(
        JasperError, match=r"deeper: checkpoints need 2.0 GB and 1.0 GB are free. Fix: free some space, or"
    ):
        check_disk_space(tmp_path / "run" / "deeper", 2 * 10**9, "checkpoints", "or think again")


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


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077, 0o000])
@pytest.mark.parametrize("replaced", [False, True])
def test_what_is_published_has_the_permissions_of_new_files(umask, replaced, tmp_path):
    """Whatever wrote it: safetensors and tempfile make private files, copies bring others."""
    before = os.umask(umask)
    try:
        for _ in range(1 + replaced):
            with publish_dir(tmp_path / "out", replace=replaced) as folder:
                save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
                (folder / "deep" / "er").mkdir(parents=True)
                (folder / "deep").chmod(0o700)
                (folder / "deep" / "er" / "plain").write_text("")
                handle, name = tempfile.mkstemp(dir=folder / "deep")
                os.close(handle)
                (folder / "script").write_text("")
                (folder / "script").chmod(0o755)
                (folder / "away").symlink_to(tmp_path / "mine")
        (tmp_path / "mine").write_text("")
        (tmp_path / "mine").chmod(0o600)
        write_atomic(tmp_path / "file", "x")
        write_atomic(tmp_path / "file", "y")
        write_atomic(tmp_path / "made" / "file", b"z")
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"), tmp_path / "file", *(tmp_path / "made").rglob("*")):
        if not path.is_symlink():
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert path.stat().st_mode & 0o777 == expected, (path, oct(path.stat().st_mode))
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600  # what a link leads to is not ours
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("check", [check_output_path, check_file])
def test_a_place_is_checked_without_making_anything(check, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for place, problem in (
        ("file/deeper", "a file is where a folder should be"),
        ("file/deeper/still", "a file is where a folder should be"),
        ("x" * 300, "the name is too long"),
        ("nul\0", "not a name in UTF-8"),
        ("half\udcff", "not a name in UTF-8"),
    ):
        with pytest.raises(JasperError, match=problem):
            check(tmp_path / place)
    check(tmp_path / "new")
    check(tmp_path / "not" / "there" / "yet")
    check(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    with pytest.raises(JasperError, match="a folder is where a file should be"):
        check_file(tmp_path / "folder")


def test_text_with_half_characters_is_written_with_escapes(tmp_path):
    write_atomic(tmp_path / "x.json", json.dumps({"name": "p\udcff…"}, ensure_ascii=False))
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "p\udcff…"}
