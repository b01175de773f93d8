"""Evaluation sets from files: retrieval (BEIR layout), sentence similarity, classification, and held-out docstrings.

The path decides the kind. Errors name the file and the line.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jasper_fast.config import EvalConfig
from jasper_fast.errors import JasperError
from jasper_fast.eval_files import SPLITS, find, first_split, json_rows, text_cell
from jasper_fast.judgements import ENDINGS, Judgements, read_judgements
from jasper_fast.listing import user_path
from jasper_fast.row_reader import PACKED, check_text, packed, read_rows
from jasper_fast.text import normal_form

DOCSTRINGS = "docstrings"
DOCSTRING_PAIRS = 1000  # kept pairs that are evaluated where no limit is given
T = TypeVar("T")
_JSONL, _TSV = packed(".jsonl"), packed(".tsv")


@dataclass(frozen=True)
class RetrievalSet:
    """Queries against a corpus, with the documents that are relevant to each query.

    Args:
        name: under which scores are reported.
        queries: texts.
        documents: texts; documents that are judged but absent from the corpus have the positions after the last.
        relevant: per query the positions of its relevant documents, with grades above 0; a query without any scores 0.
        kind: "beir" or "docstrings".
        parts: titles and bodies of documents, only for exclusion from training.
        itself: per query the document that is the query itself, else -1. That document is no answer. Empty: no query
            has one. BEIR drops a document that shares the query's id. Here the text must be the same as well, since
            many sets merely count both from 1.
        transductive: whether the documents may be trained on, as the corpus to be searched is known in advance.
        ids: names of the documents, absent ones included: equal scores rank by them, as in BEIR and mteb. Empty: equal
            scores rank by position.
        unmatched: how many judgements name documents, and how many queries, that the set's files do not have.
    """

    name: str
    queries: list[str]
    documents: list[str]
    relevant: list[dict[int, int]]
    kind: str = "beir"
    parts: list[str] = field(default_factory=list)
    itself: list[int] = field(default_factory=list)
    transductive: bool = False
    ids: list[str] = field(default_factory=list)
    unmatched: tuple[int, int] = (0, 0)
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

    def remarks(self) -> str:
        """Count the judgements without a text and the queries without a relevant document; "" if there are none."""
        documents, queries = self.unmatched
        counts = (
            _count(documents, "judgement of an absent document", "judgements of absent documents"),
            _count(queries, "judgement of an absent query", "judgements of absent queries"),
            _count(self.relevant.count({}), "query", "queries", " without a relevant document (scored 0)"),
        )
        return ", ".join(count for count in counts if count)


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
    path = user_path(config.path)
    if not os.path.exists(path):
        raise JasperError(
            f"evaluation set {config.path!r}: no such file or folder. Fix: correct the path, or give {DOCSTRINGS!r}"
        )
    if os.path.isfile(path):
        if path.parent.name == "qrels" and path.name.lower().endswith(ENDINGS):
            return _beir(config, path.parent.parent, path)
        if not path.name.lower().endswith(_TSV):
            raise JasperError(
                f"evaluation set {path}: expected a folder or a .tsv file with score, sentence1, sentence2"
            )
        return _similarity(config, path)
    if find(path, "corpus", _JSONL):
        qrels = path / "qrels"
        return _beir(config, path, first_split(qrels, ENDINGS) if qrels.is_dir() else None)
    if find(path, "train", _JSONL):
        return _classification(config, path)
    if file := first_split(path, _TSV):
        return _similarity(config, file, folder=path)
    raise JasperError(
        f"evaluation set {path}: the folder holds none of corpus.jsonl (with queries.jsonl and qrels/test.tsv), "
        f"train.jsonl (with test.jsonl), test.tsv or dev.tsv, each also with {', '.join(PACKED)}. Fix: give the folder "
        "that holds them"
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
    corpus, queries = find(folder, "corpus", _JSONL), find(folder, "queries", _JSONL)
    if corpus is None or queries is None or qrels is None:
        needed = {"corpus.jsonl": corpus, "queries.jsonl": queries, "qrels/test.tsv": qrels}
        absent = [name for name, file in needed.items() if file is None]
        raise JasperError(f"evaluation set {folder}: {' and '.join(absent)} missing; a BEIR folder has all three")
    pairs, document_at = _read_corpus(corpus)
    texts, query_at = _by_id(queries, lambda row, where: text_cell(row, "text", where))
    judgements = read_judgements(qrels)
    unmatched = _unmatched(judgements, query_at, document_at, qrels)
    judged = [name for name in query_at if name in judgements]
    kept = [judged[i] for i in _choose([texts[query_at[name]] for name in judged], config.limit)]
    own = [_itself(texts[query_at[name]], pairs, document_at.get(name)) for name in kept]
    relevant = [_relevant(judgements[name], document_at) for name in kept]
    itself = [-1 if document in grades else document for document, grades in zip(own, relevant, strict=True)]
    return RetrievalSet(
        config.name or folder.resolve().name,
        [texts[query_at[name]] for name in kept],
        [_document(title, body) for title, body in pairs],
        relevant,
        parts=[part for pair in pairs if all(pair) for part in pair],
        itself=itself if max(itself) >= 0 else [],
        transductive=config.transductive,
        ids=list(document_at),
        unmatched=unmatched,
    )


def _read_corpus(file: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Read title and body of each document, and its position by its id."""
    return _by_id(
        file, lambda row, where: (text_cell(row, "title", where, optional=True), text_cell(row, "text", where))
    )


