"""A model loads exactly the content of its files, for every loader and every kind of mismatch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jasper_fast.config.models import StudentConfig, TeacherConfig
from jasper_fast.exporting.student import export_student
from jasper_fast.models.embedder import load_model, model_encoder
from jasper_fast.models.student import Student
from jasper_fast.teachers.model import load_teacher
from jasper_fast.utils.errors import JasperError

TEXTS = ["forty boxes of apples", "the city council quietly sold the bridge", "one"]
Edit = Callable[[Path], None]


def build_student(folder: Path) -> Student:
    return Student.build(StudentConfig(model=str(folder), heads=[16], max_length=32))


def build_teacher(folder: Path) -> Any:
    return load_teacher(TeacherConfig(model=str(folder)))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "student": build_student,
    "teacher": build_teacher,
    "evaluated": lambda folder: model_encoder(load_model(str(folder))),
}


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    """Rewrite model.safetensors."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return edit


def settings(name: str, **fields: Any) -> Edit:
    """Change fields of a JSON file."""

    def edit(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**content, **fields}))

    return edit


def tokenizer(change: Callable[[Any], None]) -> Edit:
    """Change the tokenizer and save it again."""

    def edit(folder: Path) -> None:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(folder)
        change(loaded)
        loaded.save_pretrained(folder)

    return edit


def without(*endings: str) -> Edit:
    return weights(lambda held: {name: value for name, value in held.items() if not name.endswith(endings)})


def with_weight(name: str, shape: tuple[int, ...] = (32, 32)) -> Edit:
    return weights(lambda held: {**held, name: torch.ones(shape)})


def renamed(rename: Callable[[str], str]) -> Edit:
    return weights(lambda held: {rename(name): value for name, value in held.items()})


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits] and None


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def type_one(loaded: Any) -> None:
    from tokenizers import processors

    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:3 $A:3 [SEP]:3", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )


def not_a_number(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in held if name.endswith("output.dense.weight"))
    return {**held, name: torch.full_like(held[name], torch.nan)}


