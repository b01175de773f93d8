"""Quantize an ONNX graph to int8: the matrices of its layers, and its table of tokens."""

from __future__ import annotations

import logging
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 128  # values with one scale: of a weight's column, and of a token's activations
TABLE_ROWS = 256  # a table of fewer rows, such as token types, stays float32
ACTIVATIONS = "activations"  # key of a graph's metadata: "int8", or "float32" for CPUs without int8 dot products
INT8_COMPUTE, FLOAT32_COMPUTE = 4, 1  # accuracy levels of ONNX Runtime's MatMulNBits
DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"}  # in /proc/cpuinfo; other CPUs add in 16 bits


def quantize_graph(graph: Path, path: Path, *, embeddings: bool = False) -> None:
    """Store the weights of a graph as int8, and compute its matrix products in int8.

    Blocks of 128 weights in a column have one scale. While the graph runs, blocks of 128 activations of a token get
    one scale too. So an embedding does not depend on the other texts of a batch. A head after the pooling stays
    float32, because it is small.

    Without int8 dot products, a CPU adds two products in 16 bits, which may overflow. If this CPU has none, the graph
    computes in float32 from int8 weights, and a note is printed. The metadata state this as ``activations``.

    Args:
        graph: ONNX file with float32 weights.
        path: new ONNX file for ONNX Runtime ≥ 1.22. Its inputs, outputs and metadata are those of ``graph``.
        embeddings: True to store the table of tokens as int8 too, one scale for each row. Default: False.

    Example:
        >>> quantize_graph(Path("onnx/model.onnx"), Path("onnx/model_int8.onnx"), embeddings=True)  # doctest: +SKIP
    """
    import onnx

    with quiet():  # the import sets up logging for the whole program
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(str(graph))
    if embeddings:
        _quantize_tables(model)
    fast = has_dot_products()
    model.metadata_props.add(key=ACTIVATIONS, value="int8" if fast else "float32")
    level = INT8_COMPUTE if fast else FLOAT32_COMPUTE
    external = graph.with_name(graph.name + ".data").is_file()  # the float32 graph is beyond the limit of one file
    with quiet():
        quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=level)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), external)
    if not fast:
        print(
            f"note: {path.name} computes in float32 from int8 weights, because this CPU has no int8 dot products "
            "(VNNI, or dotprod on Arm). Fix: if the graph is for CPUs that have them, export on one",
            file=sys.stderr,
        )


def _quantize_tables(model: Any) -> None:
    """Replace each large table of a graph by int8 rows with one scale a row, and multiply after the look-up."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = []
    tables = {table.name: table for table in model.graph.initializer}
    done = set()
    for node in model.graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or len(table.dims) != 2 or table.dims[0] < TABLE_ROWS or table.data_type != TensorProto.FLOAT:
            nodes.append(node)
            continue
        codes, scales, found = f"{table.name}_int8", f"{table.name}_scale", node.output[0]
        if table.name not in done:
            done.add(table.name)
            rows = numpy_helper.to_array(table)
            scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
            int8 = np.rint(rows / scale).astype(np.int8)
            model.graph.initializer.extend(
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
        model.graph.initializer.remove(tables[name])
    del model.graph.node[:]
    model.graph.node.extend(nodes)


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