def _by_id(file: Path, content: Callable[[dict[str, Any], str], T]) -> tuple[list[T], dict[str, int]]:
    """Read the content of each row, and its position by its id; a row that is there again counts once.

    Raises:
        JasperError: a row is malformed, or two rows with one id differ.
    """
    found: list[T] = []
    position: dict[str, int] = {}
    for where, row in json_rows(file):
        name, one = _id(row, where), content(row, where)
        if name not in position:
            position[name] = len(found)
            found.append(one)
        elif found[position[name]] != one:
            raise JasperError(f"{where}: `_id` {name!r} appears twice, with other text. Fix: give each row its own")
    return found, position


def _document(title: str, body: str) -> str:
    return f"{title} {body}".strip()


def _itself(query: str, pairs: Sequence[tuple[str, str]], document: int | None) -> int:
    """Return the document of a query's id if it has the query's text, else -1."""
    if document is None:
        return -1
    title, body = pairs[document]
    same = {normal_form(body), normal_form(_document(title, body))}
    return document if normal_form(query) in same else -1


def _unmatched(
    judgements: Judgements, queries: dict[str, int], documents: dict[str, int], file: Path
) -> tuple[int, int]:
    """Count the judgements of absent documents and of absent queries.

    Raises:
        JasperError: no document is relevant to a query, or none of those that are is in the corpus.
    """
    relevant = {(q, d) for q, grades in judgements.items() for d, grade in grades.items() if grade > 0}
    if not relevant:
        raise JasperError(
            f"{file}: no query has a relevant document (a score above 0). Fix: give judgements with scores above 0"
        )
    if not any(query in queries and document in documents for query, document in relevant):
        query, document = min(relevant)
        raise JasperError(
            f"{file}: its judgements are of other files (no relevant document is there together with its query; e.g. "
            f"query {query!r}, document {document!r}). Fix: put the qrels next to their corpus.jsonl and queries.jsonl"
        )
    lost = {query: len(grades) for query, grades in judgements.items() if query not in queries}
    absent = sum(d not in documents for q, grades in judgements.items() if q not in lost for d in grades)
    return absent, sum(lost.values())


def _relevant(grades: dict[str, int], document_at: dict[str, int]) -> dict[int, int]:
    """Return positions and grades above 0; absent documents are added to ``document_at``, after the corpus.

    An absent document stays in the ideal ranking, as where BEIR and mteb call pytrec_eval.
    """
    return {document_at.setdefault(name, len(document_at)): grade for name, grade in grades.items() if grade > 0}


def _similarity(config: EvalConfig, file: Path, folder: Path | None = None) -> SimilaritySet:
    triples = [
        (_number(row["score"], where), row["sentence1"], row["sentence2"])
        for where, row in read_rows(file, ("score", "sentence1", "sentence2"))
    ]
    kept = [triples[i] for i in _choose([f"{a}\t{b}" for _, a, b in triples], config.limit)]
    if len({score for score, _, _ in kept}) < 2:
        raise JasperError(f"{file}: {len(kept)} pairs without two different scores; Spearman needs at least two")
    name = config.name or (folder.resolve().name if folder else _file_name(file))
    return SimilaritySet(name, [a for _, a, _ in kept], [b for _, _, b in kept], [score for score, _, _ in kept])


def _classification(config: EvalConfig, folder: Path) -> ClassificationSet:
    train, test = find(folder, "train", _JSONL), first_split(folder, _JSONL)
    if train is None or test is None or test == train:
        raise JasperError(f"evaluation set {folder}: a classification folder has train.jsonl and test.jsonl")
    parts = []
    for file in (train, test):
        texts, labels = [], []
        for where, row in json_rows(file):
            texts.append(text_cell(row, "text", where))
            label = row.get("label")
            if label is None or isinstance(label, (dict, list, float)):
                raise JasperError(f"{where}: `label` must be text or a whole number, got {label!r}")
            labels.append(check_text(str(label), f"{where}: `label`"))
        kept = _choose(texts, config.limit)
        parts.append(([texts[i] for i in kept], [labels[i] for i in kept]))
    if len(set(parts[0][1])) < 2:
        raise JasperError(f"{train}: a classifier needs two different labels at least")
    return ClassificationSet(config.name or folder.resolve().name, *parts[0], *parts[1])


def _choose(texts: Sequence[str], limit: int | None) -> list[int]:
    """Positions of at most ``limit`` texts: those of the smallest digests (a set's first rows are often alike)."""
    if limit is None or limit >= len(texts):
        return list(range(len(texts)))
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    return sorted(sorted(range(len(texts)), key=lambda i: (digests[i], i))[:limit])


def _file_name(file: Path) -> str:
    stem = file.name[: file.name.lower().index(".tsv")]
    return f"{file.resolve().parent.name}-{stem}" if stem in SPLITS else stem


def _id(row: dict[str, Any], where: str) -> str:
    name = row.get("_id")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise JasperError(f"{where}: `_id` must be text, got {name!r}")
    return check_text(str(name).strip(), f"{where}: `_id`")


def _count(count: int, one: str, several: str, rest: str = "") -> str:
    return f"{count:,} {one if count == 1 else several}{rest}" if count else ""


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise JasperError(f"{where}: the score must be a number, got {cell!r}")
    return value
