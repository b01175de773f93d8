"""Graphs of an export: int8, tokens that went through the head, OpenVINO, and one way to encode with all of them."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jasper_fast.config.models import StudentConfig
from jasper_fast.exporting import int8
from jasper_fast.exporting.onnx import _token_modules, export_onnx, graph_lines
from jasper_fast.exporting.openvino import require_openvino
from jasper_fast.exporting.runtimes import FILES, open_runtimes
from jasper_fast.exporting.student import export_student
from jasper_fast.models.embedder import load_model
from jasper_fast.models.folder import read_json
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError
from tests.helpers.adapted import PROMPTS, TEXTS, unit

WIDTH = 8


@pytest.fixture(scope="module")
def source(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    fields = {"heads": [24, WIDTH], "max_length": 20, "prompts": PROMPTS, "layers": [0, 2]}
    student = Student.build(StudentConfig(model=str(tiny_bert), **fields))
    for head in student.heads.values():
        torch.nn.init.normal_(head.bias, std=0.5)  # a head with a bias, which must not be lost or added twice
    return export_student(student, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(source, WIDTH, tmp_path_factory.mktemp("whole") / "model", int8=True)


@pytest.fixture(scope="module")
def lean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(source, WIDTH, tmp_path_factory.mktemp("lean") / "model", weights=False)


def session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_all_runtimes_give_the_embeddings_of_stock_sentence_transformers(whole: Path) -> None:
    stock = load_model(str(whole), device="cpu")
    texts = [text for text in TEXTS for _ in range(9)]  # more than one batch, in an order unlike that of lengths
    runtimes = {runtime.name: runtime for runtime in open_runtimes(whole, threads=1)}
    assert list(runtimes) == ["pytorch", "onnx", "onnx-int8"]
    for role, stock_encode in (("query", stock.encode_query), ("document", stock.encode_document)):
        expected = stock_encode(texts)
        for name, runtime in runtimes.items():
            found = runtime.encode(texts, role)
            assert found.dtype == np.float32 and found.shape == (len(texts), WIDTH)
            assert (found * expected).sum(axis=1).min() > (0.999 if name == "onnx-int8" else 0.99999)
    queries, documents = (runtimes["onnx"].encode(TEXTS, role) for role in ("query", "document"))
    assert np.abs(queries - documents).max() > 1e-2  # the prompt changes embeddings, so leaving it out would be seen
    assert runtimes["onnx"].encode([], "query").shape == (0, WIDTH)


def test_runtimes_that_cannot_be_opened_are_named(
    whole: Path, lean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [runtime.name for runtime in open_runtimes(lean)] == ["onnx"]
    with pytest.raises(JasperError, match="nothing to open for 'pytorch'.*got onnx, expected modules.json"):
        open_runtimes(lean, ["pytorch"])
    with pytest.raises(JasperError, match="expected one of pytorch, onnx"):
        open_runtimes(whole, ["tensorrt"])
    damaged = shutil.copytree(lean, tmp_path / "damaged")
    (damaged / FILES["onnx"]).write_bytes(b"no graph")
    with pytest.raises(JasperError, match="cannot load the graph.*export the model again"):
        open_runtimes(damaged)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(JasperError, match="onnxruntime is missing, .*Fix: `pip install onnxruntime`"):
        open_runtimes(whole, ["onnx"])


def test_tokens_went_through_the_head(lean: Path, whole: Path) -> None:
    """A program that pools tokens itself, and applies no head, gets the embeddings."""
    graph = session(lean / FILES["onnx"])
    assert [output.name for output in graph.get_outputs()] == ["sentence_embedding", "last_hidden_state"]
    ids = np.array([[2, 7, 8, 9, 3], [2, 9, 3, 0, 0]])
    mask = (ids > 0).astype(np.int64)
    given = {"input_ids": ids, "attention_mask": mask}
    embeddings, tokens = graph.run(None, given)
    assert tokens.shape == (2, 5, WIDTH)
    pooled = (tokens * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(unit(pooled), embeddings, atol=1e-5)
    (expected,) = session(whole / FILES["onnx"]).run(None, given)  # head after the pooling, and no token output
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_a_folder_without_weights_lists_the_modules_that_a_graph_needs(lean: Path) -> None:
    """sentence-transformers applies the listed modules to the tokens, so a Dense module would apply the head twice."""
    kinds = [module["type"].rpartition(".")[2] for module in read_json(lean / "modules.json")]
    assert kinds == ["Transformer", "Pooling", "Normalize"] and not (lean / "2_Dense").exists()
    assert read_json(lean / "1_Pooling" / "config.json")["word_embedding_dimension"] == WIDTH
    assert "model_args" not in read_json(lean / "sentence_bert_config.json")
    assert not list(lean.rglob("*.safetensors"))


def test_some_modules_keep_their_order(plain: Any) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling

    stem, linear = plain[0], Dense(32, 20, activation_function=nn.Identity())
    moved = _token_modules([stem, Pooling(32, "cls"), linear])
    assert moved is not None and [type(module).__name__ for module in moved] == ["Transformer", "Dense", "Pooling"]
    assert linear.module_input_name == "sentence_embedding"  # the model itself stays as it is
    assert _token_modules([stem, Pooling(32, "max"), linear]) is None
    assert _token_modules([stem, Pooling(32, "cls"), Dense(32, 20)]) is None  # tanh
    assert _token_modules([stem]) is None


def test_int8_tables_have_one_scale_per_row(tmp_path: Path) -> None:
    """Two look-ups share a table whose rows differ by a factor of 1,000. That of tokens may keep it in float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    rows = (generator.standard_normal((300, 16)) * np.geomspace(1, 1000, 300)[:, None]).astype(np.float32)
    rows[5] = 0
    matrix = generator.standard_normal((16, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["first"]),
        helper.make_node("Gather", ["table", "others"], ["second"]),
        helper.make_node("Gather", ["kinds", "others"], ["kind"]),
        helper.make_node("MatMul", ["first", "matrix"], ["product"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n"]) for name in ("input_ids", "others")]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("first", "second", "kind", "product")
    ]
    arrays = {"table": rows, "kinds": rows[:2], "matrix": matrix}
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="max_tokens", value="20")
    onnx.save(model, tmp_path / "g.onnx")
    stored = {}
    for name, tokens in (("plain", False), ("rows", True)):
        int8.quantize_graph(tmp_path / "g.onnx", tmp_path / f"{name}.onnx", tokens=tokens)
        quantized = onnx.load(tmp_path / f"{name}.onnx")
        stored[name] = {(tuple(i.dims), i.data_type) for i in quantized.graph.initializer}
        assert ("max_tokens", "20") in {(entry.key, entry.value) for entry in quantized.metadata_props}
        assert ((16, 4), TensorProto.FLOAT) not in stored[name]  # the matrix
    assert ((300, 16), TensorProto.FLOAT) in stored["plain"] and ((300, 16), TensorProto.FLOAT) not in stored["rows"]
    assert {((300, 16), TensorProto.INT8), ((300, 1), TensorProto.FLOAT)} <= stored["rows"]
    given = {"input_ids": np.arange(300), "others": np.arange(300) % 2}
    first, second, kind, product = session(tmp_path / "rows.onnx").run(None, given)
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert (np.abs(first - rows) <= 0.501 * step).all() and np.abs(first - rows).max() > 0
    np.testing.assert_array_equal(second, first[:2][given["others"]])
    np.testing.assert_array_equal(kind, rows[:2][given["others"]])
    # Each token has its own scale too: with one for all, the smallest rows would be lost.
    errors = np.abs(product - rows @ matrix).max(axis=1)
    assert errors.max() > 0 and (errors <= 0.03 * np.linalg.norm(rows, axis=1) * np.linalg.norm(matrix)).all()


@pytest.mark.parametrize("factor, stored", [(1, np.float16), (1e9, np.float32)])
def test_heads_are_float16(factor: float, stored: type, tmp_path: Path) -> None:
    """A weight beyond the range of float16 stays as it is."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = (np.random.default_rng(0).standard_normal((20, 16)) * factor).astype(np.float32)
    nodes = [helper.make_node("Gemm", ["pooled", "weight"], ["rows"], transB=1)]
    inputs = [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["n", 16])]
    outputs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 20])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    int8.quantize_graph(tmp_path / "g.onnx", tmp_path / "int8.onnx")
    (kept,) = onnx.load(tmp_path / "int8.onnx").graph.initializer
    assert numpy_helper.to_array(kept).dtype == stored
    pooled = np.eye(16, dtype=np.float32)
    (rows,) = session(tmp_path / "int8.onnx").run(None, {"pooled": pooled})
    np.testing.assert_allclose(rows, weight.astype(stored).T, rtol=1e-6)


@pytest.mark.parametrize(
    "flags, machine, found",
    [("avx2 avx512f", "x86_64", False), ("avx2 avx_vnni", "x86_64", True), ("", "x86_64", False), ("", "arm64", True)],
)
def test_dot_products_of_a_cpu(
    tmp_path: Path, flags: str, machine: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    file = tmp_path / "cpuinfo"
    if flags:  # else not Linux
        file.write_text(f"processor : 0\nflags\t: fpu {flags}\n", encoding="utf-8")
    assert int8.has_dot_products(file) is found


def test_a_cpu_without_dot_products_computes_in_float32(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sums of int8 products may overflow there, so the int8 graph of another machine is reported too."""
    import onnx

    for dot_products, activations, level in ((True, "int8", 4), (False, "float32", 1)):
        monkeypatch.setattr(int8, "has_dot_products", lambda found=dot_products: found)
        int8.quantize_graph(whole / FILES["onnx"], tmp_path / "g.onnx")
        assert ("computes in float32" in capsys.readouterr().err) is not dot_products
        model = onnx.load(tmp_path / "g.onnx")
        products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        levels = [a.i for node in products for a in node.attribute if a.name == "accuracy_level"]
        assert levels == [level] * 12  # two layers: query, key, value, output, and two of the feed-forward network
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["activations"] == activations and metadata["max_tokens"] == "20"
        int8.check_int8_cpu(metadata, "g.onnx")
        assert capsys.readouterr().err == ""
    int8.check_int8_cpu({"activations": "int8"}, "g.onnx")
    assert "may overflow on this CPU" in capsys.readouterr().err


def test_exporters_leave_the_logging_of_the_program_alone() -> None:
    root = logging.getLogger()
    before = (root.level, [*root.handlers])
    with int8.quiet():
        root.addHandler(logging.NullHandler())
        root.setLevel(logging.INFO)
    assert (root.level, root.handlers) == before


def test_openvino_without_its_package_says_what_to_type(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(JasperError, match="--openvino: the package openvino is missing. Fix: `pip install openvino`"):
        export_onnx(source, WIDTH, tmp_path / "out", openvino=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(JasperError, match="extra `openvino`"):
        require_openvino()


def test_openvino_gives_the_same_embeddings(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra `openvino`")
    folder = export_onnx(source, WIDTH, tmp_path / "out", openvino=True)
    runtimes = {runtime.name: runtime for runtime in open_runtimes(folder, threads=1)}
    assert list(runtimes) == ["pytorch", "onnx", "openvino"]
    for role in ("query", "document"):
        expected = runtimes["pytorch"].encode(TEXTS, role)
        np.testing.assert_allclose(runtimes["openvino"].encode(TEXTS, role), expected, atol=1e-5)
    assert any(line.startswith("openvino/openvino_model.xml") and "at most" in line for line in graph_lines(folder))
