"""Export a trained student to formats that load without jasper_fast, and measure what each file loses.

    jasper-fast export runs/try-1 --width 128                      one width for sentence-transformers
    jasper-fast export runs/try-1 --form prefix                    any width by the `dimensions` switch of a server
    jasper-fast export my-model --form prefix                      an adapted model
    … --onnx --int8 --openvino --gguf                              files for other runtimes
    … --vocabulary texts.jsonl --max-mb 10                         a smaller model
    … --check my_beir_folder                                       retrieval that each file loses

Every export is compared with its source, and refused if it loses too much. See docs/deploy.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jasper_fast._renamed import old_names
from jasper_fast.exporting.pipeline import FORMS, ExportRequest, export, export_lines
from jasper_fast.exporting.shrink import add_options, shrink_request
from jasper_fast.utils.command_line import check_model_argument, column_names, positive_int
from jasper_fast.utils.errors import run_cli

__getattr__ = old_names(__name__)


def main(argv: list[str]) -> int:
    """Run the command line: write an export, and print its files and their quality."""
    parser = argparse.ArgumentParser(
        "jasper-fast export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder, or the model folder in it")
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="flat: one width; prefix: any width, as the first dimensions of the embedding; headless: no Dense module, "
        "for a student without a head (default: flat, or headless for such a student)",
    )
    parser.add_argument("--width", type=positive_int, metavar="N", help="width of the embeddings (default: the widest)")
    parser.add_argument("--axes", metavar="FILE", help="texts that order the dimensions of the prefix form")
    parser.add_argument(
        "--columns",
        type=column_names,
        default=["text"],
        metavar="A,B",
        help="columns to join, of --axes, --vocabulary and documents of --check (default: text)",
    )
    parser.add_argument("--onnx", action="store_true", help="add an ONNX graph and check it with onnxruntime")
    parser.add_argument("--int8", action="store_true", help="add an ONNX graph with int8 weights too (implies --onnx)")
    parser.add_argument("--openvino", action="store_true", help="add a model for OpenVINO")
    parser.add_argument("--gguf", action="store_true", help="add a GGUF file, for a student without a head")
    parser.add_argument(
        "--onnx-only",
        action="store_true",
        help="leave out the PyTorch weights (implies --onnx, unless with --openvino)",
    )
    add_options(parser)
    parser.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="SET",
        help="retrieval sets, or files of documents, on which the loss is measured (default: the run's held-out texts)",
    )
    parser.add_argument("--allow-loss", action="store_true", help="publish an export that loses more than its limits")
    parser.add_argument("--out", help="new folder (default: next to the model, named after the form)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code from the model folder; only for models you trust"
    )
    arguments = parser.parse_args(argv)
    check_model_argument(arguments.run, "export")
    request = ExportRequest(
        source=Path(arguments.run),
        out=Path(arguments.out) if arguments.out else None,
        form=arguments.form,
        width=arguments.width,
        axes=arguments.axes,
        columns=arguments.columns,
        onnx=arguments.onnx,
        int8=arguments.int8,
        openvino=arguments.openvino,
        gguf=arguments.gguf,
        weights=not arguments.onnx_only,
        small=shrink_request(arguments),
        check=arguments.check,
        allow_loss=arguments.allow_loss,
        trust_remote_code=arguments.trust_remote_code,
    )
    print("\n".join(export_lines(export(request))))
    return 0


if __name__ == "__main__":
    run_cli(main)
