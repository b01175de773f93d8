"""A graph as one side of a comparison, run by onnxruntime or OpenVINO with the tokenizer of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jasper_fast.drift.recorded import holds_weights
from jasper_fast.drift.side import Facts, Prompts, Side, checked_rows
from jasper_fast.exporting.golden import ROLES, Text, by_role, golden_facts, installed_versions
from jasper_fast.exporting.openvino import OpenvinoGraph
from jasper_fast.models.graph import NO_LIMIT, graph_inputs, load_tokenizer, open_session, tokenizer_folder
from jasper_fast.models.hub import prompt_of, read_settings
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

BATCH = 32
OPENVINO_SUFFIX = ".xml"
GRAPHS = (  # in this order, if a folder is given
    "onnx/model.onnx",
    "model.onnx",
    "onnx/model_int8.onnx",
    "openvino/openvino_model.xml",
    "openvino_model.xml",
)


class GraphSide(Side):
    """Embeddings of a graph: its output ``sentence_embedding``, or its only output with two dimensions.

    Args:
        name: argument of the command.
        file: the graph, ``.onnx``, or ``.xml`` of OpenVINO. Its tokenizer and prompts are in its folder or in the
            folder above.

    Raises:
        JasperError: the runtime is missing, or the graph or its tokenizer cannot be loaded.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.file, self.folder = file, tokenizer_folder(name, file)
        self._graph = (OpenvinoGraph if file.suffix == OPENVINO_SUFFIX else _OnnxGraph)(name, file)
        self._output = _output(name, self._graph.outputs)
        self._tokenizer = load_tokenizer(name, self.folder)
        known, metadata = golden_facts(self.folder), self._graph.metadata
        self.max_tokens = (
            int(metadata["max_tokens"]) if metadata.get("max_tokens", "").isdigit() else known["max_tokens"]
        )
        if self.max_tokens is None and self._tokenizer.model_max_length < NO_LIMIT:
            self.max_tokens = int(self._tokenizer.model_max_length)
        prompts = read_settings(str(self.folder), None, "config_sentence_transformers.json").get("prompts") or {}
        self.prompts = {role: prompt_of(prompts, role) for role in ROLES}
        shared = {key: known[key] for key in ("modules", "pooling", "weights", "model")}
        versions, int8 = installed_versions(), self._graph.int8
        kind = f"{self._graph.kind} {file.name}{' with int8 weights' if int8 else ''}"
        super().__init__(
            name, kind, Facts(self.prompts, max_tokens=self.max_tokens, versions=versions, int8=int8, **shared)
        )

    def embed(self, texts: Sequence[Text], prompts: Prompts | None = None, *, together: bool = True) -> np.ndarray:
        """Embed texts in padded batches of 32, or one at a time."""
        used = self.prompts if prompts is None else prompts
        size = BATCH if together else 1

        def encode(group: list[str], role: str) -> np.ndarray:
            inputs = [used[role] + text for text in group]
            batches = (inputs[start : start + size] for start in range(0, len(inputs), size))
            return np.concatenate([self._run(batch) for batch in batches])

        return checked_rows(by_role(texts, encode), len(texts), self.name)

    def model_source(self) -> Path | None:
        """Return the folder of the graph, if the PyTorch model is in it too."""
        return self.folder if holds_weights(self.folder) else None

    def _run(self, texts: list[str]) -> np.ndarray:
        limit = {"truncation": True, "max_length": self.max_tokens} if self.max_tokens else {}
        encoded = self._tokenizer(texts, padding=True, return_tensors="np", **limit)
        inputs = graph_inputs(self.name, self._graph.inputs, encoded)
        try:
            return self._graph.run(inputs, self._output)
        except Exception as error:
            raise JasperError(
                f"{self.name}: the graph cannot be run ({first_line(error)}). Fix: export the model again"
            ) from error


class _OnnxGraph:
    """An ONNX graph in onnxruntime."""

    kind = "ONNX graph"

    def __init__(self, name: str, file: Path) -> None:
        self._session = open_session(name, file)
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.outputs = {node.name: len(node.shape) for node in self._session.get_outputs()}  # dimensions by name
        self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.int8 = is_int8(file)

    def run(self, inputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        return self._session.run([output], inputs)[0]


def find_graph(folder: Path) -> Path | None:
    """Return the graph of a folder: the first of ``GRAPHS``, or the only .onnx file. None: no such file."""
    known = [folder / name for name in GRAPHS if (folder / name).is_file()]
    others = sorted(folder.glob("*.onnx"))
    return known[0] if known else others[0] if len(others) == 1 else None


def is_int8(file: Path) -> bool:
    """Return True if a graph has weights of 8 bits."""
    try:
        from onnx import TensorProto, load
    except ImportError:
        raise JasperError(
            f"{file}: the package onnx is missing. Fix: `pip install onnx onnxruntime` (or the extra `export`)"
        ) from None
    tensors = load(str(file), load_external_data=False).graph.initializer
    return any(tensor.data_type in (TensorProto.INT8, TensorProto.UINT8) and len(tensor.dims) > 1 for tensor in tensors)


def _output(name: str, outputs: Mapping[str, int]) -> str:
    pooled = [output for output, dimensions in outputs.items() if dimensions == 2]
    if "sentence_embedding" in pooled:
        return "sentence_embedding"
    if len(pooled) == 1:
        return pooled[0]
    raise JasperError(
        f"{name}: the graph has no output with one embedding for each text (got {', '.join(outputs)}, expected "
        "sentence_embedding). Fix: export it with `jasper-fast export --onnx`, which puts pooling into the graph"
    )
