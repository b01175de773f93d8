"""The peer benchmark runs every kind of arm on the same student, texts and seconds, and prints the whole table."""

from __future__ import annotations

import argparse
import json
import os
import sys

import pytest

from bench.quality.peers import PAGE, PEERS, RESULTS, Job, main, peer_student, run_arm, settings_of
from bench.quality.peers_page import table, write_page
from jasper_fast.config.load import load_config
from jasper_fast.config.yaml import dump_yaml, parse_yaml
from tests.helpers.runs import settings, write_data


@pytest.fixture(scope="module")
def arms(tmp_path_factory, tiny_bert, tiny_texts):
    folder = tmp_path_factory.mktemp("bench")
    write_data(folder, tiny_texts)
    (folder / "tiny.yaml").write_text(dump_yaml(settings(folder, tiny_bert)))
    config = load_config(str(folder / "tiny.yaml"))
    options = argparse.Namespace(seconds=1.0, peer_batch=16, work=str(folder))
    for arm in ("jasper_fast", "st-mse", "st-cosine-matryoshka"):
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
    plain, nested = read(folder, "st-mse"), read(folder, "st-cosine-matryoshka")
    assert {(r["model"], r["width"]) for r in plain["rows"]} >= {("st-mse", 32), ("st-mse + PCA", 16)}
    assert {r["width"] for r in nested["rows"]} == {32, 16, 8}
    for peer in (plain, nested):
        assert peer["steps"] >= 1 and peer["seconds"] >= 1.0  # the step under way when time is up ends
    start = next(r for r in read(folder, "jasper_fast")["rows"] if r["model"] == "student before")["scores"]
    assert next(r for r in plain["rows"] if r["model"] == "st-mse")["scores"] != start


def test_every_peer_starts_from_our_student(arms, tiny_texts):
    import torch

    from jasper_fast.models.student import Student

    _, config = arms
    assert len(PEERS) == 4
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
    assert "learning rate is 0.001. It was searched" in text
    assert "Its means with seed 0 by rate are 0.001: 50.00; 0.01: 25.00." in text
    assert "| st-mse | 1 |" in text and "| jasper_fast | 32 |" in text
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
    found = results["search"]
    assert found["arm"] == "st-mse" and found["lr"] == float(max(found["means"], key=found["means"].get))
    assert results["arms"]["st-mse"][0]["settings"]["lr"] == found["lr"]
    text = files["--page-out"].read_text()
    assert "| kept aside | **" in text and "| tuned on | **" in text
    written = files["--out"].stat().st_mtime_ns, capsys.readouterr()
    assert main(options) == 0 and "===" not in capsys.readouterr().out  # everything is known
    assert files["--out"].stat().st_mtime_ns > written[0]


def test_the_shipped_benchmark_recipe_is_valid():
    from pathlib import Path

    tree = parse_yaml((Path(__file__).parents[2] / "bench" / "recipes" / "minilm-public.yaml").read_text())
    assert load_config(tree).student.heads == [384, 128, 64, 32]
