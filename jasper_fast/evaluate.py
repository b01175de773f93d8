"""Evaluate a model on retrieval, similarity and classification sets at every width, and compare it with its teacher.

    python -m jasper_fast.evaluate runs/minilm-docstrings docstrings path/to/beir path/to/dev.tsv
    python -m jasper_fast.evaluate MODEL DATA --teacher TEACHER --widths 384,128 --json scores.json
    python -m jasper_fast.evaluate MODEL DATA --documents-by TEACHER

With ``--documents-by``, the model encodes the queries of retrieval sets, and the teacher encodes their documents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_fast._renamed import old_names
from jasper_fast.config.data import EvalConfig
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.eval_sets import EvalSet, RetrievalSet
from jasper_fast.evaluation.quantized import parse_precisions
from jasper_fast.evaluation.score import (
    DOCUMENTS_BY_TEACHER,
    STUDENT,
    TEACHER,
    by_role,
    describe_sets,
    note_lines,
    score_rows,
    scores_table,
)
from jasper_fast.models.embedder import load_model, model_encoder, model_widths
from jasper_fast.models.quantization import PRECISIONS, read_ranges
from jasper_fast.utils.atomic import check_file, write_atomic
from jasper_fast.utils.command_line import check_model_argument, positive_int
from jasper_fast.utils.errors import JasperError, run_cli

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

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
    for model in filter(None, (arguments.model, arguments.teacher, arguments.documents_by)):
        check_model_argument(model, "evaluate")
    if not arguments.data:
        raise JasperError("evaluate: no evaluation set is given. Fix: add one after the model, e.g. docstrings")
    precisions = parse_precisions(arguments.precision)
    if arguments.json is not None:
        check_file(arguments.json)
    evalsets = load_evals([EvalConfig(path=path, limit=arguments.limit) for path in arguments.data])
    retrieval = _retrieval_sets(evalsets) if arguments.documents_by else []
    load = partial(load_model, max_length=arguments.max_length, trust_remote_code=arguments.trust_remote_code)
    model, notes = load(arguments.model), list[str]()
    student = model_encoder(model, arguments.widths)
    encoders, asymmetric = {STUDENT if arguments.teacher else "model": student}, {}
    if arguments.documents_by:
        documents = load(arguments.documents_by)
        widths, notes = _common_widths(arguments, model, documents)
        asymmetric = {DOCUMENTS_BY_TEACHER: by_role(model_encoder(model, widths), model_encoder(documents, widths))}
        notes += [
            f"{s.name}: --documents-by does not apply to a set without queries" for s in evalsets if s not in retrieval
        ]
    if arguments.teacher:
        teacher = load(arguments.teacher)
        encoders = {TEACHER: model_encoder(teacher, model_widths(teacher)[:1])} | encoders
    rows = score_rows(evalsets, encoders, None, precisions, read_ranges(arguments.model))
    rows += score_rows(retrieval, asymmetric, None, precisions)
    sets = describe_sets(evalsets)
    print("\n".join([scores_table(rows), *notes, *note_lines(sets["sets"])]))
    if arguments.json:
        names = ("model", "teacher", "documents_by", "max_length", "limit")
        settings = {name: getattr(arguments, name) for name in names}
        write_atomic(Path(arguments.json), json.dumps(settings | sets | {"rows": rows}, indent=1) + "\n")
    return 0


def _retrieval_sets(evalsets: Sequence[EvalSet]) -> list[EvalSet]:
    """Return the sets with queries and documents.

    Raises:
        JasperError: there are none.
    """
    retrieval: list[EvalSet] = [evalset for evalset in evalsets if isinstance(evalset, RetrievalSet)]
    if not retrieval:
        raise JasperError(
            f"--documents-by: no set has queries and documents (got {', '.join(s.name for s in evalsets)}, expected a "
            "retrieval set). Fix: add one, e.g. docstrings, or leave --documents-by out"
        )
    return retrieval


def _common_widths(
    arguments: argparse.Namespace, model: SentenceTransformer, teacher: SentenceTransformer
) -> tuple[list[int], list[str]]:
    """Return the widths of queries by the model and documents by the teacher, widest first, and a remark on others.

    Raises:
        JasperError: no width agrees.
    """
    own, others = sorted(set(arguments.widths or model_widths(model)), reverse=True), model_widths(teacher)
    name = arguments.documents_by
    common, left_out = [w for w in own if w in others], [w for w in own if w not in others]
    if not common:
        raise JasperError(
            f"--documents-by {name}: no width agrees (got {_listed(own)} of {arguments.model}, expected one of "
            f"{_listed(others)}). Fix: give the model's own teacher, and leave --widths out"
        )
    return common, [f"{DOCUMENTS_BY_TEACHER}: not at {_listed(left_out)}, which {name} lacks"] if left_out else []


def _listed(widths: Iterable[int]) -> str:
    return ", ".join(map(str, widths))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jasper-fast evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="run folder, path, name, or package:import_name/folder")
    parser.add_argument("data", nargs="*", help="BEIR folder, similarity TSV, classification folder, or: docstrings")
    parser.add_argument("--teacher", help="model to compare with, in the same forms")
    parser.add_argument(
        "--documents-by", metavar="TEACHER", help="model that encodes the documents of retrieval sets in one more row"
    )
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
