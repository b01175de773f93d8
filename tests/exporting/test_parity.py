"""An export is published only if stock sentence-transformers reproduces the student's embeddings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jasper_fast.config.models import StudentConfig
from jasper_fast.exporting import flat, onnx
from jasper_fast.exporting import student as exporting_student
from jasper_fast.exporting.flat import export_flat
from jasper_fast.exporting.onnx import export_onnx
from jasper_fast.exporting.parity import check_export
from jasper_fast.exporting.runtimes import Runtime
from jasper_fast.exporting.student import export_student
from jasper_fast.models.folder import load_student
from jasper_fast.models.heads import routes_of
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError

TEXTS = ["forty boxes of apples", "one", "the city council quietly sold the wooden bridge near the station"]
PROMPTS = {"query": "the old bridge: ", "document": ""}


@pytest.fixture
def student(tiny_bert: Path) -> Student:
    config = StudentConfig(model=str(tiny_bert), heads=[24, 8], max_length=20, prompts=PROMPTS, vector_dropout=0.1)
    return Student.build(config)


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))

    return edit


def swap_heads(folder: Path) -> None:
    file = folder / "2_Router" / "router_config.json"
    content = json.loads(file.read_text())
    content["parameters"]["route_mappings"] = {"('query', None)": "8", "('document', None)": "8"}
    file.write_text(json.dumps(content))


def other_weights(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        (file,) = folder.glob(name)
        held = load_file(file)
        first = sorted(held)[-1]
        save_file({**held, first: held[first] * 1.01}, file, metadata={"format": "pt"})

    return edit


def lose_normalize(folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(listed[:-1]))


def cased(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))


def lose_module(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").unlink()


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated earlier": (edit_json("sentence_bert_config.json", max_seq_length=9), "differs from the trained one"),
    "query prompt lost": (
        edit_json("config_sentence_transformers.json", prompts={"query": "", "document": ""}),
        "query",
    ),
    "first token in place of the mean": (edit_json("1_Pooling/config.json", pooling_mode="cls"), "at width 24"),
    "no normalisation": (lose_normalize, "at width 24"),
    "roles at another width": (swap_heads, "encode_query .got a width of 8, expected 24"),
    "another encoder weight": (other_weights("model.safetensors"), "at width 24"),
    "another head weight": (other_weights("2_Router/8_*/model.safetensors"), "at width 8"),
    "tokenizer without its normalizer": (cased, "differs from the trained one"),
    "a module missing": (lose_module, "cannot be loaded by sentence-transformers"),
    "layer norm of another epsilon": (edit_json("config.json", layer_norm_eps=0.1), "at width 24"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_export_that_differs_is_not_published(
    case: str, student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, message = SPOILT[case]
    write_card = exporting_student.write_card
    monkeypatch.setattr(
        exporting_student, "write_card", lambda folder, *a, **k: (write_card(folder, *a, **k), spoil(Path(folder)))
    )
    with pytest.raises(JasperError, match=message):
        export_student(student, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


def test_a_check_leaves_the_student_as_it_was(student: Student, tmp_path: Path) -> None:
    export_student(student, tmp_path / "model")
    student.train()
    state = torch.get_rng_state()
    check_export(student, tmp_path / "model")
    assert student.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "kind", ["types of the template", "xlnet", "t5", "squeezebert", "layoutlm", "longformer", "ibert"]
)
def test_unusual_encoders_export_what_they_train(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = unusual(kind, tiny_bert, tmp_path / "base")
    config = StudentConfig(model=str(folder), heads=[16], max_length=24, layers=2)
    trained = Student.build(config).eval()
    exported = SentenceTransformer(str(export_student(trained, tmp_path / "out")), device="cpu")
    with torch.no_grad():
        expected = F.normalize(trained.project(trained.pool(trained.tokenize(TEXTS)))[16], dim=1)
    torch.testing.assert_close(exported.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-6, rtol=0)
    again = Student.build(config.model_copy(update={"model": str(tmp_path / "out"), "layers": None}))
    assert again.num_layers == 2, "an export can be a student"


def unusual(kind: str, tiny_bert: Path, folder: Path) -> Path:
    from tokenizers import processors
    from transformers import AutoConfig, AutoModel, AutoTokenizer, T5Config, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "initializer_range": 0.2, "pad_token_id": 0}
    more = {
        "squeezebert": {"embedding_size": 32},
        "longformer": {"attention_window": [8] * 3, "max_position_embeddings": 66},
        "xlnet": {"d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 32},
    }
    torch.manual_seed(7)
    if kind == "t5":
        T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=3, num_heads=2, pad_token_id=0)
        ).save_pretrained(folder)
    else:
        name = "bert" if kind == "types of the template" else kind
        AutoModel.from_config(AutoConfig.for_model(name, **{**size, **more.get(kind, {})})).save_pretrained(folder)
    if kind in ("types of the template", "xlnet"):
        last = 1 if kind == "types of the template" else 2
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A:{last - 1} [SEP]:0 [CLS]:{last}", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save_pretrained(folder)
    if kind in ("types of the template", "xlnet"):
        names = ["input_ids", "token_type_ids", "attention_mask"]
        edit_json("tokenizer_config.json", model_input_names=names)(folder)
    return folder


@pytest.mark.parametrize("kind", ["t5", "xlnet"])
def test_an_architecture_without_an_onnx_form_is_named(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    trained = Student.build(
        StudentConfig(model=str(unusual(kind, tiny_bert, tmp_path / "base")), heads=[16], max_length=24)
    )
    export_student(trained, tmp_path / "model")
    with pytest.raises(JasperError, match=r"cannot export (T5Encoder|XLNet)Model to ONNX"):
        export_onnx(tmp_path / "model", 16, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_flat_form_that_differs_is_not_published(student: Student, tmp_path: Path, monkeypatch: Any) -> None:
    export_student(student, tmp_path / "model")
    write = flat.write_flat
    monkeypatch.setattr(
        flat, "write_flat", lambda source, width, folder: (write(source, width, folder), lose_normalize(folder))
    )
    with pytest.raises(JasperError, match="at width 8"):
        export_flat(tmp_path / "model", 8, tmp_path / "flat")
    assert not (tmp_path / "flat").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("training.json", cut, "training.json is corrupt"),
        ("training.json", lambda file: file.write_text("{}"), "training.json is corrupt .*student"),
        ("training.json", lambda file: file.write_text('{"student": []}'), "training.json is corrupt"),
        ("training.json", lambda file: file.write_text('{"student": {"heads": "no"}}'), "training.json is corrupt"),
        ("training.json", Path.unlink, "training.json is missing"),
        ("2_Router/document_24_0_Dense/model.safetensors", cut, "model.safetensors cannot be loaded"),
        ("2_Router/document_24_0_Dense/model.safetensors", Path.unlink, "model.safetensors cannot be loaded"),
    ],
)
def test_a_damaged_export_is_reported_with_the_fix(student, tmp_path, name, damage, message):
    folder = export_student(student, tmp_path / "model")
    heads = routes_of(folder)
    damage(folder / name.replace("document_24_0_Dense", heads[24]))
    with pytest.raises(JasperError, match=rf"{message}.*Fix: export the run again"):
        load_student(folder)


def test_an_onnx_graph_that_gives_nan_is_different(monkeypatch):
    """NaN compares as False with everything, so it must not be lost in a maximum."""
    calls = []

    def graph(texts: list[str], role: str) -> np.ndarray:
        calls.append(role)
        return np.full((len(texts), 4), np.nan if len(calls) == 2 else 0.0, np.float32)

    def pytorch(texts: list[str], role: str) -> np.ndarray:
        return np.zeros((len(texts), 4), np.float32)

    opened = [Runtime("pytorch", "modules.json", pytorch), Runtime("onnx", onnx.ONNX_FILE, graph)]
    monkeypatch.setattr(onnx, "open_runtimes", lambda *_, **__: opened)
    checks = onnx._compare(Path("folder"), ["onnx"], False)
    assert math.isnan(checks["difference"])
    with pytest.raises(JasperError, match="differs from PyTorch"):
        onnx._check_graphs(Path("folder"), checks)
