"""ONNX graphs are teachers like others: prompts, pooling, length, cache and errors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from jasper_fast.config.models import TeacherConfig
from jasper_fast.config.run import Config
from jasper_fast.data.text import text_digest
from jasper_fast.models.graph import find_graph
from jasper_fast.teachers.encoder import teacher_encoder
from jasper_fast.teachers.label import check_teachers, ensure_teachers
from jasper_fast.teachers.model import describe_teacher, load_teacher
from jasper_fast.utils.errors import JasperError
from tests.helpers.graphs import WIDTH, quantized, text_graph, weights

LIMIT = 32  # tokens, by the settings next to the graph
BOTH = ("last_hidden_state", "sentence_embedding")


def expected(folder: Path, texts, pooling="mean", max_length=LIMIT) -> np.ndarray:
    """Embeddings of the tiny graph, computed by hand from the tokens, (n, 12)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tables = {key: value.astype(np.float64) for key, value in weights(len(tokenizer)).items()}
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        states = (tables["table"][ids] + tables["positions"][: len(ids)]) @ tables["layer"]
        rows.append({"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}[pooling])
    vectors = np.array(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def some(tiny_texts):
    return [tiny_texts[0], "seven", *tiny_texts[40:48]]


@pytest.fixture
def graph(tiny_bert, tmp_path):
    """Function that writes a graph with the given outputs, and the settings of its positions."""

    def write(outputs=("last_hidden_state",), *, name="m", **options) -> Path:
        folder = tmp_path / name
        text_graph(tiny_bert, folder, outputs, **options)
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": LIMIT}))
        return folder

    return write


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls", "last"])
def test_states_are_pooled(graph, some, pooling):
    folder = graph(BOTH)
    teacher = load_teacher(TeacherConfig(model=str(folder), pooling=pooling, batch_tokens=50))
    assert teacher.width == WIDTH and teacher.precision == "fp32" and teacher.batching == "padded"
    kind = "mean" if pooling == "auto" else pooling
    np.testing.assert_allclose(teacher.encode(some), expected(folder, some, kind), atol=2e-6)
    assert teacher.max_length == LIMIT and "truncates" in (teacher.note or "truncates")


def test_settings_next_to_the_graph(graph, some):
    folder = graph(file="model.onnx")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 12, "pooling_mode_cls_token": true}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "The old map: "}}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    for model in (folder, folder / "model.onnx"):
        teacher = load_teacher(TeacherConfig(model=str(model)))
        prompted = [f"The old map: {text}" for text in some]
        np.testing.assert_allclose(teacher.encode(some, "query"), expected(folder, prompted, "cls", 9), atol=2e-6)
        np.testing.assert_allclose(teacher.encode(some, "document"), expected(folder, some, "cls", 9), atol=2e-6)
        assert describe_teacher(TeacherConfig(model=str(model)))["prompts"] == {
            "query": "The old map: ",
            "document": "",
        }
    changed = TeacherConfig(
        model=str(folder), max_length=12, truncate_dim=5, pooling="last", prompts={"document": "a {text} map"}
    )
    cut = expected(folder, [f"a {text} map" for text in some], "last", 9)[:, :5]  # the model's own limit is lower
    np.testing.assert_allclose(
        load_teacher(changed).encode(some), cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=2e-6
    )


def test_pooling_inside_the_graph(graph, some):
    folder = graph(["sentence_embedding"])
    np.testing.assert_allclose(
        load_teacher(TeacherConfig(model=str(folder))).encode(some), expected(folder, some), atol=2e-6
    )
    with pytest.raises(JasperError, match=r"pooling cannot be changed, because it is inside the graph"):
        load_teacher(TeacherConfig(model=str(folder), pooling="cls"))
    only = graph(["pooler_output"], name="only")  # the only output has one embedding for each text
    np.testing.assert_allclose(
        load_teacher(TeacherConfig(model=str(only))).encode(some), expected(only, some, "cls"), atol=2e-6
    )
    bert = graph(["pooler_output", "last_hidden_state"], name="bert")  # the states, as BERT's pooler is no embedding
    np.testing.assert_allclose(
        load_teacher(TeacherConfig(model=str(bert))).encode(some), expected(bert, some), atol=2e-6
    )


def test_int8_activations_do_not_mix_texts(graph, some):
    folder = graph()
    before = describe_teacher(TeacherConfig(model=str(folder)))
    quantized(folder / "onnx/model.onnx")
    assert describe_teacher(TeacherConfig(model=str(folder)))["revision"] != before["revision"]
    teacher = load_teacher(TeacherConfig(model=str(folder)))
    assert "one text at a time" in teacher.note
    together = teacher.encode(some)
    alone = np.concatenate([teacher.encode([text]) for text in some])
    np.testing.assert_allclose(together, alone, atol=1e-6)  # only the order of sums in the mean differs
    assert (together * expected(folder, some)).sum(axis=1).min() > 0.98


