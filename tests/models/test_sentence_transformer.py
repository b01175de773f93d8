"""Every command gives the embeddings of stock sentence-transformers, alone and in any batch, for both roles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jasper_fast.config.models import StudentConfig, TeacherConfig
from jasper_fast.models.embedder import flat_model, load_model, model_encoder
from jasper_fast.models.hub import routes_by_role
from jasper_fast.models.probes import find_batching
from jasper_fast.models.student import Student
from jasper_fast.teachers.model import describe_teacher, load_teacher, token_batches
from jasper_fast.utils.errors import JasperError

TEXTS = [
    "forty boxes of apples",
    "the city council quietly sold the bridge near the station",
    "one",
    "a map of the river, although nobody had asked for one",
]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stock(folder: Path, role: str) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return unit((model.encode_query if role == "query" else model.encode_document)(TEXTS))


# --- roles ------------------------------------------------------------------------------------------------------------


def save(folder: Path, modules: list[Any], **options: Any) -> Path:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(modules=modules, device="cpu", **options).save_pretrained(str(folder))
    return folder


def transformer(model: Path, **options: Any) -> Any:
    from sentence_transformers.base.modules import Transformer

    return Transformer(str(model), **options)


def router(routes: dict[str, list[Any]], **options: Any) -> Any:
    from sentence_transformers.base.modules import Router

    return Router(routes, default_route="document" if "document" in routes else None, **options)


def dense(seed: int) -> Any:
    from sentence_transformers.base.modules import Dense

    torch.manual_seed(seed)
    return Dense(32, 16, activation_function=nn.Identity())


def pooling(**options: Any) -> Any:
    from sentence_transformers.sentence_transformer.modules import Pooling

    return Pooling(32, **{"pooling_mode": "mean", **options})


def two_heads(model: Path, folder: Path) -> Path:
    return save(folder, [transformer(model), pooling(), router({"query": [dense(1)], "document": [dense(2)]})])


def two_towers(model: Path, folder: Path) -> Path:
    query = [transformer(model), pooling(), dense(1)]
    document = [transformer(model), pooling(pooling_mode="cls"), dense(2)]
    return save(folder, [router({"query": query, "document": document})])


def static_queries(model: Path, folder: Path) -> Path:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = transformer(model).tokenizer.backend_tokenizer
    query = StaticEmbedding(tokenizer, embedding_weights=np.random.default_rng(0).normal(size=(200, 32)))
    return save(folder, [router({"query": [query], "document": [transformer(model), pooling()]})])


def mapped_routes(model: Path, folder: Path) -> Path:
    routes = {"short": [dense(1)], "long": [dense(2)]}
    mapping = {("query", None): "short", ("document", "text"): "long"}
    return save(folder, [transformer(model), pooling(), router(routes, route_mappings=mapping)])


def prompts_by_role(model: Path, folder: Path) -> Path:
    prompts = {"query": "the old bridge: ", "document": "apples "}
    return save(folder, [transformer(model), pooling()], prompts=prompts)


def prompt_left_out(model: Path, folder: Path) -> Path:
    prompts = {"query": "the old bridge: ", "document": "apples and "}
    return save(folder, [transformer(model), pooling(include_prompt=False)], prompts=prompts)


def default_prompt(model: Path, folder: Path) -> Path:
    prompts = {"task": "apples ", "query": "bridge "}
    return save(folder, [transformer(model), pooling()], prompts=prompts, default_prompt_name="task")


def passage_prompt(model: Path, folder: Path) -> Path:
    prompts = {"query": "the old bridge: ", "passage": "apples ", "corpus": "boxes "}
    return save(folder, [transformer(model), pooling()], prompts=prompts)


def lengths_by_role(model: Path, folder: Path) -> Path:
    return save(folder, [transformer(model, query_length=5, document_length=9), pooling()])


MODELS: dict[str, Callable[[Path, Path], Path]] = {
    made.__name__: made
    for made in (
        two_heads, two_towers, static_queries, mapped_routes, prompts_by_role, prompt_left_out, default_prompt,
        passage_prompt, lengths_by_role,
    )
}  # fmt: skip


@pytest.mark.parametrize("role", ["query", "document"])
@pytest.mark.parametrize("name", MODELS)
def test_every_command_reads_a_role_as_stock_does(name: str, role: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = MODELS[name](tiny_bert, tmp_path / "model")
    expected = stock(folder, role)
    taught = load_teacher(TeacherConfig(model=str(folder))).encode(TEXTS, role)
    np.testing.assert_allclose(taught, expected, atol=2e-6)
    (evaluated,) = model_encoder(load_model(str(folder)))(TEXTS, role).values()
    np.testing.assert_allclose(evaluated, expected, atol=2e-6)
    flat = flat_model(load_model(str(folder)), None)  # for mteb
    encode = flat.encode_query if role == "query" else flat.encode_document
    np.testing.assert_allclose(unit(encode(TEXTS)), expected, atol=2e-6)


def test_routes_by_role_are_part_of_a_cache_s_identity(tiny_bert: Path, tmp_path: Path) -> None:
    asymmetric, plain = two_heads(tiny_bert, tmp_path / "two"), prompts_by_role(tiny_bert, tmp_path / "one")
    assert routes_by_role(str(asymmetric)) and not routes_by_role(str(plain)) and not routes_by_role(str(tiny_bert))
    assert describe_teacher(TeacherConfig(model=str(asymmetric)))["routes"] == "by role"
    assert "routes" not in describe_teacher(TeacherConfig(model=str(plain)))


def test_an_unused_prompt_is_reported(tiny_bert: Path, tmp_path: Path, capsys) -> None:
    load_model(str(passage_prompt(tiny_bert, tmp_path / "model")))
    assert "has a prompt 'passage' ('apples '), which encode_document does not use" in capsys.readouterr().err


def test_routes_of_different_widths_are_rejected(tiny_bert: Path, tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Dense

    routes = router({"query": [dense(1)], "document": [Dense(32, 8)]})
    folder = save(tmp_path / "model", [transformer(tiny_bert), pooling(), routes])
    with pytest.raises(JasperError, match="differ in width .got 16 and 8"):
        load_teacher(TeacherConfig(model=str(folder)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("the old bridge: ", "the old bridge: {text}"),
        ("", "{text}"),
        ("ask: ", "ask: {text}"),
    ],
)
@pytest.mark.parametrize("made", [prompt_left_out, prompts_by_role])
def test_a_prompt_that_ends_in_text_is_a_prefix(first: str, second: str, made: Any, tiny_bert: Path, tmp_path) -> None:
    folder = made(tiny_bert, tmp_path / "model")
    configs = [TeacherConfig(model=str(folder), prompts={"query": prompt}) for prompt in (first, second)]
    assert describe_teacher(configs[0]) == describe_teacher(configs[1])
    one, other = (load_teacher(config).encode(TEXTS, "query") for config in configs)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("prompt", ["find {text} now", "{text} is asked", "{text} and {text}"])
def test_text_inside_a_prompt_needs_a_mean_that_includes_it(prompt: str, tiny_bert: Path, tmp_path: Path) -> None:
    config = {"prompts": {"query": prompt}}
    with pytest.raises(JasperError, match="its pooling leaves the prompt out"):
        load_teacher(TeacherConfig(model=str(prompt_left_out(tiny_bert, tmp_path / "out")), **config))
    teacher = load_teacher(TeacherConfig(model=str(prompts_by_role(tiny_bert, tmp_path / "in")), **config))
    assert np.isfinite(teacher.encode(TEXTS, "query")).all()


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Path]:
    """Save encoders that do not mask padding (fnet, convbert), and one that masks padding on the left (gpt2)."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0}
    folders = {}
    for kind in ("fnet", "convbert", "gpt2"):
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(7)
        AutoModel.from_config(AutoConfig.for_model(kind, **size)).save_pretrained(folder)
        tokenizer.padding_side = "left" if kind == "gpt2" else "right"
        tokenizer.save_pretrained(folder)
    return folders


