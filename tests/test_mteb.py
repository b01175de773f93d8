"""mteb's own mock tasks run on a trained model, at the width and with the prompts that were asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from jasper_fast.mteb import load
from jasper_fast.utils.errors import JasperError

mteb = pytest.importorskip("mteb")
pytest.importorskip("mteb.mocks")


PROMPT = "find: "


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model has the heads 16 and 4 and a query prompt."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer
    from torch import nn

    heads = {str(w): [Dense(32, w, activation_function=nn.Identity())] for w in (16, 4)}
    router = Router(heads, "16", route_mappings={("query", None): "16", ("document", None): "16"})
    modules = [Transformer(str(tiny_bert)), Pooling(32, "mean"), router, Normalize()]
    folder = tmp_path_factory.mktemp("runs") / "tiny-run"
    SentenceTransformer(modules=modules, prompts={"query": PROMPT, "document": ""}).save(str(folder / "model"))
    return folder


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("MockRetrievalTask", "ndcg_at_10"),
        ("MockSTSTask", "cosine_spearman"),
        ("MockClassificationTask", "accuracy"),
        ("MockClusteringTask", "v_measure"),
        ("MockPairClassificationTask", "max_ap"),
    ],
)
def test_mock_task_runs_at_the_chosen_width(run: Path, task: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(run, width=4)
    widths: set[int] = set()
    encode = model.encode

    def spy(*args, **kwargs):
        vectors = encode(*args, **kwargs)
        widths.add(vectors.shape[1])
        np.testing.assert_allclose(np.linalg.norm(np.asarray(vectors), axis=1), 1, atol=1e-5)
        return vectors

    monkeypatch.setattr(model, "encode", spy)
    found = mteb.evaluate(model, [getattr(mteb.mocks, task)()], cache=None, show_progress_bar=False)
    scores = found.task_results[0].scores["test"][0]
    assert widths == {4}
    assert np.isfinite(scores[metric]) and scores["main_score"] == scores[metric]


def test_queries_get_their_prompt_and_documents_theirs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(run)
    read: dict[str, list[str]] = {"query": [], "document": []}
    forward = model.model.preprocess

    def spy(texts, prompt=None, **kwargs):
        read["query" if prompt == PROMPT else "document"].extend(texts)
        assert prompt in (PROMPT, "", None)
        return forward(texts, prompt=prompt, **kwargs)

    monkeypatch.setattr(model.model, "preprocess", spy)
    mteb.evaluate(model, [mteb.mocks.MockRetrievalTask()], cache=None, show_progress_bar=False)
    assert {"This is a test sentence", "This is another test sentence"} == set(read["query"])
    assert all("positive sentence" in text for text in read["document"]) and read["document"]


def test_names_keep_widths_apart_and_errors_say_what_to_do(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = load(run).mteb_model_meta, load(run / "model", width=4).mteb_model_meta
    assert (wide.name, wide.embed_dim) == ("jasper_fast/tiny-run-16", 16)
    assert (narrow.name, narrow.embed_dim) == ("jasper_fast/tiny-run-4", 4)
    with pytest.raises(JasperError, match=r"no head of width 8 \(expected one of 4, 16\)"):
        load(run, width=8)
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(JasperError, match="pip install mteb"):
        load(run)


def test_an_asymmetric_model_encodes_queries_and_documents_apart(tiny_bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from jasper_fast.exporting.adapted import export_asymmetric

    student, teacher = (
        SentenceTransformer(modules=[Transformer(str(tiny_bert)), Pooling(32, mode)], device="cpu")
        for mode in ("mean", "cls")
    )
    head, projection = np.eye(32)[:, :8], np.eye(32)[:, 8:16]
    export_asymmetric(student, teacher, {8: head}, {8: projection}, tmp_path / "mine" / "asymmetric")
    model = load(tmp_path / "mine", width=8)
    assert model.mteb_model_meta.name == "jasper_fast/mine-asymmetric-8"
    found = mteb.evaluate(model, [mteb.mocks.MockRetrievalTask()], cache=None, show_progress_bar=False)
    assert 0 < found.task_results[0].scores["test"][0]["ndcg_at_10"] <= 1
    texts = ["a bridge", "forty boxes of apples"]
    for encode, source, matrix in (
        (model.model.encode_query, student, head),
        (model.model.encode_document, teacher, projection),
    ):
        rows = source.encode(texts) @ matrix
        np.testing.assert_allclose(encode(texts), rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-5)
