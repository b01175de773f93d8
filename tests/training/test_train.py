"""The whole way at small size: stages, frozen weights, resume bit for bit, faults, and what a user sees."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jasper_fast.config.load import load_config
from jasper_fast.utils.errors import ConfigError, JasperError
from tests.helpers.processes import exit_code, fork_server
from tests.helpers.runs import assert_same_run, final_weights, losses_in, records, run_in_child, settings, write_data

LOSSES = {"cosine": 10.0, "similarity": 200.0, "relative_similarity": 20.0}
TWO_TEXTS = {
    "name": "three",
    "train": ["*"],
    "heads": [32, 16, 8],
    "batch_size": 2,
    "steps": 8,
    "lr": 1e-3,
    "weights": {"similarity": 0},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_bert, tiny_texts):
    """Data, and one run of the tiny recipe left alone from start to end."""
    from jasper_fast.train import train

    folder = tmp_path_factory.mktemp("world")
    write_data(folder, tiny_texts)
    tree = settings(folder, tiny_bert)
    train(tree, out=folder / "alone")
    return folder, tree


def test_a_run_leaves_everything_a_user_expects(world):
    folder, tree = world
    run = folder / "alone"
    assert [step[0] for step in losses_in(run)] == list(range(1, 21))
    for name in ("config.yaml", "results.json", "report.md", "model/modules.json", "model/README.md"):
        assert (run / name).is_file(), name
    assert not list(run.rglob("*.bin")) and not list((run / "model").rglob("*.pt"))
    assert len(list((run / "checkpoints").iterdir())) == 1  # a finished run goes back to no other
    assert not [path for path in run.rglob("*") if path.is_dir() and not list(path.iterdir())]
    results = json.loads((run / "results.json").read_text())
    rows = {(row["model"], row["width"]) for row in results["rows"]}
    assert {("teacher", 32), ("student before", 32), ("student", 32), ("student", 16), ("student", 8)} <= rows
    assert {("teacher PCA", 8), ("teacher truncated", 8)} <= rows
    to_go = [r["to_go"] for r in records(run) if r["event"] == "step"]
    assert len(to_go) == 20 and all(left >= 0 for left in to_go)
    assert results["facts"]["planned_seconds"] == {"teacher": 0.0, "training": 2.0, "evaluation": 10.0, "in all": 12.0}
    seconds = results["facts"]["seconds"]
    steps = sum(r["seconds"] for r in records(run) if r["event"] == "step")
    assert 0 < steps <= seconds["training"] and seconds["evaluation"] > 0
    assert seconds["in all"] > seconds["training"] + seconds["evaluation"]  # texts and teachers' vectors
    phases = results["facts"]["phases"]
    names = ["texts", "plan", "teacher", "one", "two", "three", "refit", "export", "evaluation", "speed", "other"]
    assert list(phases) == names and sum(phases.values()) == pytest.approx(seconds["in all"], rel=0.05)
    assert "### Where the time went" in (run / "report.md").read_text()
    codes = {(row["width"], row["precision"]) for row in results["codes"]}
    assert {(w, p) for w in (32, 16, 8) for p in ("int8", "ubinary")} <= codes
    assert "## Every width, quantised" in (run / "report.md").read_text()


def test_narrow_heads_may_start_at_the_principal_axes(world, tmp_path):
    from jasper_fast.train import train

    folder, tree = world
    tree = json.loads(json.dumps(tree))
    tree["student"]["vector_dropout"] = 0.0
    tree["stages"] = tree["stages"][:2] + [
        tree["stages"][2] | {"train": ["heads.*"], "narrow_start": "principal", "steps": 8, "lr": 1e-9}
    ]
    run = train(tree, out=tmp_path / "run")
    rows = {(r["model"], r["width"]): r["scores"] for r in json.loads((run / "results.json").read_text())["rows"]}
    plain = json.loads((folder / "alone" / "results.json").read_text())["rows"]
    assert ("student", 8) in rows and any(row["model"] == "student" for row in plain)
    weights = final_weights(run)
    wide, narrow = weights["heads.32.weight"].double(), weights["heads.16.weight"].double()
    mixed = narrow @ torch.linalg.inv(wide)  # of the widest one's coordinates: orthogonal axes, all of one length
    gram = mixed @ mixed.T / mixed.square().sum(dim=1).mean()
    torch.testing.assert_close(gram, torch.eye(16, dtype=torch.float64), atol=0.02, rtol=0)
    for change, says in (
        ({"heads": [32]}, "it has no narrow head"),
        ({"last_layers": 1}, "it trains the encoder"),
        ({"batch_size": 12}, "the head of width 16 has more axes than there are texts, 12; raise batch_size"),
        ({"batches": "random", "batch_size": 2, "steps": 7}, "the head .* texts, 14; raise batch_size or steps"),
    ):
        bad = json.loads(json.dumps(tree))
        bad["stages"][2] |= change
        if "heads" in change:
            bad["stages"][1]["heads"] = [32, 16, 8]
        with pytest.raises(JasperError, match=f"narrow_start: principal is not possible, as {says}"):
            train(bad, out=tmp_path / "bad")


def test_a_stage_ends_in_the_average_of_its_weights(world, tmp_path):
    from jasper_fast.train import train

    _, tree = world
    only = tree["stages"][0] | {"steps": 6}
    tree = tree | {"student": tree["student"] | {"heads": [32]}, "checkpoint": {"every": 1, "keep": 10}, "evaluate": []}
    for average in (0.0, 0.7):
        train(tree | {"stages": [only | {"average": average}]}, out=tmp_path / str(average))
    plain, averaged = (
        [load_file(path / "model.safetensors") for path in sorted((tmp_path / name / "checkpoints").iterdir())]
        for name in ("0.0", "0.7")
    )
    assert losses_in(tmp_path / "0.7") == losses_in(tmp_path / "0.0")  # it teaches nothing on the way
    for name in ("heads.32.weight", "heads.32.bias"):
        expected = plain[0][name]
        for n, weights in enumerate(plain[1:], 2):
            expected = expected.lerp(weights[name], max(0.3, 9 / (9 + n)))
            assert n == 6 or torch.equal(averaged[n - 1][name], weights[name])
        torch.testing.assert_close(averaged[-1][name], expected)
        assert not torch.allclose(averaged[-1][name], plain[-1][name], atol=1e-4)


def test_principal_axes_need_as_many_texts_as_the_widest_of_them(world, tmp_path):
    from jasper_fast.train import train

    _, tree = world
    stage = tree["stages"][2] | {"train": ["heads.*"], "narrow_start": "principal", "steps": 4}
    stage |= {"batches": "random", "batch_size": 4, "texts": 12}
    few = tree | {"stages": [*tree["stages"][:2], stage]}
    with pytest.raises(JasperError, match=r"16 principal axes from 12 texts\). Fix: give more, or lower batch_size"):
        train(few, out=tmp_path / "run")
    stage["texts"] = 16  # the folder of a run that was refused takes another configuration
    train(few, out=tmp_path / "run")
    with pytest.raises(JasperError, match=r"was started with another configuration:\n  - seed: 0 -> 1"):
        train(few, out=tmp_path / "run", overrides=[("seed", 1)])


def test_stock_quantisation_with_the_ranges_of_a_finished_model(world, tiny_texts):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import quantize_embeddings

    folder, _ = world
    model = SentenceTransformer(str(folder / "alone" / "model"), device="cpu")
    for width in (32, 8):
        vectors = model.encode(tiny_texts, task=str(width))
        ranges = np.load(folder / "alone" / "model" / f"int8_ranges_{width}.npy")
        codes = quantize_embeddings(vectors, "int8", ranges=ranges).astype(np.float64)
        step = (ranges[1, 0] - ranges[0, 0]) / 255
        within = np.clip(vectors, -128 * step, 127 * step)  # what the training texts did not reach is cut off
        assert np.abs(codes * step - within).max() < 0.51 * step and np.abs(within - vectors).max() < 0.05
        assert model.encode(tiny_texts[:3], task=str(width), precision="ubinary").shape == (3, width // 8)
    assert f"int8_ranges_{8}.npy" in (folder / "alone" / "model" / "README.md").read_text()


def test_stage_one_trains_the_head_alone_and_learns(world):
    folder, _ = world
    losses = losses_in(folder / "alone")
    assert losses[5][1] < 0.8 * losses[0][1]  # stage one
    assert losses[11][1] < losses[6][1]  # stage two


def test_a_finished_run_says_so_and_does_nothing(world, capsys):
    from jasper_fast.train import train

    folder, tree = world
    before = {p: p.stat().st_mtime_ns for p in (folder / "alone").rglob("*") if p.is_file() and p.name != ".lock"}
    train(tree, out=folder / "alone")
    assert "is finished" in capsys.readouterr().out
    before.pop(folder / "alone" / "config.yaml")
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_a_changed_configuration_is_refused_with_the_difference(world):
    from jasper_fast.train import train

    folder, tree = world
    with pytest.raises(JasperError, match=r"stages.1.lr: 0.001 -> 0.5"):
        train(tree, out=folder / "alone", overrides=[("stages.1.lr", 0.5)])
    train(tree, out=folder / "alone", overrides=[("log.every", 7)])  # what does not touch the numbers may change


def test_changed_texts_are_refused_before_they_are_taught(world, tmp_path, monkeypatch):
    import dataclasses
    import shutil

    import jasper_fast.train as module

    folder, tree = world
    run = tmp_path / "run"
    shutil.copytree(folder / "alone", run)
    (run / "results.json").unlink()
    prepare = module.prepare

    def fewer(*given):
        student, data = prepare(*given)
        return student, dataclasses.replace(data, texts=data.texts.select(range(100)))

    monkeypatch.setattr(module, "prepare", fewer)
    before = sorted((folder / "cache").iterdir())
    with pytest.raises(JasperError, match="was trained on other texts.*texts: "):
        module.train(tree, out=run)
    assert sorted((folder / "cache").iterdir()) == before


def test_two_teachers_run_end_to_end(world, tiny_bert, tmp_path):
    from jasper_fast.train import train

    _, tree = world
    tree = json.loads(json.dumps(tree))
    tree["student"]["heads"] = [40, 8]
    tree["teachers"] += [{"model": str(tiny_bert), "max_length": 16, "truncate_dim": 8}]
    tree["stages"][0] |= {"train": ["heads.40.*"], "heads": [40]}
    tree["stages"][2] |= {"heads": [40, 8], "steps": 2}
    tree["stages"] = [tree["stages"][0], tree["stages"][2]]
    run = train(tree, out=tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    rows = {(row["model"], row["width"]) for row in results["rows"]}
    assert {("teacher", 40), ("teacher PCA", 8), ("student", 40), ("student", 8)} <= rows
    losses = [step[1] for step in losses_in(run)]
    assert len(losses) == 8 and losses[5] < 0.8 * losses[0]


def test_a_cosine_loss_against_another_width_is_refused(world):
    from jasper_fast.config.run import check_losses

    _, tree = world
    with pytest.raises(JasperError, match=r"'one' .*32 wide .* teachers' embeddings 16 \+ 8 = 24\).*begin with 24"):
        check_losses(load_config(tree), [16, 8])
    check_losses(load_config(tree), [32, 8])  # reduced to 32
    silent = [(f"stages.{i}.weights.cosine", 0) for i in (0, 1)]
    with pytest.raises(JasperError, match=r"'three' .*the teachers' embeddings 24.*weights.cosine: 0"):
        check_losses(load_config(tree, silent), [24])
    check_losses(load_config(tree, [*silent, ("stages.2.weights.cosine", 0)]), [24])
    narrow = [("stages.2.heads", [16, 8]), ("stages.2.narrow_target", "teacher"), ("stages.2.train", ["heads.*"])]
    check_losses(load_config(tree, [*silent, *narrow]), [24])  # no FC1 in it, so no cosine is left out


def kill_and_restart(tree: dict, out: Path, kills: int, seed: int) -> int:
    """Start the run again and again, SIGKILL it at random moments, then let it end. Returns the kills that struck.

    Moments are drawn up to a bound that shrinks, so that a resumed run is killed as often.
    """
    context, chance, struck, bound = fork_server(), random.Random(seed), 0, 1.5
    while struck < kills and not (out / "results.json").exists():
        child = context.Process(target=run_in_child, args=(tree, str(out)))
        child.start()
        child.join(timeout=chance.uniform(0.02, bound))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            struck += 1
        child.join()
        bound = max(0.3, bound * 0.8)
    assert exit_code(run_in_child, tree, str(out)) == 0
    return struck


@pytest.fixture(scope="module")
def alone_on_one_thread(world):
    """The undisturbed run under the same number of threads as the killed ones."""
    folder, tree = world
    assert exit_code(run_in_child, tree, str(folder / "one-thread")) == 0
    return folder / "one-thread"


def test_a_run_killed_at_random_moments_ends_bit_identical(world, alone_on_one_thread):
    folder, tree = world
    tree = tree | {"data": tree["data"] | {"cache": str(folder / "cache-killed")}}
    run = folder / "killed"
    struck = kill_and_restart(tree, run, kills=4, seed=1)
    assert struck >= 2
    assert_same_run(run, alone_on_one_thread)


@pytest.mark.soak
def test_ten_kills_end_bit_identical(world, alone_on_one_thread):
    folder, tree = world
    for seed in range(2, 5):
        tree = tree | {"data": tree["data"] | {"cache": str(folder / f"cache-{seed}")}}
        assert kill_and_restart(tree, folder / f"killed-{seed}", kills=10, seed=seed) == 10
        assert_same_run(folder / f"killed-{seed}", alone_on_one_thread)


def test_sigterm_saves_and_leaves_with_a_message(world, alone_on_one_thread):
    folder, tree = world
    slow = tree | {"checkpoint": {"every": 1000}}
    run = folder / "stopped"
    child = fork_server().Process(target=run_in_child, args=(slow, str(run)))
    child.start()
    log = run / "log.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (log.exists() and log.read_text().count('"event": "step"') >= 8):
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert "Run the same command to resume" in (run / "said").read_text()
    last = sorted((run / "checkpoints").iterdir())[-1].name
    assert last == f"step-{len(losses_in(run)):08d}"  # saved at the step it stopped at, not at the last interval
    run_in_child_threads = torch.get_num_threads()
    try:
        run_in_child(slow, str(run))
    finally:
        torch.set_num_threads(run_in_child_threads)
    assert_same_run(run, alone_on_one_thread)


def test_a_checkpoint_cut_short_is_passed_over(world, tmp_path, capsys):
    from jasper_fast.train import train

    folder, tree = world
    run = tmp_path / "cut"
    train(tree | {"checkpoint": tree.get("checkpoint", {}) | {"keep": 3}}, out=run)  # a finished run keeps them
    (run / "results.json").unlink()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "state.pt").write_bytes(b"half")
    train(tree, out=run)
    assert "is damaged" in capsys.readouterr().out
    assert_same_run(run, folder / "alone")


def test_pooled_states_of_other_texts_are_not_used(world, tmp_path):
    from jasper_fast.training.pooled import PooledStates

    rows = np.arange(5)
    for key, value in (("one", 1.0), ("one", 2.0), ("other", 3.0)):
        states = PooledStates(tmp_path / "pooled", rows, key)
        states.compute(lambda part, value=value: np.full((len(part), 2), value, np.float32), lambda n: None)
        expected = 3.0 if key == "other" else 1.0  # cached the second time, computed again for another key
        assert torch.equal(states.read(rows), torch.full((5, 2), expected))


def test_two_processes_do_not_share_a_run(world, tmp_path):
    from jasper_fast.training.run.folder import open_run

    _, tree = world
    config = load_config(tree)
    with (
        open_run(tmp_path / "run", config),
        pytest.raises(JasperError, match="another process is at work"),
        open_run(tmp_path / "run", config),
    ):
        pass


def test_a_loss_that_is_not_finite_stops_before_the_update(world, tmp_path, monkeypatch):
    from jasper_fast.train import train

    folder, tree = world
    monkeypatch.setattr("jasper_fast.training.stages.losses.StageLoss.forward", spoil_third_call())
    with pytest.raises(JasperError, match=r"stage 'one', step 3 .* loss part similarity is not finite"):
        train(tree, out=tmp_path / "nan")
    saved = sorted((tmp_path / "nan" / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step-00000002"]
    assert all(t.isfinite().all() for t in load_file(saved[0] / "model.safetensors").values())


def spoil_third_call():
    from jasper_fast.losses import LossOutput
    from jasper_fast.training.stages.losses import StageLoss

    true_forward, calls = StageLoss.forward, []

    def forward(self, students, teacher):
        calls.append(1)
        output = true_forward(self, students, teacher)
        if len(calls) < 3:
            return output
        bad = output.parts["similarity"] * float("nan")
        return LossOutput(output.loss + bad, output.parts | {"similarity": bad})

    return forward


def test_a_frozen_weight_that_moves_is_noticed(world, tmp_path, monkeypatch):
    import jasper_fast.train as module
    import jasper_fast.training.preflight as preparing
    import jasper_fast.training.stages.base as stages

    folder, tree = world
    honest = stages.learning_rate

    def meddle(stage, step):
        frame_student = meddle.student
        with torch.no_grad():
            next(iter(frame_student.encoder.parameters())).add_(1e-3)
        return honest(stage, step)

    build = preparing.build_student

    def remember(config):
        meddle.student = build(config)
        return meddle.student

    monkeypatch.setattr(preparing, "build_student", remember)
    monkeypatch.setattr(stages, "learning_rate", meddle)
    with pytest.raises(JasperError, match="a frozen weight changed"):
        module.train(tree, out=tmp_path / "frozen")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("stages.0.train", ["heads.99.*"])], "matches no parameter"),
        ([("stages.1.last_layers", 9)], "the student has 2 layers"),
        ([("stages.0.train", ["heads.16.*"])], "belong only to heads that it does not use"),
        ([("student.layers", [0, 7])], "student.layers"),
        ([("student.model", "no/such-model")], "was not found"),
        ([("stages.2.batch_size", 4096)], "a batch of 4096 from"),
        ([("stages.1.max_length", 4096)], "stages.1.max_length is 4096, but the model has 64 positions"),
        ([("teachers.0.model", "./no-such-teacher")], "there is no such folder"),
        ([("teachers.0.truncate_dim", 24)], "32 wide and the teachers' embeddings 24"),
        ([("stages.2.narrow_weights", {"cosine": 1, "similarity": 0, "relative_similarity": 0})], "leave its head 16"),
        ([("stages.2", TWO_TEXTS)], "leave its head 16 untrained: .* no other loss learns from 2 texts"),
    ],
)
def test_impossible_runs_are_refused_before_training(world, tmp_path, overrides, message):
    from jasper_fast.train import train

    _, tree = world
    with pytest.raises(JasperError, match=message):
        train(tree, out=tmp_path / "bad", overrides=overrides)
    assert not (tmp_path / "bad" / "checkpoints").exists()


def test_all_that_is_known_before_the_texts_is_told_together(world, tmp_path, monkeypatch):
    from jasper_fast.train import train

    _, tree = world
    monkeypatch.setattr("jasper_fast.training.run.trackers.find_spec", lambda name: None)
    overrides = [
        ("log.trackers", ["trackio"]),
        ("teachers.0.model", "./no-such-teacher"),
        ("stages.0.train", ["heads.99.*"]),
        ("stages.1.max_length", 4096),
        ("stages.1.gradient_checkpointing", 9),
        ("stages.2.narrow_start", "principal"),
    ]
    with pytest.raises(ConfigError) as caught:
        train(tree, out=tmp_path / "bad", overrides=overrides)
    expected = [
        "log.trackers asks for 'trackio'",
        "./no-such-teacher: there is no such folder",
        "stage 'one': `train` glob 'heads.99.*' matches no parameter",
        "stage 'two': gradient_checkpointing asks for 9 layers",
        "stages.1.max_length is 4096",
        "stage 'three': narrow_start: principal is not possible, as it trains the encoder",
    ]
    assert len(caught.value.problems) == len(expected)
    assert all(map(str.startswith, caught.value.problems, expected)), caught.value


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"a: [1", b"name: tr\xe4ge\n"])
def test_a_run_whose_kept_configuration_is_damaged_tells_the_mend(content, world, tmp_path):
    from jasper_fast.train import train

    _, tree = world
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "log.jsonl").touch()  # the run had begun
    with pytest.raises(JasperError, match=r"(?s)1 problem in .*config.yaml.*restore it .* or use --out DIR"):
        train(tree, out=tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == content


def test_a_tracker_that_is_not_installed_is_named(world, tmp_path, monkeypatch):
    from jasper_fast.train import train

    _, tree = world
    monkeypatch.setattr("jasper_fast.training.run.trackers.find_spec", lambda name: None)
    with pytest.raises(JasperError, match="pip install trackio"):
        train(tree, out=tmp_path / "bad", overrides=[("log.trackers", ["trackio"])])


def test_print_config_and_dry_run(world, tmp_path, capsys):
    from jasper_fast.config.yaml import dump_yaml, parse_yaml
    from jasper_fast.train import main

    _, tree = world
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_yaml(tree))
    main(["--config", str(path), "--print-config", "--stages.0.lr", "0.5"])
    assert load_config(parse_yaml(capsys.readouterr().out)).stages[0].lr == 0.5
    main(["--config", str(path), "--dry-run", "-v", "--out", str(tmp_path / "dry")])
    plan = capsys.readouterr().out
    assert "heads.32.weight" in plan and "stage three" in plan and not (tmp_path / "dry").exists()
    with pytest.raises(ConfigError, match="unknown key"):
        main(["--config", str(path), "--nonsense", "1"])


def test_a_run_without_sets_is_scored_on_its_held_out_documents(world, tiny_texts, tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    from datasets import Dataset

    from jasper_fast import train as command
    from jasper_fast.data.text import text_digest

    folder, tree = world
    texts = tiny_texts[:40]
    held_out = Dataset.from_dict(
        {
            "text": texts,
            "role": ["document"] * len(texts),
            "digest": [text_digest(text) for text in texts],
            "query": [text[: len(text) // 3] for text in texts],
            "body": [text[len(text) // 3 :] for text in texts],
        }
    )
    prepare = command.prepare

    def with_held_out(config, ranks):
        student, data = prepare(config, ranks)
        return student, replace(data, held_out_texts=held_out)

    monkeypatch.setattr(command, "prepare", with_held_out)
    stages = [stage | {"steps": 2} for stage in tree["stages"]]
    command.train({**tree, "evaluate": [], "stages": stages}, out=tmp_path / "run")
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    label_free = results["label_free"]
    models = {(row["model"], row["width"], row.get("precision")) for row in label_free["rows"]}
    assert {("teacher", 32, None), ("student before", 32, None), ("student", 8, "int8")} <= models
    assert {("student PCA", 8, None), ("teacher PCA", 8, None)} <= models
    assert label_free["documents"] == len(set(texts)) and label_free["queries"] > 0
    assert "neighbours kept of the teacher's" in shown and results["advice"] in shown
    assert "## Held-out documents" in (tmp_path / "run" / "report.md").read_text()


def test_a_wider_teacher_is_compared_at_its_own_width_to_the_end(world, tiny_texts, tmp_path):
    """The floors of held-out documents were fitted to reduced embeddings, and the run ended in a traceback."""
    from jasper_fast.train import train

    _, tree = world
    texts = [f"{text} Part {number}." for number in range(2) for text in tiny_texts]
    vectors = np.random.default_rng(0).standard_normal((len(texts), 48))
    rows = [{"text": text, "embedding": v.tolist()} for text, v in zip(texts, vectors, strict=True)]
    (tmp_path / "bought.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [stage | {"steps": 2} for stage in tree["stages"]]
    data = {"sources": [{"path": str(tmp_path / "bought.jsonl")}], "cache": str(tmp_path / "cache")}
    teachers = [{"vectors": str(tmp_path / "bought.jsonl")}]
    run = train(tree | {"teachers": teachers, "data": data, "evaluate": [], "stages": stages}, out=tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    assert "48 dimensions are reduced to 32" in results["facts"]["teacher_reduction"]
    assert {row["model"] for row in results["label_free"]["rows"]} >= {"student", "teacher PCA", "student PCA"}


@pytest.mark.parametrize(("labelled", "scored"), [(40, 40), (25, 25), (10, 0), (0, 0)])
def test_held_out_documents_are_compared_with_precomputed_vectors(world, tmp_path, labelled, scored):
    from datasets import Dataset

    from jasper_fast.data.text import text_digest
    from jasper_fast.training import finish
    from jasper_fast.training.held_out import label_held_out

    _, tree = world
    texts = [f"document {n} of a small set about subject {n % 7}" for n in range(40)]
    columns = {"text": texts, "role": ["document"] * 40, "digest": [text_digest(text, "document") for text in texts]}
    held_out = Dataset.from_dict({**columns, "query": [""] * 40, "body": [""] * 40})
    vectors = np.random.default_rng(0).standard_normal((40, 24))
    rows = [{"text": text, "embedding": v.tolist()} for text, v in zip(texts, vectors, strict=True)][:labelled]
    rows += [{"text": "another text", "embedding": vectors[0].tolist()}]
    (tmp_path / "bought.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config({**tree, "teachers": [{"vectors": str(tmp_path / "bought.jsonl")}], "evaluate": []})
    run = type("Run", (), {"config": config, "path": tmp_path / "run"})()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")

    def encode(batch, role):
        return {32: np.random.default_rng(1).standard_normal((len(batch), 32)).astype(np.float32)}

    labelled_documents = label_held_out(config, held_out)
    label_free = finish._label_free(run, labelled_documents, {"student": encode}, {}, {})["label_free"]
    if scored:
        assert label_free["documents"] == scored and {row["model"] for row in label_free["rows"]} == {"student"}
        assert ("unlabelled" in label_free) == (labelled < 40)
    else:
        assert label_free["missing"] and "rows" not in label_free


def test_choices_for_the_user_are_printed_before_the_teacher_runs(world, tmp_path, capsys, monkeypatch):
    from jasper_fast import train as command

    folder, tree = world

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "label_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.train(load_config(tree).with_notes(["a choice"]), out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.count("a choice") == 1 and printed.index("texts: ") < printed.index("a choice") < printed.index(
        "plan: "
    )
