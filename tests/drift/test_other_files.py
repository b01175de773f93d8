"""OpenVINO and GGUF files as a side of a comparison."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from jasper_fast import compare
from jasper_fast.drift.comparison import compare_models, open_side
from jasper_fast.drift.llama import GgufSide
from jasper_fast.exporting.gguf import write_gguf
from jasper_fast.exporting.golden import Text
from jasper_fast.exporting.llama_server import PATH_VARIABLE, find_llama_server
from jasper_fast.exporting.openvino import write_openvino
from jasper_fast.utils.errors import JasperError
from tests.helpers.adapted import PROMPTS

LENGTH = 24
ASCII = "the old bridge over the river\nthe river\nthe tax on imported wheat and a cell under the microscope\n"


@pytest.fixture(scope="module")
def converted(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export with an OpenVINO model in place of its graphs and weights."""
    pytest.importorskip("openvino", reason="the extra `openvino`")
    folder = tmp_path_factory.mktemp("openvino") / "model"
    shutil.copytree(exported, folder)
    file = folder / "openvino" / "openvino_model.xml"
    write_openvino(folder / "onnx" / "model.onnx", file, {"max_tokens": "40"})
    shutil.rmtree(folder / "onnx")
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "2_Dense")
    return folder


@pytest.mark.parametrize("file", ["", "openvino", "openvino/openvino_model.xml"])
def test_an_openvino_model_passes(exported: Path, converted: Path, file: str) -> None:
    assert compare.main([str(exported / "golden.json"), str(converted / file)]) == 0


def test_facts_of_an_openvino_model(converted: Path) -> None:
    side = open_side(str(converted))
    assert (side.kind, side.facts.int8, side.facts.max_tokens) == ("OpenVINO model openvino_model.xml", False, 40)
    assert side.facts.prompts == {"document": "", **PROMPTS}


def test_a_fault_of_an_openvino_model_is_found(exported: Path, converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "model"))
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(settings.read_text().replace(PROMPTS["query"], ""))
    found = compare_models(str(exported), str(folder))
    assert [finding.kind for finding in found.findings] == ["prompt"]


def test_an_openvino_model_that_cannot_be_opened(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "model"))
    (folder / "openvino" / "openvino_model.xml").write_text("<html/>")
    with pytest.raises(JasperError, match=r"OpenVINO cannot open the file .*Fix: export the model again"):
        open_side(str(folder))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(JasperError, match=r"the package openvino is missing\. Fix: `pip install openvino`"):
        open_side(str(converted))


@pytest.fixture(scope="module")
def llama(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a head, with its GGUF file."""
    pytest.importorskip("gguf", reason="the extra `gguf`")
    if find_llama_server() is None:
        pytest.skip("llama.cpp's server is not installed")
    folder = tmp_path_factory.mktemp("gguf") / "model"
    modules = [Transformer(str(tiny_bert), max_seq_length=LENGTH), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=modules, prompts=dict(PROMPTS), device="cpu").save(str(folder))
    write_gguf(folder)
    return folder


def test_a_gguf_file_passes(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text(ASCII)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("model.gguf", "config_sentence_transformers.json"):
        shutil.copy(llama / name, alone)
    for side in (llama / "model.gguf", alone):
        assert compare.main([str(llama), str(side), "--texts", str(tmp_path / "texts.txt")]) == 0
    side = open_side(str(alone))
    assert isinstance(side, GgufSide) and side.kind == "GGUF file model.gguf" and side.facts.max_tokens == LENGTH
    assert side.embed([Text("query", "the river " * 99)]).shape == (1, 32)


def test_a_gguf_file_without_its_prompt_is_found(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "model.gguf", tmp_path / "other.gguf")
    found = compare_models(str(llama), str(tmp_path / "other.gguf"))
    assert "prompt" in [finding.kind for finding in found.findings]


def test_a_gguf_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the extra `gguf`")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"no model")
    if find_llama_server() is not None:
        with pytest.raises(JasperError, match=r"model\.gguf: not a GGUF file .*Fix: export the model again"):
            open_side(str(file))
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(JasperError, match=r"llama\.cpp's server, .*, is missing\. Fix: `pip install gguf mineru"):
        open_side(str(file))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(JasperError, match=r"model\.gguf: the package gguf is missing\. Fix: `pip install gguf"):
        open_side(str(file))


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(JasperError, match=r"got \.bin, expected \.onnx, \.xml, \.gguf, \.json"):
        open_side(str(tmp_path / "model.bin"))
    with pytest.raises(JasperError, match="no such file or folder"):
        open_side(str(tmp_path / "model.gguf"))
