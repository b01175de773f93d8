"""Search texts by meaning: build an index from a model and texts, then ask it questions.

    python -m jasper_fast.search build runs/minilm-docstrings my_texts.jsonl --out my-index
    python -m jasper_fast.search ask my-index "how do I reverse a list?"
    python -m jasper_fast.search build runs/glyphs my_photos --pictures --out my-index   # find images by words

``ask`` also reads questions from a file (``--file``). Without a question it reads them interactively.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import jasper_fast.pictures
from jasper_fast.config.data import SourceConfig
from jasper_fast.data.listing import user_path
from jasper_fast.data.rows import BOM, check_text, read_lines
from jasper_fast.data.text_sources import read_source, report_ignored
from jasper_fast.mips import FlatIPIndex
from jasper_fast.models.embedder import EncodeWidths, load_model, model_encoder
from jasper_fast.models.hub import model_revision, resolve_model
from jasper_fast.utils.arrow_files import read_mapped, stream_bytes
from jasper_fast.utils.atomic import check_output_path, publish_dir
from jasper_fast.utils.command_line import (
    check_command,
    check_model_argument,
    column_names,
    positive_int,
    text_argument,
)
from jasper_fast.utils.errors import JasperError, run_cli
from jasper_fast.utils.output import output_failed, shows_unicode

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENCODE_CHUNK_TEXTS = 4096  # The model sorts these by length.
Dtype = Literal["bfloat16", "float32", "int8"]
SETTINGS, TEXTS, VECTORS = "search.json", "texts.arrow", "vectors"
SETTING_TYPES: dict[str, Any] = {
    "model": str,
    "revision": str,
    "width": int,
    "max_length": (int, type(None)),
    "role": str,
}


@dataclass(frozen=True)
class Hit:
    """One result: the inner product with the question, the number in the index, and the text."""

    score: float
    id: int
    text: str


class TextIndex:
    """An index of texts on disk, opened with the model that built it.

    Args:
        path: folder that ``build`` wrote.
        model: current location of the model. None takes the location at the time of the build.
        verify: compare the files' checksums, and check that the model built the index.
        trust_remote_code: allow code that the model brings to run.

    Raises:
        JasperError: the folder has no index, the index is damaged, or another model built it.
    """

    def __init__(
        self, path: str | Path, model: str | None = None, verify: bool = True, *, trust_remote_code: bool = False
    ) -> None:
        import pyarrow as pa

        path = Path(path)
        try:
            settings = _read_settings(path / SETTINGS)
            name, self.width, self.role = model or settings["model"], settings["width"], settings["role"]
            self.texts = read_mapped(path / TEXTS).column("text")
        except FileNotFoundError as error:
            missing = f"no text index here ({Path(error.filename or SETTINGS).name} is missing)"
            raise JasperError(
                f"{path}: {missing if path.exists() else 'there is no such folder'}. Fix: make an index with "
                "`python -m jasper_fast.search build MODEL TEXTS --out DIR`"
            ) from None
        except (ValueError, KeyError, OSError, pa.ArrowException) as error:
            raise JasperError(f"{path}: damaged ({error}). Fix: build the index again") from error
        self.vectors = FlatIPIndex.load(path / VECTORS, verify=verify)
        if len(self.vectors) != len(self.texts):
            raise JasperError(
                f"{path}: damaged ({len(self.texts)} texts, {len(self.vectors)} embeddings). Fix: build the index again"
            )
        if verify and model_revision(_weights(name)) != settings["revision"]:
            raise JasperError(f"{name}: not the model that {path} was built with. Fix: build the index again")
        loaded = load_model(name, settings["max_length"], trust_remote_code=trust_remote_code)
        self._encode = model_encoder(loaded, [self.width])

    def __len__(self) -> int:
        return len(self.texts)

    def encode(self, questions: Sequence[str]) -> np.ndarray:
        """Encode questions, (Q, width) float32.

        Args:
            questions: Q questions.

        Raises:
            JasperError: a question has a lone surrogate.
        """
        checked = [check_text(question, f"question {number}") for number, question in enumerate(questions, 1)]
        return self._encode(checked, self.role)[self.width]

    def ask(self, questions: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Return the k texts nearest to every question, nearest first.

        Args:
            questions: Q questions.
            k: number of texts to return for each.

        Raises:
            JasperError: a question has a lone surrogate.
        """
        if not questions:
            return []
        scores, ids = self.vectors.search(self.encode(questions), min(k, len(self)))
        return [
            [Hit(score, number, self.texts[number].as_py()) for score, number in zip(*pair, strict=True)]
            for pair in zip(scores.tolist(), ids.tolist(), strict=True)
        ]


