"""Evaluation sets from files: retrieval (BEIR layout), sentence similarity, classification, and the kept docstrings.

The kind is found from the path; every problem of a file is an error that names the file and the row.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TextIO

from jasper_fast.config import EvalConfig
from jasper_fast.data import normal_form
from jasper_fast.errors import JasperError

DOCSTRINGS = "docstrings"
DOCSTRING_PAIRS = 1000  # kept pairs that are evaluated where no limit is given
_SPLITS = ("test", "dev", "validation", "valid", "val", "train")  # the first that is there is used
_JSONL = (".jsonl", ".jsonl.gz")
_TSV = (".tsv", ".tsv.gz")


@dataclass(frozen=True)
class RetrievalSet:
    """Queries against a corpus; judgements are positions into both lists, with their grade."""

    name: str
    queries: list[str]
    documents: list[str]
    relevant: list[dict[int, int]]  # per query: document position -> grade > 0
    kind: str = "beir"
    parts: list[str] = field(default_factory=list)  # titles and bodies apart, for exclusion only
    # Per query the document that is the query itself, else -1; it is no answer. Empty: none is. BEIR drops what shares
    # the query's id; here the text must be the same as well, since many sets merely count both from 1.
    itself: list[int] = field(default_factory=list)
    transductive: bool = False  # the documents may be trained on: the corpus that will be searched is known by then
    metrics: ClassVar[tuple[str, ...]] = ("nDCG@10", "recall@100")

    def groups(self) -> dict[str, tuple[list[str], str]]:
        """What to encode: per group its texts and their role."""
        return {"queries": (self.queries, "query"), "documents": (self.documents, "document")}

    def texts(self) -> Iterator[str]:
        """Every text of the set: queries, documents, and the titles and bodies that documents are made of."""
        yield from self.queries
        yield from self.documents
        yield from self.parts

    def kept_apart(self) -> Iterator[str]:
        """What training must not see."""
        yield from self.queries if self.transductive else self.texts()


@dataclass(frozen=True)
class SimilaritySet:
    """Pairs of sentences with a human score."""

    name: str
    left: list[str]
    right: list[str]
    scores: list[float]
    kind: str = "sts"
    metrics: ClassVar[tuple[str, ...]] = ("Spearman",)

    def groups(self) -> dict[str, tuple[list[str], str]]:
        """What to encode: neither sentence asks for the other, so both are documents."""
        return {"left": (self.left, "document"), "right": (self.right, "document")}

    def texts(self) -> Iterator[str]:
        """Every sentence of the set."""
        yield from self.left
        yield from self.right

    kept_apart = texts  # from training


@dataclass(frozen=True)
class ClassificationSet:
    """Labelled texts: a part to fit a linear classifier on, and a part to judge it by."""

    name: str
    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]
    kind: str = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def groups(self) -> dict[str, tuple[list[str], str]]:
        """What to encode: the two parts."""
        return {"train": (self.train_texts, "document"), "test": (self.test_texts, "document")}

    def texts(self) -> Iterator[str]:
        """Every text of both parts."""
        yield from self.train_texts
        yield from self.test_texts

    kept_apart = texts  # from training


EvalSet = RetrievalSet | SimilaritySet | ClassificationSet


def load_eval(config: EvalConfig) -> EvalSet:
    """Read one evaluation set; its kind is found from what lies at the path.

    Args:
        config: ``path`` is a BEIR folder (or one of its ``qrels/*.tsv``), a similarity TSV or a folder with dev.tsv or
            test.tsv, a folder with train and test JSONL (text, label), or the word ``docstrings``. ``limit`` keeps
            so many queries or pairs (classification: texts of each part), always the same ones; the corpus stays whole.

    Raises:
        JasperError: nothing usable at the path, or a malformed row, with file and row.
    """
    if config.path == DOCSTRINGS:
        return _docstrings(config)
    found = _load_files(config)
    if config.transductive and not isinstance(found, RetrievalSet):
        raise JasperError(
            f"evaluation set {config.path!r}: `transductive` lets a retrieval set's documents be trained on; this is a "
            f"set of {found.kind}: leave it out"
        )
    return found


def _load_files(config: EvalConfig) -> EvalSet:
    path = Path(config.path).expanduser()
    if not path.exists():
        raise JasperError(f"evaluation set {config.path!r}: no such file or folder (or the word {DOCSTRINGS!r})")
    if path.is_file():
        if not path.name.endswith(_TSV):
            raise JasperError(
                f"evaluation set {path}: expected a folder or a .tsv file with score, sentence1, sentence2"
            )
        if path.parent.name == "qrels":
            return _beir(config, path.parent.parent, path)
        return _similarity(config, path)
    if _find(path, "corpus", _JSONL):
        return _beir(config, path, _first_split(path / "qrels", _TSV))
    if _find(path, "train", _JSONL):
        return _classification(config, path)
    if file := _first_split(path, _TSV):
        return _similarity(config, file, folder=path)
    raise JasperError(
        f"evaluation set {path}: the folder holds none of corpus.jsonl[.gz] (beside queries.jsonl[.gz] and "
        "qrels/test.tsv), train.jsonl[.gz] (beside test.jsonl[.gz]), test.tsv or dev.tsv"
    )


def load_evals(configs: Sequence[EvalConfig]) -> list[EvalSet]:
    """Read several sets, whose names must differ because scores are reported by name.

    Raises:
        JasperError: a set cannot be read, or two have one name.
    """
    evalsets = [load_eval(config) for config in configs]
    names = [s.name for s in evalsets]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise JasperError(
            f"evaluation sets share the name {', '.join(map(repr, twice))}; give each a `name` of its own"
        )
    return evalsets


def _docstrings(config: EvalConfig) -> RetrievalSet:
    from jasper_fast.docstrings import split_docstrings  # reads every installed package: only when asked for

    if config.transductive:
        raise JasperError("evaluation set 'docstrings': what is kept is never trained on; leave `transductive` out")
    _, held_out = split_docstrings(config.limit or DOCSTRING_PAIRS)
    if not held_out:
        raise JasperError("evaluation set 'docstrings': the installed packages hold no docstrings that could be kept")
    queries, documents = [summary for summary, _ in held_out], [body for _, body in held_out]
    relevant = [{position: 1} for position in range(len(queries))]
    return RetrievalSet(config.name or DOCSTRINGS, queries, documents, relevant, kind="docstrings")


def _beir(config: EvalConfig, folder: Path, qrels: Path | None) -> RetrievalSet:
    corpus, queries = _find(folder, "corpus", _JSONL), _find(folder, "queries", _JSONL)
    if corpus is None or queries is None or qrels is None:
        needed = {"corpus.jsonl[.gz]": corpus, "queries.jsonl[.gz]": queries, "qrels/test.tsv": qrels}
        absent = [name for name, file in needed.items() if file is None]
        raise JasperError(f"evaluation set {folder}: {' and '.join(absent)} missing; a BEIR folder has all three")
    documents: list[str] = []
    bodies: list[str] = []
    parts: list[str] = []
    document_at: dict[str, int] = {}
    for where, row in _json_rows(corpus):
        title, body = _text(row, "title", where, optional=True), _text(row, "text", where)
        _new_id(document_at, row, where, len(documents))
        documents.append(f"{title} {body}".strip())
        bodies.append(body)
        if title and body:
            parts += [title, body]
    texts: list[str] = []
    query_at: dict[str, int] = {}
    for where, row in _json_rows(queries):
        _new_id(query_at, row, where, len(texts))
        texts.append(_text(row, "text", where))
    relevant = _judgements(qrels, query_at, document_at)
    judged = [query for query, grades in enumerate(relevant) if grades]
    if not judged:
        raise JasperError(f"{qrels}: no query has a relevant document (a score above 0)")
    kept = [judged[i] for i in _choose([texts[query] for query in judged], config.limit)]
    names = list(query_at)

    def itself(query: int) -> int:
        document = document_at.get(names[query], -1)
        if document < 0 or document in relevant[query]:
            return -1
        same = {normal_form(bodies[document]), normal_form(documents[document])}
        return document if normal_form(texts[query]) in same else -1

    found = [itself(query) for query in kept]
    return RetrievalSet(
        config.name or folder.resolve().name,
        [texts[query] for query in kept],
        documents,
        [relevant[query] for query in kept],
        parts=parts,
        itself=found if max(found) >= 0 else [],
        transductive=config.transductive,
    )


def _judgements(qrels: Path, query_at: dict[str, int], document_at: dict[str, int]) -> list[dict[int, int]]:
    relevant: list[dict[int, int]] = [{} for _ in query_at]
    for number, line in _lines(qrels):
        where, cells = f"{qrels}, row {number}", line.rstrip("\r\n").split("\t")
        if number == 1 and cells[-1].strip() == "score":
            continue
        if len(cells) != 3:
            raise JasperError(
                f"{where}: expected query-id, corpus-id and score with tabs between, got {line.strip()!r}"
            )
        query, document, score = (cell.strip() for cell in cells)
        for what, name, known in (("query", query, query_at), ("document", document, document_at)):
            if name not in known:
                raise JasperError(f"{where}: {what} id {name!r} is not among the {len(known)} {what} ids of the set")
        try:
            grade = int(score)
        except ValueError:
            raise JasperError(f"{where}: the score must be a whole number, got {score!r}") from None
        if grade > 0:
            relevant[query_at[query]][document_at[document]] = grade
    return relevant


def _similarity(config: EvalConfig, file: Path, folder: Path | None = None) -> SimilaritySet:
    with _open(file) as stream:
        rows = csv.reader((line.rstrip("\r\n") for line in stream), delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = next(rows, [])
            if missing := [column for column in ("score", "sentence1", "sentence2") if column not in header]:
                raise JasperError(f"{file}, row 1: no column {', '.join(missing)} in the header {header}")
            at, left, right = (header.index(column) for column in ("score", "sentence1", "sentence2"))
            triples: list[tuple[float, str, str]] = []
            for number, row in enumerate(rows, 2):
                if not row:
                    continue
                if len(row) != len(header):
                    raise JasperError(f"{file}, row {number}: {len(row)} cells where the header has {len(header)}")
                triples.append((_number(row[at], f"{file}, row {number}"), row[left], row[right]))
        except (UnicodeDecodeError, EOFError, OSError, zlib.error, csv.Error) as error:
            raise JasperError(f"{file}: cannot be read as UTF-8 tab-separated text ({error})") from None
    kept = [triples[i] for i in _choose([f"{a}\t{b}" for _, a, b in triples], config.limit)]
    if len({score for score, _, _ in kept}) < 2:
        raise JasperError(f"{file}: {len(kept)} pairs without two different scores; Spearman needs at least two")
    name = config.name or (folder.resolve().name if folder else _file_name(file))
    return SimilaritySet(name, [a for _, a, _ in kept], [b for _, _, b in kept], [score for score, _, _ in kept])


def _classification(config: EvalConfig, folder: Path) -> ClassificationSet:
    train, test = _find(folder, "train", _JSONL), _first_split(folder, _JSONL)
    if train is None or test is None or test == train:
        raise JasperError(f"evaluation set {folder}: a classification folder has train.jsonl[.gz] and test.jsonl[.gz]")
    parts = []
    for file in (train, test):
        texts, labels = [], []
        for where, row in _json_rows(file):
            texts.append(_text(row, "text", where))
            label = row.get("label")
            if label is None or isinstance(label, (dict, list, float)):
                raise JasperError(f"{where}: `label` must be text or a whole number, got {label!r}")
            labels.append(str(label))
        kept = _choose(texts, config.limit)
        parts.append(([texts[i] for i in kept], [labels[i] for i in kept]))
    if len(set(parts[0][1])) < 2:
        raise JasperError(f"{train}: a classifier needs two different labels at least")
    return ClassificationSet(config.name or folder.resolve().name, *parts[0], *parts[1])


def _choose(texts: Sequence[str], limit: int | None) -> list[int]:
    """Positions of at most ``limit`` texts: those of the smallest digests (a set's first rows are often alike)."""
    if limit is None or limit >= len(texts):
        return list(range(len(texts)))
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
    return sorted(sorted(range(len(texts)), key=lambda i: (digests[i], i))[:limit])


def _file_name(file: Path) -> str:
    stem = file.name.removesuffix(".gz").removesuffix(".tsv")
    return f"{file.resolve().parent.name}-{stem}" if stem in _SPLITS else stem


def _find(folder: Path, stem: str, endings: Sequence[str]) -> Path | None:
    return next((file for ending in endings if (file := folder / f"{stem}{ending}").is_file()), None)


def _first_split(folder: Path, endings: Sequence[str]) -> Path | None:
    return next((file for split in _SPLITS if (file := _find(folder, split, endings))), None)


def _open(file: Path) -> TextIO:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8", newline="\n")
    return open(file, encoding="utf-8", newline="\n")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their number from 1."""
    empty = True
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    empty = False
                    yield number, line
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise JasperError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    if empty:
        raise JasperError(f"{file}: the file is empty")


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(file):
        where = f"{file}, row {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise JasperError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise JasperError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield where, row


def _text(row: dict[str, Any], key: str, where: str, optional: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise JasperError(f"{where}: `{key}` must be text, got {value!r}")
    return value


def _new_id(known: dict[str, int], row: dict[str, Any], where: str, position: int) -> None:
    name = row.get("_id")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise JasperError(f"{where}: `_id` must be text, got {name!r}")
    if str(name) in known:
        raise JasperError(f"{where}: `_id` {name!r} stands twice in the file")
    known[str(name)] = position


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise JasperError(f"{where}: the score must be a number, got {cell!r}")
    return value
