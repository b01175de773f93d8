"""A ranking stage: its loss, its steps, whole runs, restarts, the plan and the dry run."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jasper_fast.config.load import load_config
from jasper_fast.config.stage import StageConfig
from jasper_fast.losses import reference
from jasper_fast.models.student import Student
from jasper_fast.train import train
from jasper_fast.training.data import RankInputs
from jasper_fast.training.dry_run import describe_plan
from jasper_fast.training.loop import train_stage
from jasper_fast.training.measure import measure_costs
from jasper_fast.training.parameters import set_trained
from jasper_fast.training.plan import Costs, StageCost, describe_costs, make_plan
from jasper_fast.training.preflight import prepare
from jasper_fast.training.ranking import random_ranking
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.run.run import Run
from jasper_fast.training.search_costs import RandomTeachers
from jasper_fast.training.stages.base import build_stage, stage_class, trained_names
from jasper_fast.training.stages.losses import RankLoss, StageLoss
from jasper_fast.training.stages.rank import RankStage, rank_batches
from jasper_fast.training.step import dropout_mask, take_gradients
from jasper_fast.utils.errors import ConfigError, JasperError
from tests.helpers.costs import fixed_costs
from tests.helpers.processes import exit_code
from tests.helpers.rank_stages import Judge, rank_settings, rank_stage, replace_cross_encoder, write_queries
from tests.helpers.runs import losses_in, records, run_in_child, write_data

CPU = torch.device("cpu")


def stage_config(**fields) -> StageConfig:
    return StageConfig.model_validate(rank_stage() | fields)


def inputs_of(queries: int, documents: int, candidates: int, seed: int = 0) -> RankInputs:
    """Return random inputs with missing candidates and unanswered queries."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(documents, generator=generator)[:candidates] for _ in range(queries)])
    chosen[::2, -1] = -1
    positives = torch.where(torch.arange(queries) % 3 == 1, -1, chosen[:, 0])
    scores = torch.rand(queries, candidates, generator=generator)
    return RankInputs(chosen, scores, positives, torch.arange(queries + documents), (queries + documents,))


