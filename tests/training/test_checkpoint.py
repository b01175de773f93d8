"""A checkpoint restores everything, and a damaged one is never loaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from jasper_fast.training.run.checkpoint import Position, Saver, latest_checkpoint, publish, snapshot
from jasper_fast.utils.errors import JasperError
from tests.helpers.processes import exit_code
from tests.helpers.runs import die_half_way_through


def save_checkpoint(folder, position, model, optimizer, facts, keep):
    return publish(folder, position, snapshot(model, optimizer), facts, keep)


def trained(steps=3):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(3, 4)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_round_trip_of_weights_optimiser_and_random_numbers(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path, Position(3, 0, 3), model, optimizer, {"texts": 5}, keep=2)
    expected_random = torch.rand(4)
    other, other_optimizer = trained(0)
    torch.rand(9)
    found = latest_checkpoint(tmp_path)
    assert found.position == Position(3, 0, 3) and found.facts == {"texts": 5}
    found.load_model(other)
    found.load_state(other_optimizer)
    assert torch.equal(torch.rand(4), expected_random)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    a, b = optimizer.state_dict(), other_optimizer.state_dict()
    assert all(torch.equal(a["state"][i][k], b["state"][i][k]) for i in a["state"] for k in a["state"][i])


def test_retention_and_fall_back(tmp_path, capsys):
    model, optimizer = trained()
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, Position(step, 0, step), model, optimizer, {}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{i:08d}" for i in (2, 3, 4)]
    weights = tmp_path / "step-00000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "step-00000003" / "manifest.json").write_text('{"position')
    assert latest_checkpoint(tmp_path).position.step == 2
    said = capsys.readouterr().out
    assert "step-00000004 is damaged (model.safetensors is not what was written)" in said
    assert "step-00000003 is damaged" in said


def test_nothing_whole_is_an_error(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, Position(1, 0, 1), model, optimizer, {}, keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "state.pt").unlink()
    assert "state.pt" in manifest["files"]
    for _ in range(2):  # the evidence stays, so the same command says the same again
        with pytest.raises(JasperError, match=r"no checkpoint .* is whole .*state.pt is missing"):
            latest_checkpoint(tmp_path)


@pytest.mark.parametrize("lost", ["position", "facts", "files"])
def test_a_manifest_that_lacks_something_is_damage(tmp_path, capsys, lost):
    model, optimizer = trained()
    for step in (1, 2):
        path = save_checkpoint(tmp_path, Position(step, 0, step), model, optimizer, {"texts": 5}, keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop(lost)
    (path / "manifest.json").write_text(json.dumps(manifest))
    found = latest_checkpoint(tmp_path)
    assert found.position.step == 1 and found.facts == {"texts": 5}
    assert f"step-00000002 is damaged (manifest.json cannot be read: KeyError('{lost}'))" in capsys.readouterr().out


def test_tied_weights_are_saved_and_loaded(tmp_path):
    model = torch.nn.Module()
    model.a = torch.nn.Linear(3, 3)
    model.b = torch.nn.Linear(3, 3)
    model.b.weight = model.a.weight
    save_checkpoint(tmp_path, Position(1, 0, 1), model, None, {}, keep=2)
    expected = model.a.weight.detach().clone()
    with torch.no_grad():
        model.a.weight.zero_()
    latest_checkpoint(tmp_path).load_model(model)
    assert torch.equal(model.a.weight, expected) and model.b.weight is model.a.weight


def test_a_disk_that_is_full_is_said_and_earlier_checkpoints_stay(tmp_path):
    import resource

    model, optimizer = trained()
    save_checkpoint(tmp_path, Position(1, 0, 1), model, optimizer, {}, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # a real limit: writing fails where a full disk would
    try:
        with pytest.raises(JasperError, match="ulimit"):
            save_checkpoint(tmp_path, Position(2, 0, 2), model, optimizer, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert latest_checkpoint(tmp_path).position.step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_no_folder_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None


def test_a_saver_copies_at_once_and_writes_meanwhile(tmp_path, monkeypatch):
    """Training continues while a checkpoint is written, and the checkpoint has the values at the time of saving."""
    import threading

    import jasper_fast.training.run.checkpoint as module

    may_write, honest = threading.Event(), module.publish

    def slow(*arguments):
        assert may_write.wait(10)
        return honest(*arguments)

    monkeypatch.setattr(module, "publish", slow)
    model, optimizer = trained()
    saved = model.weight.detach().clone()
    saver = Saver(tmp_path / "checkpoints", keep=2)
    saver.save(Position(3, 0, 3), model, optimizer, {})
    with torch.no_grad():
        model.weight.zero_()
    assert latest_checkpoint(tmp_path / "checkpoints") is None  # nothing is there before all of it is
    may_write.set()
    saver.close()
    other, _ = trained(0)
    latest_checkpoint(tmp_path / "checkpoints").load_model(other)
    assert torch.equal(other.weight, saved)


def test_a_saver_tells_at_the_next_save_that_writing_failed(tmp_path):
    model, optimizer = trained()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver = Saver(tmp_path / "checkpoints", keep=2)
    saver.save(Position(1, 0, 1), model, optimizer, {})
    with pytest.raises(JasperError, match="a file is where a folder should be"):
        saver.save(Position(2, 0, 2), model, optimizer, {})
    saver.close()


def test_a_folder_removed_under_the_run_is_made_again(tmp_path):
    model, optimizer = trained()
    saver = Saver(tmp_path / "checkpoints", keep=2)
    saver.save(Position(1, 0, 1), model, optimizer, {})
    saver.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    saver.save(Position(2, 0, 2), model, optimizer, {})
    saver.close()
    assert latest_checkpoint(tmp_path / "checkpoints").position.step == 2


@pytest.mark.parametrize("times", [1, 2])
def test_a_folder_removed_while_a_checkpoint_is_written_is_made_once_more(tmp_path, monkeypatch, times):
    import jasper_fast.training.run.checkpoint as module

    left, honest = [tmp_path / "checkpoints"] * times, module.file_sha256

    def remove_first(path):
        if left:
            shutil.rmtree(left.pop())
        return honest(path)

    monkeypatch.setattr(module, "file_sha256", remove_first)
    model, optimizer = trained()
    if times == 1:
        save_checkpoint(tmp_path / "checkpoints", Position(1, 0, 1), model, optimizer, {}, keep=2)
        assert latest_checkpoint(tmp_path / "checkpoints").position.step == 1
    else:
        with pytest.raises(JasperError, match="was removed, and removed again, .*leave it alone"):
            save_checkpoint(tmp_path / "checkpoints", Position(1, 0, 1), model, optimizer, {}, keep=2)


def save_two(folder: Path, name: str) -> None:
    model, optimizer = trained()
    save_checkpoint(folder, Position(1, 0, 1), model, optimizer, {}, keep=2)
    die_half_way_through(name)
    save_checkpoint(folder, Position(2, 0, 2), model, optimizer, {}, keep=2)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_file_half_written_when_the_process_was_killed_is_never_loaded(tmp_path, name):
    assert exit_code(save_two, tmp_path, name) == -signal.SIGKILL
    assert any(path.name == name for path in tmp_path.glob(".unfinished-*/*"))
    assert latest_checkpoint(tmp_path).position.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_is_left_of_the_file_that_an_optimiser_was_read_from(tmp_path):
    """It is mapped, not read whole; training on must not keep a deleted file's place on the disk."""
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, Position(3, 0, 3), model, optimizer, {}, keep=2)
    other, other_optimizer = trained(0)
    latest_checkpoint(tmp_path).load_state(other_optimizer)
    assert str(path / "state.pt") not in Path("/proc/self/maps").read_text()
    assert len(other_optimizer.state_dict()["state"]) == 2


def test_another_rank_than_the_first_writes_nothing(tmp_path):
    model, optimizer = trained()
    saver = Saver(tmp_path / "checkpoints", keep=2, is_main=False)
    saver.save(Position(1, 0, 1), model, optimizer, {})
    saver.close()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_others_read_a_checkpoint_where_the_umask_lets_them(umask, tmp_path):
    before = os.umask(umask)
    try:
        path = save_checkpoint(tmp_path / "checkpoints", Position(1, 0, 1), *trained(), {}, keep=2)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (path, path.parent, *path.iterdir())}
    files = {"model.safetensors", "state.pt", "manifest.json"}
    assert modes == {name: (0o666 if name in files else 0o777) & ~umask for name in (*files, path.name, "checkpoints")}
