"""The smallest form of an export: one ONNX graph with int8 weights, and its token table in bytes of a codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.exporting.codebooks import code_table
from jasper_fast.exporting.int8 import ACTIVATIONS, quiet
from jasper_fast.utils.errors import JasperError

TOKENS = "input_ids"  # input of the graph
TABLE_ROWS = 16  # tables with fewer rows, such as that of segments, stay as they are
TABLE = "token_table"  # prefix of the names of the new parts


def quantize_weights(graph: Path, path: Path) -> None:
    """Quantize a graph to int8, except for its token table.

    Weights have one scale for each output channel, and other tables, such as that of positions, one for each row.

    Args:
        graph: graph in float32.
        path: new graph.
    """
    import onnx

    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            graph, path, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
    model = onnx.load(path)
    _quantize_tables(model.graph)
    _strip_notes(model)
    model.metadata_props.add(key=ACTIVATIONS, value="int8")  # CPUs without int8 dot products get a warning
    onnx.save(model, path)


def _quantize_tables(graph: Any) -> None:
    """Replace each look-up in a table by look-ups of int8 rows and their scales, except for the token table."""
    from onnx import TensorProto, helper, numpy_helper

    tables = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for place, node in reversed(list(enumerate(graph.node))):
        tensor = tables.get(node.input[0]) if node.op_type == "Gather" and node.input[1] != TOKENS else None
        if tensor is None or len(tensor.dims) != 2 or tensor.dims[0] < TABLE_ROWS:
            continue
        rows, indices, out = numpy_helper.to_array(tensor), node.input[1], node.output[0]
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
        graph.initializer.append(numpy_helper.from_array(np.rint(rows / scales).astype(np.int8), f"{out}_table"))
        graph.initializer.append(numpy_helper.from_array(scales.astype(np.float32), f"{out}_scales"))
        graph.initializer.remove(tensor)
        nodes = [
            helper.make_node("Gather", [f"{out}_table", indices], [f"{out}_codes"]),
            helper.make_node("Cast", [f"{out}_codes"], [f"{out}_levels"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{out}_scales", indices], [f"{out}_scale"]),
            helper.make_node("Mul", [f"{out}_levels", f"{out}_scale"], [out]),
        ]
        _replace_node(graph, place, nodes)


class CodedGraph:
    """A graph whose token table is in bytes, which can be written with some of the rows.

    Args:
        graph: graph of ``quantize_weights``.

    Raises:
        JasperError: the graph has no table that ``input_ids`` selects from.
    """

    def __init__(self, graph: Path) -> None:
        import onnx
        from onnx import numpy_helper

        self.model = onnx.load(graph)
        found = [
            (place, node)
            for place, node in enumerate(self.model.graph.node)
            if node.op_type == "Gather" and node.input[1] == TOKENS
        ]
        tables = [one for one in self.model.graph.initializer if found and one.name == found[0][1].input[0]]
        if not tables:
            raise JasperError(
                f"the graph of this architecture has no table of tokens (expected one that {TOKENS} selects from). "
                "Fix: export with --weights fp16"
            )
        self.place, self.output = found[0][0], found[0][1].output[0]
        self.table = code_table(numpy_helper.to_array(tables[0]))
        self.model.graph.initializer.remove(tables[0])

    def write(self, kept: np.ndarray, fine: np.ndarray, path: Path) -> None:
        """Write the graph.

        Args:
            kept: (k,) sorted numbers of the rows to keep.
            fine: numbers of those with both layers. The others have only the first.
            path: new graph.
        """
        import onnx
        from onnx import numpy_helper

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        fine = np.intersect1d(fine, kept)
        refined = np.zeros(len(kept), np.int32)  # 0 is a row without a second layer
        refined[np.searchsorted(kept, fine)] = np.arange(1, len(fine) + 1)
        first, second = self.table.layers
        constants = {
            "centre": self.table.centre.astype(np.float32),
            "spread": self.table.spread.astype(np.float32),
            "row": np.array([0, 0, len(self.table.centre)], np.int64),  # 0 keeps the axis
            "refined": refined.astype(np.uint16 if len(fine) < 65_535 else np.int32),
            "codebook1": first.codebook,
            "codes1": first.codes[kept],
            "scales1": first.scales[kept],
            "codebook2": second.codebook,
            "codes2": np.concatenate([second.codes[:1], second.codes[fine]]),
            "scales2": np.concatenate([np.zeros((1, 1), np.float16), second.scales[fine]]),
        }
        for name, value in constants.items():
            model.graph.initializer.append(numpy_helper.from_array(value, f"{TABLE}_{name}"))
        _replace_node(model.graph, self.place, _table_nodes(self.output))
        onnx.save(model, path)


def _table_nodes(out: str) -> list[Any]:
    """Return the nodes that make the embeddings of ``input_ids`` from bytes."""
    from onnx import TensorProto, helper

    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Gather", ["refined", TOKENS], "refined_small", {}),
        ("Cast", ["refined_small"], "indices2", {"to": TensorProto.INT64}),
    ]
    for layer, indices in (("1", TOKENS), ("2", "indices2")):
        steps += [
            ("Gather", [f"codes{layer}", indices], f"bytes{layer}", {}),
            ("Cast", [f"bytes{layer}"], f"entries{layer}", {"to": TensorProto.INT32}),
            ("Gather", [f"codebook{layer}", f"entries{layer}"], f"blocks{layer}", {}),
            ("Reshape", [f"blocks{layer}", "row"], f"unit{layer}", {}),
            ("Gather", [f"scales{layer}", indices], f"half{layer}", {}),
            ("Cast", [f"half{layer}"], f"scale{layer}", {"to": TensorProto.FLOAT}),
            ("Mul", [f"unit{layer}", f"scale{layer}"], f"layer{layer}", {}),
        ]
    steps += [
        ("Add", ["layer1", "layer2"], "sum", {}),
        ("Mul", ["sum", "spread"], "wide", {}),
        ("Add", ["wide", "centre"], "", {}),
    ]

    def named(name: str) -> str:
        return name if name == TOKENS else f"{TABLE}_{name}" if name else out

    return [
        helper.make_node(kind, [named(name) for name in inputs], [named(output)], **more)
        for kind, inputs, output, more in steps
    ]


def _replace_node(graph: Any, place: int, nodes: list[Any]) -> None:
    all_nodes = [*graph.node[:place], *nodes, *graph.node[place + 1 :]]
    del graph.node[:]
    graph.node.extend(all_nodes)


def _strip_notes(model: Any) -> None:
    """Remove the exporter's notes on nodes and shapes, which take up to a megabyte. The graph's metadata stay."""
    graph = model.graph
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
