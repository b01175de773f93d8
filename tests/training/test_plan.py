"""The plan of a run: minutes become steps, the plan is kept, and the time to go does not jump."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from jasper_fast.config.load import load_config
from jasper_fast.training.plan import Costs, StageCost, make_plan, read_plan
from jasper_fast.training.run.progress import Phase, Progress, clock, duration
from jasper_fast.utils.errors import ConfigError, JasperError
from tests.helpers.costs import fixed_costs
from tests.helpers.runs import settings, write_data

FAST = StageCost("head", 0.1, 128, 1000, row=0.01, rows=1000)  # 10 s of pooling at most
SLOW = StageCost("distil", 1.0, 32, 9000)
NARROW = StageCost("reduce", 0.5, 512, 6000, setup=5.0)


def config(minutes=None, own=(None, None, None), steps=(100, 500, 300)):
    tree = load_config().model_dump(mode="json") | {"minutes": minutes}
    for stage, count, limit in zip(tree["stages"], steps, own, strict=True):
        stage.update(steps=0 if limit else count, minutes=limit)
    return load_config(tree)


@pytest.mark.parametrize(
    ("minutes", "own", "steps"),
    [
        (None, (None, None, None), (100, 500, 300)),
        (None, (None, 2.0, None), (100, 120, 300)),
        (None, (0.5, None, None), (200, 500, 300)),  # 10 s of pooling, then 20 s
        (None, (None, None, 1.0), (100, 500, 110)),  # 5 s of neighbours, then 55 s
        (11.25, (None, None, None), (100, 500, 300)),  # what the configuration takes
        (None, (None, 0.01, None), (100, 1, 300)),  # less than a step
    ],
)
def test_minutes_become_steps(minutes, own, steps):
    plan = make_plan(config(minutes, own), Costs((FAST, SLOW, NARROW)))
    assert plan.steps == steps
    assert bool(plan.notes) == (minutes is not None or 0.01 in own)


@pytest.mark.parametrize("minutes", [1.0, 5.0, 30.0, 600.0])
@pytest.mark.parametrize("own", [None, 0.5])
def test_one_factor_fills_the_budget(minutes, own):
    plan = make_plan(config(minutes, (None, own, None)), Costs((FAST, SLOW, NARROW)))
    assert 60 * minutes - 3.0 <= plan.training <= 60 * minutes
    assert plan.steps[2] == pytest.approx(3 * plan.steps[0], abs=3)


def test_a_budget_below_one_step_of_each_stage_is_reported():
    plan = make_plan(config(0.1), Costs((FAST, SLOW, NARROW)))
    assert plan.steps == (1, 1, 1)
    assert "minutes 0.1 are too few for one step of each stage" in plan.notes[-2]


LITTLE = "the student will learn little. Fix: raise minutes, or lower max_length"


@pytest.mark.parametrize(("minutes", "few"), [(0.5, "distil 16"), (1.5, ""), (8.0, "")])
def test_stages_of_few_steps_are_reported(minutes, few):
    notes = make_plan(config(minutes), Costs((FAST, SLOW, NARROW))).notes
    found = [note for note in notes if "few steps" in note]
    assert found == ([f"minutes {minutes:g} leave few steps ({few}), so {LITTLE}"] if few else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, "minutes: Input should be greater than 0"),
        ({"minutes": -3}, "minutes: Input should be greater than 0"),
        ({"minutes": "soon"}, "minutes: "),
        ({"stages.1.minutes": 0}, "stages.1.minutes: Input should be greater than 0"),
        (
            {"stages.1.minutes": 3, "stages.1.steps": 700},
            "steps 700 and minutes 3 are both given. Fix: set steps: 0, or no minutes",
        ),
        ({"stages.1.steps": 0}, "neither `steps` nor `minutes` is given"),
        ({"stages.1.steps": 0, "stages.1.minutes": 3, "minutes": 2}, "no time beside the stages' own 3 minutes"),
        (
            {f"stages.{i}.{key}": value for i in range(3) for key, value in (("steps", 0), ("minutes", 1))}
            | {"minutes": 9},
            "all stages have own `minutes`",
        ),
    ],
)
def test_impossible_budgets_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, list(changes.items()))
    assert message in str(caught.value)


def test_phases_and_lines_of_a_plan():
    costs = Costs((FAST, SLOW, NARROW), teacher=120.0, missing=9000, evaluation=50.0, evaluated=40, export=10.0)
    plan = make_plan(config(), costs)
    assert plan.line() == "about 14 minutes: 2.0 minutes teacher, 11 minutes training, 60 seconds evaluation"
    progress = plan.progress()
    assert [phase.name for phase in progress.phases] == ["head: pooling", "head", "distil", "reduce", "evaluation"]
    assert progress.to_go() == pytest.approx(plan.training + plan.evaluation)
    assert progress.line("distil", 120) == "distil 120/500 · 12:15 to go"


@pytest.mark.parametrize("seed", range(20))
def test_the_time_to_go_never_rises_by_a_third_on_a_steady_machine(seed):
    """Each phase takes another time than planned, by up to a fifth, and its steps vary by half."""
    draw = random.Random(seed)
    phases = [Phase("a", 100, 15.0), Phase("b", 500, 360.0), Phase("c", 300, 45.0), Phase("evaluation", 1, 60.0)]
    progress, lowest = Progress(phases), float("inf")
    for phase in phases[:3]:
        factor = draw.uniform(0.8, 1.2)
        for _ in range(phase.units):
            seconds = phase.seconds / phase.units * factor * draw.uniform(0.5, 1.5)
            to_go = progress.advance(phase.name, 1, seconds)
            lowest = min(lowest, to_go)
            assert to_go <= 4 / 3 * lowest
    assert 40.0 < to_go < 80.0


def test_a_machine_of_half_the_speed_doubles_the_time_to_go():
    progress = Progress([Phase("a", 1000, 500.0), Phase("evaluation", 1, 100.0)])
    for _ in range(500):
        to_go = progress.advance("a", 1, 1.0)
    assert to_go == pytest.approx(700.0, rel=0.1)


def test_done_work_of_a_resumed_run_says_nothing_about_the_speed():
    progress = Progress([Phase("a: pooling", 10, 5.0), Phase("a", 10, 20.0), Phase("b", 10, 30.0)])
    assert progress.advance("b", 5, None) == pytest.approx(15.0)
    assert Progress().advance("b", 5, 1.0) is None and Progress().line("b", 5) == "b 5"


@pytest.mark.parametrize(
    ("seconds", "short", "long"),
    [
        (0.2, "0:00", "0 seconds"),
        (1, "0:01", "1 second"),
        (372, "6:12", "6.2 minutes"),
        (15071, "4:11:11", "4.2 hours"),
    ],
)
def test_times_are_written_for_people(seconds, short, long):
    assert (clock(seconds), duration(seconds)) == (short, long)


@pytest.fixture
def tiny(tmp_path, tiny_bert, tiny_texts):
    write_data(tmp_path, tiny_texts)
    return settings(tmp_path, tiny_bert)


def test_measuring_changes_neither_student_nor_random_numbers(tiny):
    from jasper_fast.training.measure import measure_costs
    from jasper_fast.training.preflight import prepare

    student, data = prepare(load_config(tiny))
    weights, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    trainable = [parameter.requires_grad for parameter in student.parameters()]
    costs = measure_costs(load_config(tiny), student, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert [parameter.requires_grad for parameter in student.parameters()] == trainable
    assert all(cost.step > 0 for cost in costs.stages) and costs.teacher > 0 and costs.evaluation > 0
    assert [cost.rows for cost in costs.stages] == [len(data.texts), 0, 0]
    assert costs.missing == len(data.texts) and costs.teacher_bytes > 0
    # The evaluation set and the held-out documents: by the teacher, and by the student before and after.
    assert costs.evaluated == 3 * (36 + len(data.held_out_texts))
    assert costs.stages[2].setup > 0  # the neighbours


def test_only_embeddings_that_a_model_computes_are_counted(tiny, tmp_path):
    from jasper_fast.training.measure import TeacherCosts
    from jasper_fast.training.preflight import prepare

    tree = tiny | {"data": {**tiny["data"], "cut_share": 0, "shuffle_share": 0}}
    data = prepare(load_config(tree))[1]
    np.save(tmp_path / "ready.npy", np.random.default_rng(0).standard_normal((len(data.texts), 32)))
    model, ready = tiny["teachers"][0], {"vectors": str(tmp_path / "ready.npy"), "order": "texts"}
    other = {**model, "max_length": 16}
    for teachers, expected in (([ready], 0), ([model], 1), ([model, ready], 1), ([model, other], 2)):
        costs = TeacherCosts(load_config(tree | {"teachers": teachers}), data)
        costs.missing_seconds()
        assert costs.missing == expected * len(data.texts)


def test_stages_are_measured_with_targets_as_wide_as_they_will_be(tiny):
    """Teachers wider than the widest head are reduced to it. The cosine of unequal widths would have no gradient."""
    from jasper_fast.training.measure import TeacherCosts, measure_costs
    from jasper_fast.training.preflight import prepare

    model, stages = tiny["teachers"][0], [dict(stage) for stage in tiny["stages"]]
    stages[1]["weights"] = {"cosine": 10, "similarity": 0, "relative_similarity": 0}
    config = load_config(tiny | {"teachers": [model, {**model, "max_length": 16}], "stages": stages})
    student, data = prepare(config)
    teacher = TeacherCosts(config, data)
    assert (teacher.width, teacher.target_width) == (64, student.widths[0])
    assert all(cost.step > 0 for cost in measure_costs(config, student, data).stages)


def test_a_graph_in_the_cache_takes_no_time(tiny):
    from jasper_fast.training.measure import TeacherCosts, measure_costs
    from jasper_fast.training.neighbours import cached_graph
    from jasper_fast.training.preflight import prepare
    from jasper_fast.training.search_costs import RandomTeachers

    config = load_config(tiny)
    student, data = prepare(config)
    stage, teachers = config.stages[2], RandomTeachers(32)
    teachers.fingerprint = TeacherCosts(config, data).fingerprint
    cached_graph(config.data.cache, teachers, len(data.texts), stage.neighbours, print)
    assert measure_costs(config, student, data).stages[2].setup == 0.0


def test_a_resumed_run_keeps_its_steps(tiny, tmp_path, monkeypatch):
    from jasper_fast.training import preflight
    from jasper_fast.training.run.checkpoint import Checkpoint, Position
    from jasper_fast.training.run.folder import RunFolder
    from jasper_fast.training.run.run import Run

    by_time = load_config(tiny | {"minutes": 0.1})  # 6 s of 0.1 s a step: three times the 20 steps
    student, data = preflight.prepare(by_time)
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(by_time, torch.device("cpu"), folder=RunFolder(folder))
    preflight.plan_run(run, student, data)
    planned = [stage.steps for stage in run.config.stages]
    assert sum(planned) == pytest.approx(60, abs=2) and run.progress.to_go() == pytest.approx(22.0, abs=8.0)
    assert read_plan(folder, by_time, data).steps == tuple(planned)

    def twice_as_fast(*given):
        costs = fixed_costs(*given)
        return Costs(tuple(StageCost(cost.name, 0.05, cost.batch, 160) for cost in costs.stages))

    monkeypatch.setattr(preflight, "measure_costs", twice_as_fast)
    again = Run(by_time, torch.device("cpu"), folder=RunFolder(folder))
    preflight.plan_run(again, student, data)
    assert [stage.steps for stage in again.config.stages] == planned
    (folder / "plan.json").unlink()
    lost = Run(by_time, torch.device("cpu"), folder=RunFolder(folder))
    lost.checkpoint = Checkpoint(folder, Position(2, 0, 2), {})
    with pytest.raises(JasperError, match="it has the steps of this run, and is missing"):
        preflight.plan_run(lost, student, data)


def test_the_dry_run_tells_the_cost_and_names_parameters_only_if_asked(tiny, tmp_path):
    from jasper_fast.training.dry_run import describe_plan

    short = describe_plan(load_config(tiny), tmp_path / "run")
    assert "plan: about 12 seconds: 2 seconds training, 10 seconds evaluation" in short
    assert "6 steps of 16, 0.6 passes over 160" in short and "memory: " in short and "disk: " in short
    assert "heads.32.weight" not in short
    assert "heads.32.weight" in describe_plan(load_config(tiny), tmp_path / "run", verbose=True)
    without = describe_plan(load_config(tiny | {"evaluate": []}), tmp_path / "run")
    assert "evaluation: no set with labels" in without


@pytest.mark.parametrize(("quadratic", "linear"), [(1e-8, 0.0), (0.0, 1e-4), (1e-8, 1e-4)])
def test_the_graph_of_many_texts_is_measured_on_full_blocks(quadratic, linear, monkeypatch):
    """Few rows are slower for each pair of rows. Scaled up, they would make the graph look several times too slow."""
    from types import SimpleNamespace

    from jasper_fast.training import search_costs

    clock, searched = [0.0], []

    def search(read, rows, k):
        searched.append(rows)
        clock[0] += quadratic * rows**2 + linear * rows

    monkeypatch.setattr(search_costs, "neighbour_graph", search)
    monkeypatch.setattr(search_costs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for n in (100, 16_384, 112_345):
        assert search_costs.graph_seconds(n, 4, 8) == pytest.approx(quadratic * n**2 + linear * n)
    assert max(searched) == 16_384


def test_a_plan_of_a_version_without_a_field_is_still_the_runs_plan(tmp_path):
    """The key leaves out newer fields of a stage at their defaults, so that a run resumes after an upgrade."""
    from types import SimpleNamespace

    from jasper_fast.training.plan import ADDED, _key
    from jasper_fast.training.run.folder import result_settings
    from jasper_fast.utils.fingerprint import settings_digest

    data, now = SimpleNamespace(fingerprint="texts"), config()
    older = result_settings(now)
    del older["refit"]
    older["stages"] = [{k: v for k, v in stage.items() if k not in ADDED} for stage in older["stages"]]
    assert _key(now, data) == settings_digest([older, "texts"], size=16)
    tree = now.model_dump(mode="json")
    tree["stages"][1]["optimizer"] = "muon"
    assert _key(load_config(tree), data) != _key(now, data)