def test_the_loss_is_the_sum_of_its_parts_by_the_slow_way():
    torch.manual_seed(1)
    inputs, teacher = inputs_of(5, 9, 4), F.normalize(torch.randn(14, 16, dtype=torch.float64), dim=1)
    heads = {width: torch.randn(14, width, dtype=torch.float64, requires_grad=True) for width in (16, 4)}
    rank = {"listwise": 2.0, "contrastive": 3.0, "margin": 0.1, "temperature": 0.2, "teacher_temperature": 0.5}
    settings = stage_config(heads=[16, 4], rank=rank, batch_size=5)
    output = RankLoss(settings, 16)(heads, teacher, inputs)
    plain = StageLoss(settings, 16)(heads, teacher)
    listwise = contrastive = 0.0
    for vectors in heads.values():
        queries, documents = vectors[:5], vectors[5:]
        listwise = listwise + reference.listwise_loss(
            queries, documents, inputs.candidates, inputs.scores, temperature=0.2, teacher_temperature=0.5
        )
        known = inputs.positives >= 0
        contrastive = contrastive + reference.info_nce_loss(
            queries[known],
            documents,
            inputs.positives[known],
            temperature=0.2,
            teacher_queries=teacher[:5][known],
            teacher_documents=teacher[5:],
            margin=0.1,
        )
    assert float(listwise.detach()) > 0 and float(contrastive.detach()) > 0
    torch.testing.assert_close(output.parts["listwise"], listwise, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(output.parts["contrastive"], contrastive, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(output.loss, plain.loss + 2 * listwise + 3 * contrastive, rtol=1e-6, atol=1e-9)
    assert output.parts["cosine"] == plain.parts["cosine"] and plain.parts["cosine"] > 0  # queries and documents
    output.loss.backward()
    assert all(head.grad is not None and head.grad.abs().sum(dim=1).min() > 0 for head in heads.values())


def test_a_loss_without_weight_is_zero_and_costs_nothing():
    inputs, teacher = inputs_of(3, 5, 3), F.normalize(torch.randn(8, 16), dim=1)
    heads = {16: torch.randn(8, 16, requires_grad=True)}
    for rank, zero in (({"contrastive": 0.0}, "contrastive"), ({"listwise": 0.0, "contrastive": 1.0}, "listwise")):
        output = RankLoss(stage_config(heads=[16], rank=rank, batch_size=3), 16)(heads, teacher, inputs)
        assert output.parts[zero] == 0 and output.parts.keys() >= {"listwise", "contrastive", "cosine"}
    unanswered = inputs._replace(positives=torch.full((3,), -1), candidates=torch.full((3, 3), -1))
    rank = {"listwise": 1.0, "contrastive": 1.0}
    output = RankLoss(stage_config(heads=[16], rank=rank, batch_size=3), 16)(heads, teacher, unanswered)
    assert output.parts["listwise"] == output.parts["contrastive"] == 0 and output.loss.isfinite()


def run_planned(tree: dict, out: str) -> None:
    """Run in a process of its own, without measuring speeds first."""
    import jasper_fast.training.preflight as module

    module.measure_costs = fixed_costs
    run_in_child(tree, out)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_bert, tiny_texts):
    """A finished run of a head stage and a ranking stage, without any measuring."""
    folder = tmp_path_factory.mktemp("rank-stage")
    write_data(folder, tiny_texts)
    write_queries(folder, tiny_texts)
    tree = rank_settings(folder, tiny_bert)
    assert exit_code(run_planned, tree, str(folder / "alone")) == 0
    return folder, tree


def weights(run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000006"
    return load_file(newest / "model.safetensors")


def all_losses(run) -> list[tuple]:
    keep = ("step", "loss", "listwise", "contrastive", "grad_norm")
    return losses_in(run) + [tuple(r.get(k) for k in keep) for r in records(run) if r["event"] == "step"]


def assert_same_end(run, alone) -> None:
    ours, expected = weights(run), weights(alone)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    assert all_losses(run) == all_losses(alone)


def test_a_run_logs_and_reports_its_ranking(world):
    folder, _ = world
    run = folder / "alone"
    steps = [r for r in records(run) if r["event"] == "step"]
    assert len(steps) == 6 and all(r["listwise"] > 0 and r["contrastive"] > 0 for r in steps[2:])
    assert "listwise" not in steps[0] and all(r["cosine"] > 0 for r in steps)
    (event,) = [r for r in records(run) if r["event"] == "ranking"]
    assert event["queries"] == 24 and event["seconds"] >= event["mining"] > 0
    assert steps[2]["texts_per_s"] * steps[2]["seconds"] > 6.5  # queries and documents
    report = (run / "report.md").read_text()
    assert "1 listwise, 0.5 contrastive" in report
    assert "stage rank: " in report and "candidates of each among" in report
    results = json.loads((run / "results.json").read_text())
    assert results["facts"]["seconds"]["training"] >= event["seconds"]
    assert (run / "model" / "modules.json").is_file()


def kill_while_ranking() -> None:
    """Kill this process when it has mined, before it scores."""
    import jasper_fast.training.ranking as module

    module._scores = lambda *given: os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step_four() -> None:
    import jasper_fast.training.stages.base as module

    honest = module.learning_rate

    def trap(stage, step):
        if stage.name == "rank" and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(stage, step)

    module.learning_rate = trap


def run_killed(tree: dict, out: str, before) -> None:
    before()
    run_planned(tree, out)


def test_a_killed_run_ends_bit_identical(world):
    folder, tree = world
    out, fresh = folder / "killed", tree | {"data": tree["data"] | {"cache": str(folder / "cache-killed")}}
    assert exit_code(run_killed, fresh, str(out), kill_while_ranking) == -signal.SIGKILL
    assert exit_code(run_killed, fresh, str(out), kill_in_step_four) == -signal.SIGKILL
    assert exit_code(run_planned, fresh, str(out)) == 0
    assert_same_end(out, folder / "alone")


def test_stages_in_memory_are_those_of_a_run(world):
    from jasper_fast.teachers.label import ensure_teachers

    folder, tree = world
    config = load_config(tree)
    student, data = prepare(config)
    labels, position = ensure_teachers(config, data.texts, progress=False), Position(0, 0, 0)
    torch.set_num_threads(1)
    for index in range(2):
        stage = build_stage(config, index, data, labels)
        train_stage(Run.local(config, CPU), student, stage, position)
        position = position.after(stage.config.steps)
    saved = weights(folder / "alone")
    assert all(torch.equal(student.state_dict()[name], saved[name]) for name in saved)


def gradients(world, settings: dict, dtype=torch.float64, micro_batch: int = 1000, caching: bool = False):
    """Return losses and gradients of one step with random candidates."""
    folder, tree = world
    stages = [tree["stages"][0], rank_stage() | {"micro_batch": micro_batch, "gradient_caching": caching} | settings]
    config = load_config(tree | {"stages": stages})
    torch.manual_seed(3)
    student = Student.build(config.student).to(dtype).train()
    _, data = prepare(config)
    stage = build_stage(config, 1, data, RandomTeachers(32))
    assert isinstance(stage, RankStage)
    set_trained(student, trained_names(student, stage.config))
    ranking = random_ranking(stage.settings, stage.queries, stage.labels, np.arange(len(stage.queries)))
    plan = stage.plan(Run.local(config, CPU))
    run = Run.local(config, CPU)
    _, batch = next(rank_batches(stage.config, 0, plan, data.texts, ranking, student, run.ranks))
    mask = dropout_mask(0.2, (0, 1, 0), batch.places, batch.total, student.hidden_size, CPU)
    loss = RankLoss(stage.config, 32)
    batch = type(batch)(**{**vars(batch), "teacher": batch.teacher.to(dtype)})
    output, _ = take_gradients(student, batch, stage.config, loss, CPU, "fp32", mask)
    return output, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "given", [{}, {"train": ["*"], "narrow_target": "self"}, {"codes": ["int8"]}, {"batch_size": 1}]
)
def test_gradient_caching_gives_the_plain_gradient(world, given):
    if given.get("batch_size") == 1:
        given = given | {"rank": {"candidates": 2, "contrastive": 1.0}}
    plain = gradients(world, given)
    cached = gradients(world, given, micro_batch=4, caching=True)
    torch.testing.assert_close(plain[0]._asdict(), cached[0]._asdict(), rtol=1e-10, atol=0)
    largest = max(float(g.abs().max()) for g in plain[1].values())
    assert plain[1].keys() == cached[1].keys() and largest > 0
    for name, gradient in plain[1].items():
        torch.testing.assert_close(cached[1][name], gradient, rtol=0, atol=1e-10 * largest, msg=name)


def test_a_frozen_encoder_learns_a_ranking_by_its_heads(world):
    _, found = gradients(world, {"last_layers": 0, "heads": [8], "weights": rank_stage()["weights"] | {"cosine": 0.0}})
    assert set(found) == {"heads.8.weight", "heads.8.bias"} and found["heads.8.weight"].abs().sum() > 0


def test_heads_of_any_width_learn_without_another_loss(world):
    from jasper_fast.config.run import check_losses

    _, tree = world
    alone = {"weights": {"cosine": 1.0, "similarity": 0.0, "relative_similarity": 0.0}, "batch_size": 1}
    plain = rank_stage() | alone
    del plain["rank"]
    with pytest.raises(JasperError, match="would leave its head 8 untrained"):
        check_losses(load_config(tree | {"stages": [plain]}), [32])
    check_losses(load_config(tree | {"stages": [rank_stage() | alone]}), [32])
    _, found = gradients(world, alone)
    assert found["heads.8.weight"].abs().sum() > 0


@pytest.mark.parametrize("rank", [{"queries": "file", "targets": "grades"}, {"targets": "judge", "limit": 9}])
def test_other_queries_and_targets_train_to_the_end(world, tmp_path, rank, monkeypatch):
    import jasper_fast.training.ranking as module

    folder, tree = world
    monkeypatch.setattr(module, "open_cross_encoder", None)
    judge = replace_cross_encoder(Judge())
    if rank.get("queries"):
        rank = rank | {"queries": str(folder / "queries.jsonl")}
    stages = [tree["stages"][0], rank_stage(**rank)]
    run = train(tree | {"stages": stages}, out=tmp_path / "run")
    steps = [r for r in records(run) if r["event"] == "step" and r["stage"] == "rank"]
    assert len(steps) == 4 and all(r["listwise"] > 0 for r in steps)
    assert (judge.scored > 0) == (rank["targets"] == "judge")
    assert "at temperature 1" in (run / "report.md").read_text()


def test_a_changed_file_of_queries_is_rejected_when_a_run_resumes(world, tmp_path, tiny_texts):
    folder, tree = world
    file = write_queries(tmp_path, tiny_texts)
    tree = tree | {"stages": [tree["stages"][0], rank_stage(queries=str(file))]}
    out = tmp_path / "run"
    assert exit_code(run_killed, tree, str(out), kill_in_step_four) == -signal.SIGKILL
    file.write_text(file.read_text().replace("number 3", "number three"))
    with pytest.raises(JasperError, match="was trained on other texts.*stage rank"):
        train(tree, out=out)


def test_the_speed_is_measured_with_all_that_comes_before_the_first_step(world, monkeypatch):
    import jasper_fast.training.ranking as module

    folder, tree = world
    monkeypatch.setattr(module, "open_cross_encoder", None)
    judge = replace_cross_encoder(Judge())
    config = load_config(tree | {"stages": [tree["stages"][0], rank_stage(targets="judge")]})
    student, data = prepare(config)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    random = torch.get_rng_state()
    cost = measure_costs(config, student, data).stages[1]
    queries = len(build_stage(config, 1, data).queries)
    assert cost.queries == cost.available == queries and cost.pairs == 5 and judge.scored > 0
    assert cost.step > 0 and cost.query > 0 and cost.rows == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())


