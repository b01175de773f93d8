"""Smaller exports: the same embeddings for kept tokens, stock readers, target sizes, and errors."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from jasper_fast import compare, export
from jasper_fast.config.models import StudentConfig
from jasper_fast.exporting.flat import export_flat
from jasper_fast.exporting.shrink import ShrinkRequest, Step, add_options, shrink, shrink_request
from jasper_fast.exporting.student import export_student
from jasper_fast.exporting.token_table import folder_bytes
from jasper_fast.models.folder import read_json
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError

MB = 1e6


@pytest.fixture(scope="module")
def flats(tiny_bert: Path, tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Flat exports with a document prompt, one for each kind of tokenizer."""
    folder, made = tmp_path_factory.mktemp("flats"), {}
    for name, model in (("bert", tiny_bert), ("qwen2", tiny_qwen2)):
        torch.manual_seed(1)
        config = StudentConfig(
            model=str(model), heads=[24], max_length=20, prompts={"query": "", "document": "the {text}"}
        )
        export_student(Student.build(config).eval(), folder / name / "model")
        made[name] = export_flat(folder / name / "model", 24, folder / name / "flat")
    return made


@pytest.fixture
def copy(flats: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(flats[name], tmp_path / name))


@pytest.fixture
def corpus(tiny_texts: list[str], tmp_path: Path) -> str:
    """The first 60 texts, as one column of two."""
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"title": "the", "body": text}) + "\n" for text in tiny_texts[:60]))
    return str(file)


