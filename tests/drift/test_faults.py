"""Ten planted faults: each must be found and named, and a correct model must pass."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from jasper_fast.drift.comparison import Comparison, Options, compare_models
from jasper_fast.drift.diagnosis import declared_differences
from jasper_fast.drift.graph import GraphSide
from jasper_fast.drift.measures import unit
from jasper_fast.drift.recorded import GoldenSide
from jasper_fast.drift.report import verdict
from jasper_fast.drift.stock import StockSide
from jasper_fast.exporting.golden import GOLDEN_FILE, Text, installed_versions
from jasper_fast.models.embedder import load_model
from tests.helpers.adapted import PROMPTS
from tests.helpers.endpoints import openai, server, tei

SEND = Options(send_prompts=True)
QUERY = PROMPTS["query"]


@pytest.fixture(scope="module")
def model(exported: Path) -> SentenceTransformer:
    return load_model(str(exported), device="cpu")


class Newer(StockSide):
    """A model in an environment with another version of torch."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.facts = replace(self.facts, versions={**self.facts.versions, "torch": "99"})


def kinds(comparison: Comparison) -> list[str]:
    return [finding.kind for finding in comparison.findings]


def served(exported: Path, encode, options: Options = SEND, make=openai) -> Comparison:
    """Compare the golden file with a server. The texts it gets have prompts, which `encode` must not add again."""
    place = {openai: "/v1/embeddings", tei: "/embed"}[make]
    with server(make(encode)) as address:
        return compare_models(str(exported / GOLDEN_FILE), address + place, options)


def stock(model: SentenceTransformer):
    return lambda texts: model.encode(texts, prompt="")


def changed(model: SentenceTransformer, position: int, module) -> SentenceTransformer:
    """Return a model with another module at a position, or without it."""
    modules = [part if i != position else module for i, part in enumerate(model)]
    return SentenceTransformer(modules=[part for part in modules if part is not None], device="cpu").eval()


@pytest.mark.parametrize("make", [openai, tei])
def test_a_correct_server_passes(exported, model, make):
    comparison = served(exported, stock(model), make=make)
    assert comparison.same and not comparison.findings
    assert comparison.figures.cosine_min > 0.999999 and comparison.figures.same_nearest == 1
    assert verdict(comparison) == "same: B gives the embeddings of A"


@pytest.mark.parametrize("form", ["", "onnx/model.onnx"])
def test_the_forms_of_an_export_pass(exported, form):
    assert not compare_models(str(exported / GOLDEN_FILE), str(exported / form)).findings
    assert not compare_models(str(exported / form), str(exported)).findings


def test_a_folder_of_graphs_passes(exported, tmp_path):
    ignored = shutil.ignore_patterns("*.safetensors", "modules.json", GOLDEN_FILE)
    shutil.copytree(exported, tmp_path / "graphs", ignore=ignored)
    comparison = compare_models(str(exported / GOLDEN_FILE), str(tmp_path / "graphs"))
    assert comparison.same and comparison.sides[1].kind == "ONNX graph model.onnx"


def test_pooling(exported, model):
    comparison = served(exported, stock(changed(model, 1, type(model[1])(32, "cls"))))
    assert kinds(comparison) == ["pooling"] and comparison.findings[0].exact
    assert verdict(comparison) == "different: B pools by cls, and A by mean"


def test_missing_head(exported, model):
    comparison = served(exported, stock(changed(model, 2, None)))
    assert kinds(comparison) == ["head"] and comparison.figures.widths == (24, 32)
    assert comparison.findings[0].cosine_min > 0.9999


def test_missing_prompt(exported, model):
    comparison = served(exported, stock(model), Options())
    assert kinds(comparison) == ["prompt"]
    assert "B puts no prompt before queries, and A puts 'the city council '" in comparison.findings[0].text


def test_no_normalisation(exported, model):
    comparison = served(exported, stock(changed(model, 3, None)))
    assert kinds(comparison) == ["normalisation"] and comparison.figures.cosine_min > 0.9999
    assert "vectors of B have a mean length" in comparison.findings[0].text


@pytest.mark.parametrize("renormalised", [True, False])
def test_another_width(exported, model, renormalised):
    def encode(texts):
        rows = model.encode(texts, prompt="")[:, :8]
        return unit(rows) if renormalised else rows

    comparison = served(exported, encode)
    assert kinds(comparison) == ([] if renormalised else ["normalisation"]) + ["width"]
    assert comparison.findings[-1].text == "B has the first 8 of the 24 numbers of A"


def test_another_head(exported):
    comparison = compare_models(str(exported.parent / "run"), str(exported), Options(dimensions=24))
    assert not comparison.findings
    comparison = compare_models(str(exported.parent / "run"), str(exported), Options(dimensions=8))
    assert kinds(comparison) == ["width"] and comparison.figures.widths == (8, 8)  # a head is no prefix
    assert comparison.findings[0].text == "B has the first 8 numbers of the head of width 24 of A"
    with server(openai(stock(load_model(str(exported))))) as address:
        options = Options(send_prompts=True, dimensions=8)
        comparison = compare_models(str(exported.parent / "run"), address + "/v1/embeddings", options)
        wide = openai(stock(load_model(str(exported))))
        with server(lambda path, content: wide(path, content and {**content, "dimensions": None})) as ignoring:
            ignored = compare_models(str(exported.parent / "run"), ignoring + "/v1/embeddings", options)
    assert kinds(comparison) == ["normalisation", "width"] and comparison.findings[-1].exact
    assert verdict(ignored) == "different: B is the head of width 24 of A"
    comparison = compare_models(str(exported.parent / "run"), str(exported))
    assert not comparison.findings
    with_prefix = compare_models(str(exported), str(exported), Options(dimensions=8))
    assert with_prefix.same and with_prefix.figures.widths == (8, 8)


