"""Students: layer choice, pooling, heads, gradient checkpointing and rejected models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jasper_fast.config.models import StudentConfig
from jasper_fast.models.backbone import check_max_length, is_bidirectional, make_bidirectional
from jasper_fast.models.layers import layer_list
from jasper_fast.models.padding import pad
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError

WIDTHS = [24, 8, 4]
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
ENCODERS = ["bert", "roberta", "mpnet", "xlm-roberta", "modernbert", "distilbert"]
DECODERS = ["qwen2", "qwen3", "llama", "mistral", "gemma2"]


def student(model: Path | str, **fields: Any) -> Student:
    return Student.build(StudentConfig(model=str(model), heads=WIDTHS, **{"max_length": 32, **fields}))


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path):
    """Return a function from a model type to the folder of a random 4-layer model with the BERT fixture's tokenizer."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        from transformers import AutoConfig, AutoModel

        if kind not in made:
            sizes = dict(SIZES)
            if kind in DECODERS:
                sizes |= {"num_key_value_heads": 1, "head_dim": 8}
            if kind == "gemma2":
                sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
            if kind == "mistral":
                sizes |= {"sliding_window": None}
            made[kind] = tmp_path_factory.mktemp(kind)
            AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(made[kind])
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_bert / name, made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_chosen_layers_survive_saving(kind: str, architecture, tmp_path: Path) -> None:
    from transformers import AutoModel

    whole = AutoModel.from_pretrained(architecture(kind))
    shorter = student(architecture(kind), layers=[0, 3]).eval()
    path = layer_list(whole)
    assert path is not None and shorter.num_layers == 2
    for old, new in ((0, 0), (3, 1)):
        expected = whole.get_submodule(f"{path}.{old}").state_dict()
        actual = shorter.encoder.get_submodule(f"{path}.{new}").state_dict()
        assert all(torch.equal(value, actual[name]) for name, value in expected.items())

    ids = torch.randint(5, 125, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    shorter.encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()  # without jasper_fast
    with torch.no_grad():
        ours = shorter.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        theirs = loaded(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])
    if kind == "gemma2":
        assert loaded.config.layer_types == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("kind", DECODERS)
def test_a_later_token_changes_an_earlier_state(kind: str, architecture, tmp_path: Path) -> None:
    from transformers import AutoModel

    ids = [[7, 8, 9, 10, 11, 12], [7, 8, 9, 10, 11, 99]]
    causal, free = (student(architecture(kind), bidirectional=wanted).eval() for wanted in (False, True))
    free.encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    padded = torch.tensor([[*ids[0], 0], [*ids[1], 0]])
    for mask in (None, (padded != 0).long()):  # attention takes different paths with and without padding
        tokens = torch.tensor(ids) if mask is None else padded
        with torch.no_grad():
            first = {
                name: model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0]
                for name, model in (("causal", causal.encoder), ("free", free.encoder), ("loaded", loaded))
            }
        assert torch.equal(first["causal"][0], first["causal"][1])
        assert (first["free"][0] - first["free"][1]).abs().max() > 1e-3
        assert torch.equal(first["free"], first["loaded"])


def test_a_decoder_that_keeps_its_causal_mask_is_rejected() -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTModel

    model = OpenAIGPTModel(OpenAIGPTConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(JasperError, match="student.bidirectional: false"):
        make_bidirectional(model)
    assert not is_bidirectional(model)


def test_pooling_is_the_mean_over_each_texts_own_tokens(tiny_bert: Path, tiny_texts: list[str]) -> None:
    model = student(tiny_bert).eval()
    ids = model.tokenize(tiny_texts[:6] + ["short"])
    with torch.no_grad():
        together = model.pool(ids)
        for row, tokens in zip(together, ids, strict=True):
            states = model.encoder(input_ids=torch.tensor([tokens])).last_hidden_state
            torch.testing.assert_close(row, states[0].mean(dim=0), atol=2e-6, rtol=1e-5)
    assert together.dtype == torch.float32 and together.shape == (7, 32)
    same_length = [tokens[:5] for tokens in ids if len(tokens) >= 5]
    with torch.no_grad():
        torch.testing.assert_close(model.pool(same_length)[0], model.pool([same_length[0], [1]])[0])


def test_padding_keeps_every_token_in_its_place() -> None:
    ids, mask = pad([[5, 6, 7], [8], [9, 0]], pad_id=0, length=3)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 0, 0]]
    assert mask is not None and mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    ids, mask = pad([[5, 6], [7, 8]], pad_id=0, length=2)
    assert ids.tolist() == [[5, 6], [7, 8]] and mask is None


def test_pooling_stays_float32_under_autocast(tiny_bert: Path) -> None:
    model = student(tiny_bert).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pooled = model.pool([[2, 9, 3], [2, 9, 8, 3]])
        projected = model.project(pooled, [8])[8]
    assert pooled.dtype == projected.dtype == torch.float32


