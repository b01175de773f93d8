"""A ranking stage on several processes: the same loss, gradients and scores as on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jasper_fast.config.load import load_config
from jasper_fast.distributed.fsdp import full_tensor, shard
from jasper_fast.distributed.ranks import Ranks, join_ranks
from jasper_fast.models.student import Student
from jasper_fast.training.parameters import set_trained
from jasper_fast.training.preflight import prepare
from jasper_fast.training.ranking import make_ranking, random_ranking
from jasper_fast.training.run.run import Run
from jasper_fast.training.search_costs import RandomTeachers
from jasper_fast.training.stages.base import build_stage, trained_names
from jasper_fast.training.stages.losses import RankLoss
from jasper_fast.training.stages.rank import rank_batches
from jasper_fast.training.step import dropout_mask, take_gradients
from tests.helpers.rank_stages import Judge, rank_settings, rank_stage, replace_cross_encoder
from tests.helpers.ranks import end, start
from tests.helpers.runs import records, write_data

CPU = torch.device("cpu")
CASES = {
    "both losses": {},
    "caching": {"gradient_caching": True, "micro_batch": 3},
    "own target": {"narrow_target": "self"},
    "codes": {"codes": ["int8"]},
    "one query a rank": {"batch_size": 4},
}


class RowTeachers(RandomTeachers):
    """Random embeddings that belong to their rows, whichever rank reads them."""

    def read(self, rows: np.ndarray) -> torch.Tensor:
        every = torch.randn(1000, self.width, generator=torch.Generator().manual_seed(7))
        return torch.nn.functional.normalize(every[torch.from_numpy(rows)], dim=1)

    read_full = read


def step(tree: dict, case: dict, ranks: Ranks, mode: str, scope: str = "global") -> dict:
    """Return losses and whole gradients of one step."""
    stages = [tree["stages"][0], rank_stage(margin=0.1) | {"batch_size": 7} | case]
    config = load_config(tree | {"stages": stages, "losses": {"scope": scope}})
    torch.manual_seed(3)
    student = Student.build(config.student).double().train()
    if mode == "fsdp":
        shard(student, CPU, ranks.world)
    data = prepare(config)[1]
    stage = build_stage(config, 1, data, RowTeachers(32))
    settings = stage.config
    set_trained(student, trained_names(student, settings))
    ranking = random_ranking(settings.rank, stage.queries, stage.labels, np.arange(len(stage.queries)))
    plan = stage.plan(Run.local(config, CPU))
    across = scope == "global"
    _, batch = next(rank_batches(settings, 0, plan, data.texts, ranking, student, ranks, across))
    batch = replace(batch, teacher=batch.teacher.double())
    mask = dropout_mask(0.2, (0, 1, 0), batch.places, batch.total, student.hidden_size, CPU) if across else None
    loss = RankLoss(settings, 32, ranks.group if across else None)
    output, _ = take_gradients(student, batch, settings, loss, CPU, "fp32", mask)
    ranks.average_gradients(student.parameters())
    found = {name: full_tensor(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    return {
        "losses": [part.detach() for part in output._asdict().values()],
        "gradients": found,
        "rows": len(batch.rows),
    }


def every_case(tree: dict, out: str) -> None:
    with join_ranks(60.0) as ranks:
        found = {}
        for mode in ("ddp", "fsdp") if ranks.world > 1 else ("ddp",):
            for name, case in CASES.items():
                found[name, mode] = step(tree, case, ranks, mode)
        found["local", "ddp"] = step(tree, {}, ranks, "ddp", "local")
        rows = sum(ranks.all_gather_object(found["both losses", "ddp"]["rows"]))
        if ranks.is_main:
            torch.save(found | {"rows": rows, "scores": scores(tree, ranks)}, out)
        else:
            scores(tree, ranks)


def scores(tree: dict, ranks: Ranks) -> list:
    """Mine and score with all ranks. Return candidates, scores, and how many pairs this rank scored."""
    import jasper_fast.teachers.score_cache as cache
    from jasper_fast.teachers.label import ensure_teachers

    cache.CHUNK = 16
    judge = replace_cross_encoder(Judge())
    folder = Path(tree["data"]["cache"]) / f"of-{ranks.world}"
    stages = [tree["stages"][0], rank_stage(targets="judge", limit=20)]
    config = load_config(tree | {"stages": stages, "data": tree["data"] | {"cache": str(folder)}})
    data = ranks.main_first(lambda: prepare(config)[1])
    labels = ensure_teachers(config, data.texts, progress=False)
    stage = build_stage(config, 1, data, labels)
    run = Run(config, CPU, ranks)
    queries = stage.queries
    ranking = make_ranking(run, "rank", stage.config.rank, queries, data.texts, labels, np.arange(20))
    assert len(ranks.all_gather_object(ranking.candidates.scores.tolist())) == ranks.world
    return [ranking.candidates.rows.tolist(), ranking.candidates.scores.tolist(), judge.scored]


@pytest.mark.slow
def test_the_same_loss_and_gradient_on_one_two_and_four_processes(tiny_bert, tiny_texts, tmp_path):
    write_data(tmp_path, tiny_texts)
    tree = rank_settings(tmp_path, tiny_bert)
    found = {}
    for world in (1, 2, 4):
        out = tmp_path / str(world)
        assert end(start(world, every_case, tree, str(out)), 900) == [0] * world
        found[world] = torch.load(out)
    alone = found[1]
    for world in (2, 4):
        assert found[world]["rows"] == alone["rows"]  # no document is encoded twice
        assert found[world]["scores"][:2] == alone["scores"][:2]
        assert found[world]["scores"][2] < alone["scores"][2]  # ranks divide the pairs
        for name in CASES:
            for mode in ("ddp", "fsdp"):
                ours, expected = found[world][name, mode], alone[name, "ddp"]
                for a, b in zip(ours["losses"], expected["losses"], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=f"{world} {name} {mode}: {a} {b}")
                assert ours["gradients"].keys() == expected["gradients"].keys()
                largest = max(float(g.abs().max()) for g in expected["gradients"].values())
                for key, gradient in expected["gradients"].items():
                    assert float((ours["gradients"][key] - gradient).abs().max()) <= 1e-10 * largest, (name, mode, key)
        assert found[world]["local", "ddp"]["rows"] < alone["rows"]


def whole_run(tree: dict, out: str) -> None:
    import jasper_fast.training.preflight as module
    from jasper_fast.train import train
    from tests.helpers.costs import fixed_costs

    module.measure_costs = fixed_costs
    replace_cross_encoder(Judge())
    train(tree, out=out)


@pytest.mark.slow
def test_a_whole_run_of_two_processes_is_that_of_one(tiny_bert, tiny_texts, tmp_path):
    write_data(tmp_path, tiny_texts)
    tree = rank_settings(tmp_path, tiny_bert, targets="judge")
    for world in (1, 2):
        fresh = tree | {"data": tree["data"] | {"cache": str(tmp_path / f"cache-{world}")}}
        assert end(start(world, whole_run, fresh, str(tmp_path / f"run-{world}")), 900) == [0] * world
    alone, both = (
        [r for r in records(tmp_path / f"run-{world}") if r["event"] == "step" and r["stage"] == "rank"]
        for world in (1, 2)
    )
    for key in ("loss", "listwise", "contrastive", "cosine"):
        assert [r.get(key) for r in both] == pytest.approx([r.get(key) for r in alone], rel=1e-3)
    assert (tmp_path / "run-2" / "model" / "modules.json").is_file()