@pytest.mark.parametrize("kind", ["fnet", "convbert"])
def test_a_teacher_that_pads_badly_encodes_one_length_at_a_time(kind: str, leaky: dict[str, Path], capsys) -> None:
    teacher = load_teacher(TeacherConfig(model=str(leaky[kind]), max_length=40, pooling="mean"))
    assert teacher.batching == "equal lengths"
    texts = [*TEXTS, *(f"{text} again" for text in TEXTS), "one"]
    together = teacher.encode(texts)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(teacher.encode([text])[0], vector, atol=1e-5)


@pytest.mark.parametrize("kind", ["fnet", "convbert", "gpt2"])
def test_evaluate_and_search_encode_it_the_same_way(kind: str, leaky: dict[str, Path]) -> None:
    encode = model_encoder(load_model(str(leaky[kind])))
    (together,) = encode(TEXTS, "query").values()
    alone = np.concatenate([next(iter(encode([text], "query").values())) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_text_too_short_for_the_encoder_is_an_error_with_a_fix(tmp_path: Path) -> None:
    from transformers import CanineConfig, CanineModel, CanineTokenizer

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(7)
    CanineModel(CanineConfig(**size, num_hash_buckets=64, num_hash_functions=2)).save_pretrained(tmp_path)
    CanineTokenizer(model_max_length=64).save_pretrained(tmp_path)
    encode, teacher = model_encoder(load_model(str(tmp_path))), load_teacher(TeacherConfig(model=str(tmp_path)))
    assert np.isfinite(teacher.encode(TEXTS)).all()
    for encoded in (lambda: encode([*TEXTS, "a"], "query"), lambda: teacher.encode([*TEXTS, "a"])):
        with pytest.raises(JasperError, match="cannot encode a text such as 'a' .* Fix: leave out texts as short"):
            encoded()


@pytest.mark.parametrize("kind", ["fnet", "convbert"])
def test_a_student_that_pads_badly_is_rejected(kind: str, leaky: dict[str, Path]) -> None:
    with pytest.raises(JasperError, match="does not honour the attention mask"):
        Student.build(StudentConfig(model=str(leaky[kind]), heads=[8], max_length=32))


def test_mteb_rejects_what_it_would_pad(leaky: dict[str, Path]) -> None:
    from jasper_fast.mteb import load

    with pytest.raises(JasperError, match="mteb pads its batches"):
        load(leaky["fnet"])


def fake(change: Callable[[Tensor, list[str]], Tensor]) -> Callable[[list[str]], Tensor]:
    """Return an encoder of letter counts with a change to each batch."""

    def encode(texts: list[str]) -> Tensor:
        counts = torch.tensor([[text.count(letter) + 1.0 for letter in "aeioust"] for text in texts])
        return change(counts, texts)

    return encode


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v, texts: v, "padded"),
        (lambda v, texts: v + 1e-5, "padded"),
        (lambda v, texts: v / max(map(len, texts)), "equal lengths"),
        (lambda v, texts: v + (len(set(texts)) > 1), "equal lengths"),
        (lambda v, texts: v - v.sum(dim=0) / 4, "error"),
        (lambda v, texts: v + len(texts), "error"),
        (lambda v, texts: v * torch.nan, "error"),
        (lambda v, texts: v / 0, "error"),
    ],
)
def test_batching_is_found_from_what_an_embedding_depends_on(change: Any, expected: str) -> None:
    if expected == "error":
        with pytest.raises(JasperError, match="depends on the other texts|not finite"):
            find_batching(fake(change), "fake")
    else:
        assert find_batching(fake(change), "fake") == expected


