"""Evaluate a model on retrieval, similarity and classification sets at every width, and compare it with its teacher.

python -m jasper_fast.evaluate runs/minilm-docstrings docstrings path/to/beir path/to/dev.tsv
python -m jasper_fast.evaluate MODEL DATA --teacher TEACHER --widths 384,128 --json scores.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jasper_fast._renamed import old_names
from jasper_fast.config.data import EvalConfig
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.evaluation.quantized import parse_precisions
from jasper_fast.evaluation.score import STUDENT, TEACHER, describe_sets, note_lines, score_rows, scores_table
from jasper_fast.models.embedder import load_model, model_encoder, routes
from jasper_fast.models.quantization import PRECISIONS, read_ranges
from jasper_fast.utils.atomic import check_file, write_atomic
from jasper_fast.utils.command_line import check_model_argument, positive_int
from jasper_fast.utils.errors import JasperError, run_cli

__getattr__ = old_names(__name__)


def main(argv: list[str]) -> int:
    """Evaluate a model on sets from the command line.

    Args:
        argv: command-line arguments.

    Returns:
        The exit status.

    Raises:
        JasperError: An argument is wrong, or a model or evaluation set cannot be used.
    """
    arguments = _parser().parse_args(argv)
    for model in filter(None, (arguments.model, arguments.teacher)):
        check_model_argument(model, "evaluate")
    if not arguments.data:
        raise JasperError("evaluate: no evaluation set is given. Fix: add one after the model, e.g. docstrings")
    precisions = parse_precisions(arguments.precision)
    if arguments.json is not None:
        check_file(arguments.json)
    evalsets = load_evals([EvalConfig(path=path, limit=arguments.limit) for path in arguments.data])
    max_length, trusted = arguments.max_length, arguments.trust_remote_code
    student = model_encoder(load_model(arguments.model, max_length, trust_remote_code=trusted), arguments.widths)
    if arguments.teacher:
        teacher = load_model(arguments.teacher, max_length, trust_remote_code=trusted)
        _, heads = routes(teacher)
        encoders = {TEACHER: model_encoder(teacher, [max(heads)] if heads else None), STUDENT: student}
    else:
        encoders = {"model": student}
    rows = score_rows(evalsets, encoders, None, precisions, read_ranges(arguments.model))
    sets = describe_sets(evalsets)
    print("\n".join([scores_table(rows), *note_lines(sets["sets"])]))
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("model", "teacher", "max_length", "limit")}
        write_atomic(Path(arguments.json), json.dumps(settings | sets | {"rows": rows}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jasper-fast evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="run folder, path, name, or package:import_name/folder")
    parser.add_argument("data", nargs="*", help="BEIR folder, similarity TSV, classification folder, or: docstrings")
    parser.add_argument("--teacher", help="model to compare with, in the same forms")
    parser.add_argument("--widths", metavar="N,N", type=_widths, help="e.g. 384,128; default: every head of the model")
    parser.add_argument("--json", metavar="FILE", help="also write the scores to this file")
    parser.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help="maximum tokens per text, or per document of an asymmetric model; default: each model's own",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="at most N queries or pairs per set")
    parser.add_argument("--precision", default="float32", help=f"comma-separated, from {', '.join(PRECISIONS)}")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run a model's own code; only if you trust its authors"
    )
    return parser


def _widths(text: str) -> list[int]:
    try:
        return [positive_int(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise JasperError(
            f"--widths takes numbers separated by commas (got {text!r}). Fix: give e.g. 384,128"
        ) from None


if __name__ == "__main__":
    run_cli(main)
