"""The arms at full width: each differs in one thing, soups and closed-form heads are what they say, runs resume."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.quality import ablation, full_width
from bench.quality.full_width_arms import BASE, FULL_WIDTH_ARMS
from bench.quality.full_width_page import table, write_page
from bench.quality.model_making import closed_form_head, soup
from jasper_fast.config.diff import config_difference
from jasper_fast.config.load import load_config
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import settings, write_data

RECIPE = full_width.HERE / "recipes" / "minilm-full-width.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_bert, tiny_texts):
    """Return a folder, and the command of a finished ablation of three arms, made of two runs."""
    folder = tmp_path_factory.mktemp("full")
    write_data(folder, tiny_texts)
    tree = settings(folder, tiny_bert)
    tree["student"]["heads"] = [32]
    tree["stages"] = [{**tree["stages"][1], "average": 0.0}]
    (folder / "tiny.yaml").write_text(json.dumps(tree))  # JSON is YAML
    patch = pytest.MonkeyPatch()
    made = ("soup of full runs", "three layers")
    some = [arm for arm in FULL_WIDTH_ARMS if arm.name in (BASE, "no questions") or arm.made in made]
    patch.setattr(full_width, "FULL_WIDTH_ARMS", some)
    command = ["--full-width", "--config", str(folder / "tiny.yaml"), "--work", str(folder / "work"), "--seeds", "0"]
    command += ["--steps", "4", "--out", str(folder / "full.json"), "--page-out", str(folder / "full.md")]
    assert ablation.main(command) == 0
    yield folder, command
    patch.undo()


def test_every_arm_has_its_cost_and_scores(world):
    folder, _ = world
    results = json.loads((folder / "full.json").read_text())
    runs = {run["arm"]: run for run in results["runs"]}
    assert {arm: run["steps"] for arm, run in runs.items()} == {
        BASE: 4, "soup of two, twice the cost": 8, "closed-form head on three layers": 4
    }  # fmt: skip
    for arm, run in runs.items():
        assert [row["width"] for row in run["rows"]] == [32] and run["seconds"] > 0, arm
        assert run["texts"] == 16 * run["steps"] and run["teacher"]
    assert len({json.dumps(run["rows"]) for run in runs.values()}) == len(runs)
    left = {path.name for path in (folder / "work").rglob("*-seed*") if path.is_dir()}
    assert left == {"base-seed0", "base-seed1000"}  # which other arms are made of
    text = (folder / "full.md").read_text()
    assert (
        "| A soup of two whole runs | *soup of two, twice the cost* |" in text
        and "one seed: no spread known" in text
        and "| teacher |" in text
    )


def test_going_on_trains_nothing_twice(world, monkeypatch, capsys):
    folder, command = world
    before = (folder / "full.json").read_text()
    monkeypatch.setattr(full_width, "run_arm", None)  # would fail
    assert ablation.main(command) == 0
    assert json.loads((folder / "full.json").read_text())["runs"] == json.loads(before)["runs"]
    assert "no questions: left out, the configuration has nothing to change for it" in capsys.readouterr().out
    assert ablation.main([*command, "--page"]) == 0
    with pytest.raises(TypeError):
        ablation.main([*command, "--steps", "5"])  # another budget is another arm


@pytest.mark.skipif(not RECIPE.exists(), reason="the recipe is part of the checkout")
def test_each_shipped_arm_differs_from_the_base_in_one_field():
    base = full_width.with_budget(load_config(str(RECIPE)), 10.0, None)
    assert base.stages[-1].minutes == 10.0 and base.stages[-1].steps == 0
    before, names = base.model_dump(mode="json"), [arm.name for arm in FULL_WIDTH_ARMS]
    assert len(set(names)) == len(names) and names[0] == BASE
    for arm in FULL_WIDTH_ARMS:
        overrides = arm.overrides(base)
        assert overrides is not None, arm.name
        after = load_config(before, overrides).model_dump(mode="json")
        changed = 0 if arm.name == BASE or arm.made else 1
        assert len(overrides) == len({key for key, _ in overrides}) == changed, arm.name
        if arm.name == "no questions":
            assert after["data"]["sources"] == [s for s in before["data"]["sources"] if s["role"] != "query"]
            after["data"]["sources"] = before["data"]["sources"]
            changed = 0
        assert len(config_difference(before, after)) == changed, arm.name


def test_the_sets_that_choose_are_not_those_that_are_kept_aside():
    from bench.quality.peers import KEPT_ASIDE

    sets = {one.name or Path(one.path).name for one in load_config(str(RECIPE)).evaluate}
    assert not sets & set(KEPT_ASIDE)


def test_a_share_of_the_budget():
    config = load_config(str(RECIPE))
    assert full_width.with_budget(config, 10.0, None, 0.5).stages[-1].minutes == 5.0
    stage = full_width.with_budget(config, 10.0, 7, 0.5).stages[-1]
    assert (stage.steps, stage.minutes) == (4, None)


def test_a_soup_at_the_same_cost_is_of_two_halves_with_other_seeds(tmp_path, monkeypatch):
    trained = []

    def train_run(config, folder):
        trained.append((config.seed, config.stages[-1].steps, folder.name))
        (folder / "model").mkdir(parents=True)
        save_file({"w": torch.full((2,), float(config.seed))}, folder / "model" / "model.safetensors")
        return {"seconds": 1.0, "steps": config.stages[-1].steps, "texts": 7, "rows": [], "teacher": {"s": 1.0}}

    def load(folder, *_, **__):
        return load_file(Path(folder) / "model.safetensors")["w"]

    monkeypatch.setattr(full_width, "train_run", train_run)
    monkeypatch.setattr(full_width, "load_model", load)
    monkeypatch.setattr(full_width, "model_encoder", lambda model, widths: model)
    monkeypatch.setattr(full_width, "score", lambda config, model: [float(model[0])])
    options = argparse.Namespace(work=str(tmp_path), minutes=10.0, steps=8)
    config = load_config(load_config(str(RECIPE)).model_dump(mode="json"), [("seed", 2)])
    (arm,) = [arm for arm in FULL_WIDTH_ARMS if arm.made == "soup"]
    outcome = full_width.run_arm(arm, config, options)
    assert trained == [(2, 4, "half-seed2"), (1002, 4, "half-seed1002")]
    assert outcome == {"seconds": 2.0, "steps": 8, "texts": 14, "rows": [502.0], "teacher": {"s": 1.0}}
    assert not list(tmp_path.iterdir())


def test_a_soup_is_the_mean_of_the_weights(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name / "inner").mkdir(parents=True)
        tensors = {"w": torch.full((2, 3), value, dtype=torch.float16), "n": torch.tensor([4])}
        save_file(tensors, tmp_path / name / "inner" / "model.safetensors")
        (tmp_path / name / "modules.json").write_text(name)
    made = soup([tmp_path / "a", tmp_path / "b"], tmp_path / "made")
    weights = load_file(made / "inner" / "model.safetensors")
    assert torch.equal(weights["w"], torch.full((2, 3), 1.5, dtype=torch.float16)) and weights["n"].tolist() == [4]
    assert (made / "modules.json").read_text() == "a"
    save_file({"w": torch.zeros(3, 2)}, tmp_path / "b" / "inner" / "model.safetensors")
    with pytest.raises(JasperError, match="other weights in each model"):
        soup([tmp_path / "a", tmp_path / "b"], tmp_path / "bad")
    (tmp_path / "b" / "inner" / "model.safetensors").unlink()
    with pytest.raises(JasperError, match="weight files that differ"):
        soup([tmp_path / "a", tmp_path / "b"], tmp_path / "bad")


def test_a_closed_form_head_finds_a_linear_target(world, tiny_texts):
    """The target is linear in the states of the layer before the last, which only two layers and more can reach."""
    from jasper_fast.models.embedder import load_model

    folder, _ = world
    path = folder / "work" / "steps-4" / "base-seed0" / "model"
    model = load_model(str(path), 32)
    encoder, tokenizer = model[0].auto_model, model.tokenizer
    states = []
    for text in tiny_texts:
        batch = tokenizer([text], truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            states.append(encoder(**batch, output_hidden_states=True).hidden_states[-2].mean(dim=1)[0])
    hidden = torch.stack(states).numpy()
    teacher = hidden @ np.random.default_rng(0).standard_normal((hidden.shape[1], 32))
    teacher = (teacher / np.linalg.norm(teacher, axis=1, keepdims=True)).astype(np.float32)
    roles = ["document", "query"] * (len(tiny_texts) // 2)
    fits = {}
    for layers in (1, 2):
        encode = closed_form_head(path, layers, tiny_texts, roles, teacher, 32)
        vectors = encode(tiny_texts[:50], "document")[32]
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
        fits[layers] = float((vectors * teacher[:50]).sum(axis=1).mean())
    assert fits[2] > 0.99 and fits[2] > fits[1]


def test_the_page_compares_each_arm_with_the_base(tmp_path):
    def run(arm, seed, value):
        rows = [{"width": 8, "precision": "float32", "scores": {"s/Spearman": value + 0.001 * seed}}]
        return {"arm": arm, "budget": "equal", "seed": seed, "seconds": 9.0, "steps": 5, "rows": rows, "teacher": {}}

    results = {
        "environment": {"cpu": {"model": "none"}, "threads": 1, "commit": "abc"},
        "budgets": {"minutes": 10.0},
        "seeds": [0, 1, 2],
        "widths": [8],
        "sets": [{"name": "s", "kind": "sts", "metric": "Spearman"}],
        "runs": [run(arm, seed, value) for arm, value in ((BASE, 0.5), ("muon", 0.6)) for seed in range(3)],
    }
    write_page(results, tmp_path / "page.md")
    assert "| Muon against AdamW | *muon* | 9 | 5 | 60.10 ± 0.10 | better by 10.00 |" in table(results)
    assert "for 10 minutes" in (tmp_path / "page.md").read_text()
