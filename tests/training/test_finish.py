"""``train --finish``: a model of a stopped run, which can train on afterwards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jasper_fast.models.folder import load_student
from jasper_fast.train import Stopped, main, train
from jasper_fast.training.encoding import measure_speeds
from jasper_fast.training.run.run import Run
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import assert_same_run, losses_in, settings, write_data


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_bert, tiny_texts):
    """Settings, an undisturbed run, and a function that stops a run of these settings after a step."""
    folder = tmp_path_factory.mktemp("finish")
    write_data(folder, tiny_texts)
    tree = settings(folder, tiny_bert)
    train(tree, out=folder / "alone")

    def stop_after(steps, out):
        with pytest.MonkeyPatch.context() as patch:
            honest = Run.resume

            def resume(run, student):
                run_log = honest(run, student)
                return _Stopping(run, run_log, steps)

            patch.setattr(Run, "resume", resume)
            with pytest.raises(Stopped, match="add --finish"):
                train(tree, out=out)

    return folder, tree, stop_after


class _Stopping:
    """The block of a run's training that asks to stop after a number of logged steps."""

    def __init__(self, run, block, steps):
        self.run, self.block, self.steps = run, block, steps

    def __enter__(self):
        position = self.block.__enter__()
        self.run.stop_requested = lambda: len(losses_in(self.run.path)) >= self.steps - 1
        return position

    def __exit__(self, *error):
        return self.block.__exit__(*error)


@pytest.mark.parametrize(
    ("steps", "cut_short", "not_run", "principal"),
    [(6, [], ["two", "three"], [16, 8]), (14, ["three"], [], [])],
)
def test_a_stopped_run_is_finished_early_and_trains_on(
    world, tmp_path, tiny_texts, capsys, steps, cut_short, not_run, principal
):
    from sentence_transformers import SentenceTransformer

    folder, tree, stop_after = world
    run = tmp_path / "run"
    stop_after(steps, run)
    train(tree, out=run, finish=True)
    said = capsys.readouterr().out
    early = json.loads((run / "results.json").read_text())["finished_early"]
    assert early == {
        "step": steps, "steps": 20, "cut_short": cut_short, "not_run": not_run,
        "untrained_heads": principal, "principal_heads": principal,
    }  # fmt: skip
    line = f"finished early, after step {steps} of 20"
    assert line in said and line in (run / "report.md").read_text()
    assert f"- The run was {line}" in (run / "model" / "README.md").read_text()
    weights = load_student(run / "model").state_dict()
    saved = load_file(run / "checkpoints" / f"step-{steps:08d}" / "model.safetensors")
    for width in (16, 8):
        assert torch.equal(weights[f"heads.{width}.weight"], saved[f"heads.{width}.weight"]) == (
            not principal and steps == 6
        )
    if principal:  # the untrained heads keep the similarities of the widest
        model = SentenceTransformer(str(run / "model"))
        wide, narrow = model.encode(tiny_texts[:100]), model.encode(tiny_texts[:100], task="16")
        cosines = [(unit(rows) @ unit(rows).T)[np.triu_indices(100, 1)] for rows in (wide - wide.mean(0), narrow)]
        assert np.corrcoef(*cosines)[0, 1] > 0.85
    with pytest.raises(JasperError, match=f"finished early already, after step {steps} of 20"):
        train(tree, out=run, finish=True)
    train(tree, out=run)  # trains on, and ends as a run that was never finished early
    assert "was finished early" in capsys.readouterr().out
    assert "finished_early" not in json.loads((run / "results.json").read_text())
    assert_same_run(run, folder / "alone")
    assert "finished early" not in (run / "model" / "README.md").read_text()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_run_without_a_checkpoint_is_refused_and_nothing_is_made(world, tmp_path):
    _, tree, _ = world
    with pytest.raises(JasperError, match="has no checkpoint .* Fix: train without --finish first"):
        train(tree, out=tmp_path / "none", finish=True)
    assert not (tmp_path / "none").exists()


def test_a_dry_run_plans_no_early_end(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "run"), "--dry-run", "--finish"])
    assert "argument --finish: not allowed with argument --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_so(world, tmp_path, capsys):
    folder, tree, _ = world
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    assert main(["--config", str(tmp_path / "run.yaml"), "--out", str(folder / "alone"), "--finish"]) == 0
    assert "is finished: see" in capsys.readouterr().out


def test_speeds_are_reported(world):
    folder, _, _ = world
    encoding = json.loads((folder / "alone" / "results.json").read_text())["facts"]["encoding"]
    assert encoding["student_texts_per_s"] > 0 and encoding["teacher_texts_per_s"] > 0
    assert 8 <= encoding["texts"] <= 160 and 2 < encoding["mean_tokens"] <= 32
    report = (folder / "alone" / "report.md").read_text()
    assert "encoding speed on this machine: the student" in report
    assert "32 wide: 128 / 32 / 4; 16 wide: 64 / 16 / 2; 8 wide: 32 / 8 / 1" in report


def test_the_median_of_equal_texts_is_the_speed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("jasper_fast.training.encoding.LONG_ENOUGH", 1.0)
    monkeypatch.setattr("jasper_fast.training.encoding.time.perf_counter", lambda: clock[0])

    def encoder(seconds):
        return lambda texts: clock.__setitem__(0, clock[0] + seconds * len(texts))

    speeds, count = measure_speeds({"student": encoder(0.005), "teacher": encoder(0.02)}, ["a"] * 256)
    assert speeds == pytest.approx({"student": 200.0, "teacher": 50.0})
    assert count == 32  # 0.64 s of the teacher