def test_batches_of_one_length_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    batches = token_batches(lengths, 200, "equal lengths")
    assert sorted(np.concatenate(batches)) == list(range(300))
    assert all(len(set(lengths[batch])) == 1 and lengths[batch].sum() <= 200 for batch in batches)


# --- settings of a model ----------------------------------------------------------------------------------------------


def test_routes_named_by_numbers_are_widths_only_if_they_are(tiny_bert: Path, tmp_path: Path) -> None:
    mapping = {("query", None): "0", ("document", None): "1"}
    routes = router({"0": [dense(1)], "1": [dense(2)]}, route_mappings=mapping)
    folder = save(tmp_path / "model", [transformer(tiny_bert), pooling(), routes])
    for role in ("query", "document"):
        (found,) = model_encoder(load_model(str(folder)))(TEXTS, role).values()
        np.testing.assert_allclose(found, stock(folder, role), atol=2e-6)


LONG_PROMPT = "the old keeper repaired the bridge and sold forty boxes of apples: "


@pytest.mark.parametrize(("length", "prompt"), [(8, LONG_PROMPT), (2, "")])
def test_a_maximum_length_too_short_for_a_text_is_rejected(length: int, prompt: str, tiny_bert: Path) -> None:
    prompts = {"query": prompt}
    with pytest.raises(JasperError, match=f"the query prompt .* fill the maximum length of {length} tokens"):
        load_teacher(TeacherConfig(model=str(tiny_bert), max_length=length, prompts=prompts))
    with pytest.raises(JasperError, match=f"student.max_length: no room for a text within {length} tokens"):
        Student.build(StudentConfig(model=str(tiny_bert), heads=[8], max_length=length, prompts=prompts))


