"""The training loop for callers other than a run: in memory, with their stages."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from jasper_fast.config.load import load_config
from jasper_fast.models.student import Student
from jasper_fast.teachers.label import ensure_teachers
from jasper_fast.train import train
from jasper_fast.training.loop import train_stage
from jasper_fast.training.preflight import prepare
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.run.folder import open_run
from jasper_fast.training.run.log import SilentLog
from jasper_fast.training.run.run import Run
from jasper_fast.training.stages.base import STAGES, build_stage, build_stages, stage_class
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import settings, write_data

CPU = torch.device("cpu")


class Records(SilentLog):
    def __init__(self):
        super().__init__()
        self.steps = []

    def step(self, stage, record, last):
        self.steps.append({"event": "step", "stage": stage, **record})


@pytest.fixture(scope="module")
def tree(tmp_path_factory, tiny_bert, tiny_texts):
    folder = tmp_path_factory.mktemp("loop")
    write_data(folder, tiny_texts)
    return settings(folder, tiny_bert) | {"evaluate": [], "checkpoint": {"every": 2, "keep": 20}}


def numbers(steps) -> list[tuple]:
    return [tuple(step[key] for key in ("step", "stage", "loss", "similarity", "grad_norm", "lr")) for step in steps]


def test_stages_in_memory_are_those_of_a_run_bit_for_bit(tree, tmp_path):
    config = load_config(tree)
    run = train(config, out=tmp_path / "run")
    student, data = prepare(config)
    labels = ensure_teachers(config, data.texts, progress=False)
    log, position = Records(), Position(0, 0, 0)
    local = Run.local(config, CPU, log)
    for stage in build_stages(config, data, labels):
        train_stage(local, student, stage, position)
        position = position.after(stage.config.steps)
        saved = load_file(run / "checkpoints" / f"step-{position.step:08d}" / "model.safetensors")
        ours = student.state_dict()
        assert ours.keys() == saved.keys()
        assert all(torch.equal(ours[name], saved[name]) for name in saved), stage.config.name
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert numbers(log.steps) == numbers(record for record in records if record["event"] == "step")
    assert not list(local.pooled_folder.rglob("*.npy"))  # a temporary folder, empty after the stages


def test_a_stage_resumes_from_the_step_that_it_is_given(tree):
    config = load_config(tree)
    student, data = prepare(config)
    labels = ensure_teachers(config, data.texts, progress=False)
    log, stage = Records(), build_stage(config, 0, data, labels)
    train_stage(Run.local(config, CPU, log), student, stage, Position(4, 0, 4))
    assert [(step["step"], step["stage_step"]) for step in log.steps] == [(5, 5), (6, 6)]


def test_every_kind_of_stage_is_in_the_registry(tree):
    config = load_config(tree)
    assert {stage_class(stage).__name__ for stage in config.stages} == {"TextStage"}
    seeing = config.stages[0].model_copy(update={"vision": object()})
    assert stage_class(seeing).__name__ == "VisionStage" and len(STAGES) == 3


def test_positions_count_over_stages():
    position = Position(10, 1, 4)
    assert position.at(6) == Position(12, 1, 6)
    assert position.after(9) == Position(15, 2, 0)


def test_a_folder_is_free_again_after_its_run(tree, tmp_path):
    config = load_config(tree)
    for _ in range(2):
        with open_run(tmp_path / "run", config) as folder:
            assert folder.path == tmp_path / "run" and not folder.finished
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(JasperError, match="could not write .*a file is where a folder should be"),
        open_run(file, config),
    ):
        pass


def test_a_stage_does_not_start_at_the_position_of_another(tree):
    config = load_config(tree)
    stage = build_stage(config, 0)
    with pytest.raises(ValueError, match="stage 0 cannot start at a position of stage 1"):
        train_stage(Run.local(config, CPU), Student.build(config.student), stage, Position(6, 1, 0))