def test_another_revision(exported, model, tmp_path):
    shutil.copytree(exported, tmp_path / "other")
    other = load_model(str(exported), device="cpu")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03 * float(parameter.abs().mean()))
    other.save(str(tmp_path / "other"))
    for first in (exported / GOLDEN_FILE, exported):
        comparison = compare_models(str(first), str(tmp_path / "other"))
        assert kinds(comparison) == ["revision"], comparison.findings
        assert any("weights: " in line for line in comparison.declared)


def test_int8_weights(exported):
    graph = GraphSide("int8", exported / "onnx/model_int8.onnx")
    comparison = served(exported, lambda texts: graph.embed([Text("document", text) for text in texts]))
    assert kinds(comparison) == ["int8"], comparison.findings
    declared = compare_models(str(exported), str(exported / "onnx/model_int8.onnx"), Options(accept=["int8"]))
    assert kinds(declared) == ["int8"] and declared.same
    assert verdict(declared).endswith("apart from what you accepted (int8)")


@pytest.mark.parametrize("scaled", [True, False])
def test_int8_codes(exported, model, scaled):
    def encode(texts):
        rows = model.encode(texts, prompt="")
        scale = np.abs(rows).max() / 127
        return np.round(rows / scale) * (scale if scaled else 1)

    assert kinds(served(exported, encode)) == ["int8"]


def test_truncated_length(exported):
    other = load_model(str(exported), max_length=16, device="cpu")
    comparison = served(exported, stock(other))
    assert kinds(comparison) == ["length"]
    assert comparison.findings[0].text == "B reads 16 tokens of a text, and A reads 40"


def test_padding_leak(exported, model):
    def encode(texts):
        features = model.preprocess(list(texts))
        features["attention_mask"] = torch.ones_like(features["attention_mask"])
        with torch.no_grad():
            return model(features)["sentence_embedding"].numpy()

    comparison = served(exported, encode)
    assert kinds(comparison) == ["padding"] and comparison.findings[0].exact


def test_query_and_document_swapped(exported, model):
    def encode(texts):
        return model.encode([t.removeprefix(QUERY) if t.startswith(QUERY) else QUERY + t for t in texts], prompt="")

    assert kinds(served(exported, encode)) == ["roles"]


def test_faults_in_the_settings_of_a_folder(exported, tmp_path):
    """Without the model of the golden file: its folder is elsewhere."""
    golden, folder = tmp_path / GOLDEN_FILE, tmp_path / "model"
    shutil.copy(exported / GOLDEN_FILE, golden)

    def edited(file, **fields):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported, folder)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **fields}))
        return kinds(compare_models(str(golden), str(folder)))

    declared = compare_models(str(golden), str(exported)).declared
    assert not declared
    other = declared_differences([GoldenSide(str(golden)), Newer(str(exported))])
    assert other == ["torch: " + installed_versions()["torch"] + " in A, 99 in B"]
    settings = "config_sentence_transformers.json"
    assert edited(settings, prompts={"query": "", "document": ""}) == ["prompt"]
    assert edited(settings, prompts={"query": "", "document": QUERY}) == ["roles"]
    assert edited("sentence_bert_config.json", max_seq_length=20) == ["length"]
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    assert edited("1_Pooling/config.json", **modes) == ["pooling"]


def test_two_faults_are_both_named(exported, model):
    wrong = changed(changed(model, 1, type(model[1])(32, "cls")), 3, None)
    comparison = served(exported, stock(wrong), Options())
    assert sorted(kinds(comparison)) == ["normalisation", "pooling", "prompt"]


def test_another_model(exported, tiny_qwen2, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    other = SentenceTransformer(modules=[Transformer(str(tiny_qwen2), max_seq_length=30), Pooling(32)], device="cpu")
    other.save(str(tmp_path / "other"))
    comparison = compare_models(str(exported / GOLDEN_FILE), str(tmp_path / "other"))
    assert "width" in kinds(comparison) and not comparison.same
    assert "neither is the start of the other" in verdict(comparison)

    def encode(texts):
        rows = [np.random.default_rng(list(text.encode())).standard_normal(24) for text in texts]
        return unit(np.array(rows))

    comparison = served(exported, encode)
    assert kinds(comparison) == ["model"] and "A is " in comparison.findings[0].text


def test_a_rotation_is_told_from_another_model(exported, model):
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    assert kinds(served(exported, lambda texts: model.encode(texts, prompt="") @ rotation)) == ["rotation"]


def test_without_modules_the_limits_are_noted(exported, model, tmp_path):
    shutil.copy(exported / GOLDEN_FILE, tmp_path / GOLDEN_FILE)
    wrong = stock(changed(model, 1, type(model[1])(32, "max")))
    comparison = served(tmp_path, wrong)
    assert set(kinds(comparison)) <= {"revision", "model"} and not comparison.same
    assert "give the folder of the model" in comparison.notes[0]
