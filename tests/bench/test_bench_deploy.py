"""The benchmark of exported files, on a tiny model."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import deploy
from jasper_fast import export
from jasper_fast.config.models import StudentConfig
from jasper_fast.exporting.student import export_student
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError
from tests.helpers.beir import write_beir


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = StudentConfig(model=str(tiny_bert), heads=[24, 4], max_length=20)
    export_student(Student.build(config), tmp_path / "run" / "model")
    return tmp_path / "run"


def measured(run: Path, tiny_texts: list[str], *options: str) -> dict[str, Any]:
    judged = write_beir(run.parent / "tiny", tiny_texts[:50], queries=12)
    arguments = [str(run), "--sets", str(judged), "--folder", str(run.parent / "work"), "--files"]
    arguments += ["--repeats", "1", "--documents", "30", "--json", str(run.parent / "out.json"), *options]
    assert deploy.main(arguments) == 0
    return json.loads((run.parent / "out.json").read_text())


def test_rows_of_a_model(
    run: Path, tiny_texts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = measured(run, tiny_texts)
    assert [(row["form"], row["width"], row["runtime"]) for row in result["rows"]] == [
        ("flat", 24, "pytorch"),
        ("flat", 4, "pytorch"),
    ]
    for row in result["rows"]:
        assert row["lost"] == 0 and row["cosine_min"] > 0.9999 and row["question_ratio"] == row["batch_ratio"] == 1
    assert result["settings"]["documents"] == 30 and str(run.parent) not in json.dumps(result["rows"])
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and {line.count("|") for line in table} == {12}
    exported, options = run.parent / "work" / "run-model-flat-24", Namespace(folder=run.parent / "work")
    monkeypatch.setattr(export, "main", lambda arguments: pytest.fail("exported again"))
    assert exported.is_dir() and deploy.exported(run / "model", "flat", 24, options) == exported


def test_an_export_of_a_given_size(run: Path, tiny_texts: list[str], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(tiny_texts[:60]))
    result = measured(run, tiny_texts, "--widths", "24", "--small-mb", "0.17", "--vocabulary", str(texts))
    (row,) = result["rows"]
    whole, step = row["steps"]
    assert row["form"] == "small" and step["mb"] < whole["mb"] and step["mb"] < row["folder_mb"] <= 0.17
    assert 0 < row["question_ratio"] != 1 and row["cosine_min"] < 1  # the ratio is to the whole model
    assert (result["settings"]["small_mb"], result["settings"]["vocabulary"]) == (0.17, ["texts.txt"])


def test_other_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("score\tsentence1\tsentence2\n1\ta b\tc d\n2\ta b\tc\n")
    with pytest.raises(JasperError, match="has no retrieval"):
        deploy.judged_sets([str(tmp_path / "pairs.tsv")], None, None)