def stock(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_a_pruned_vocabulary_keeps_embeddings(
    name: str, flats: dict[str, Path], copy: Callable[[str], Path], corpus: str, tiny_texts: list[str]
) -> None:
    folder = copy(name)
    (folder / "vocab.txt").write_text("old")
    whole, pruned = shrink(ShrinkRequest(vocabulary=(corpus,), columns=("title", "body")), folder)
    before, after = stock(flats[name]), stock(folder)
    table = after[0].model.get_input_embeddings()
    rows = read_json(folder / "config.json")["vocab_size"]
    assert rows == pruned.tokens == len(table.weight) == len(after.tokenizer) < len(before.tokenizer)
    assert not (folder / "vocab.txt").exists() and folder_bytes(folder) < folder_bytes(flats[name])
    np.testing.assert_allclose(
        after.encode_document(tiny_texts[:60]), before.encode_document(tiny_texts[:60]), atol=1e-6
    )
    other = [text for text in tiny_texts[60:] if len(after.tokenize([text])["input_ids"][0]) != 0]
    assert np.isfinite(after.encode_document([*other, "ночь", "水", "\x07"])).all()
    assert pruned.agreement == pytest.approx(1) and pruned.removed < 0.002
    assert read_json(folder / "training.json")["shrunk"][1]["tokens"] == rows


def test_float16_weights_give_float32_embeddings(
    flats: dict[str, Path], copy: Callable[[str], Path], tiny_texts: list[str]
) -> None:
    folder = copy("bert")
    shrink(ShrinkRequest(half=True), folder)
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(folder / file).values()} == {torch.float16}
    assert read_json(folder / "config.json")["dtype"] == "float32"
    model = stock(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found, expected = model.encode(tiny_texts), stock(flats["bert"]).encode(tiny_texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - expected).max() > 1e-6


def test_a_size_is_reached_with_float16_and_fewer_tokens(
    flats: dict[str, Path], copy: Callable[[str], Path], corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("qwen2")
    whole, step = shrink(ShrinkRequest((corpus,), ("body",), max_mb=0.07, graph=False), folder)
    assert 0.068 < step.mb <= 0.07 < whole.mb and folder_bytes(folder) == pytest.approx(step.mb * MB, abs=1000)
    assert step.tokens == len(stock(folder).tokenizer) and 0 < step.removed < 0.5 and 0.2 < step.agreement < 1
    assert f"float16 weights: {step.mb:.2f} MB, {step.tokens} tokens" in capsys.readouterr().out


LIMIT = 0.0695  # with all tokens, the graph takes a little more, even with a quarter of them fine


@pytest.fixture
def graph(copy: Callable[[str], Path], corpus: str) -> tuple[Path, Step]:
    """A folder with a small graph, and the step that made it."""
    folder = copy("bert")
    _, step = shrink(ShrinkRequest((corpus,), ("body",), max_mb=LIMIT, graph=True), folder)
    return folder, step


def run_graph(folder: Path, batches: list[list[str]]) -> np.ndarray:
    """Encode batches with onnxruntime and tokenizers alone, (n, 24)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model_int8.onnx"))
    assert session.get_modelmeta().custom_metadata_map["activations"] in ("int8", "float32")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    rows = []
    for batch in batches:
        encoded = tokenizer.encode_batch(batch)
        inputs = {
            "input_ids": np.array([one.ids for one in encoded]),
            "attention_mask": np.array([one.attention_mask for one in encoded]),
        }
        rows += session.run(["sentence_embedding"], inputs)
    return np.concatenate(rows)


def test_a_graph_of_integers(graph: tuple[Path, Step], flats: dict[str, Path], tiny_texts: list[str]) -> None:
    folder, step = graph
    assert not list(folder.rglob("*.safetensors")) and not (folder / "modules.json").exists()
    assert 0.95 * LIMIT * MB < folder_bytes(folder) <= LIMIT * MB
    rows = run_graph(folder, [[f"the {text}" for text in tiny_texts[:20]]])
    expected = stock(flats["bert"]).encode_document(tiny_texts[:20])
    assert (rows * expected).sum(axis=1).min() > 0.95
    assert 0.1 < step.agreement < 1 and step.mb <= LIMIT and step.tokens < 125 and "fine tokens" in step.name


def test_a_text_of_a_graph_does_not_depend_on_its_batch(graph: tuple[Path, Step], tiny_texts: list[str]) -> None:
    folder, _ = graph
    texts = [*tiny_texts[:7], " ".join(tiny_texts[7:9])]  # one of them is longer, so the others are padded
    together, alone = run_graph(folder, [texts]), run_graph(folder, [[text] for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_one_call_fits_the_size_with_its_card_and_golden_file(flats: dict[str, Path], tmp_path: Path) -> None:
    source, out = flats["bert"].parent / "model", tmp_path / "out"
    assert export.main([str(source), "--weights", "fp16", "--max-mb", "0.17", "--out", str(out)]) == 0
    assert folder_bytes(out) <= 0.17 * MB < folder_bytes(source) + 60_000
    assert {"README.md", "golden.json", "quality.json"} <= {file.name for file in out.iterdir()}
    assert compare.main([str(out / "golden.json"), str(out)]) == 0
    with pytest.raises(JasperError, match="--max-mb: .*Nothing was published. Fix: give"):
        export.main([str(source), "--weights", "fp16", "--max-mb", "0.1", "--out", str(tmp_path / "smaller")])
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_unreachable_size_names_the_smallest(copy: Callable[[str], Path], corpus: str) -> None:
    folder = copy("bert")
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(JasperError, match=r"cannot be made that small \(got 0\.\d+ MB at least.*Fix: give --max-mb"):
        shrink(ShrinkRequest(vocabulary=(corpus,), columns=("body",), max_mb=0.01, graph=False), folder)
    with pytest.raises(JasperError, match=r"Fix: give --vocabulary TEXTS"):
        shrink(ShrinkRequest(max_mb=0.01, graph=False), folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == files
    assert not list(folder.parent.glob(".unfinished*"))


def test_a_large_limit_changes_nothing(copy: Callable[[str], Path]) -> None:
    folder = copy("bert")
    before = (folder / "model.safetensors").read_bytes()
    assert len(shrink(ShrinkRequest(max_mb=50), folder)) == 1
    assert (folder / "model.safetensors").read_bytes() == before
    assert shrink(ShrinkRequest(), folder) == []


def test_a_lost_language_is_rejected(copy: Callable[[str], Path], tiny_texts: list[str], tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("zzz\nqqq xx\n" * 40)
    with pytest.raises(
        JasperError, match=r"docs: the pruned vocabulary .*lost words in LATIN letters .*Fix: add texts"
    ):
        shrink(ShrinkRequest((str(foreign),), checks={"docs": tiny_texts}), copy("qwen2"))


def test_bad_requests(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("bert")
    with pytest.raises(JasperError, match=r"--max-mb: got 0, expected a size above 0 MB\. Fix"):
        shrink(ShrinkRequest(max_mb=0), folder)
    with pytest.raises(JasperError, match=r"--weights fp16 is for .*Fix"):
        shrink(ShrinkRequest(half=True, graph=True, max_mb=1), folder)
    tensors = load_file(folder / "2_Dense" / "model.safetensors")
    save_file({name: tensor + 1e6 for name, tensor in tensors.items()}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(JasperError, match=r"float16 cannot store the weight linear.*got 1e\+06.*Fix"):
        shrink(ShrinkRequest(half=True), folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(JasperError, match="tokenizer"):
        shrink(ShrinkRequest(vocabulary=(str(tmp_path),)), folder)


def test_the_options_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--onnx", "--int8", "--onnx-only", "--trust-remote-code"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--columns", default=["text"])
    add_options(parser)
    asked = parser.parse_args(["--vocabulary", "a.txt", "--vocabulary", "b", "--max-mb", "9.5", "--onnx-only"])
    assert shrink_request(asked) == ShrinkRequest(vocabulary=("a.txt", "b"), max_mb=9.5, graph=True)
    assert shrink_request(parser.parse_args(["--weights", "fp16", "--onnx"])) == ShrinkRequest(half=True)
    assert shrink_request(parser.parse_args([])) == ShrinkRequest()
    with pytest.raises(JasperError, match=r"--max-mb writes one form .*got --int8.*Fix: leave out --int8"):
        shrink_request(parser.parse_args(["--max-mb", "10", "--int8"]))