def test_the_cache_and_the_target(graph, tiny_bert, tiny_texts, tmp_path):
    """Two teachers, one of them a graph, fill caches by which the next run needs neither."""
    folder = graph()
    tree = {
        "name": "two",
        "student": {"model": str(tiny_bert), "heads": [WIDTH + 32], "max_length": 32},
        "teachers": [{"model": str(tiny_bert)}, {"model": str(folder)}],
        "data": {"sources": [{"path": "docstrings", "limit": 9}], "cache": str(tmp_path / "cache")},
        "stages": [{"name": "a", "heads": [WIDTH + 32], "train": ["*"], "steps": 1, "batch_size": 4, "lr": 0.1}],
    }
    config = Config.model_validate(tree)
    roles = ["document" if i % 3 else "query" for i in range(20)]
    digests = [text_digest(text, role) for text, role in zip(tiny_texts, roles, strict=False)]
    texts = Dataset.from_dict({"text": tiny_texts[:20], "role": roles, "digest": digests})
    check_teachers(config)
    target = ensure_teachers(config, texts, progress=False).read(np.arange(20)).numpy()
    np.testing.assert_allclose(target[:, 32:] * np.sqrt(2), expected(folder, tiny_texts[:20]), atol=2e-3)
    encode = teacher_encoder(config.teachers, tmp_path / "cache", "fp32")
    np.testing.assert_allclose(encode(tiny_texts[:20], "document")[44], target, atol=2e-3)
    (folder / "onnx/model.onnx").rename(folder / "onnx/moved")
    moved = folder.rename(tmp_path / "elsewhere")  # the content identifies the graph, not its path
    (moved / "onnx/moved").rename(moved / "onnx/model.onnx")
    shutil.copytree(moved, tmp_path / "again" / "m")
    tree["teachers"][1]["model"] = str(tmp_path / "again" / "m")
    sys.modules["onnxruntime"], kept = None, sys.modules["onnxruntime"]  # type: ignore[assignment]
    try:
        again = ensure_teachers(Config.model_validate(tree), texts, progress=False)
    finally:
        sys.modules["onnxruntime"] = kept
    np.testing.assert_array_equal(again.read(np.arange(20)).numpy(), target)


def test_a_folder_with_weights_is_no_graph(graph, tiny_bert, tmp_path):
    folder = graph()
    assert find_graph(str(folder)) == folder / "onnx/model.onnx"
    for name in ("model.xml", "model.bin"):  # of OpenVINO
        (folder / "onnx" / name).touch()
    assert find_graph(str(folder)) == folder / "onnx/model.onnx"
    shutil.copy(tiny_bert / "model.safetensors", folder)
    assert find_graph(str(folder)) is None
    assert find_graph(str(folder / "onnx/model.onnx")) == folder / "onnx/model.onnx"
    assert find_graph("owner/name") is None


def test_what_cannot_teach(graph, tmp_path, monkeypatch):
    folder = graph(["ids"])
    with pytest.raises(JasperError, match=r"no output with embeddings \(got ids .*, expected sentence_embedding"):
        load_teacher(TeacherConfig(model=str(folder)))
    with pytest.raises(JasperError, match="`dense: 2_Dense` needs a PyTorch model"):
        load_teacher(TeacherConfig(model=str(graph()), dense="2_Dense"))
    with pytest.raises(JasperError, match=r"no\.onnx: there is no such file"):
        describe_teacher(TeacherConfig(model=str(tmp_path / "no.onnx")))
    with pytest.raises(JasperError, match="not fetched yet .*Fix: run `jasper-fast fetch bge-small-en-v1.5`"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        describe_teacher(TeacherConfig(model="bundle:bge-small-en-v1.5"))
    long = graph(name="long", positions=LIMIT)
    (long / "config.json").unlink()  # 64 positions by the tokenizer, but 32 in the graph
    with pytest.raises(JasperError, match="onnxruntime cannot run the graph .*Fix: lower max_length"):
        load_teacher(TeacherConfig(model=str(long))).encode(["the " * 60])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(JasperError, match="no tokenizer next to the graph"):
        load_teacher(TeacherConfig(model=str(folder)))
    broken = graph(name="broken")
    (broken / "onnx/model.onnx").write_bytes(b"nothing")
    with pytest.raises(JasperError, match="onnxruntime cannot load the graph"):
        load_teacher(TeacherConfig(model=str(broken)))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(JasperError, match="the package onnxruntime is missing, which runs ONNX graphs"):
        load_teacher(TeacherConfig(model=str(graph(name="last"))))
