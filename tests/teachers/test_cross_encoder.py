"""Cross-encoders score pairs alike in every order and batch, from PyTorch weights and from ONNX graphs."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch

from jasper_fast.models.graph import TextGraph, graph_revision
from jasper_fast.teachers.cross_encoder import open_cross_encoder
from jasper_fast.utils.errors import JasperError
from tests.helpers.graphs import quantized, text_graph, weights


@pytest.fixture(scope="module")
def pairs(tiny_texts):
    return [(text.split(" ", 3)[2], other) for text, other in zip(tiny_texts[:40], tiny_texts[7:47], strict=True)]


@pytest.fixture(scope="module")
def reranker(tiny_bert, tmp_path_factory):
    """Folder of a tiny cross-encoder in PyTorch."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reranker")
    BertForSequenceClassification(BertConfig.from_pretrained(tiny_bert, num_labels=1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


def expected_logits(folder, pairs, max_length):
    """Scores of the tiny graph, computed by hand from the tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tables = {key: value.astype(np.float64) for key, value in weights(len(tokenizer)).items()}
    found = []
    for query, document in pairs:
        encoded = tokenizer(query, document, truncation=True, max_length=max_length, return_token_type_ids=True)
        types = np.array(encoded["token_type_ids"])[:, None]
        states = tables["table"][encoded["input_ids"]] + tables["positions"][: len(types)] + types
        found.append((states @ tables["layer"]).mean(axis=0) @ tables["score"][:, 0])
    return np.array(found)


@pytest.mark.parametrize("max_length", [8, 256])
def test_a_graph_gives_its_logits(tiny_bert, tmp_path, pairs, max_length):
    text_graph(tiny_bert, tmp_path, ["logits"])
    judge = open_cross_encoder(str(tmp_path), max_length=max_length)
    calls = []
    scores = judge.scores(pairs, lambda count, tokens: calls.append((count, tokens)))
    assert scores.shape == (40,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected_logits(tmp_path, pairs, max_length), rtol=1e-4, atol=1e-5)
    assert sum(count for count, _ in calls) == 40 and all(tokens > 0 for _, tokens in calls)
    assert judge.scores([]).shape == (0,)


def test_pytorch_gives_the_logits_of_transformers(reranker, pairs):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scores = open_cross_encoder(str(reranker)).scores(pairs)
    model = AutoModelForSequenceClassification.from_pretrained(reranker).eval()
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    with torch.no_grad():
        single = [
            model(**tokenizer(*pair, truncation=True, max_length=64, return_tensors="pt")).logits for pair in pairs
        ]
    np.testing.assert_allclose(scores, torch.cat(single)[:, 0].numpy(), atol=1e-5)


def test_scores_of_an_int8_graph_do_not_depend_on_the_batch(tiny_bert, tmp_path, pairs):
    file = quantized(text_graph(tiny_bert, tmp_path, ["logits"]))
    judge = open_cross_encoder(str(file))
    together = judge.scores(pairs)
    np.testing.assert_array_equal(together, np.concatenate([judge.scores([pair]) for pair in pairs]))
    np.testing.assert_array_equal(together[::-1], judge.scores(pairs[::-1]))
    # the test can fail: in one batch, the graph itself gives other scores
    graph = TextGraph("int8", file)
    raw = graph.run(graph.tokenize(pairs, 64), "logits")[:, 0]
    assert np.abs(raw - together).max() > 1e-3


def test_the_identity_covers_files_and_length(tiny_bert, reranker, tmp_path):
    text_graph(tiny_bert, tmp_path / "a", ["logits"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same = {open_cross_encoder(str(tmp_path / name)).identity for name in "ab"}
    assert len(same) == 1
    assert open_cross_encoder(str(tmp_path / "a"), max_length=9).identity not in same
    before = graph_revision(tmp_path / "b/onnx/model.onnx")
    (tmp_path / "b/tokenizer_config.json").write_text((tmp_path / "a/tokenizer_config.json").read_text() + "\n")
    assert graph_revision(tmp_path / "b/onnx/model.onnx") != before
    assert open_cross_encoder(str(reranker)).identity not in same


def test_what_is_no_cross_encoder(tiny_bert, tmp_path):
    for outputs, labels in ((["last_hidden_state"], 1), (["logits"], 2), (["sentence_embedding", "ids"], 1)):
        text_graph(tiny_bert, tmp_path, outputs, labels=labels)
        with pytest.raises(JasperError, match=r"no output with one score for each pair \(got .*expected logits"):
            open_cross_encoder(str(tmp_path))
    with pytest.raises(JasperError, match="not a cross-encoder with one score .got BertModel"):
        open_cross_encoder(str(tiny_bert))
    with pytest.raises(JasperError, match=r"missing\.onnx: there is no such file"):
        open_cross_encoder(str(tmp_path / "missing.onnx"))
    with pytest.raises(JasperError, match="there is no such folder"):
        open_cross_encoder("./nothing/here")
    with pytest.raises(JasperError, match="no such bundle .expected one of bge-small"):
        open_cross_encoder("bundle:nothing")


def test_scores_that_are_not_finite(tiny_bert, tmp_path, monkeypatch):
    text_graph(tiny_bert, tmp_path, ["logits"])
    judge = open_cross_encoder(str(tmp_path))
    monkeypatch.setattr(judge, "_forward", lambda features: np.full(len(features["input_ids"]), np.nan))
    with pytest.raises(JasperError, match=r"the score of pair 0 \('a', 'b'\) is not finite"):
        judge.scores([("a", "b")])


def test_without_onnxruntime(tiny_bert, tmp_path, monkeypatch):
    text_graph(tiny_bert, tmp_path, ["logits"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(JasperError, match="the package onnxruntime is missing.*Fix: `pip install onnxruntime`"):
        open_cross_encoder(str(tmp_path))