def test_tokenize_applies_each_roles_prompt_and_cuts(tiny_bert: Path) -> None:
    model = student(tiny_bert, prompts={"query": "the city council {text}", "document": "the"})
    query, document = model.tokenize(["an engine", "an engine"], ["query", "document"])
    assert model.tokenizer.decode(query, skip_special_tokens=True) == "the city council an engine"
    assert document == student(tiny_bert).tokenize(["thean engine"])[0]
    cut = model.tokenize(["forty boxes of apples " * 30], "document", 12)[0]
    assert len(cut) == 12 and cut[0] == query[0] and cut[-1] == query[-1]  # special tokens survive the cut
    assert model.tokenize([]) == []


def test_an_empty_text_has_an_embedding(tiny_qwen2: Path) -> None:
    model = student(tiny_qwen2).eval()
    ids = model.tokenize(["", "forty boxes"])
    assert len(ids[0]) == 1 and torch.isfinite(model.pool(ids)).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_graph_below_the_first_trained_layer(checkpointing: bool, tiny_bert: Path) -> None:
    model = student(tiny_bert).train()
    model.set_gradient_checkpointing(checkpointing)
    trained = set(model.layer_parameters(1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or name.startswith("heads."))
    seen: dict[int, bool] = {}
    for index, layer in enumerate(model.encoder.encoder.layer):
        layer.register_forward_pre_hook(lambda _, given, index=index: seen.__setitem__(index, given[0].requires_grad))
    model.project(model.pool([[2, 9, 3], [2, 9, 8, 3]]))[24].sum().backward()
    assert seen == {0: False, 1: False, 2: False}  # Hugging Face's own checkpointing would make them all True
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained | {
        "heads.24.weight",
        "heads.24.bias",
    }


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_qwen2"])
def test_every_parameter_is_used(kind: str, request: pytest.FixtureRequest) -> None:
    model = student(request.getfixturevalue(kind)).train()
    outputs = model.project(model.pool([[2, 9, 3], [2, 9, 8, 3]]))
    torch.stack([out.square().sum() for out in outputs.values()]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_last_layers_include_the_norm_that_follows_them(tiny_bert: Path, tiny_qwen2: Path) -> None:
    bert, qwen2 = student(tiny_bert), student(tiny_qwen2)
    names = bert.layer_parameters(2)
    assert {name.split(".")[3] for name in names} == {"1", "2"} and len(names) == 2 * 16
    assert "encoder.norm.weight" in qwen2.layer_parameters(1)
    assert not any(".layers.0." in name or "embed" in name for name in qwen2.layer_parameters(1))
    assert bert.layer_parameters(0) == qwen2.layer_parameters(0) == []
    with pytest.raises(JasperError, match="3 layers"):
        bert.layer_parameters(4)


def test_training_mode_adds_no_noise_but_vector_dropout(tiny_bert: Path) -> None:
    assert json.loads((tiny_bert / "config.json").read_text())["hidden_dropout_prob"] > 0
    model = student(tiny_bert, vector_dropout=0.5, head_type="prefix")
    ids = [[2, 9, 3], [2, 9, 8, 3]]
    with torch.no_grad():
        trained, evaluated = model.train().pool(ids), model.eval().pool(ids)
        assert torch.equal(trained, evaluated)
        assert torch.equal(model.project(trained)[24], model.project(trained)[24])
        model.train()
        dropped = model.project(trained)
    assert not torch.equal(dropped[24], model.eval().project(trained)[24])
    assert torch.equal(dropped[24][:, :8], dropped[8])  # one mask for all heads


def test_prefix_heads_are_the_beginning_of_the_widest(tiny_bert: Path) -> None:
    pooled = torch.randn(5, 32)
    prefix, independent = student(tiny_bert, head_type="prefix"), student(tiny_bert)
    assert list(prefix.heads) == ["24"] and list(independent.heads) == ["24", "8", "4"]
    out = prefix.project(pooled, [4, 24])
    assert list(out) == [4, 24] and torch.equal(out[4], out[24][:, :4])
    other = independent.project(pooled)
    assert not torch.allclose(other[8], other[24][:, :8])
    for model in (prefix, independent):
        weight, bias = model.head(4)
        torch.testing.assert_close(model.project(pooled)[4], pooled @ weight.T + bias)
    with pytest.raises(ValueError, match=r"no heads of width \[5\]"):
        prefix.project(pooled, [5])
    with pytest.raises(ValueError, match=r"\(B, 32\)"):
        prefix.project(pooled[:, :16])


def test_heads_depend_on_the_seed_alone(tiny_bert: Path) -> None:
    weights = []
    for seed, layers in ((3, None), (3, [0, 2]), (4, None)):
        torch.manual_seed(seed)
        weights.append(student(tiny_bert, layers=layers).heads["24"].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_qwen2"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, request: pytest.FixtureRequest) -> None:
    model = student(request.getfixturevalue(kind)).train()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    layers = model.encoder.get_submodule(layer_list(model.encoder))
    next(layers[0].children()).register_forward_hook(count)
    gradients, counted = [], []
    for on in (False, True, False):
        model.set_gradient_checkpointing(on)
        model.zero_grad()
        calls = 0
        model.project(model.pool([[2, 9, 3], [2, 9, 8, 3]]))[24].square().sum().backward()
        counted.append(calls)
        gradients.append([p.grad for n, p in model.named_parameters() if n.startswith("encoder.")])
    assert counted == [1, 2, 1]  # a checkpointed layer's forward runs again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[1], strict=True))


def test_a_sentence_transformers_folder_gives_its_transformer(tiny_qwen2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_qwen2, tmp_path / "model" / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    plain = student(tmp_path / "model")
    assert plain.tokenize(["The CITY"]) != plain.tokenize(["the city"])
    settings = tmp_path / "model" / "0_Transformer" / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 16, "do_lower_case": True}))
    lowered = student(tmp_path / "model")
    assert lowered.tokenize(["The CITY"]) == lowered.tokenize(["the city"]) == plain.tokenize(["the city"])


def test_a_decoder_without_padding_token_pads_with_its_end_of_text(tiny_qwen2: Path) -> None:
    from transformers import AutoTokenizer

    from jasper_fast.models.backbone import ensure_pad_token

    model = student(tiny_qwen2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    tokenizer.pad_token = None
    size = model.encoder.get_input_embeddings().num_embeddings
    ensure_pad_token(tokenizer, model.encoder, "it")
    assert tokenizer.pad_token == tokenizer.eos_token and len(tokenizer) == size
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(JasperError, match="pad_token"):
        ensure_pad_token(tokenizer, model.encoder, "it")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 4}, "the model has 3 layers (got 4). Fix: give a number from 1 to 3"),
        ({"layers": [0, 3]}, "distinct indices from 0 to 2"),
        ({"layers": [1, 1]}, "distinct indices from 0 to 2"),
        ({"max_length": 65}, "the model has 64 positions. Fix: give at most 64"),
        ({"prompts": {"query": "say {text} again"}}, "nothing may follow {text}"),
        ({"model": "no/such-model"}, "hf download no/such-model"),
        ({"model": "package:no_such_package/model"}, "pip install no-such-package"),
    ],
)
def test_an_impossible_student_says_how_to_fix_it(fields: dict[str, Any], message: str, tiny_bert: Path) -> None:
    with pytest.raises(JasperError) as caught:
        student(**{"model": tiny_bert, **fields})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", lambda whole: whole[: len(whole) // 2], "could not be loaded"),
        ("model.safetensors", lambda whole: whole.replace(b'"shape":[32]', b'"shape":[16]', 1), "could not be loaded"),
        ("config.json", lambda whole: whole.replace(b'"hidden_size": 32', b'"hidden_size": 16'), "another shape"),
        ("config.json", lambda whole: whole[: len(whole) // 2], "could not be loaded"),
        ("modules.json", lambda _: b"[{", "modules.json is damaged"),
        ("modules.json", lambda _: b"[{}]", "modules.json is damaged"),
        ("modules.json", lambda _: b"3", "modules.json is damaged"),
    ],
)
def test_a_damaged_model_gives_one_error(file: str, damage, message: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    whole = (folder / file).read_bytes() if (folder / file).exists() else b""
    (folder / file).write_bytes(damage(whole))
    assert (folder / file).read_bytes() != whole
    with pytest.raises(JasperError, match=f"{message}.* copy or download the model again"):
        student(folder)


def test_a_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(JasperError, match="could not be loaded"):
        student(tmp_path)


def test_roberta_has_fewer_positions_than_its_table(architecture) -> None:
    model = student(architecture("roberta"))
    check_max_length(model.encoder, 39)  # the first of 40 positions belongs to the padding token
    with pytest.raises(JasperError, match="at most 39"):
        check_max_length(model.encoder, 40)


def test_layers_built_by_position_are_rejected(architecture) -> None:
    with pytest.raises(JasperError, match="layer 0"):
        student(architecture("modernbert"), layers=[1, 2])


def test_shared_layers_cannot_be_chosen(architecture) -> None:
    with pytest.raises(JasperError, match="leave student.layers empty"):
        student(architecture("albert"), layers=2)


def test_heads_that_start_as_the_identity_give_the_first_pooled_coordinates(tiny_bert):
    model = student(tiny_bert, head_init="identity").eval()
    pooled = model.pool(model.tokenize(["a text", "another one"]))
    for width, vectors in model.project(pooled).items():
        torch.testing.assert_close(vectors, pooled[:, :width])
    assert not torch.equal(student(tiny_bert).heads["8"].weight, model.heads["8"].weight)
