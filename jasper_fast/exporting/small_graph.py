"""The smallest form of an export: an int8 graph whose token table is in bytes of a codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.exporting.codebooks import code_table
from jasper_fast.exporting.int8 import TOKENS, replace_nodes
from jasper_fast.utils.errors import JasperError

TABLE = "token_table"  # prefix of the names of the new parts


class CodedGraph:
    """A graph whose token table is in bytes, which can be written with some of the rows.

    Args:
        graph: graph of ``quantize_graph``, with the table of tokens in float32.

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
        before, after = model.graph.node[: self.place], model.graph.node[self.place + 1 :]
        replace_nodes(model.graph, [*before, *_table_nodes(self.output), *after])
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