def build(
    model: str,
    texts: Iterable[str],
    out: str | Path,
    *,
    width: int | None = None,
    dtype: Dtype = "float32",
    max_length: int | None = None,
    total: int | None = None,
    pictures: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Encode texts and write their index as a folder, atomically.

    Args:
        model: run folder, path, name, or ``package:import_name/folder`` of the model.
        texts: documents. Repeated texts are indexed once.
        out: folder to write. An index at this path is replaced.
        width: width of the embeddings. None takes the model's widest.
        dtype: storage dtype of the embeddings, as in ``FlatIPIndex``.
        max_length: maximum number of tokens per text. None keeps the model's limit.
        total: number of texts for the progress bar. None shows no total.
        pictures: treat the texts as paths of images. The model must have a vision tower. Words find the images.
        trust_remote_code: allow code that the model brings to run.

    Returns:
        number of texts in the index.

    Raises:
        JasperError: no such model or width, no text, or a folder that cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out / SETTINGS).is_file():
        raise JasperError(f"{out}: exists and is not a text index. Fix: choose another path, or remove it")
    loaded = load_model(model, max_length, trust_remote_code=trust_remote_code)
    encode, width = _encoder(loaded, width)
    if pictures:
        encode = _image_encoder(model, width, trust_remote_code)
    index, indexed = _encode_texts(model, texts, encode, width, dtype, total, " images" if pictures else " texts")
    if not indexed:
        raise JasperError("no texts to index. Fix: give a source with at least one text")
    settings = {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "revision": model_revision(_weights(model)),
        "width": width,
        "max_length": max_length,
        "texts": len(indexed),
        "role": "document" if pictures else "query",  # the captions' role in training on images
    }
    _write(out, index, indexed, settings)
    return len(indexed)


def _image_encoder(model: str, width: int, trust_remote_code: bool) -> EncodeWidths:
    embedder = jasper_fast.pictures.load(_weights(model), trust_remote_code=trust_remote_code)

    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        return {width: embedder.encode(texts, width)}

    return encode


def _encode_texts(
    model: str, texts: Iterable[str], encode: EncodeWidths, width: int, dtype: Dtype, total: int | None, unit: str
) -> tuple[FlatIPIndex, list[str]]:
    """Return the index of the distinct texts, and these texts."""
    from tqdm import tqdm

    index, indexed = FlatIPIndex(width, dtype=dtype), list[str]()
    with tqdm(total=total, unit=unit, desc="encoding") as bar:
        for chunk in _chunks(texts):
            try:
                index.add(np.ascontiguousarray(encode(chunk, "document")[width]))
            except ValueError as error:
                raise JasperError(f"{model}: its embeddings cannot be indexed: {error}") from error
            indexed += chunk
            bar.update(len(chunk))
    return index, indexed


def _write(out: Path, index: FlatIPIndex, texts: list[str], settings: dict[str, Any]) -> None:
    import pyarrow as pa

    with publish_dir(out, replace=True) as folder:
        index.save(folder / VECTORS)
        (folder / TEXTS).write_bytes(stream_bytes(pa.table({"text": pa.array(texts, pa.large_string())})))
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _read_settings(file: Path) -> dict[str, Any]:
    """Read an index's settings.

    Raises:
        OSError: the file cannot be read.
        ValueError: a setting is missing or of another type.
    """
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{file.name} has no settings")
    settings = {"role": "query", "max_length": None, **settings}  # missing in the first version
    for name, kinds in SETTING_TYPES.items():
        if not isinstance(settings.get(name), kinds):
            raise ValueError(f"{file.name}: {name} is {settings.get(name)!r}")
    if settings["role"] not in ("query", "document"):
        raise ValueError(f"{file.name}: role is {settings['role']!r}")
    return settings


def _encoder(model: SentenceTransformer, width: int | None) -> tuple[EncodeWidths, int]:
    if width is not None:
        return model_encoder(model, [width]), width
    every = model_encoder(model)
    widest = max(every(["a"], "document"))
    return model_encoder(model, [widest]), widest