@pytest.mark.parametrize("kind", ["SparseEncoder", "CrossEncoder", "MultiVectorEncoder"])
def test_models_of_another_kind_are_rejected(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    import json

    folder = prompts_by_role(tiny_bert, tmp_path / "model")
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": kind}))
    with pytest.raises(JasperError, match=f"the model is a {kind}|{kind}"):
        load_teacher(TeacherConfig(model=str(folder)))


def test_a_longer_length_than_the_saved_one_is_used(tiny_bert: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", [transformer(tiny_bert, max_seq_length=8), pooling()])
    assert load_model(str(folder)).max_seq_length == 8
    assert load_model(str(folder), 32).max_seq_length == 32


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sentence_roberta_config.json", {"max_seq_length": 64, "do_lower_case": True}),
        ("sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": True}),
        ("sentence_bert_config.json", {"max_seq_length": 64, "config_args": {"hidden_act": "relu"}}),
        ("sentence_bert_config.json", {"max_seq_length": 64, "tokenizer_args": {"truncation_side": "left"}}),
    ],
)
def test_a_student_reads_the_settings_that_stock_reads(name: str, settings: dict, tiny_bert: Path, tmp_path) -> None:
    import json

    from sentence_transformers import SentenceTransformer

    folder = save(tmp_path / "model", [transformer(tiny_bert), pooling()])
    cased = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**cased, "normalizer": None}))
    (folder / "sentence_bert_config.json").unlink()
    (folder / name).write_text(json.dumps(settings))
    texts = ["the OLD bridge", "one two three " * 40]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    student = Student.build(StudentConfig(model=str(folder), heads=[8], max_length=64)).eval()
    with torch.no_grad():
        torch.testing.assert_close(student.pool(student.tokenize(texts)), expected, atol=1e-5, rtol=0)


def test_an_encoder_that_changes_for_good_is_rejected(tiny_bert: Path, tmp_path: Path) -> None:
    """BigBird leaves sparse attention after the first short text, so long texts depend on earlier ones."""
    from transformers import AutoTokenizer, BigBirdConfig, BigBirdModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.model_max_length = 128
    config = BigBirdConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, block_size=4, num_random_blocks=1, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    BigBirdModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(JasperError, match="depends on the texts encoded before it"):
        load_teacher(TeacherConfig(model=str(tmp_path), max_length=128))
    with pytest.raises(JasperError, match="depends on the texts encoded before it"):
        Student.build(StudentConfig(model=str(tmp_path), heads=[8], max_length=128))


def test_a_run_folder_and_a_home_folder_are_models(tiny_bert: Path, tmp_path: Path, monkeypatch) -> None:
    from jasper_fast.models.hub import model_revision, resolve_model

    folder = prompts_by_role(tiny_bert, tmp_path / "run" / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(tmp_path / "run")) == resolve_model("~/run") == str(folder)
    assert load_teacher(TeacherConfig(model="~/run")).encode(TEXTS).shape == (4, 32)
    before = model_revision(str(folder))
    (tmp_path / "far").mkdir()
    (folder / "2_Far").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "model.safetensors").write_bytes(b"other weights")
    assert model_revision(str(folder)) != before, "files in a linked folder count as well"


def test_a_disabled_prompt_takes_no_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    prompts = {"query": LONG_PROMPT, "document": ""}
    folder = save(tmp_path / "model", [transformer(tiny_bert), pooling()], prompts=prompts)
    with pytest.raises(JasperError, match="the query prompt .* fill the maximum length of 8 tokens"):
        load_teacher(TeacherConfig(model=str(folder), max_length=8))
    load_teacher(TeacherConfig(model=str(folder), max_length=8, prompts={"query": ""}))


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "somebody/something"])
def test_the_kind_of_a_hub_model_is_read_from_the_cache_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jasper_fast.models import sentence_transformer as module

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: pytest.fail("the network was used"))
    module.check_embeds(name, name)  # no kind is known, so it is not rejected
