"""Small ONNX graphs of texts, made by hand, with the tokenizer of a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WIDTH = 12
POSITIONS = 64


def weights(vocabulary: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"table": (vocabulary, 16), "positions": (POSITIONS, 16), "layer": (16, WIDTH), "score": (WIDTH, 1)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def text_graph(
    model: Path,
    folder: Path,
    outputs: Sequence[str] = ("last_hidden_state",),
    *,
    file: str = "onnx/model.onnx",
    labels: int = 1,
    positions: int = POSITIONS,
) -> Path:
    """Write a graph that embeds tokens by id and position, and return its file.

    Outputs: ``last_hidden_state`` (n, tokens, 12), ``sentence_embedding`` (n, 12) which is the mean, ``pooler_output``
    (n, 12) of the first token, ``logits`` (n, labels) and ``ids`` (n, tokens, 1, 1), which is no output of a model.
    """
    from onnx import TensorProto, helper, numpy_helper, save
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)
    tables = weights(len(AutoTokenizer.from_pretrained(model)))
    tables["positions"] = tables["positions"][:positions]
    tables["score"] = np.repeat(tables["score"], labels, axis=1)
    make = helper.make_node
    constants = {"one": np.int64(1), "zero": np.array([0], np.int64), "last": np.array([-1], np.int64)}
    constants |= {"middle": np.array([1], np.int64), "start": np.int64(0), "two": np.array([2], np.int64)}
    nodes = [
        make("Gather", ["table", "input_ids"], ["tokens"]),
        make("Shape", ["input_ids"], ["shape"]),
        make("Gather", ["shape", "one"], ["length"], axis=0),
        make("Range", ["start", "length", "one"], ["places"]),
        make("Gather", ["positions", "places"], ["placed"]),
        make("Add", ["tokens", "placed"], ["summed"]),
        make("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        make("Unsqueeze", ["types", "last"], ["typed"]),
        make("Add", ["summed", "typed"], ["inputs"]),
        make("MatMul", ["inputs", "layer"], ["last_hidden_state"]),
        make("Cast", ["attention_mask"], ["float_mask"], to=TensorProto.FLOAT),
        make("Unsqueeze", ["float_mask", "last"], ["mask"]),
        make("Mul", ["last_hidden_state", "mask"], ["masked"]),
        make("ReduceSum", ["masked", "middle"], ["sums"], keepdims=0),
        make("ReduceSum", ["mask", "middle"], ["counts"], keepdims=0),
        make("Div", ["sums", "counts"], ["sentence_embedding"]),
        make("Gather", ["last_hidden_state", "start"], ["pooler_output"], axis=1),
        make("MatMul", ["sentence_embedding", "score"], ["logits"]),
        make("Unsqueeze", ["mask", "last"], ["ids"]),
    ]
    shapes = {
        "last_hidden_state": ["n", "tokens", WIDTH],
        "sentence_embedding": ["n", WIDTH],
        "pooler_output": ["n", WIDTH],
        "logits": ["n", labels],
        "ids": ["n", "tokens", 1, 1],
    }
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "tokens"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in (tables | constants).items()]
    graph = helper.make_graph(nodes, "texts", inputs, results, stored)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def quantized(file: Path) -> Path:
    """Replace a graph by its int8 form, whose activations have one scale for a whole batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    int8 = file.with_name("int8.onnx")
    quantize_dynamic(file, int8, weight_type=QuantType.QInt8)
    int8.replace(file)
    return file
