"""The benchmark of exported files, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import deploy
from jasper_fast.config.models import StudentConfig
from jasper_fast.exporting.student import export_student
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError
from tests.helpers.beir import write_beir


def test_rows_of_a_model(tiny_bert: Path, tiny_texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(1)
    config = StudentConfig(model=str(tiny_bert), heads=[8, 4], max_length=20, layers=[0])
    model = export_student(Student.build(config), tmp_path / "run" / "model")
    judged = write_beir(tmp_path / "tiny", tiny_texts[:50], queries=12)
    arguments = [str(tmp_path / "run"), "--sets", str(judged), "--folder", str(tmp_path / "work"), "--files"]
    arguments += ["--repeats", "1", "--documents", "30", "--json", str(tmp_path / "out.json")]
    assert deploy.main(arguments) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(row["form"], row["width"], row["runtime"]) for row in result["rows"]] == [
        ("flat", 8, "pytorch"),
        ("flat", 4, "pytorch"),
    ]
    for row in result["rows"]:
        assert row["lost"] == 0 and row["cosine_min"] > 0.9999 and row["question_ratio"] == row["batch_ratio"] == 1
    assert result["settings"]["documents"] == 30 and str(tmp_path) not in json.dumps(result["rows"])
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and {line.count("|") for line in table} == {12}
    exported = tmp_path / "work" / "run-model-flat-8"
    assert exported.is_dir() and deploy.exported(model, "flat", 8, tmp_path / "work", []) == exported  # reused


def test_other_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("score\tsentence1\tsentence2\n1\ta b\tc d\n2\ta b\tc\n")
    with pytest.raises(JasperError, match="has no retrieval"):
        deploy.judged_sets([str(tmp_path / "pairs.tsv")], None, None)
