"""A student without a head: its pooled state is its embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

from jasper_fast import evaluate, search
from jasper_fast.config.default_stages import default_stages
from jasper_fast.config.models import StudentConfig, VisionConfig
from jasper_fast.exporting import axes
from jasper_fast.exporting.pipeline import ExportRequest, export, export_lines
from jasper_fast.exporting.student import export_student
from jasper_fast.models.folder import load_student
from jasper_fast.models.student import Student
from jasper_fast.train import train
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import settings, write_data

TEXTS = ["forty boxes", "the old lighthouse keeper " * 20, "who sold it?"]
MODULES = ["Transformer", "Pooling", "Normalize"]


@pytest.fixture(scope="module")
def tree(tiny_texts: list[str], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a run of a student without a head."""
    folder = tmp_path_factory.mktemp("headless")
    write_data(folder, tiny_texts)
    tree: dict[str, Any] = settings(folder, tiny_bert)
    tree["student"] |= {"heads": [32], "head_type": "none"}
    stage = {"name": "one", "last_layers": "all", "heads": [32], "batch_size": 16, "steps": 6, "lr": 1e-3}
    tree["stages"] = [stage]
    tree["checkpoint"] = {"every": 2, "keep": 9}
    return tree


@pytest.fixture(scope="module")
def run(tree: dict[str, Any]) -> Path:
    out = Path(tree["evaluate"][0]["path"]).with_name("run")
    train(tree, out=str(out))
    return out


def kinds(folder: Path) -> list[str]:
    return [module["type"].rpartition(".")[2] for module in json.loads((folder / "modules.json").read_text())]


def test_a_run_trains_and_exports_the_encoder_alone(run: Path) -> None:
    weights = load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    assert weights and all(name.startswith("encoder.") for name in weights)
    assert kinds(run / "model") == MODULES
    student, stock = load_student(run), SentenceTransformer(str(run / "model"), device="cpu")
    with torch.no_grad():
        expected = F.normalize(student.pool(student.tokenize(TEXTS)), dim=1).numpy()
    np.testing.assert_allclose(stock.encode(TEXTS), expected, atol=1e-5)
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in losses if line["event"] == "step"]
    assert steps[-1] < steps[0]


def test_a_run_resumes(run: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    newest = sorted((again / "checkpoints").glob("step-*"))[-1]
    expected = load_file(newest / "model.safetensors")
    shutil.rmtree(newest)
    (again / "results.json").unlink()
    train(tree, out=str(again))
    found = load_file(newest / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_export_for_older_readers(run: Path, tmp_path: Path) -> None:
    out = export(ExportRequest(run, tmp_path / "out"))  # headless, since the student has no head
    assert kinds(out) == MODULES
    assert export_lines(out) == [f"wrote {out}: headless, embeddings 32 wide"]
    modules = json.loads((out / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.models.") for module in modules)
    models = [SentenceTransformer(str(folder), device="cpu") for folder in (run / "model", out)]
    np.testing.assert_allclose(models[0].encode(TEXTS), models[1].encode(TEXTS), atol=1e-6)


def test_prefix_export_of_a_run_orders_by_its_texts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axes, "SECONDS", 0.2)
    monkeypatch.setattr("jasper_fast.exporting.pipeline.NARROW", (16, 8))
    out = export(ExportRequest(run, tmp_path / "out", "prefix"))
    facts = json.loads((out / "training.json").read_text())["export"]
    assert facts["axes"]["texts"] == "160 texts of the run tiny" and facts["prefix_widths"] == [16, 8]
    before, after = (SentenceTransformer(str(folder), device="cpu").encode(TEXTS) for folder in (run / "model", out))
    np.testing.assert_allclose(before @ before.T, after @ after.T, atol=1e-5)


def test_evaluate_and_search_use_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run), str(run.parent / "pairs.tsv"), "--json", str(tmp_path / "scores.json")]) == 0
    assert "32" in capsys.readouterr().out
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    index = str(tmp_path / "index")
    assert search.main(["build", str(run), str(tmp_path / "texts.txt"), "--out", index]) == 0
    capsys.readouterr()
    assert search.main(["ask", index, TEXTS[2], "-k", "1"]) == 0
    assert TEXTS[2] in capsys.readouterr().out


def test_forms_that_do_not_fit(run: Path, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(JasperError, match="the student has no head.*--form headless"):
        export(ExportRequest(run, tmp_path / "out", "flat"))
    with pytest.raises(JasperError, match=r"one width .got --width 8, expected 32.*--form prefix"):
        export(ExportRequest(run, tmp_path / "out", width=8))
    student = Student.build(StudentConfig(model=str(tiny_bert), heads=[16], max_length=32))
    folder = export_student(student, tmp_path / "headed")
    with pytest.raises(JasperError, match=r"the student has a head.*head_type: none"):
        export(ExportRequest(folder, tmp_path / "out", "headless"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": [384, 64]}, "one width, the encoder's hidden size"),
        ({"heads": [32], "head_init": "model"}, "no head to load"),
        ({"heads": [32], "vision": VisionConfig(tower={"image_size": 8})}, "needs a head"),
    ],
)
def test_configurations_without_a_head(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig(model="any", head_type="none", **fields)


def test_the_width_is_the_encoders(tiny_bert: Path) -> None:
    with pytest.raises(JasperError, match=r"got \[16\], expected \[32\]\). Fix: set student.heads to \[32\]"):
        Student.build(StudentConfig(model=str(tiny_bert), heads=[16], head_type="none", max_length=32))
    (stage,) = default_stages({"heads": [32], "head_type": "none"})
    assert stage["last_layers"] == "all" and "train" not in stage