def test_minutes_pay_for_scores_too(world):
    _, tree = world
    rank = rank_stage(targets="teacher") | {"steps": 0, "minutes": 1.0, "batch_size": 10}
    config = load_config(tree | {"stages": [tree["stages"][0], rank]})
    head = StageCost("one", 0.1, 16, 160)
    few = make_plan(config, Costs((head, StageCost("rank", 0.1, 10, 100, query=0.2, queries=100, pairs=5))))
    many = make_plan(config, Costs((head, StageCost("rank", 0.1, 10, 10**6, query=0.2, queries=10**6))))
    assert few.steps[1] == 400  # 20 s for all 100 queries, then 40 s
    assert many.steps[1] == 28  # 2.1 s for each step of 10 queries
    assert [phase.name for phase in few.progress().phases] == ["one", "rank: scoring", "rank", "evaluation"]
    assert few.progress().phases[1].units == 500
    lines = describe_costs(few, config.stages)
    assert "400 steps of 10, 40.0 passes over 100; candidates and scores of 100 queries in 20 seconds" in lines[2]


def test_the_dry_run_tells_what_was_chosen(world, tmp_path, monkeypatch):
    from jasper_fast.training import dry_run

    _, tree = world
    monkeypatch.setattr(dry_run, "measure_costs", fixed_costs)
    text = describe_plan(load_config(tree), tmp_path / "run")
    assert "stage rank: trains" in text and "stage rank: " in text
    assert " queries (" in text and "up to 5 candidates of each among 1" in text
    assert "scored by the teachers' cosines at temperature 0.05" in text