def nested(folder: Path) -> None:
    torch.save({"epoch": 3, "state_dict": load_file(folder / "model.safetensors")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


WRONG: dict[str, tuple[Edit, str]] = {
    "one weight missing": (without("layer.1.output.dense.bias"), "1 weights .*missing from its files"),
    "embeddings missing": (without("word_embeddings.weight"), "missing from its files"),
    "fewer layers than configured": (settings("config.json", num_hidden_layers=5), "missing from its files"),
    "more layers than configured": (settings("config.json", num_hidden_layers=2), "16 weights .*unknown to BertModel"),
    "an adapter next to its weights": (with_weight("encoder.layer.0.attention.self.query.lora_A"), "merge adapters"),
    "a projection that nothing reads": (with_weight("projection.weight"), "unknown to BertModel"),
    "other shapes": (settings("config.json", max_position_embeddings=65), "another shape than config.json"),
    "not a number": (weights(not_a_number), "not finite"),
    "a checkpoint around the weights": (nested, "cannot be loaded|could not be loaded|missing from its files"),
    "a shard missing": (lost_shard, "cannot be loaded|could not be loaded|no weights here"),
    "no tokenizer": (no_tokenizer, "maps all words to the same ids"),
    "a token without a row": (tokenizer(lambda t: t.add_tokens(["bridge2"])), "token 'bridge2' has id"),
    "a padding token without a row": (tokenizer(lambda t: t.add_special_tokens({"pad_token": "<p>"})), "'<p>' has id"),
    "token types beyond the table": (
        both(tokenizer(type_one), settings("tokenizer_config.json", model_input_names=["input_ids", "token_type_ids"])),
        "token type 3, but config.json has type_vocab_size 2",
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", WRONG)
def test_a_model_whose_files_disagree_is_rejected(case: str, loader: str, tiny_bert: Path, tmp_path: Path) -> None:
    edit, message = WRONG[case]
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    edit(folder)
    with pytest.raises(JasperError, match=message):
        LOADERS[loader](folder)


def big_table(folder: Path) -> None:
    settings("config.json", vocab_size=3000)(folder)
    weights(lambda held: held | {"embeddings.word_embeddings.weight": torch.randn(3000, 32)})(folder)


def test_a_tokenizer_far_smaller_than_the_table_is_of_another_model(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    big_table(folder)
    with pytest.raises(JasperError, match="tokenizer belongs to another model .got .* expected about 3000"):
        build_student(folder)


PREFIXES = {
    "DataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "sentence-transformers": lambda name: f"0.auto_model.{name}",
    "Lightning": lambda name: f"model.encoder.{name}",
    "a task model": lambda name: f"bert.{name}",
    "compiled layers": lambda name: re.sub(r"(layer\.\d+\.)", r"\1_orig_mod.", name),
    "FSDP": lambda name: "_fsdp_wrapped_module." + re.sub(r"(layer\.\d+\.)", r"\1_fsdp_wrapped_module.", name),
    "checkpointed and compiled": lambda name: (
        "_orig_mod." + re.sub(r"(layer\.\d+\.)", r"\1_checkpoint_wrapped_module._orig_mod.", name)
    ),
}


@pytest.mark.parametrize("loader", ["student", "evaluated"])
@pytest.mark.parametrize("wrapper", PREFIXES)
def test_prefixes_of_training_wrappers_are_stripped(wrapper: str, loader: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    renamed(PREFIXES[wrapper])(folder)
    encoder = build_student(folder).encoder if loader == "student" else load_model(str(folder))[0].model
    saved = load_file(tiny_bert / "model.safetensors")
    found = encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in saved.items() if name in found)
    assert len(found) > 40


@pytest.mark.parametrize("loader", ["student", "evaluated"])
@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"])
def test_task_heads_and_poolers_may_be_left_over_or_missing(
    head: str, loader: str, tiny_bert: Path, tmp_path: Path
) -> None:
    import transformers

    transformers.BertModel.from_pretrained(tiny_bert)
    model = getattr(transformers, head).from_pretrained(tiny_bert)
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    model.save_pretrained(folder)
    without("pooler.dense.weight", "pooler.dense.bias")(folder)
    LOADERS[loader](folder)


def test_looking_for_task_heads_logs_no_warning(tiny_bert: Path) -> None:
    """BertLMHeadModel warns that its configuration is not that of a decoder. It is built for its names only."""
    import logging

    import transformers

    from jasper_fast.models.loading import _task_heads

    model, records, handler = transformers.BertModel.from_pretrained(tiny_bert), [], logging.Handler()
    handler.emit = records.append
    logger, verbosity = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    try:
        assert "cls" in _task_heads(model)
        assert transformers.logging.get_verbosity() == logging.WARNING
    finally:
        logger.removeHandler(handler)
        transformers.logging.set_verbosity(verbosity)
    assert not records


# --- sentence-transformers folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock_folder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    parts = [modules.Transformer(str(tiny_bert)), modules.Pooling(32, "cls"), modules.Dense(32, 16)]
    folder = tmp_path_factory.mktemp("stock") / "model"
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder))
    return folder


def lost(*names: str) -> Edit:
    return lambda folder: (
        [shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink() for name in names]
        and None
    )


STOCK_WRONG: dict[str, tuple[Edit, str]] = {
    "no list of modules": (lost("modules.json"), "modules.json is missing"),
    "no pooling": (lost("1_Pooling"), "cannot be loaded"),
    "no dense head": (lost("2_Dense"), "cannot be loaded"),
    "no weights in the dense head": (lost("2_Dense/model.safetensors"), "cannot be loaded"),
    "dense head of another width": (settings("2_Dense/config.json", in_features=31), "cannot be loaded"),
    "longer than the position table": (
        settings("sentence_bert_config.json", max_seq_length=512),
        r"max_seq_length exceeds the position table \(got 512 tokens, expected at most 64\)",
    ),
    "more layers than configured": (settings("config.json", num_hidden_layers=2), "unknown to BertModel"),
}


@pytest.mark.parametrize("case", STOCK_WRONG)
def test_an_incomplete_sentence_transformers_folder_is_rejected(case: str, stock_folder: Path, tmp_path: Path) -> None:
    edit, message = STOCK_WRONG[case]
    folder = shutil.copytree(stock_folder, tmp_path / "model")
    edit(folder)
    with pytest.raises(JasperError, match=message):
        build_teacher(folder)


def roberta(folder: Path, tiny_bert: Path, padding: int) -> Path:
    """Save a small RoBERTa, whose positions start after the padding id of config.json."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    loaded = AutoTokenizer.from_pretrained(tiny_bert)
    config = RobertaConfig(
        vocab_size=len(loaded), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, pad_token_id=padding, type_vocab_size=2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loader", LOADERS)
def test_another_padding_id_matters_where_positions_are_counted_from_it(
    loader: str, tiny_bert: Path, tmp_path: Path, capsys
) -> None:
    LOADERS[loader](roberta(tmp_path / "same", tiny_bert, 0))
    assert "padding" not in capsys.readouterr().err
    with pytest.raises(JasperError, match="different padding ids .got 0 and 3., and positions are counted"):
        LOADERS[loader](roberta(tmp_path / "other", tiny_bert, 3))
    masked = shutil.copytree(tiny_bert, tmp_path / "masked")
    settings("config.json", pad_token_id=3)(masked)
    LOADERS[loader](masked)  # like the published multilingual MiniLM models
    assert "different padding ids (got 0 and 3). Padding is masked" in capsys.readouterr().err


def test_an_adapter_is_not_a_student(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(JasperError, match="merge it with PEFT"):
        build_student(folder)


def test_a_length_beyond_the_position_table_is_rejected(stock_folder: Path) -> None:
    with pytest.raises(JasperError, match="max length 65 is beyond the model's 64 positions. Fix: set at most 64"):
        load_model(str(stock_folder), 65)
    assert load_model(str(stock_folder), 64).max_seq_length == 64


def test_a_roberta_tokenizer_without_a_limit_stops_at_the_last_position(tiny_bert: Path, tmp_path: Path) -> None:
    """RoBERTa positions start after the padding id, so 66 rows hold 64 tokens with padding id 1."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    loaded = AutoTokenizer.from_pretrained(tiny_bert)
    config = RobertaConfig(
        vocab_size=len(loaded), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, pad_token_id=1, type_vocab_size=2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    loaded.model_max_length = 10**30
    loaded.pad_token = "[UNK]"
    loaded.save_pretrained(tmp_path)
    long = "the bridge near the station and " * 60
    found = model_encoder(load_model(str(tmp_path)))([long, "one"], "document")[32]
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", ["no padding token", "no end-of-text token either"])
def test_a_teacher_without_a_padding_token(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    state = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["pad_token"] + (["unk_token", "eos_token"] if kind != "no padding token" else [])
    state |= dict.fromkeys(names)
    (folder / "tokenizer_config.json").write_text(json.dumps(state))
    if kind == "no padding token":
        assert np.isfinite(build_teacher(folder).encode(TEXTS)).all()
    else:
        with pytest.raises(JasperError, match="no padding, end-of-text or unknown token"):
            build_teacher(folder)


def test_dry_run_reports_a_teacher_that_cannot_be_used(tiny_bert: Path, tmp_path: Path) -> None:
    from jasper_fast.config.load import load_config
    from jasper_fast.training.dry_run import describe_plan

    broken = shutil.copytree(tiny_bert, tmp_path / "teacher")
    without("layer.1.output.dense.bias")(broken)
    (tmp_path / "texts.txt").write_text("\n".join(f"text number {i}" for i in range(40)))
    config = load_config(
        {
            "name": "tiny",
            "student": {"model": str(tiny_bert), "heads": [32], "max_length": 32},
            "teachers": [{"model": str(broken)}],
            "data": {"sources": [{"path": str(tmp_path / "texts.txt")}], "cache": str(tmp_path / "cache")},
            "stages": [{"name": "distil", "train": ["*"], "heads": [32], "batch_size": 8, "steps": 2, "lr": 1e-3}],
        }
    )
    with pytest.raises(JasperError, match="missing from its files"):
        describe_plan(config, tmp_path / "run")


def test_loads_and_exports_show_no_bars_of_transformers(tiny_bert: Path, tmp_path: Path) -> None:
    """The user's own loads and saves have their bars again afterwards."""
    from transformers import AutoModel
    from transformers.utils import logging

    bars: list[str] = []

    def hook(factory: Any, args: Any, kwargs: Any) -> Any:
        bars.append(kwargs["desc"])
        return factory(*args, **kwargs)

    before = logging.set_tqdm_hook(hook)
    try:
        folder = export_student(build_student(tiny_bert), tmp_path / "model")
        build_teacher(tiny_bert)
        load_model(str(folder))
        assert bars == []
        AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "copy")
        assert bars == ["Loading weights", "Writing model shards"]
    finally:
        assert logging.set_tqdm_hook(before) is hook
