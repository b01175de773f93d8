"""Test the ablation at small size: arms, both budgets, resuming, and a page whose words follow the figures."""

from __future__ import annotations

import json

import pytest

from bench.quality import ablation
from bench.quality.ablation_arms import ARMS, BEST, FULL_WIDTH_BITS, PAPERS, RECIPE, STATEMENTS, Arm, mined
from bench.quality.ablation_page import BY_HAND, write_page
from bench.quality.ablation_scores import verdict
from bench.quality.ablation_targets import targets
from tests.helpers.beir import write_beir
from tests.helpers.runs import settings, write_data


def tiny_arms():
    weights = {"cosine": 0, "similarity": 0, "relative_similarity": 0}
    near = {"narrow_weights": {**weights, "neighbourhood": 1}, "batch_size": 16}
    paper = {"narrow_weights": {**weights, "similarity": 200, "relative_similarity": 20}, "batch_size": 16}
    return [
        Arm("losses", PAPERS, paper),
        Arm("losses", BEST, near | mined(4)),
        Arm("heads", "neighbourhood, mined, prefix", near, heads="prefix"),
        Arm("teachers", "neighbourhood, mined, two teachers", near | mined(4, 0.5), teachers="two"),
        Arm("target", "paper's, random, own vector", paper, teachers="own"),
        Arm("start", RECIPE, near, start="principal"),
        Arm("searched", "all texts", near | mined(4), start="principal", searched=True),
        Arm("codes", FULL_WIDTH_BITS, near | {"codes": ["ubinary"]}, heads="widest", codes=True),
        Arm("codes", "trained for int8 and bits", near | {"codes": ["int8", "ubinary"]}, codes=True),
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_bert, tiny_texts):
    folder = tmp_path_factory.mktemp("ablation")
    write_data(folder, tiny_texts)
    tree = settings(folder, tiny_bert)
    tree["student"]["heads"] = [32]
    tree["stages"] = tree["stages"][:2]
    (folder / "found").mkdir()
    write_beir(folder / "found", tiny_texts[:30])
    tree["evaluate"].append({"path": str(folder / "found")})
    (folder / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    encoder_arms = {"encoder: cosine": {"cosine": 10, "similarity": 0, "relative_similarity": 0}}
    patch = pytest.MonkeyPatch()
    patch.setattr(ablation, "ARMS", tiny_arms())
    patch.setattr(ablation, "ENCODER_ARMS", encoder_arms)
    command = ["--config", str(folder / "config.yaml"), "--work", str(folder / "work"), "--seeds", "0", "1"]
    command += ["--widths", "8", "4", "--seconds", "0.1", "--texts", "160"]
    command += ["--out", str(folder / "ablation.json"), "--page-out", str(folder / "docs" / "ablation.md")]
    assert ablation.main(command) == 0
    yield folder, command
    patch.undo()


def test_every_arm_has_both_budgets_and_every_width(done):
    folder, _ = done
    results = json.loads((folder / "ablation.json").read_text())
    runs = {(r["arm"], r["budget"], r["seed"]): r for r in results["runs"]}
    assert len(runs) == 2 * (2 * len(tiny_arms()) + 1)
    for (arm, budget, _), run in runs.items():
        if budget == "texts" and not arm.startswith("encoder"):
            assert run["texts"] == 160 and run["steps"] == 10
        if budget == "seconds":
            assert 0.1 <= run["seconds"] < 5 and run["steps"] >= 1
        alone = arm.startswith("encoder") or arm == FULL_WIDTH_BITS
        widths = {32} if alone else {32, 8, 4} if "prefix" in arm else {8, 4}
        assert {row["width"] for row in run["rows"]} == widths
    forms = {(row["width"], row["precision"]) for row in runs["trained for int8 and bits", "texts", 0]["rows"]}
    assert {(8, "int8"), (8, "ubinary"), (4, "ubinary+rescore")} <= forms
    by_seed = [runs[BEST, "texts", seed]["rows"] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
    assert {row["precision"] for row in runs[FULL_WIDTH_BITS, "texts", 0]["rows"]} >= {"float32", "int8", "ubinary"}
    coded = {row["precision"] for row in results["floors"] if "precision" in row}
    assert coded == {"int8", "ubinary", "ubinary+rescore"}
    floors = {(row["model"], row["width"]) for row in results["floors"] if "precision" not in row}
    assert {("teacher", 32), ("teacher PCA", 8), ("student", 32), ("student truncated", 4)} <= floors


def test_going_on_trains_nothing_twice_and_keeps_what_was_written_by_hand(done, monkeypatch):
    folder, command = done
    before = json.loads((folder / "ablation.json").read_text())["runs"]
    page = folder / "docs" / "ablation.md"
    page.write_text(page.read_text().replace(BY_HAND[0], BY_HAND[0] + "\nWritten by hand."))
    monkeypatch.setattr(ablation, "run_arm", None)  # would fail
    assert ablation.main(command) == 0
    assert json.loads((folder / "ablation.json").read_text())["runs"] == before
    assert page.read_text().count("Written by hand.") == 1
    assert ablation.main([*command, "--groups", "losses", "--seeds", "1"]) == 0  # what else is known stays
    assert json.loads((folder / "ablation.json").read_text())["runs"] == before
    with pytest.raises(TypeError):
        ablation.main([*command, "--texts", "176"])  # another budget is another arm


def test_nothing_is_trained_that_was_not_asked_for(done, tmp_path):
    folder, command = done
    command = [*command, "--texts", "176", "--groups", "losses", "--seeds", "1"]
    command += ["--out", str(tmp_path / "part.json"), "--page-out", str(tmp_path / "part.md")]
    assert ablation.main(command) == 0
    results = json.loads((tmp_path / "part.json").read_text())
    by_texts = {(run["arm"], run["seed"]) for run in results["runs"] if run["budget"] == "texts"}
    encoders = {("encoder: cosine", 0), ("encoder: cosine", 1)}  # these have the configuration's own number of texts
    assert by_texts == {(arm.name, 1) for arm in tiny_arms() if arm.group == "losses"} | encoders
    assert {run["seed"] for run in results["runs"] if run["budget"] == "seconds"} == {0, 1} == set(results["seeds"])


def test_searched_documents_are_texts_of_the_arms_that_say_so_alone(done):
    folder, _ = done
    results = json.loads((folder / "ablation.json").read_text())
    assert results["facts"]["texts"] == 117 and results["facts"]["searched"] == 30
    (known,) = {json.loads(file.read_text())["settings"]["arm"]["searched"] for file in (folder / "work").glob("all*")}
    assert known is True


def test_an_arm_learns(done):
    folder, _ = done
    results = json.loads((folder / "ablation.json").read_text())
    a, b = (
        [r["rows"] for r in results["runs"] if r["arm"] == arm and r["budget"] == "texts"] for arm in (BEST, PAPERS)
    )
    assert a[0] != b[0]


def test_the_page_says_what_the_figures_say(done, tmp_path):
    folder, _ = done
    results = json.loads((folder / "ablation.json").read_text())
    for run in results["runs"]:
        for row in run["rows"]:
            value = {BEST: 0.8, PAPERS: 0.7}.get(run["arm"], 0.5) + 0.001 * run["seed"]
            row["scores"] = {name: value for name in row["scores"]}
    write_page(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| Which losses |")]
    assert f"| *{BEST}* | *{PAPERS}* | better by 10.00 |" in line and "80.05 ± 0.07" in text
    assert "## Width × precision" in text and "| trained for int8 and bits | 4 | similarity |" in text
    assert (tmp_path / "page" / "arms-4.png").stat().st_size > 1000 and "(page/arms-4.png)" in text


def test_a_verdict_needs_more_than_noise():
    assert verdict([0.5, 0.52], [0.51, 0.53]) == "no difference beyond noise (-1.00)"
    assert verdict([0.5, 0.501], [0.52, 0.521]) == "worse by 2.00"
    assert "one seed" in verdict([0.5], [0.4])
    # 2.4 standard errors: of three seeds each, Student's t asks for 2.8.
    assert verdict([0.5, 0.502, 0.504], [0.496, 0.498, 0.5]) == "no difference beyond noise (+0.40)"


def test_targets_are_read_from_the_means():
    results = {
        "widths": [384, 64, 32],
        "sets": [
            {"name": "r", "kind": "beir", "metric": "nDCG@10"},
            {"name": "s", "kind": "sts", "metric": "Spearman"},
        ],
        "floors": [
            {"model": model, "width": width, "scores": {"r/nDCG@10": score, "s/Spearman": score + 0.2}}
            for model, width, score in [
                ("student", 384, 0.50),
                ("teacher PCA", 64, 0.44),
                ("teacher truncated", 64, 0.41),
                ("teacher PCA", 32, 0.36),
            ]
        ],
    }
    scores = {}
    for arm, width, precision, score in [
        (RECIPE, 64, "float32", 0.45),
        (RECIPE, 32, "float32", 0.40),
        (RECIPE, 64, "int8", 0.4495),
        (RECIPE, 32, "int8", 0.39),
        (PAPERS, 64, "float32", 0.44),
        (PAPERS, 32, "float32", 0.36),
        (FULL_WIDTH_BITS, 384, "ubinary", 0.465),
        (FULL_WIDTH_BITS, 384, "ubinary+rescore", 0.48),
    ]:
        scores[arm, "seconds", width, precision, "retrieval"] = [score] * 2
        scores[arm, "seconds", width, precision, "similarity"] = [score + (0.21 if arm == RECIPE else 0.2)] * 2
    rows = [line.strip("| ").split(" | ") for line in targets(results, scores).splitlines()[6:]]
    assert rows == [
        ["retrieval at 32 above the paper's losses", "≥ 8 %", "+11.11 %", "yes"],
        ["retrieval at 64 above the paper's losses", "≥ 3 %", "+2.27 %", "no"],
        ["similarity at 32 above the paper's losses", "≥ 1.5 points", "+5.00 points", "yes"],
        ["similarity at 64 above the paper's losses", "≥ 0.5 points", "+2.00 points", "yes"],
        [
            "above PCA and truncation of the teacher at every width",
            "> 0 points",
            "+1.00 points (retrieval at 64)",
            "yes",
        ],
        ["retrieval of full width that 64 keep", "≥ 88 % (aim 92 %)", "90.0 %", "yes"],
        ["cost of int8, of retrieval", "≤ 0.5 %", "2.50 % (at 32)", "no"],
        ["cost of ubinary at 384, of retrieval", "≤ 8 %", "7.00 %", "yes"],
        ["cost of ubinary+rescore at 384, of retrieval", "≤ 2 %", "4.00 %", "no"],
    ]
    assert targets({**results, "floors": []}, {}) == ""


def test_the_recipe_of_installed_packages_is_valid():
    from jasper_fast.config.load import load_config

    assert load_config(ablation.HERE / "recipes" / "ablation-docstrings.yaml").evaluate[0].path == "docstrings"


def test_the_shipped_arms_are_valid_and_every_statement_has_its_arms():
    from bench.quality.ablation_arms import ENCODER_ARMS

    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    for arm in ARMS:
        heads = [384] if arm.heads == "widest" else [128, 64, 32]
        assert arm.settings(384, [128, 64, 32]).heads[-3:] == heads
    for _, first, second in STATEMENTS:
        assert {first, second} <= {*names, *ENCODER_ARMS}