def test_impossible_stages_are_rejected_before_texts_are_read(world, tmp_path):
    _, tree = world
    with pytest.raises(JasperError, match="cannot be found|no model|not|hub"):
        train(
            tree | {"stages": [tree["stages"][0], rank_stage(targets=str(tmp_path / "no-judge"))]}, out=tmp_path / "a"
        )
    np.save(tmp_path / "v.npy", np.eye(32, dtype=np.float32))
    stored = tree | {"teachers": [{"vectors": str(tmp_path / "v.npy"), "order": "source"}]}
    with pytest.raises(JasperError, match="teachers.0 has stored embeddings, and cannot embed queries that are made"):
        train(stored, out=tmp_path / "b")
    with pytest.raises(ConfigError, match="made queries have no grades"):
        load_config(tree | {"stages": [rank_stage(targets="grades")]})
    missing = tree | {"stages": [tree["stages"][0], rank_stage(queries=str(tmp_path / "no.jsonl"))]}
    with pytest.raises(JasperError, match="no such file of queries"):
        train(missing, out=tmp_path / "c")
    with pytest.raises(JasperError, match=r"stage 'rank': a batch of 6 from 2 queries"):
        train(tree | {"stages": [tree["stages"][0], rank_stage(limit=2)]}, out=tmp_path / "d")
    local = tree | {"losses": {"scope": "local"}, "parallel": {"mode": "fsdp"}}
    stage = build_stage(load_config(local), 1)
    assert "needs losses.scope: global" in stage.parallel_problems(2)[0] and stage.parallel_problems(1) == []


def test_few_queries_shrink_the_batch_if_the_stage_allows_it(world, tmp_path):
    folder, tree = world
    stages = [tree["stages"][0], rank_stage(limit=3) | {"small_data": "adapt", "steps": 1}]
    run = train(tree | {"stages": stages}, out=tmp_path / "run")
    assert "batch_size 6 -> 3, since there are 3 queries" in json.dumps(records(run))
    assert stage_class(load_config(tree).stages[1]) is RankStage
