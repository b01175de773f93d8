"""Quantize an ONNX graph to int8: the matrices of its layers, and its table of tokens."""

from __future__ import annotations

import logging
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32  # values with one scale: of a weight's column, and of a token's activations
TABLE_ROWS = 16  # a table of fewer rows, such as token types, stays float32
TOKENS = "input_ids"  # input of a graph that selects rows of the table of tokens
ACTIVATIONS = "activations"  # key of a graph's metadata: "int8", or "float32" for CPUs without int8 dot products
INT8_COMPUTE, FLOAT32_COMPUTE = 4, 1  # accuracy levels of ONNX Runtime's MatMulNBits
DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"}  # in /proc/cpuinfo; other CPUs add in 16 bits


def quantize_graph(graph: Path, path: Path, *, tokens: bool = True) -> None:
    """Store the weights of a graph as int8, and compute its matrix products in int8.

    Blocks of 32 weights in a column have one scale, and so has each row of a table. While the graph runs, blocks of 32
    activations of a token get one scale too. So an embedding does not depend on the other texts of a batch. A head
    after the pooling is stored as float16, and computes in float32.

    Without int8 dot products, a CPU adds two products in 16 bits, which may overflow. If this CPU has none, the graph
    computes in float32 from int8 weights, and a note is printed. The metadata state this as ``activations``.

    Args:
        graph: ONNX file with float32 weights.
        path: new ONNX file for ONNX Runtime ≥ 1.22. Its inputs, outputs and metadata are those of ``graph``.
        tokens: False to leave the table of tokens in float32, as ``CodedGraph`` needs it. Default: True.

    Example:
        >>> quantize_graph(Path("onnx/model.onnx"), Path("onnx/model_int8.onnx"))  # doctest: +SKIP
    """
    import onnx

    with quiet():  # the import sets up logging for the whole program
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(str(graph))
    _quantize_tables(model.graph, tokens)
    _halve_heads(model.graph)
    fast = has_dot_products()
    model.metadata_props.add(key=ACTIVATIONS, value="int8" if fast else "float32")
    level = INT8_COMPUTE if fast else FLOAT32_COMPUTE
    external = graph.with_name(graph.name + ".data").is_file()  # the float32 graph is beyond the limit of one file
    with quiet():
        quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=level)
        quantizer.process()
        _strip_notes(quantizer.model.graph())
        quantizer.model.save_model_to_file(str(path), external)
    if not fast:
        print(
            f"note: {path.name} computes in float32 from int8 weights, because this CPU has no int8 dot products "
            "(VNNI, or dotprod on Arm). Fix: if the graph is for CPUs that have them, export on one",
            file=sys.stderr,
        )


def _quantize_tables(graph: Any, tokens: bool) -> None:
    """Replace each large table of a graph by int8 rows with one scale a row, and multiply after the look-up."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = []
    tables = {table.name: table for table in graph.initializer}
    done = set()
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or not _is_matrix(table) or not (tokens or node.input[1] != TOKENS):
            nodes.append(node)
            continue
        codes, scales, found = f"{table.name}_int8", f"{table.name}_scale", node.output[0]
        if table.name not in done:
            done.add(table.name)
            rows = numpy_helper.to_array(table)
            scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
            int8 = np.rint(rows / scale).astype(np.int8)
            graph.initializer.extend(
                [numpy_helper.from_array(int8, codes), numpy_helper.from_array(scale.astype(np.float32), scales)]
            )
        nodes += [
            helper.make_node("Gather", [codes, node.input[1]], [f"{found}_int8"]),
            helper.make_node("Cast", [f"{found}_int8"], [f"{found}_codes"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [scales, node.input[1]], [f"{found}_scale"]),
            helper.make_node("Mul", [f"{found}_codes", f"{found}_scale"], [found]),
        ]
    used = {name for node in nodes for name in node.input}
    for name in done - used:
        graph.initializer.remove(tables[name])
    replace_nodes(graph, nodes)


def _halve_heads(graph: Any) -> None:
    """Store the weights of heads, the layers that torch exports as Gemm, as float16. A cast makes them float32."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = []
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        weights = tensors.pop(node.input[1], None) if node.op_type == "Gemm" else None
        if weights is not None and _is_matrix(weights):
            values, half = numpy_helper.to_array(weights), f"{weights.name}_half"
            if np.abs(values).max() <= np.finfo(np.float16).max:
                graph.initializer.remove(weights)
                graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), half))
                nodes.append(helper.make_node("Cast", [half], [weights.name], to=TensorProto.FLOAT))
        nodes.append(node)
    replace_nodes(graph, nodes)


def _is_matrix(tensor: Any) -> bool:
    """Return True for a float32 matrix with enough rows to store it in fewer bits."""
    from onnx import TensorProto

    return len(tensor.dims) == 2 and tensor.dims[0] >= TABLE_ROWS and tensor.data_type == TensorProto.FLOAT


def replace_nodes(graph: Any, nodes: Sequence[Any]) -> None:
    """Replace all nodes of a graph."""
    del graph.node[:]
    graph.node.extend(nodes)


def _strip_notes(graph: Any) -> None:
    """Remove the exporter's notes on nodes and shapes, which take up to a megabyte. The graph's metadata stay."""
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def check_int8_cpu(metadata: Mapping[str, str], name: str) -> None:
    """Print a warning if a graph computes in int8 and this CPU has no int8 dot products.

    Args:
        metadata: metadata of the graph.
        name: graph, for the message.
    """
    if metadata.get(ACTIVATIONS) == "int8" and not has_dot_products():
        print(
            f"warning: {name}: sums of int8 products may overflow on this CPU, which changes embeddings (got no VNNI "
            "and no dotprod). Fix: use onnx/model.onnx here, or export with --int8 on this machine",
            file=sys.stderr,
        )


def has_dot_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True if this CPU adds products of int8 in 32 bits. Where Linux does not tell, only Arm counts.

    Args:
        cpuinfo: file with the names of the CPU's instructions.
    """
    try:
        return bool(DOT_PRODUCTS & set(cpuinfo.read_text(encoding="utf-8", errors="replace").split()))
    except OSError:  # not Linux
        return platform.machine().lower() in ("arm64", "aarch64")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings of torch's exporter and onnxruntime, and keep the logging of the program as it was set up."""
    root = logging.getLogger()
    before, level, handlers = root.manager.disable, root.level, [*root.handlers]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        root.setLevel(level)
        root.handlers[:] = handlers
