"""`python -m jasper_fast.compare`: settings and scores of runs, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jasper_fast import compare
from jasper_fast.config.load import dump_config, load_config
from jasper_fast.utils.errors import JasperError

LABEL_FREE = {
    "documents": 300,
    "queries": 250,
    "rows": [
        {"model": "teacher", "width": 384, "ndcg": 0.8},
        {"model": "student before", "width": 384, "overlap": 0.4, "spearman": 0.5},
        {"model": "student", "width": 384, "overlap": 0.61, "spearman": 0.9, "ndcg": 0.78},
        {"model": "student", "width": 384, "precision": "int8", "overlap": 0.6, "spearman": 0.9, "ndcg": 0.7},
    ],
}


def write_run(folder: Path, overrides: dict[str, Any], results: dict[str, Any] | None, steps: int = 3) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config(None, list(overrides.items()))))
    lines = [json.dumps({"event": "step", "step": step}) for step in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"event": "st']))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def scores(student: float, **more: Any) -> dict[str, Any]:
    rows = [("teacher", 384, 0.8), ("student", 384, student), ("student", 64, student - 0.1)]
    return {"rows": [{"model": m, "width": w, "scores": {"docs/nDCG@10": s}} for m, w, s in rows], **more}


def cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(label + "  ")]
    return line.removeprefix(label).split()


def test_what_differs_is_shown_side_by_side(tmp_path, capsys):
    facts = {"seconds": {"training": 61.25}, "encoding": {"student_texts_per_s": 30.0}, "student_parameters": 1234567}
    new = scores(0.75, facts=facts, label_free=LABEL_FREE)
    a = write_run(tmp_path / "a", {"stages.1.lr": 1e-4}, new)
    b = write_run(tmp_path / "b", {"stages.1.lr": 2e-4, "log.every": 3}, scores(0.7, facts={"seconds": 9.0}))
    c = write_run(tmp_path / "c", {"stages.1.lr": 2e-4}, None)
    d = write_run(tmp_path / "d", {"stages.1.lr": 2e-4}, scores(0.5, finished_early={"step": 4, "steps": 900}))
    assert compare.main([str(path) for path in (a, b, c, d)]) == 0
    text = capsys.readouterr().out
    assert cells(text, "stages.1.lr") == ["0.0001", "0.0002", "0.0002", "0.0002"] and "log.every" not in text
    assert cells(text, "docs/nDCG@10 student @64") == ["65.00", "60.00", "–", "40.00"]
    assert cells(text, "held-out neighbours student @384") == ["61.00", "–", "–", "–"]
    assert cells(text, "held-out nDCG@10 teacher @384") == ["80.00", "–", "–", "–"]
    assert cells(text, "held-out documents") == ["300", "–", "–", "–"]
    assert "int8" not in text and "student before" not in text
    assert cells(text, "student texts/s") == ["30", "–", "–", "–"]
    assert cells(text, "seconds, training") == ["61.2", "–", "–", "–"]
    assert f"3  {c}: unfinished: 3 of 1420 steps" in text
    assert f"4  {d}: finished early, after step 4 of 900" in text
    assert "± sd" not in text


def test_the_steps_and_batches_of_a_finished_run_are_those_taken(tmp_path, capsys):
    runs, names = [], ("head", "distil", "reduce")
    cases = (("few", (2, 3, 1), scores(0.7), 40.0), ("many", (2, 4, 1), scores(0.7), 64.0), ("cut", (1,), None, 64.0))
    for name, counts, results, speed in cases:
        runs.append(write_run(tmp_path / name, {}, results))
        stages = [stage for stage, count in zip(names, counts, strict=False) for _ in range(count)]
        common = {"event": "step", "seconds": 0.5, "texts_per_s": speed}
        lines = [json.dumps({**common, "step": step, "stage": stage}) for step, stage in enumerate(stages, 1)]
        (runs[-1] / "log.jsonl").write_text("\n".join(lines))
    assert compare.main([*map(str, runs)]) == 0
    text = capsys.readouterr().out
    assert cells(text, "stages.0.steps") == ["2", "2", "100"]  # an unfinished run has its plan
    assert cells(text, "stages.1.steps") == ["3", "4", "720"]
    assert cells(text, "stages.1.batch_size") == ["20", "32", "32"]


def test_runs_whose_minutes_gave_other_steps_are_not_compared_in_silence(tmp_path, capsys):
    runs = [
        write_run(tmp_path / name, {"minutes": 1, "stages.1.lr": lr}, None) for name, lr in (("a", 1e-4), ("b", 2e-4))
    ]
    for run, steps in zip(runs, ([2, 6, 3], [1, 2, 1]), strict=True):
        (run / "plan.json").write_text(json.dumps({"steps": steps}))
    assert compare.main([str(run) for run in runs]) == 0
    text = capsys.readouterr().out
    assert cells(text, "stages.1.steps") == ["6", "2"] and f"1  {runs[0]}: unfinished: 3 of 11 steps" in text
    assert "note: minutes set other steps in each run (stages.0.steps, stages.1.steps, stages.2.steps)" in text
    (runs[0] / "plan.json").write_text(json.dumps({"steps": [1, 2, 1]}))
    fixed = write_run(tmp_path / "c", {"stages.0.steps": 1, "stages.1.steps": 2, "stages.2.steps": 1}, None)
    assert compare.main([str(runs[0]), str(fixed)]) == 0
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [True, False])
def test_seeds_have_a_mean(tmp_path, capsys, as_json):
    runs = [write_run(tmp_path / str(seed), {"seed": seed}, scores(0.7 + seed / 100)) for seed in (1, 2, 3)]
    compare.main([*map(str, runs), *(["--json"] if as_json else [])])
    printed = capsys.readouterr().out
    if not as_json:
        assert cells(printed, "docs/nDCG@10 student @384") == ["71.00", "72.00", "73.00", "72.00", "±", "1.00"]
        return
    content = json.loads(printed)
    assert content["settings"] == {"seed": [1, 2, 3]} and content["runs"] == list(map(str, runs))
    assert content["seeds"]["docs/nDCG@10 student @384"] == pytest.approx({"mean": 0.72, "sd": 0.01})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "got one run .* expected at least two"),
        ("config.yaml", None, "is not the folder of a run"),
        ("config.yaml", "name: [", "config.yaml is damaged"),
        ("config.yaml", "words", "config.yaml is damaged .* expected fields"),
        ("results.json", "[1]", "results.json is damaged .got list, expected fields"),
        ("results.json", "{", "results.json is damaged"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, name, content, message):
    good, bad = (write_run(tmp_path / run, {}, scores(0.7)) for run in ("good", "bad"))
    if name is None:
        arguments = [str(good)]
    else:
        arguments = [str(good), str(bad)]
        (bad / name).unlink() if content is None else (bad / name).write_text(content)
    with pytest.raises(JasperError, match=message):
        compare.main(arguments)
