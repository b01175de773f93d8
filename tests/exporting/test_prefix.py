"""The prefix form: one rotated Dense head, whose first dimensions are the narrow embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer

from jasper_fast.config.models import StudentConfig
from jasper_fast.export import main
from jasper_fast.exporting import axes
from jasper_fast.exporting.pipeline import ExportRequest, export
from jasper_fast.exporting.student import export_student
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.models.embedder import load_model, model_encoder, normalise
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError
from tests.exporting.test_export import python_blocks
from tests.helpers.adapted import PROMPTS, TEACHER_PROMPTS, D

QUERIES = ["forty boxes", "who sold the old bridge?"]
DOCUMENTS = ["A map of the river.", "The city council sold it.", "an engine that runs on warm air " * 9, "forty apples"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axes, "SECONDS", 0.2)


@pytest.fixture(scope="module")
def router(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads of 24 and 8 dimensions, which have biases."""
    torch.manual_seed(6)
    config = StudentConfig(model=str(tiny_bert), heads=[24, 8], layers=[0, 2], max_length=20, prompts=PROMPTS)
    student = Student.build(config).eval()
    for head in student.heads.values():
        torch.nn.init.normal_(head.bias, std=0.1)
    return export_student(student, tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def documents(tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "documents.jsonl"
    file.write_text("".join(json.dumps({"title": t[:9], "text": t}) + "\n" for t in tiny_texts))
    return file


@pytest.fixture
def fitted(adapted: Any, tmp_path: Path) -> Path:
    """An adapted folder with the statistics of 50 documents."""
    folder = tmp_path / "mine"
    shutil.copytree(adapted.folder, folder)
    draw = np.random.default_rng(0)
    sums = PairStatistics(24, D)
    sums.add(draw.normal(size=(50, 24)), draw.normal(size=(50, D)))
    save_file(sums.arrays("documents."), folder / axes.STATISTICS)
    return folder


def embeddings(query: Any, document: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return query.encode_query(QUERIES, **options), document.encode_document(DOCUMENTS, **options)


def test_full_width_keeps_every_inner_product_and_prefixes_are_embeddings(
    router: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prefix"
    command = [str(router), "--form", "prefix", "--axes", str(documents), "--columns", "title,text", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}: prefix, embeddings 24 wide" in printed
    assert "dimensions are ordered by" in printed and "200 texts of documents.jsonl" in printed
    assert "principal axes keep" in printed and "learned axes keep" in printed

    stock = SentenceTransformer(str(out), device="cpu")
    before = embeddings(*[load_model(str(router), device="cpu")] * 2)
    after = embeddings(stock, stock)
    np.testing.assert_allclose(after[0] @ after[1].T, before[0] @ before[1].T, atol=1e-5)
    np.testing.assert_array_equal(np.argsort(after[0] @ after[1].T), np.argsort(before[0] @ before[1].T))
    assert np.abs(after[1] - before[1]).max() > 0.01  # rotated

    cut = SentenceTransformer(str(out), device="cpu", truncate_dim=8)
    narrow = embeddings(cut, cut, normalize_embeddings=True)
    for found, full in zip(narrow, after, strict=True):
        np.testing.assert_allclose(found, normalise(full[:, :8]), atol=1e-6)
    assert cut.similarity_fn_name == "cosine"
    # Commands cut and normalise, too.
    encode = model_encoder(load_model(str(out), device="cpu"), [24, 8])
    np.testing.assert_allclose(encode(DOCUMENTS, "document")[8], narrow[1], atol=1e-5)


def test_settings_are_those_that_version_5_reads(router: Path, documents: Path, tmp_path: Path) -> None:
    out = export(ExportRequest(router, tmp_path / "out", "prefix", axes=str(documents)))
    modules = json.loads((out / "modules.json").read_text())
    names = ["Transformer", "Pooling", "Dense", "Normalize"]
    assert [module["type"] for module in modules] == [f"sentence_transformers.models.{name}" for name in names]
    keys = {
        name: set(json.loads((out / place / file).read_text()))
        for name, place, file in (("Transformer", "", "sentence_bert_config.json"), ("Dense", "2_Dense", "config.json"))
    }
    assert keys["Dense"] == {"in_features", "out_features", "bias", "activation_function"}
    assert keys["Transformer"] <= {"max_seq_length", "do_lower_case", "model_args"}
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32 and pooling["pooling_mode_mean_tokens"] is True
    assert not list(out.glob("int8_ranges*"))  # those of the rotated embeddings are others
    exported = json.loads((out / "training.json").read_text())["export"]
    assert exported["form"] == "prefix" and exported["prefix_widths"] == [8] and exported["width"] == 24
    assert exported["axes"]["overlap"]["principal axes"]["8"] > 0
    assert "truncate_dim=8)" in (out / "README.md").read_text()


def test_a_symmetric_adapted_model_gives_one_folder(fitted: Path, adapted: Any, tmp_path: Path) -> None:
    out = export(ExportRequest(fitted / "symmetric", tmp_path / "out", "prefix"))
    source, stock = load_model(str(fitted / "symmetric"), device="cpu"), SentenceTransformer(str(out), device="cpu")
    before, after = embeddings(source, source), embeddings(stock, stock)
    np.testing.assert_allclose(after[0] @ after[1].T, before[0] @ before[1].T, atol=1e-5)
    assert json.loads((out / "training.json").read_text())["export"]["axes"]["name"] == axes.FITTED

    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    axes.save_axes(fitted, axes.Axes(rotation, axes.LEARNED, "50 documents"))
    out = export(ExportRequest(fitted / "symmetric", tmp_path / "learned", "prefix"))
    after = embeddings(*[SentenceTransformer(str(out), device="cpu")] * 2)
    np.testing.assert_allclose(after[1], before[1] @ rotation, atol=1e-5)


def test_an_asymmetric_adapted_model_gives_two_folders_in_one_space(
    fitted: Path,
    adapted: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert main([str(fitted), "--form", "prefix", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out / 'query'}" in printed and f"wrote {out / 'document'}" in printed
    assert "axes of the fitted heads of 50 documents of the adaptation" in printed
    source = load_model(str(fitted / "asymmetric"), device="cpu")
    query, document = (SentenceTransformer(str(out / role), device="cpu") for role in ("query", "document"))
    before, after = embeddings(source, source), embeddings(query, document)
    np.testing.assert_allclose(after[0] @ after[1].T, before[0] @ before[1].T, atol=1e-5)
    # The first eight axes span the fitted projection.
    directions = np.linalg.svd(adapted.projections[8], full_matrices=False)[0]
    expected = normalise(before[1] @ directions)
    found = normalise(after[1][:, :8])
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    for role, prompt in (("query", PROMPTS["query"]), ("document", TEACHER_PROMPTS["document"])):
        card = (out / role / "README.md").read_text()
        assert f"- {role}: `{json.dumps(prompt)}`" in card  # its own prompt, and not that of the other encoder
        assert card.count("\n- query: ") + card.count("\n- document: ") == 1
        monkeypatch.chdir(out / role)
        names: dict[str, Any] = {}
        for block in python_blocks(card):
            exec(block, names)
        scores = (
            source.encode_query(["How do I reverse a list?"])
            @ source.encode_document(["list.reverse() reverses a list in place."]).T
        )
        np.testing.assert_allclose(names["scores"], scores, atol=1e-5)


def test_requests_that_cannot_be_met(router: Path, fitted: Path, documents: Path, tmp_path: Path) -> None:
    with pytest.raises(JasperError, match=r"no texts to order the dimensions by.*--axes FILE"):
        export(ExportRequest(router, tmp_path / "out", "prefix"))
    with pytest.raises(JasperError, match="--width 8: the prefix form has all widths.*leave out --width"):
        export(ExportRequest(router, tmp_path / "out", "prefix", width=8, axes=str(documents)))
    with pytest.raises(JasperError, match="--axes orders the dimensions of the prefix form alone"):
        export(ExportRequest(router, tmp_path / "out", axes=str(documents)))
    with pytest.raises(JasperError, match="no such folder"):
        export(ExportRequest(tmp_path / "none", tmp_path / "out", "prefix"))
    (fitted / axes.STATISTICS).write_bytes(b"broken")
    with pytest.raises(JasperError, match=r"statistics.safetensors is damaged.*--axes FILE"):
        export(ExportRequest(fitted, tmp_path / "out", "prefix"))
    assert not (tmp_path / "out").exists()
