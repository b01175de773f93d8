"""The quality gate: what passes, what is refused, and what its table says."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jasper_fast.config.load import dump_config
from jasper_fast.config.models import StudentConfig
from jasper_fast.config.run import Config
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.data.text_dataset import build_all_texts
from jasper_fast.evaluation.metrics import ndcg_by_query, score_embeddings
from jasper_fast.exporting.check_sets import (
    JUDGED,
    LABEL_FREE,
    CheckSet,
    checks_of,
    held_out_check,
    load_checks,
    mixed_texts,
)
from jasper_fast.exporting.flat import export_flat
from jasper_fast.exporting.onnx import export_onnx
from jasper_fast.exporting.quality import (
    compare_runtimes,
    file_megabytes,
    join_roles,
    limit_of,
    measure_quality,
    quality_lines,
    source_encoder,
)
from jasper_fast.exporting.runtimes import Runtime, open_runtimes
from jasper_fast.exporting.student import export_student
from jasper_fast.models.embedder import normalise
from jasper_fast.models.student import Student
from jasper_fast.reporting.exports import quality_table
from jasper_fast.utils.errors import JasperError
from tests.helpers.beir import write_beir

WIDTH = 16
PROMPTS = {"query": "the city council {text}", "document": ""}


@pytest.fixture(scope="module")
def model(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = StudentConfig(model=str(tiny_bert), heads=[WIDTH, 4], max_length=40, prompts=PROMPTS, layers=[0, 2])
    return export_student(Student.build(config), tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(model, WIDTH, tmp_path_factory.mktemp("onnx") / "out", int8=True)


@pytest.fixture(scope="module")
def judged(tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("sets") / "tiny", tiny_texts[:60], queries=30)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "unpublished"))


def planted(folder: Path, amount: float) -> None:
    """Add noise to one weight of the float32 graph."""
    import onnx
    from onnx import numpy_helper

    file = folder / "onnx" / "model.onnx"
    graph = onnx.load(file)
    weight = max((w for w in graph.graph.initializer if len(w.dims) == 2), key=lambda w: w.dims[0] * w.dims[1])
    values = numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(0, amount * values.std(), values.shape)
    weight.CopyFrom(numpy_helper.from_array((values + noise).astype(values.dtype), weight.name))
    onnx.save(graph, file)


def test_a_good_export_passes_and_its_table_is_complete(
    model: Path, exported: Path, judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(exported, tmp_path)
    runtimes = open_runtimes(folder, ["pytorch", "onnx"])
    content = measure_quality(model, folder, runtimes, widths=[WIDTH], checks=load_checks([str(judged)]))
    assert content == json.loads((folder / "quality.json").read_text())
    assert not content["beyond"] and not content["allowed"]
    assert content["sets"] == [{"name": "tiny", "kind": JUDGED, "queries": 30, "documents": 60, "of": 60}]
    for row in content["rows"]:
        assert row["cosine_min"] > 0.99999 and row["question_ms"] > 0 and row["batch_per_s"] > 0
        assert abs(row["lost"]) < 1e-3 and row["neighbours"] > 0.999
    printed = capsys.readouterr().out
    assert printed.strip() == "\n".join(quality_lines(content))
    assert "and retrieval on tiny (30 questions, 60 of 60 documents, judged)" in printed
    table = quality_table(content)
    assert table[0][:4] == ["form", "width", "runtime", "MB"] and table[0][-1] == "retrieval lost"
    assert [row[2] for row in table[1:]] == ["pytorch", "onnx"]


def test_int8_is_compared_with_pytorch(model: Path, exported: Path) -> None:
    runtimes = open_runtimes(exported)
    content = compare_runtimes(source_encoder(model, WIDTH), exported, runtimes, [WIDTH])
    pytorch, onnx, int8 = content["rows"]
    assert [row["runtime"] for row in content["rows"]] == ["pytorch", "onnx", "onnx-int8"]
    assert onnx["cosine_min"] > 0.99999 > int8["cosine_mean"] > 0.95 and int8["mb"] < onnx["mb"]
    assert "ndcg" not in int8 and int8["limit_cosine"] < onnx["limit_cosine"] == pytorch["limit_cosine"]
    assert quality_lines(content)[-1].startswith("Retrieval was not measured") or content["beyond"]


def test_a_damaged_graph_is_refused(
    model: Path, exported: Path, judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(exported, tmp_path)
    planted(folder, 0.3)
    runtimes, checks = open_runtimes(folder, ["pytorch", "onnx"]), load_checks([str(judged)])
    with pytest.raises(JasperError, match=r"limits: onnx at width 16 has a cosine of 0\.\d.*Nothing was published"):
        measure_quality(model, folder, runtimes, widths=[WIDTH], checks=checks)
    assert "Beyond the limits: onnx at" in capsys.readouterr().out  # the table is seen before the error
    content = measure_quality(model, folder, runtimes, widths=[WIDTH], checks=checks, allow_loss=True)
    assert content["allowed"] and content["beyond"] and "Accepted by --allow-loss" in capsys.readouterr().out
    assert json.loads((folder / "quality.json").read_text())["allowed"]


def test_damaged_weights_of_pytorch_are_refused(model: Path, tmp_path: Path) -> None:
    folder = export_flat(model, WIDTH, tmp_path / "flat")
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    weights["linear.weight"][0] *= 1.5
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(JasperError, match=r"pytorch at width 16 has a cosine"):
        measure_quality(model, folder, open_runtimes(folder), widths=[WIDTH])


def rows_of(texts: list[str], role: str, width: int = WIDTH) -> np.ndarray:
    seeds = [zlib.crc32(f"{role} {text}".encode()) for text in texts]
    return normalise(np.stack([np.random.default_rng(seed).normal(size=width) for seed in seeds]))


def test_a_rotated_model_passes_as_prefix_form_only(tmp_path: Path) -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    (tmp_path / "model.safetensors").touch()
    runtimes = [Runtime("pytorch", "model.safetensors", lambda texts, role: rows_of(texts, role) @ turn)]
    widths = [WIDTH, 4]
    assert not compare_runtimes(rows_of, tmp_path, runtimes, widths, form="prefix")["beyond"]
    assert compare_runtimes(rows_of, tmp_path, runtimes, widths)["beyond"]
    skewed = turn @ np.diag(np.linspace(0.8, 1.2, WIDTH)).astype(np.float32)
    bad = [Runtime("pytorch", "model.safetensors", lambda texts, role: normalise(rows_of(texts, role) @ skewed))]
    (reason,) = compare_runtimes(rows_of, tmp_path, bad, widths, form="prefix")["beyond"]
    assert "at width 16" in reason  # a prefix is compared with the same prefix of PyTorch


@pytest.mark.parametrize(
    ("width", "value", "message"),
    [(WIDTH - 1, 0.25, "got a width of 15"), (WIDTH, np.nan, "rows with NaN"), (WIDTH, 1.0, "lengths from 4.000")],
)
def test_wrong_embeddings_are_refused(width: int, value: float, message: str, tmp_path: Path) -> None:
    runtime = Runtime("onnx", "onnx/model.onnx", lambda texts, role: np.full((len(texts), width), value))
    with pytest.raises(JasperError, match=message):
        compare_runtimes(rows_of, tmp_path, [runtime], [WIDTH])


def noisy(amount: float):
    return lambda texts, role: normalise(rows_of(texts, role) + amount * rows_of(texts, f"noise {role}"))


def check_set(documents: int, queries: int) -> CheckSet:
    texts = [f"document {i}" for i in range(documents)]

    relevant = [dict.fromkeys(near, 1) for near in _nearest(texts, queries)]
    return CheckSet(RetrievalSet("set", [f"query {i}" for i in range(queries)], texts, relevant), JUDGED, documents)


def _nearest(texts: list[str], queries: int) -> np.ndarray:
    scores = rows_of([f"query {i}" for i in range(queries)], "query") @ rows_of(texts, "document").T
    return np.argsort(-scores, axis=1)[:, :3]


def test_limits_of_reduced_weights(tmp_path: Path) -> None:
    """A small loss of int8 passes, a large one does not, and an error of a small set excuses nothing."""
    checks = [check_set(300, 100)]

    def beyond(amount: float, name: str = "onnx-int8", sets=checks, shrunk: bool = False) -> list[str]:
        runtimes = [Runtime("pytorch", "m", rows_of), Runtime(name, "x", noisy(amount))]
        return compare_runtimes(rows_of, tmp_path, runtimes, [WIDTH], checks=sets, shrunk=shrunk)["beyond"]

    assert not beyond(0.001) and not beyond(0.001, shrunk=True)
    assert any("of retrieval" in reason for reason in beyond(0.3))
    assert any("of retrieval" in reason for reason in beyond(0.3, sets=[check_set(300, 4)]))
    assert any("has a cosine" in reason for reason in beyond(0.1, "onnx"))
    assert limit_of("pytorch", shrunk=True, compared=False).cosine is None
    assert limit_of("onnx", shrunk=True).cosine == limit_of("onnx", shrunk=False).cosine


def test_checks_are_read(judged: Path, tiny_texts: list[str], tmp_path: Path) -> None:
    titled = tmp_path / "titled.jsonl"
    rows = [{"title": text.split(" ")[0] + f" {i}", "text": text} for i, text in enumerate(tiny_texts[:20])]
    titled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = load_checks([str(judged), str(titled)], ["title", "text"])
    assert first.kind == JUDGED and (second.kind, second.evalset.name) == (LABEL_FREE, "titled")
    assert len(second.evalset.queries) == 20 and second.evalset.documents[0] == tiny_texts[0]
    assert len(mixed_texts([first, second])) > len(mixed_texts())
    similarity = tmp_path / "pairs.tsv"
    similarity.write_text("score\tsentence1\tsentence2\n1\ta b\tc d\n2\ta b\tc\n")
    for paths, message in (
        ([str(titled)], "too few documents have a title or three sentences .got 0 of 20"),
        ([str(similarity)], "kind 'sts' has no retrieval"),
        ([str(tmp_path / "nowhere")], "no such file or folder"),
        ([str(judged), str(judged)], "two sets are called 'tiny'"),
    ):
        with pytest.raises(JasperError, match=message):
            load_checks(paths)


def test_held_out_documents_of_a_run(tiny_texts: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    documents = tmp_path / "documents.jsonl"
    rows = [{"title": f"{text.split(' ')[1]} {i}", "text": text} for i, text in enumerate(tiny_texts)]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(documents), "columns": ["title", "text"]}
    config = Config.model_validate(
        {
            "name": "mine",
            "student": {"model": str(tiny_bert), "heads": [4]},
            "teachers": [{"model": str(tiny_bert)}],
            "data": {"sources": [source], "cache": str(tmp_path / "cache")},
            "stages": [{"name": "distil", "train": ["heads.*"], "heads": [4], "steps": 1, "lr": 1e-4}],
        }
    )
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    assert held_out_check(run) is None
    (run / "config.yaml").write_text(dump_config(config))
    assert held_out_check(run) is None  # its cache is gone
    held_out = build_all_texts(config.data, config.data.seed).held_out
    adapted = tmp_path / "adapted"
    (adapted / "symmetric").mkdir(parents=True)
    (adapted / "student").symlink_to(run)
    for folder in (run, run / "model", adapted, adapted / "symmetric"):
        check = held_out_check(folder)
        assert check is not None and check.kind == LABEL_FREE and check.evalset.name == "held-out documents"
        assert len(held_out) == 20 and set(check.evalset.queries) == set(held_out["query"])
    assert [one.kind for one in checks_of([], ["text"], run)] == [LABEL_FREE]
    other = config.model_copy(update={"data": config.data.model_copy(update={"cut_share": 0.0})})
    (run / "config.yaml").write_text(dump_config(other))
    assert held_out_check(run) is None  # other texts
    assert checks_of([], ["text"], run) == []


def test_a_large_set_keeps_what_is_judged(monkeypatch: pytest.MonkeyPatch, judged: Path) -> None:
    monkeypatch.setattr("jasper_fast.exporting.check_sets.DOCUMENTS", 40)
    (check,) = load_checks([str(judged)])
    small, count = check.evalset, check.documents
    assert (len(small.documents), count) == (40, 60)
    for query, grades in zip(small.queries, small.relevant, strict=True):
        assert all(query in small.documents[at] for at in grades)
    assert len(small.ids) == 40 and small.ids[1][0] == "d"


def test_scores_by_query_have_the_mean_of_the_set(judged: Path) -> None:
    evalset = load_checks([str(judged)])[0].evalset
    unjudged = replace(evalset, relevant=[{}, *evalset.relevant[1:]])
    vectors = {group: rows_of(texts, role) for group, (texts, role) in evalset.groups().items()}
    for one in (evalset, unjudged):
        scores = ndcg_by_query(one, vectors)
        assert scores.shape == (30,) and scores.mean() == pytest.approx(score_embeddings(one, vectors)["nDCG@10"])
    assert scores[0] == 0


def test_sizes(tmp_path: Path) -> None:
    for name in ("model.safetensors", "2_Dense/model.safetensors", "onnx/model.onnx", "onnx/model.onnx.data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(100_000))
    sizes = [file_megabytes(tmp_path, *one) for one in (("pytorch", "modules.json"), ("onnx", "onnx/model.onnx"))]
    assert sizes == [0.2, 0.2]


def test_an_export_of_two_encoders(tmp_path: Path) -> None:
    for role in ("query", "document"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "model.safetensors").write_bytes(bytes(100_000))

    def of_role(own: str) -> list[Runtime]:
        def encode(texts: list[str], role: str) -> np.ndarray:
            assert role == own
            return rows_of(texts, role)

        names = ("pytorch", "onnx") if own == "query" else ("pytorch",)
        return [Runtime(name, "modules.json", encode) for name in names]

    runtimes = join_roles(of_role("query"), of_role("document"))
    content = compare_runtimes(rows_of, tmp_path, runtimes, [WIDTH], checks=[check_set(50, 20)])
    assert [(row["runtime"], row["mb"], row["lost"]) for row in content["rows"]] == [("pytorch", 0.2, 0)]
    assert not content["beyond"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_exports_have_the_permissions_of_new_files(umask: int, model: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = export_flat(model, WIDTH, tmp_path / "flat")
    finally:
        os.umask(before)
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
