"""Export a trained student to formats that load without jasper_fast: sentence-transformers folders, ONNX, OpenVINO.

``python -m jasper_fast.export RUN --width 128 [--onnx] [--int8] [--openvino] [--out DIR]`` takes a run folder or an
exported model.
"""

from __future__ import annotations

import argparse

from jasper_fast._renamed import old_names
from jasper_fast.exporting.flat import export_flat, resolve_width
from jasper_fast.exporting.onnx import export_onnx, graph_lines
from jasper_fast.models.folder import model_folder
from jasper_fast.utils.command_line import check_model_argument, positive_int
from jasper_fast.utils.errors import run_cli

__getattr__ = old_names(__name__)


def main(argv: list[str]) -> int:
    """Run the command line: export one width, with graphs for other runtimes if requested."""
    parser = argparse.ArgumentParser("jasper-fast export", description=__doc__)
    parser.add_argument("run", help="run folder, or the model folder in it")
    parser.add_argument("--width", type=positive_int, metavar="N", help="width of the embeddings (default: the widest)")
    parser.add_argument("--onnx", action="store_true", help="add an ONNX graph and check it with onnxruntime")
    parser.add_argument("--int8", action="store_true", help="add an ONNX graph with int8 weights too (implies --onnx)")
    parser.add_argument("--openvino", action="store_true", help="add a model for OpenVINO, and check it there")
    parser.add_argument(
        "--onnx-only",
        action="store_true",
        help="leave out the PyTorch weights (implies --onnx, unless with --openvino)",
    )
    parser.add_argument("--out", help="new folder (default: next to the model, named after the width)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code from the model folder; only for models you trust"
    )
    arguments = parser.parse_args(argv)
    check_model_argument(arguments.run, "export")
    source = model_folder(arguments.run)
    width = resolve_width(source, arguments.width)
    openvino = arguments.openvino
    onnx = arguments.onnx or arguments.int8 or (arguments.onnx_only and not openvino)
    out = (
        arguments.out
        or source.resolve().parent
        / f"{source.resolve().name}-{width}{'-onnx' if onnx else '-openvino' if openvino else ''}"
    )
    trust = arguments.trust_remote_code
    if not onnx and not openvino:
        written = export_flat(source, width, out, trust_remote_code=trust)
    else:
        written = export_onnx(
            source,
            width,
            out,
            onnx=onnx,
            int8=arguments.int8,
            openvino=openvino,
            weights=not arguments.onnx_only,
            trust_remote_code=trust,
        )
    lines = graph_lines(written) if onnx or openvino else []
    print("\n".join([f"wrote {written}: embeddings {width} wide", *lines]))
    return 0


if __name__ == "__main__":
    run_cli(main)
