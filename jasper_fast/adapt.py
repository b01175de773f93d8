"""Adapt a student to your documents: the teacher's quality in seconds, without labels.

    jasper-fast adapt docs.jsonl --columns title,text --out my-model                     train a student, then fit it
    jasper-fast adapt docs.jsonl --columns title,text --model runs/mine --out my-model   only fit a trained one
    … --minutes 10                       train that long; with --model, on from that model
    … --teacher NAME | vectors.npy       another teacher: a model, or embeddings of the documents
    … --dry-run                          what would be done
    … --model runs/new --into old-index  map a new model's questions into an existing index instead

The same command continues after an interruption. With more documents, it encodes and counts only the new ones. Then
build an index with `jasper-fast search build my-model docs.jsonl --out my-index`. From Python, call
``jasper_fast.adapt(documents, out=…)``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jasper_fast.adaptation.documents import Corpus
from jasper_fast.adaptation.dry_run import describe_request
from jasper_fast.adaptation.pipeline import adapt_documents
from jasper_fast.adaptation.request import STUDENT, Request, make_request
from jasper_fast.adaptation.student import continued_training, first_training
from jasper_fast.models.embedder import load_model
from jasper_fast.train import Stopped, train
from jasper_fast.training.run.folder import RunFolder
from jasper_fast.utils.command_line import StoreOnce, check_model_argument, column_names, positive_int
from jasper_fast.utils.errors import JasperError, run_cli

__all__ = ["Stopped", "adapt", "main"]


def adapt(
    documents: str | Path,
    *,
    out: str | Path,
    teacher: str | None = None,
    model: str | Path | None = None,
    minutes: float | None = None,
    columns: Sequence[str] = ("text",),
    id_column: str | None = None,
    widths: Sequence[int] | None = None,
    max_length: int | str = "auto",
    cache: str | Path = "cache",
    trust_remote_code: bool = False,
) -> Path:
    """Adapt a student to documents, and write models that sentence-transformers loads.

    A linear map takes the student's embeddings to the teacher's. It is fitted on the documents, and chosen by held-out
    ones with their titles or first sentences as questions. No labels are needed.

    Args:
        documents: text source: .jsonl, .csv, .tsv, .txt, .parquet, a folder of them, or a ``datasets`` name.
        out: folder of the adaptation. A folder that an earlier call wrote is continued.
        teacher: model, or precomputed vectors of the documents (.npy, .parquet, .jsonl or a folder of them). None: the
            teacher of ``model``, or the default one.
        model: trained student: run folder, model folder or hub name. None: one is trained first.
        minutes: minutes of training. None: 10 without ``model``, none with it.
        columns: columns to join to one document.
        id_column: column with ids, by which precomputed vectors can be matched.
        widths: widths to write besides the teacher's. None: those of the student, or 128, 64 and 32.
        max_length: tokens that the student reads. "auto": chosen on held-out documents.
        cache: folder of texts and embeddings, which ``teach`` and ``train`` use too.
        trust_remote_code: permission to run code that comes with a model.

    Returns:
        ``out``, with ``symmetric/`` and ``asymmetric/`` (models), ``report.md``, ``results.json`` and the state.

    Raises:
        JasperError: an argument, a document, a model or the folder cannot be used. The message has a fix.
        Stopped: a signal asked to stop during training. The same call resumes.

    Example:
        >>> folder = adapt("docs.jsonl", out="my-model", columns=["title", "text"])  # doctest: +SKIP
        >>> SentenceTransformer(str(folder / "asymmetric")).encode_query("a question")  # doctest: +SKIP
    """
    request = make_request(
        documents, out, teacher=teacher, model=None if model is None else str(model), minutes=minutes, columns=columns,
        id_column=id_column, widths=widths, max_length=max_length, cache=cache, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return adapt_documents(request, _train)


def _train(request: Request, corpus: Corpus) -> Path:
    """Train the student of a call and return the folder of its run. Later calls keep the student of the first one."""
    folder = request.out / STUDENT
    if RunFolder(folder).finished:
        print(f"the student in {folder} is trained already and stays as it is", flush=True)
        return folder
    if request.model is None:
        config = first_training(request)
    else:
        given = load_model(str(request.model.model), trust_remote_code=request.trust_remote_code)
        config = continued_training(request, corpus, given)
    try:
        return train(config, out=folder)
    except Stopped as stopped:
        done = str(stopped).partition(". ")[0]
        raise Stopped(f"{done}. Run the same command to go on") from None


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    args = _parser().parse_args(argv)
    if args.model is not None:
        check_model_argument(args.model, "adapt")
    options = {
        "teacher": args.teacher, "model": args.model, "minutes": args.minutes, "columns": args.columns,
        "id_column": args.id_column, "widths": args.widths, "max_length": args.max_length, "cache": args.cache,
        "trust_remote_code": args.trust_remote_code,
    }  # fmt: skip
    if args.into is not None:
        return _migrate(args)
    for option in ("pairs", "force"):
        if getattr(args, option):
            raise JasperError(f"--{option} is for --into, which is not given. Fix: leave it out, or give --into OLD")
    if args.dry_run:
        print(describe_request(make_request(args.documents, args.out, **options)))
        return 0
    try:
        adapt(args.documents, out=args.out, **options)
    except Stopped as stopped:
        print(stopped)
        return 130
    return 0


def _migrate(args: argparse.Namespace) -> int:
    """Map a new model into an existing index."""
    from jasper_fast.adaptation.migrate import PAIRS, migrate

    if args.model is None:
        raise JasperError("--into needs --model, the new model whose questions are mapped. Fix: give --model")
    for option in ("teacher", "minutes", "widths", "dry_run"):
        if getattr(args, option):
            name = f"--{option.replace('_', '-')}"
            raise JasperError(f"--into maps a finished model, for which {name} means nothing. Fix: leave out {name}")
    if args.max_length != "auto":
        raise JasperError("--into keeps the length of the model. Fix: leave out --max-length")
    migrate(
        args.documents, args.into, args.model, args.out, columns=args.columns, id_column=args.id_column,
        pairs=args.pairs or PAIRS, cache=args.cache, force=args.force, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jasper-fast adapt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = ".jsonl, .csv, .tsv, .txt, .parquet, a folder of them, a datasets name"
    parser.add_argument("documents", metavar="DOCUMENTS", help=formats)
    parser.add_argument("--out", required=True, metavar="DIR", action=StoreOnce, help="folder of models and report")
    parser.add_argument(
        "--teacher", metavar="NAME", action=StoreOnce,
        help="model, or vectors of the documents (default: the model's teacher, or all-MiniLM-L6-v2)",
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", action=StoreOnce, help="trained student (default: train one)")
    parser.add_argument("--minutes", type=_minutes, metavar="N", help="training time (default: 10 without --model)")
    parser.add_argument(
        "--columns", type=column_names, default=["text"], metavar="A,B", help="columns to join (default: text)"
    )
    parser.add_argument("--id-column", metavar="NAME", action=StoreOnce, help="column with your ids")
    parser.add_argument("--widths", type=_widths, metavar="A,B", help="narrower widths (default: the student's)")
    parser.add_argument(
        "--max-length", type=_length, default="auto", metavar="N", help="tokens that the student reads (default: auto)"
    )
    parser.add_argument(
        "--into", metavar="OLD", action=StoreOnce, help="existing index to map --model's questions into"
    )
    parser.add_argument("--pairs", type=positive_int, metavar="N", help="with --into: most documents to encode")
    parser.add_argument(
        "--force", action="store_true", help="with --into: write the model in spite of a bad map or order"
    )
    parser.add_argument("--cache", default="cache", metavar="DIR", help="texts and embeddings (default: cache)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and leave")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code that the models bring to run")
    return parser


def _minutes(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of minutes, got {text!r}") from None


def _widths(text: str) -> list[int]:
    return [positive_int(part.strip()) for part in text.split(",")]


def _length(text: str) -> int | str:
    return text if text == "auto" else positive_int(text)


if __name__ == "__main__":
    run_cli(main, resumes=True)
