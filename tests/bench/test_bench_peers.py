"""The peer benchmark runs every kind of arm on the same student, texts and seconds, and prints the whole table."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys

import numpy as np
import pytest
import torch

from bench.quality import peers
from bench.quality.peer_arms import (
    PEERS,
    PlainL2,
    by_the_clock,
    cycles,
    missing,
    peer_student,
    score_peer,
    warm_and_fall,
)
from bench.quality.peers import KEPT_ASIDE, PAGE, RESULTS, TUNED_ON, Job, main, run_arm, settings_of
from bench.quality.peers_page import not_ahead, set_kinds, table, write_page
from jasper_fast.config.load import load_config
from jasper_fast.config.yaml import dump_yaml, parse_yaml
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import settings, write_data


@pytest.fixture(scope="module")
def arms(tmp_path_factory, tiny_bert, tiny_texts):
    folder = tmp_path_factory.mktemp("bench")
    write_data(folder, tiny_texts)
    (folder / "tiny.yaml").write_text(dump_yaml(settings(folder, tiny_bert)))
    config = load_config(str(folder / "tiny.yaml"))
    options = argparse.Namespace(seconds=1.0, peer_batch=16, work=str(folder))
    for arm in ("st-mse", "st-cosine-matryoshka", "leaf", "jasper_fast"):  # ours last: peers would wait as long
        run_arm(Job(arm, 0, 0.0 if arm == "jasper_fast" else 1e-3), config, options)
    return folder, config


def read(folder, arm):
    return json.loads(Job(arm, 0, 0.0 if arm == "jasper_fast" else 1e-3).result(folder).read_text())


def test_ours_brings_the_teacher_and_its_floors(arms):
    folder, _ = arms
    ours = read(folder, "jasper_fast")
    names = {(row["model"], row["width"]) for row in ours["rows"]}
    assert {("teacher", 32), ("teacher PCA", 8), ("jasper_fast", 32), ("jasper_fast", 8)} <= names
    assert ours["seconds"] > 0
    assert len(ours["code"]["digest"]) == 16 and ours["code"] == read(folder, "st-mse")["code"]
    assert "code" not in ours["settings"]


def test_a_teachers_own_prompts_are_part_of_the_settings(arms):
    folder, config = arms
    options = argparse.Namespace(seconds=1.0, peer_batch=16, work=str(folder))
    for arm in ("jasper_fast", "st-mse"):
        (teacher,) = settings_of(Job(arm, 0), config, options)["config"]["teachers"]
        assert teacher["prompts"] == {"query": "", "document": ""}  # as in results of before prompts could be left out


def test_peers_train_for_the_seconds_given_and_are_scored_at_every_width(arms):
    folder, _ = arms
    plain, nested, leaf = (read(folder, arm) for arm in ("st-mse", "st-cosine-matryoshka", "leaf"))
    assert {(r["model"], r["width"]) for r in plain["rows"]} >= {("st-mse", 32), ("st-mse + PCA", 16)}
    assert {r["width"] for r in nested["rows"]} == {32, 16, 8}
    assert {(r["model"], r["width"]) for r in leaf["rows"]} >= {("leaf", 32), ("leaf + PCA", 8)}
    for peer in (plain, nested, leaf):
        assert peer["steps"] >= 1 and peer["seconds"] >= 1.0  # the step under way when time is up ends
    start = next(r for r in read(folder, "jasper_fast")["rows"] if r["model"] == "student before")["scores"]
    # on a busy machine the only step of the others may come when their rate is 0; leaf's never is
    assert next(r for r in leaf["rows"] if r["model"] == "leaf")["scores"] != start


def test_every_peer_starts_from_our_student(arms, tiny_texts):
    from jasper_fast.models.student import Student

    _, config = arms
    student = Student.build(config.student).eval()
    ours = torch.nn.functional.normalize(student.pool(student.tokenize(tiny_texts[:4])), dim=-1)
    theirs = peer_student(config).encode(tiny_texts[:4], convert_to_tensor=True)
    torch.testing.assert_close(theirs, ours.detach(), atol=1e-5, rtol=1e-4)


def test_the_table_shows_every_arm_with_its_spread(arms):
    folder, _ = arms
    ours = read(folder, "jasper_fast")
    other = json.loads(json.dumps(ours))
    row = next(r for r in other["rows"] if r["model"] == "jasper_fast" and r["width"] == 8)
    key = next(iter(row["scores"]))
    row["scores"][key] += 0.02
    text = table(
        {"tuned_on": ["pairs"], "arms": {"jasper_fast": [ours, other], "st-mse": [read(folder, "st-mse")] * 2}}
    )
    assert "| jasper_fast | 8 | " in text and "± 1.41" in text and "| st-mse + PCA | 16 |" in text


def test_the_page_says_who_is_ahead_at_every_width(arms, tmp_path):
    folder, _ = arms
    results = {
        "environment": {"seeds": [0], "threads": 1, "cpu": {"model": "none", "logical_cpus": 1}, "commit": "abc"},
        "tuned_on": ["pairs"],
        "search": {"arm": "st-mse", "lr": 1e-3, "means": {"0.001": 0.5, "0.01": 0.25}},
        "arms": {arm: [read(folder, arm)] for arm in ("jasper_fast", "st-mse", "st-cosine-matryoshka")},
    }
    for row in results["arms"]["st-mse"][0]["rows"]:
        if row["model"] == "st-mse + PCA" and row["width"] == 8:
            row["scores"] = dict.fromkeys(row["scores"], 0.999)
    write_page(results, tmp_path / "peers.md")
    text = (tmp_path / "peers.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| 8 |") and "**-" in line]
    assert lines and all("| st-mse + PCA | 99.90 |" in line for line in lines)
    assert "0.001, searched with st-mse and seed 0. The means by rate are 0.001: 50.00; 0.01: 25.00." in text
    assert re.search(r"^- 8, the mean, tuned on: .*st-mse \+ PCA \(-", text, flags=re.MULTILINE)
    seconds = round(results["arms"]["st-mse"][0]["seconds"])  # 1, or the one step of a busy machine
    assert f"| st-mse | {seconds} |" in text and "| jasper_fast | 32 |" in text
    assert "same code" not in text
    results["arms"]["st-mse"][0]["code"] = {"commit": "def", "digest": "1234"}
    del results["arms"]["jasper_fast"][0]["code"]
    write_page(results, tmp_path / "peers.md")
    text = (tmp_path / "peers.md").read_text()
    assert "do not all come from the same code: code not recorded: jasper_fast seed 0; commit def (code 1234)" in text


def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    results = json.loads(RESULTS.read_text())
    if "tuned_on" not in results:
        pytest.skip("the committed results are of before the learning rate was searched")
    write_page(results, tmp_path / "peers.md")
    assert (tmp_path / "peers.md").read_text() == PAGE.read_text()


def test_the_command_searches_the_peers_rate_and_keeps_other_sets_aside(
    arms, tmp_path, capsys, monkeypatch, warm_python
):
    monkeypatch.setattr(sys, "executable", warm_python)  # of the processes of the arms
    folder, _ = arms
    monkeypatch.setattr(peers, "KEPT_ASIDE", ("other",))
    (tmp_path / "other.tsv").write_text((folder / "pairs.tsv").read_text())
    tree = parse_yaml((folder / "tiny.yaml").read_text())
    tree["evaluate"].append({"path": str(tmp_path / "other.tsv")})
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tree))
    together = ["--together", "2"] if len(os.sched_getaffinity(0)) > 1 else []
    options = [
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--work",
        str(tmp_path / "work"),
        "--arms",
        "jasper_fast",
        "st-mse",
    ]
    options += ["--seeds", "0", "--peer-lr", "1e-9", "1e-3", "--tuned-on", "pairs", *together]
    files = {"--out": tmp_path / "distil.json", "--page-out": tmp_path / "peers.md"}
    for name, file in files.items():
        options += [name, str(file)]
    assert main(options) == 0
    results = json.loads(files["--out"].read_text())
    (found,) = results["search"]
    assert found["arms"] == ["st-mse"] and results["kept_aside"] == ["other"]
    assert found["arm"] == "st-mse" and found["lr"] == float(max(found["means"], key=found["means"].get))
    assert results["arms"]["st-mse"][0]["settings"]["lr"] == found["lr"]
    text = files["--page-out"].read_text()
    assert "| kept aside | **" in text and "| tuned on | **" in text
    written = files["--out"].stat().st_mtime_ns, capsys.readouterr()
    assert main(options) == 0 and "===" not in capsys.readouterr().out  # everything is known
    assert files["--out"].stat().st_mtime_ns > written[0]
    assert json.loads(files["--out"].read_text())["arms"] == results["arms"]


def test_results_are_written_after_every_arm(arms, tmp_path, monkeypatch):
    """A stop loses nothing that is done."""
    folder, config = arms
    options = argparse.Namespace(
        seconds=1.0, peer_batch=16, work=str(tmp_path), together=1, seeds=[0], arms=["jasper_fast", "st-mse", "leaf"]
    )
    options.tuned_on, options.peer_lr, options.out = ["pairs"], [1e-3], str(tmp_path / "distil.json")
    seen = []

    def child(command, **_):
        arm = command[command.index("--one") + 1]
        seen.append(json.loads((tmp_path / "distil.json").read_text())["arms"] if seen else None)
        job = Job(arm, 0, float(command[command.index("--one") + 3]))
        stored = read(folder, arm) | {"settings": settings_of(job, config, options)}
        job.result(tmp_path).parent.mkdir(exist_ok=True)
        job.result(tmp_path).write_text(json.dumps(stored))
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(peers.subprocess, "run", child)
    monkeypatch.setattr(peers, "environment", dict)
    monkeypatch.setattr(PEERS["leaf"].__class__, "rates", lambda peer, given: given)
    runner = peers.Runner([], config, options)
    runner.search()
    runner.run(peers.jobs_of(options, runner.searches))
    assert seen[0] is None and list(seen[1]) == ["jasper_fast"] and list(seen[2]) == ["jasper_fast", "st-mse"]
    assert list(json.loads((tmp_path / "distil.json").read_text())["arms"]) == options.arms


def test_sets_are_chosen_by_name_and_kept_aside_from_choices(arms):
    _, config = arms
    options = argparse.Namespace(sets=None, seconds=90.0, tuned_on=list(TUNED_ON))
    assert peers.selected(config, options).minutes == 1.5
    options.sets = ["pairs"]
    assert [one.path for one in peers.selected(config, options).evaluate] == [config.evaluate[0].path]
    options.sets = ["nothing"]
    with pytest.raises(JasperError, match="--sets: got nothing, expected some of pairs"):
        peers.selected(config, options)
    options.sets, options.tuned_on = None, [KEPT_ASIDE[0]]
    with pytest.raises(JasperError, match=f"--tuned-on: {KEPT_ASIDE[0]} are kept aside"):
        peers.selected(config, options)
    assert not set(KEPT_ASIDE) & set(TUNED_ON)


def test_a_peer_whose_package_is_missing_is_left_out_with_a_line(capsys, monkeypatch):
    import importlib.util

    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "smallmodel" else honest(name, *a)
    )
    assert peers.installed(["jasper_fast", "smallmodel", "leaf"]) == ["jasper_fast", "leaf"]
    assert "smallmodel is left out: smallmodel not installed. Fix: pip install" in capsys.readouterr().out


def test_leafs_rate_falls_to_a_tenth_three_times():
    rates = [cycles(n / 300) for n in range(301)]
    assert rates[0] == rates[100] == rates[200] == 1.0
    assert rates[50] == pytest.approx(0.55) and rates[99] == pytest.approx(0.109) and 0.1 <= rates[300] < 0.11
    assert [warm_and_fall(done) for done in (0.05, 0.1, 0.55, 1.0, 1.1)] == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.0])
    clock = by_the_clock(1e9, 0.5, lambda done: 0.25)
    clock.on_train_begin(None, None, None)
    group: dict = {}
    clock.on_pre_optimizer_step(None, None, None, optimizer=argparse.Namespace(param_groups=[group]))
    assert group["lr"] == 0.125


def test_leafs_loss_is_the_plain_distance():
    vectors, targets = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    model = torch.nn.Module()
    model.forward = lambda features: {"sentence_embedding": features}
    loss = PlainL2(model)([vectors], targets)
    expected = sum(
        sum((a - b) ** 2 for a, b in zip(v, t, strict=True)) ** 0.5 for v, t in zip(vectors, targets, strict=True)
    )
    torch.testing.assert_close(loss, expected / 4)
    loss.backward()
    assert torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize("arm", ["smallmodel", "model2vec"])
def test_a_peer_with_a_package_of_its_own(arms, arm, tmp_path):
    if missing(arm):
        pytest.skip(f"needs the extra distil-peers: {missing(arm)}")
    folder, config = arms
    options = argparse.Namespace(seconds=0.5, peer_batch=16, work=str(tmp_path))
    job = Job(arm, 0, 0.0 if PEERS[arm].fixed else 1e-3)
    run_arm(job, config, options)
    result = json.loads(job.result(tmp_path).read_text())
    assert {(row["model"], row["width"]) for row in result["rows"]} >= {(arm, 32), (f"{arm} + PCA", 8)}
    assert (result["steps"] >= 1) == (arm == "smallmodel") and result["seconds"] > 0
    two = config.model_copy(update={"teachers": config.teachers * 2})
    with pytest.raises(JasperError, match=f"{arm}: got 2 teachers"):
        run_arm(job, two, options)


def test_a_lead_within_the_spread_is_no_lead():
    def run(model, width, values):
        return [{"model": model, "width": width, "scores": {"a/x": value}} for value in values]

    rows = {
        "jasper_fast": [run("jasper_fast", 8, [v])[0] for v in (0.50, 0.54)],
        "leaf": [run("leaf", 8, [v])[0] for v in (0.49, 0.51)],
        "st-mse": [run("st-mse", 8, [v])[0] for v in (0.30, 0.31)],
        "model2vec": [run("model2vec", 8, [v])[0] for v in (0.60, 0.60)],
    }
    results = {
        "tuned_on": [],
        "kept_aside": ["a"],
        "arms": {arm: [{"rows": [row]} for row in some] for arm, some in rows.items()},
    }
    listed = not_ahead(results)
    assert "- 8, the mean, kept aside: leaf (+2.00), model2vec (-8.00)" in listed and "st-mse" not in listed
    for arm in ("leaf", "model2vec"):
        del results["arms"][arm]
    assert "It leads every peer at every width" in not_ahead(results)
    assert set_kinds(results | {"kept_aside": []}) == {"other": ["a"]}
    del results["arms"]["jasper_fast"]
    assert not_ahead(results) == "Ours has no result, so nothing is compared."


def test_peers_without_narrow_heads_are_reduced_by_the_training_texts(arms, tiny_texts):
    _, config = arms
    rng = np.random.default_rng(0)
    texts = {"text": tiny_texts[:64]}

    class Rows:
        def __getitem__(self, rows):
            return {"text": texts["text"][rows]}

    def encode(some, role):
        return {32: rng.standard_normal((len(some), 32)).astype(np.float32)}

    rows = score_peer("leaf", config, encode, Rows())
    assert {(row["model"], row["width"]) for row in rows} == {
        ("leaf", 32), *((f"leaf + {how}", width) for how in ("PCA", "truncation") for width in (16, 8))
    }  # fmt: skip


def test_the_shipped_benchmark_recipe_is_valid():
    from pathlib import Path

    tree = parse_yaml((Path(__file__).parents[2] / "bench" / "recipes" / "minilm-public.yaml").read_text())
    assert load_config(tree).student.heads == [384, 128, 64, 32]