def _weights(model: str) -> str:
    """Return a run folder's model, so that checkpoints are not part of its identity."""
    path = Path(resolve_model(model))
    return str(path / "model") if (path / "model" / "modules.json").is_file() else model


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    seen: set[str] = set()
    chunk: list[str] = []
    for number, text in enumerate(texts, 1):
        if text in seen or not text.strip():
            continue
        seen.add(check_text(text, f"text {number}"))
        chunk.append(text)
        if len(chunk) == ENCODE_CHUNK_TEXTS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _build(args: argparse.Namespace) -> None:
    documents: Iterator[str]
    check_output_path(args.out)
    if args.pictures:
        documents = (str(file) for file in jasper_fast.pictures.image_files(args.texts))
    else:
        source = SourceConfig(path=args.texts, columns=args.columns, split=args.split)
        report_ignored(source)
        documents = (" ".join(part for part in row if part) for row in read_source(source))
    first = list(islice(documents, 1))  # Report errors of the source before the model is opened.
    texts = islice(chain(first, documents), args.limit)
    begin = time.perf_counter()
    count = build(
        args.model, texts, args.out, width=args.width, dtype=args.dtype, max_length=args.max_length,
        total=args.limit, pictures=args.pictures, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    kind = "images" if args.pictures else "texts"
    print(f"{count:,} {kind} in {args.out}, {time.perf_counter() - begin:.0f} s. Ask with:")
    print(f"  python -m jasper_fast.search ask {args.out}")


def _ask(args: argparse.Namespace) -> None:
    questions = [args.question] if args.question else _lines(args.file) if args.file is not None else []
    index = TextIndex(args.index, args.model, verify=not args.no_verify, trust_remote_code=args.trust_remote_code)
    if questions:
        for start in range(0, len(questions), 256):
            if output_failed():
                break
            part = questions[start : start + 256]
            for question, hits in zip(part, index.ask(part, args.k), strict=True):
                _show(question, hits, args.json)
        return
    index.ask(["a question that warms up the model"], 1)
    print(f"{len(index):,} texts. Type a question, or an empty line to quit.", file=sys.stderr)
    while question := _read_question():
        begin = time.perf_counter()
        (hits,) = index.ask([question], args.k)
        seconds = time.perf_counter() - begin
        _show(question, hits, args.json)
        print(f"({seconds * 1e3:.0f} ms)", file=sys.stderr)


def _read_question() -> str:
    try:
        typed = input("? ").lstrip(BOM).strip()
        return text_argument(typed, "the question") if typed else ""
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise JasperError(f"the question is not {error.encoding} text ({error.reason}). Fix: type it again") from None


def _lines(file: str) -> list[str]:
    questions = [text for _, line in read_lines(user_path(file)) if (text := line.strip())]
    if not questions:
        raise JasperError(f"{file}: no questions in it. Fix: give a text file with one question per line")
    return questions


def _show(question: str, hits: Sequence[Hit], as_json: bool) -> None:
    if as_json:
        answer = {"question": question, "hits": [vars(hit) for hit in hits]}
        print(json.dumps(answer, ensure_ascii=not shows_unicode()))
        return
    print(f"\n{question}")
    for place, hit in enumerate(hits, 1):
        line = " ".join(hit.text.split())
        print(f"{place:3d}. {hit.score:.3f}  {line if len(line) <= 100 else line[:99] + '…'}")


def main(argv: list[str]) -> int:
    """Build an index or ask one.

    Args:
        argv: command-line arguments.
    """
    parser = _parser()
    check_command(argv, ("build", "ask"), "python -m jasper_fast.search", "ask")
    args = parser.parse_args(argv)
    if args.model is not None:
        check_model_argument(args.model, f"search {args.command}")
    if args.command == "ask" and args.question is not None:
        if args.file is not None:
            raise JasperError("give a question or --file, not both. Fix: leave out one of them")
        args.question = text_argument(args.question, "the question")
    (_build if args.command == "build" else _ask)(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jasper_fast.search", description=(__doc__ or "").splitlines()[0])
    commands: Any = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="encode texts and write their index")
    make.add_argument("model", help="run folder, path, name, or package:import_name/folder")
    make.add_argument("texts", help=".jsonl, .csv, .tsv, .txt, .parquet, a folder of them, a datasets name, docstrings")
    make.add_argument("--out", required=True, metavar="DIR", help="folder of the index")
    make.add_argument("--columns", type=column_names, default=["text"], help="columns to join (default: text)")
    make.add_argument("--pictures", action="store_true", help="TEXTS is a folder of images, found by words")
    make.add_argument("--split", default="train", help="split of a datasets name (default: train)")
    make.add_argument("--width", type=positive_int, metavar="N", help="width of the embeddings (default: the widest)")
    make.add_argument(
        "--dtype", choices=("float32", "bfloat16", "int8"), default="float32", help="storage dtype of the embeddings"
    )
    make.add_argument(
        "--max-length", type=positive_int, metavar="N", help="maximum tokens per text (default: the model's)"
    )
    make.add_argument("--limit", type=positive_int, metavar="N", help="index the first N texts only")
    ask = commands.add_parser("ask", help="answer questions from the command line, a file, or interactively")
    ask.add_argument("index", help="folder that build wrote")
    ask.add_argument("question", nargs="?", help="question to answer (default: read questions interactively)")
    ask.add_argument("--file", metavar="FILE", help="file with one question per line")
    ask.add_argument("-k", type=positive_int, default=10, help="results per question (default: 10)")
    ask.add_argument("--json", action="store_true", help="print one JSON object per question")
    ask.add_argument("--model", help="current location of the model, if it moved")
    ask.add_argument("--no-verify", action="store_true", help="skip the checksums, to open the index faster")
    for command in (make, ask):
        command.add_argument("--trust-remote-code", action="store_true", help="allow code that the model brings to run")
    return parser


if __name__ == "__main__":
    run_cli(main)
