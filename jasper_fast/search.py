"""Search texts by meaning: build an index from a model and texts, then ask it questions.

    python -m jasper_fast.search build runs/minilm-docstrings my_texts.jsonl --out my-index
    python -m jasper_fast.search ask my-index "how do I reverse a list?"
    python -m jasper_fast.search add my-index more_texts.jsonl
    python -m jasper_fast.search remove my-index ID ID
    python -m jasper_fast.search build runs/glyphs my_photos --pictures --out my-index   # find images by words

``ask`` also reads questions from a file (``--file``). Without a question it reads them interactively.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import jasper_fast.pictures
from jasper_fast.config.data import SourceConfig
from jasper_fast.data.document_ids import DocumentId, read_documents
from jasper_fast.data.listing import user_path
from jasper_fast.data.rows import BOM, read_lines
from jasper_fast.data.text import join_columns
from jasper_fast.data.text_sources import read_source, report_ignored
from jasper_fast.text_index import Hit, TextIndex, add, build, check_replace, remove
from jasper_fast.utils.atomic import check_output_path
from jasper_fast.utils.command_line import (
    check_command,
    check_model_argument,
    column_names,
    positive_int,
    text_argument,
)
from jasper_fast.utils.errors import JasperError, run_cli
from jasper_fast.utils.output import output_failed, shows_unicode


def _build(args: argparse.Namespace) -> None:
    check_output_path(args.out)
    check_replace(args.out, args.replace)
    documents, ids = _documents(args)
    begin = time.perf_counter()
    count = build(
        args.model, documents, args.out, width=args.width, dtype=args.dtype, max_length=args.max_length,
        total=args.limit, pictures=args.pictures, trust_remote_code=args.trust_remote_code, replace=args.replace,
        ids=ids, cache=args.cache,
    )  # fmt: skip
    kind = "images" if args.pictures else "texts"
    print(f"{count:,} {kind} in {args.out}, {time.perf_counter() - begin:.0f} s. Ask with:")
    print(f"  jasper-fast search ask {args.out}")


def _add(args: argparse.Namespace) -> None:
    check_output_path(args.index)
    documents, ids = _documents(args)
    begin = time.perf_counter()
    count = add(
        args.index, documents, ids=ids, model=args.model, total=args.limit, pictures=args.pictures,
        trust_remote_code=args.trust_remote_code, replace=args.replace,
    )  # fmt: skip
    kind = "images" if args.pictures else "texts"
    print(f"{count:,} new {kind} in {args.index}, {time.perf_counter() - begin:.0f} s")


def _remove(args: argparse.Namespace) -> None:
    check_output_path(args.index)
    if bool(args.ids) == (args.file is not None):
        raise JasperError("give ids, or --file with one id per line. Fix: give one of the two")
    count = remove(args.index, args.ids or _lines(args.file, "id"))
    print(f"{count:,} document{'s' if count > 1 else ''} removed from {args.index}")


def _documents(args: argparse.Namespace) -> tuple[Iterator[str], list[DocumentId] | None]:
    """Return the documents of the command line, and their ids if a column has them."""
    documents: Iterator[str]
    ids: list[DocumentId] | None = None
    if args.pictures:
        if args.id_column is not None:
            raise JasperError("--pictures takes images, which have no columns. Fix: leave out --id-column")
        documents = (str(file) for file in jasper_fast.pictures.image_files(args.texts))
    else:
        source = SourceConfig(path=args.texts, columns=args.columns, split=args.split)
        report_ignored(source)
        if args.id_column is not None:
            texts, ids = read_documents(source, args.id_column, args.limit)
            documents = iter(texts)
        else:
            documents = (join_columns(row) for row in read_source(source))
    first = list(islice(documents, 1))  # Report errors of the source before the model is opened.
    return islice(chain(first, documents), args.limit), ids


def _ask(args: argparse.Namespace) -> None:
    questions = [args.question] if args.question else _lines(args.file) if args.file is not None else []
    index = TextIndex(args.index, args.model, verify=not args.no_verify, trust_remote_code=args.trust_remote_code)
    if questions:
        for start in range(0, len(questions), 256):
            if output_failed():
                break
            part = questions[start : start + 256]
            for question, hits in zip(part, index.ask(part, args.k), strict=True):
                _show(question, hits, args.json, index.ids is not None, args.full)
        return
    index.ask(["a question that warms up the model"], 1)
    print(f"{len(index):,} texts. Type a question, or an empty line to quit.", file=sys.stderr)
    while question := _read_question():
        begin = time.perf_counter()
        (hits,) = index.ask([question], args.k)
        seconds = time.perf_counter() - begin
        _show(question, hits, args.json, index.ids is not None, args.full)
        print(f"({seconds * 1e3:.0f} ms)", file=sys.stderr)


def _read_question() -> str:
    try:
        typed = input("? ").lstrip(BOM).strip()
        return text_argument(typed, "the question") if typed else ""
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise JasperError(f"the question is not {error.encoding} text ({error.reason}). Fix: type it again") from None


def _lines(file: str, kind: str = "question") -> list[str]:
    lines = [text for _, line in read_lines(user_path(file)) if (text := line.strip())]
    if not lines:
        raise JasperError(f"{file}: no {kind}s in it. Fix: give a text file with one {kind} per line")
    return lines


def _show(question: str, hits: Sequence[Hit], as_json: bool, with_ids: bool = False, full: bool = False) -> None:
    if as_json:
        answer = {"question": question, "hits": [vars(hit) for hit in hits]}
        print(json.dumps(answer, ensure_ascii=not shows_unicode()))
        return
    print(f"\n{question}")
    width = shutil.get_terminal_size((100, 24)).columns
    for place, hit in enumerate(hits, 1):
        line = " ".join(hit.text.split())
        label = f"[{' '.join(str(hit.id).split())}]  " if with_ids else ""
        start = f"{place:3d}. {hit.score:.3f}  {label}"
        print(start + (line if full else _shorten(line, max(20, width - _columns(start)))))


def _shorten(line: str, columns: int) -> str:
    """Return the start of a line that fits a number of terminal columns, with … if something is left out."""
    if _columns(line[: columns + 1]) <= columns and len(line) <= columns:
        return line
    used = 0
    for position, character in enumerate(line):
        used += _columns(character)
        if used > columns - 1:
            return line[:position] + "…"
    return line


def _columns(text: str) -> int:
    """Return how many columns a terminal takes for a text: two for wide characters, none for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def main(argv: list[str]) -> int:
    """Build an index, add documents to it, remove some, or ask it.

    Args:
        argv: command-line arguments.
    """
    parser = _parser()
    check_command(argv, ("build", "add", "remove", "ask"), "jasper-fast search", "ask")
    args = parser.parse_args(argv)
    if getattr(args, "model", None) is not None:
        check_model_argument(args.model, f"search {args.command}")
    if args.command == "ask" and args.question is not None:
        if args.file is not None:
            raise JasperError("give a question or --file, not both. Fix: leave out one of them")
        args.question = text_argument(args.question, "the question")
    {"build": _build, "add": _add, "remove": _remove, "ask": _ask}[args.command](args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jasper-fast search", description=(__doc__ or "").splitlines()[0])
    commands: Any = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="encode texts and write their index")
    make.add_argument("model", help="run folder, folder of an adapted model, path, name, or package:import_name/folder")
    make.add_argument("--out", required=True, metavar="DIR", help="folder of the index")
    make.add_argument("--replace", action="store_true", help="replace an existing index at --out")
    make.add_argument("--width", type=positive_int, metavar="N", help="width of the embeddings (default: the widest)")
    make.add_argument(
        "--dtype", choices=("float32", "bfloat16", "int8"), default="float32", help="storage dtype of the embeddings"
    )
    make.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help="maximum tokens per text, or per document of an asymmetric model (default: the model's)",
    )
    make.add_argument(
        "--cache",
        default="cache",
        metavar="DIR",
        help="embeddings that adapt computed, used if they fit (default: cache)",
    )
    more = commands.add_parser("add", help="append texts to an index, with the model that built it")
    more.add_argument("index", help="folder that build wrote")
    more.add_argument("--replace", action="store_true", help="replace the documents whose ids are given again")
    less = commands.add_parser("remove", help="remove documents by their ids")
    less.add_argument("index", help="folder that build wrote, with --id-column")
    less.add_argument("ids", nargs="*", metavar="ID", help="ids of the documents")
    less.add_argument("--file", metavar="FILE", help="file with one id per line")
    for command in (make, more):
        command.add_argument(
            "texts", help=".jsonl, .csv, .tsv, .txt, .parquet, a folder of them, a datasets name, docstrings"
        )
        command.add_argument("--columns", type=column_names, default=["text"], help="columns to join (default: text)")
        command.add_argument(
            "--id-column", metavar="NAME", help="column with your ids, shown in results (default: row numbers)"
        )
        command.add_argument("--pictures", action="store_true", help="TEXTS is a folder of images, found by words")
        command.add_argument("--split", default="train", help="split of a datasets name (default: train)")
        command.add_argument("--limit", type=positive_int, metavar="N", help="read the first N texts only")
    ask = commands.add_parser("ask", help="answer questions from the command line, a file, or interactively")
    ask.add_argument("index", help="folder that build wrote")
    ask.add_argument("question", nargs="?", help="question to answer (default: read questions interactively)")
    ask.add_argument("--file", metavar="FILE", help="file with one question per line")
    ask.add_argument("-k", type=positive_int, default=10, help="results per question (default: 10)")
    ask.add_argument("--json", action="store_true", help="print one JSON object per question")
    ask.add_argument("--full", action="store_true", help="print whole texts, not what fits one line of the terminal")
    ask.add_argument("--no-verify", action="store_true", help="skip the checksums, to open the index faster")
    for command in (more, ask):
        command.add_argument("--model", help="current location of the model, if it moved")
    for command in (make, more, ask):
        command.add_argument("--trust-remote-code", action="store_true", help="allow code that the model brings to run")
    return parser


if __name__ == "__main__":
    run_cli(main)
