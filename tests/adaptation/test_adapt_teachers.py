"""Adapting with precomputed vectors as the teacher, and training before the fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import jasper_fast
from jasper_fast.adaptation.embeddings import is_vectors, vectors_config
from jasper_fast.adaptation.request import make_request, same_space, teacher_of
from jasper_fast.adaptation.scores import UNTRAINED
from jasper_fast.config.load import load_arguments
from jasper_fast.config.models import TeacherConfig
from jasper_fast.utils.errors import JasperError

pytestmark = pytest.mark.usefixtures("fast")


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def vectors(world):
    """Embeddings of the documents by the teacher, in their order."""
    texts = [f"{row['title']}\n{row['text']}" for row in rows_of(world.many)]
    return SentenceTransformer(str(world.teacher)).encode(texts, normalize_embeddings=True)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_vectors_in_the_order_of_the_documents_teach_the_symmetric_form(world, vectors, tmp_path, capsys):
    np.save(tmp_path / "v.npy", vectors[:90])
    out = tmp_path / "out"
    jasper_fast.adapt(world.few, out=out, **world.options(teacher=str(tmp_path / "v.npy")))
    said = capsys.readouterr()
    assert "held-out documents are the questions, and only the symmetric model is written" in said.out
    assert "rank correlation" in said.err  # the order of the rows was checked
    assert (out / "symmetric").is_dir() and not (out / "asymmetric").exists()
    results = results_of(out)
    assert set(results["maps"]) == {"symmetric"} and results["held_out"] == {
        "documents": 9,
        "questions": 0,
        "kinds": {},
        "question_in_document": True,
    }
    assert results["next"][0].startswith(f"jasper-fast search build {out / 'symmetric'} ")
    # More documents come with more vectors. Those of another model are recognised by the documents of the first call.
    np.save(tmp_path / "v.npy", vectors @ np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0])
    with pytest.raises(JasperError, match="another vector than in earlier calls .*Fix: "):
        jasper_fast.adapt(world.many, out=out, **world.options(teacher=str(tmp_path / "v.npy")))
    assert results_of(out) == results
    np.save(tmp_path / "v.npy", vectors)
    jasper_fast.adapt(world.many, out=out, **world.options(teacher=str(tmp_path / "v.npy")))
    assert results_of(out)["documents"]["used"] == 130


def test_vectors_with_ids_are_matched_by_id(world, vectors, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = np.random.default_rng(1).permutation(90)
    table = {"id": [f"d{i}" for i in order], "embedding": [vectors[i].tolist() for i in order]}
    pq.write_table(pa.table(table), tmp_path / "v.parquet")
    options = world.options(teacher=str(tmp_path / "v.parquet"), id_column="id")
    request = make_request(world.few, tmp_path / "out", **options)
    assert request.teacher.order is None and request.source.id_column == "id"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[np.random.default_rng(3).permutation(90)], "row order"),
        (lambda v: np.where(np.arange(90)[:, None] == 7, np.nan, v), "not finite"),
        (lambda v: v[:80], "80 embeddings for 90 documents"),
        (lambda v: np.zeros_like(v), "(zero|equal)"),
    ],
    ids=["another order", "NaN", "too few", "zeros"],
)
def test_bad_vectors_are_rejected_before_anything_is_written(world, vectors, tmp_path, change, message):
    np.save(tmp_path / "v.npy", change(vectors[:90]).astype(np.float32))
    out = tmp_path / "out"
    with pytest.raises(JasperError, match=rf"(?s){message}.*Fix: "):
        jasper_fast.adapt(world.few, out=out, **world.options(teacher=str(tmp_path / "v.npy")))
    assert not out.exists() or not [path for path in out.iterdir()]


def test_a_file_or_folder_without_a_model_is_a_set_of_vectors(world, tmp_path):
    (tmp_path / "parts").mkdir()
    assert is_vectors("x.npy") and is_vectors("y.PARQUET") and is_vectors(str(tmp_path / "parts"))
    assert not is_vectors(str(world.teacher)) and not is_vectors(str(world.student)) and not is_vectors("owner/name")


def test_the_teacher_is_that_of_the_student(world, tmp_path):
    assert teacher_of(str(world.student)).model == teacher_of(str(world.student / "model")).model == str(world.teacher)
    assert teacher_of(str(world.student)).max_length == 512  # whole documents, also if training read short texts
    teacher = TeacherConfig(model=str(world.teacher))
    assert same_space(str(world.student), teacher) is True and same_space(str(world.teacher), teacher) is None
    assert same_space(str(world.student), TeacherConfig(model=str(world.student / "model"))) is False
    with pytest.raises(JasperError, match="does not say which teacher.*--teacher"):
        teacher_of(str(world.teacher))


def test_the_student_learns_on_from_its_own_embeddings(world, tmp_path, capsys):
    out = tmp_path / "out"
    options = world.options(minutes=0.02, cache=str(tmp_path / "cache"))
    jasper_fast.adapt(world.few, out=out, **options)
    results = results_of(out)
    training = results["training"]
    assert training["minutes"] == 0.02 and training["steps"] > 0
    assert results["student"]["name"] == "student" and results["student"]["same_space"]
    models = {row["model"] for row in results["label_free"]["rows"]}
    assert {"student", "student before", UNTRAINED} <= models
    questions = [json.loads(line)["text"] for line in (out / "questions.jsonl").read_text().splitlines()]
    held_out = {row["title"] for row in rows_of(world.few)} - set(questions)
    assert len(held_out) >= results["held_out"]["documents"]
    jasper_fast.adapt(world.few, out=out, **options)
    assert "is finished" in capsys.readouterr().out
    weights = (out / "student" / "model" / "model.safetensors").read_bytes()
    assert "earlier" not in training and "by an earlier call" not in (out / "report.md").read_text()
    jasper_fast.adapt(world.many, out=out, **options)
    said = " ".join(capsys.readouterr().out.split())
    assert "stays as it is" in said and results_of(out)["documents"]["used"] == 130
    assert "Training for 0.02 minutes by an earlier call" in said
    assert "by an earlier call" in (out / "report.md").read_text()
    assert (out / "student" / "model" / "model.safetensors").read_bytes() == weights


def test_a_student_with_several_widths_is_opened_without_a_warning(world, monkeypatch):
    from sentence_transformers.base.modules import router

    from jasper_fast.teachers.model import load_teacher

    warned = []
    monkeypatch.setattr(router.logger, "warning_once", warned.append, raising=False)
    assert load_teacher(TeacherConfig(model=str(world.student))).width == 32 and not warned


def test_a_trained_student_starts_as_it_is(world):
    from jasper_fast.config.models import StudentConfig
    from jasper_fast.models.folder import load_student
    from jasper_fast.models.student import Student

    settings = {"model": str(world.student / "model"), "heads": [32], "head_init": "model", "max_length": 24}
    built = Student.build(StudentConfig(**settings)).eval()
    loaded = load_student(world.student)
    texts = ["the old bridge", "a map of the river"]
    ours = built.project(built.pool(built.tokenize(texts)))[32]
    np.testing.assert_array_equal(ours.detach(), loaded.project(loaded.pool(loaded.tokenize(texts)))[32].detach())
    with pytest.raises(JasperError, match="no heads to start from .*Fix: "):
        Student.build(StudentConfig(**{**settings, "model": str(world.teacher)}))


def test_without_a_student_it_trains_as_train_with_texts_does(world, tmp_path, monkeypatch):
    """The configuration is that of `train --texts`, but that the teacher reads whole documents."""
    import importlib

    seen = []

    def record(config, out):
        seen.append((config, out))
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("jasper_fast.adapt"), "train", record)
    out = tmp_path / "mine"
    with pytest.raises(KeyboardInterrupt):
        jasper_fast.adapt(
            world.few, out=out, columns=["title", "text"], teacher=str(world.teacher), cache=str(world.cache), minutes=2
        )
    texts = ["--texts", str(world.few), "--columns", "title,text", "--teacher", str(world.teacher), "--minutes", "2"]
    expected = load_arguments(None, [*texts, "--data.cache", str(world.cache)], (), out)
    ((config, folder),) = seen
    assert config.model_dump() == expected.model_dump() and folder == out / "student"


def test_a_stopped_training_says_how_to_go_on(world, tmp_path, monkeypatch, capsys):
    import importlib

    module = importlib.import_module("jasper_fast.adapt")

    def stop(config, out):
        raise module.Stopped("stopped after step 3 as requested. Run the same command to resume, or add --finish")

    monkeypatch.setattr(module, "train", stop)
    given = ["--columns", "title,text", "--model", str(world.student), "--minutes", "1", "--cache", str(world.cache)]
    assert module.main([str(world.few), *given, "--out", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().out
    assert "stopped after step 3 as requested. Run the same command to go on" in said and "--finish" not in said


def test_vectors_have_no_other_settings(world, vectors, tmp_path):
    np.save(tmp_path / "v.npy", vectors[:90])
    request = make_request(world.few, tmp_path / "out", **world.options(teacher=str(tmp_path / "v.npy")))
    assert request.teacher.order == "source" and request.config.data.cut_share == 0
    assert vectors_config(str(tmp_path / "v.npy"), request.config) == request.teacher


def test_an_onnx_graph_is_no_teacher_of_an_adaptation(tiny_bert, tiny_texts, tmp_path):
    from tests.helpers.graphs import text_graph

    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in tiny_texts[:20]))
    graph = text_graph(tiny_bert, tmp_path / "graph")
    with pytest.raises(JasperError, match="an ONNX graph cannot be the teacher of an adaptation"):
        make_request(str(tmp_path / "texts.jsonl"), tmp_path / "out", teacher=str(graph))
