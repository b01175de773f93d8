"""Load evaluation sets: retrieval (BEIR layout), sentence similarity, classification, and held-out docstrings.

The files at the path determine the kind of set. Errors give the file and the line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jasper_fast.config.data import EvalConfig
from jasper_fast.data.eval_files import SPLITS, find_file, first_split, json_rows, subsample, text_cell
from jasper_fast.data.eval_pairs import read_pairs
from jasper_fast.data.eval_sets import ClassificationSet, EvalSet, RetrievalSet, SimilaritySet
from jasper_fast.data.judgements import SUFFIXES, Judgements, read_judgements
from jasper_fast.data.listing import user_path
from jasper_fast.data.rows import COMPRESSION_SUFFIXES, check_text, read_rows, with_compressed
from jasper_fast.data.text import normal_form
from jasper_fast.utils.errors import JasperError

DOCSTRINGS = "docstrings"
DOCSTRING_PAIRS = 1000  # default number of held-out docstring pairs to evaluate
T = TypeVar("T")
_JSONL, _TSV = with_compressed(".jsonl"), with_compressed(".tsv")


def load_eval(config: EvalConfig) -> EvalSet:
    """Read an evaluation set. The files at its path determine its kind.

    Args:
        config: the settings of the set. Its ``path`` is one of:

            - a BEIR folder, or one of its ``qrels/*.tsv``
            - a similarity TSV, or a folder with dev.tsv or test.tsv
            - a folder with train and test JSONL files (text, label)
            - the word ``docstrings``
            - any file or folder of rows, if ``query`` and ``document`` name two of its columns

            Its ``limit`` is the maximum number of queries, pairs, or texts per classification part. The selection is
            always the same, and the corpus stays complete.

    Raises:
        JasperError: the path has no evaluation set, or a row is malformed. The message gives file and row.
    """
    if config.query is not None:
        return read_pairs(config)
    if config.path == DOCSTRINGS:
        return _docstrings(config)
    evalset = _load_files(config)
    if config.transductive and not isinstance(evalset, RetrievalSet):
        raise JasperError(
            f"evaluation set {config.path!r}: `transductive` applies only to retrieval sets (got kind "
            f"{evalset.kind!r}). Fix: remove `transductive`"
        )
    return evalset


def _load_files(config: EvalConfig) -> EvalSet:
    path = user_path(config.path)
    if not os.path.exists(path):
        raise JasperError(
            f"evaluation set {config.path!r}: no such file or folder. Fix: correct the path, or give {DOCSTRINGS!r}"
        )
    if os.path.isfile(path):
        if path.parent.name == "qrels" and path.name.lower().endswith(SUFFIXES):
            return _beir(config, path.parent.parent, path)
        if not path.name.lower().endswith(_TSV):
            raise JasperError(
                f"evaluation set {path}: not an evaluation set (got {path.suffix or 'no suffix'}, expected a folder or "
                "a .tsv file with score, sentence1, sentence2). Fix: correct the path, or name two columns "
                "of the file, e.g. query: title, document: text"
            )
        return _similarity(config, path)
    if find_file(path, "corpus", _JSONL):
        qrels = path / "qrels"
        return _beir(config, path, first_split(qrels, SUFFIXES) if qrels.is_dir() else None)
    if find_file(path, "train", _JSONL):
        return _classification(config, path)
    if file := first_split(path, _TSV):
        return _similarity(config, file, folder=path)
    raise JasperError(
        f"evaluation set {path}: no evaluation files in this folder (expected corpus.jsonl with queries.jsonl and "
        f"qrels/test.tsv, train.jsonl with test.jsonl, test.tsv or dev.tsv, each also with "
        f"{', '.join(COMPRESSION_SUFFIXES)}). Fix: give the folder with these files"
    )


def load_evals(configs: Sequence[EvalConfig]) -> list[EvalSet]:
    """Read several evaluation sets. Their names must differ, because scores are reported by name.

    Raises:
        JasperError: a set cannot be read, or two sets have the same name.
    """
    evalsets = [load_eval(config) for config in configs]
    names = [s.name for s in evalsets]
    if duplicates := sorted({n for n in names if names.count(n) > 1}):
        raise JasperError(
            f"evaluation sets share the name {', '.join(map(repr, duplicates))}. Fix: give each set a different `name`"
        )
    return evalsets


def _docstrings(config: EvalConfig) -> RetrievalSet:
    from jasper_fast.data.docstrings import split_docstrings

    if config.transductive:
        raise JasperError(
            "evaluation set 'docstrings': held-out docstrings are never used for training. Fix: remove `transductive`"
        )
    _, held_out = split_docstrings(config.limit or DOCSTRING_PAIRS)
    if not held_out:
        raise JasperError(
            "evaluation set 'docstrings': the installed packages have no held-out docstrings. Fix: use another "
            "evaluation set"
        )
    queries, documents = [summary for summary, _ in held_out], [body for _, body in held_out]
    relevant = [{position: 1} for position in range(len(queries))]
    return RetrievalSet(config.name or DOCSTRINGS, queries, documents, relevant, kind="docstrings")


def _beir(config: EvalConfig, folder: Path, qrels: Path | None) -> RetrievalSet:
    corpus, queries = find_file(folder, "corpus", _JSONL), find_file(folder, "queries", _JSONL)
    if corpus is None or queries is None or qrels is None:
        needed = {"corpus.jsonl": corpus, "queries.jsonl": queries, "qrels/test.tsv": qrels}
        absent = [name for name, file in needed.items() if file is None]
        raise JasperError(
            f"evaluation set {folder}: incomplete BEIR folder (missing {', '.join(absent)}; expected "
            f"{', '.join(needed)}). Fix: add the missing files"
        )
    pairs, document_at = _read_corpus(corpus)
    texts, query_at = _by_id(queries, lambda row, where: text_cell(row, "text", where))
    judgements = read_judgements(qrels)
    unmatched = _unmatched(judgements, query_at, document_at, qrels)
    judged = [name for name in query_at if name in judgements]
    selected = [judged[i] for i in subsample([texts[query_at[name]] for name in judged], config.limit)]
    same_text = [_self_match(texts[query_at[name]], pairs, document_at.get(name)) for name in selected]
    relevant = [_relevant(judgements[name], document_at) for name in selected]
    self_matches = [
        -1 if document in grades else document for document, grades in zip(same_text, relevant, strict=True)
    ]
    return RetrievalSet(
        config.name or folder.resolve().name,
        [texts[query_at[name]] for name in selected],
        [_document(title, body) for title, body in pairs],
        relevant,
        parts=[part for pair in pairs if all(pair) for part in pair],
        self_matches=self_matches if max(self_matches) >= 0 else [],
        transductive=config.transductive,
        ids=list(document_at),
        unmatched=unmatched,
    )


def _read_corpus(file: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Read the title and body of each document, and the position of each id."""
    return _by_id(
        file, lambda row, where: (text_cell(row, "title", where, optional=True), text_cell(row, "text", where))
    )


def _by_id(file: Path, content: Callable[[dict[str, Any], str], T]) -> tuple[list[T], dict[str, int]]:
    """Read the content of each row, and the position of each id. A repeated row counts once.

    Raises:
        JasperError: a row is malformed, or two rows with the same id differ.
    """
    contents: list[T] = []
    position: dict[str, int] = {}
    for where, row in json_rows(file):
        name, value = _id(row, where), content(row, where)
        if name not in position:
            position[name] = len(contents)
            contents.append(value)
        elif contents[position[name]] != value:
            raise JasperError(
                f"{where}: `_id` {name!r} appears twice with different text. Fix: give each row a unique `_id`"
            )
    return contents, position


def _document(title: str, body: str) -> str:
    return f"{title} {body}".strip()


def _self_match(query: str, pairs: Sequence[tuple[str, str]], document: int | None) -> int:
    """Return the position of the document with the query's id if it also has the query's text, else -1."""
    if document is None:
        return -1
    title, body = pairs[document]
    forms = {normal_form(body), normal_form(_document(title, body))}
    return document if normal_form(query) in forms else -1


def _unmatched(
    judgements: Judgements, queries: dict[str, int], documents: dict[str, int], file: Path
) -> tuple[int, int]:
    """Count the judgements with an absent document, and those with an absent query.

    Raises:
        JasperError: no query has a relevant document, or no relevant pair is in the corpus and the queries.
    """
    relevant = {(q, d) for q, grades in judgements.items() for d, grade in grades.items() if grade > 0}
    if not relevant:
        raise JasperError(
            f"{file}: no query has a relevant document (a score above 0). Fix: add judgements with scores above 0"
        )
    if not any(query in queries and document in documents for query, document in relevant):
        query, document = min(relevant)
        raise JasperError(
            f"{file}: the judgements do not match the corpus and the queries (no relevant pair is in both, e.g. query "
            f"{query!r}, document {document!r}). Fix: put the qrels next to their corpus.jsonl and queries.jsonl"
        )
    absent_queries = {query: len(grades) for query, grades in judgements.items() if query not in queries}
    absent = sum(d not in documents for q, grades in judgements.items() if q not in absent_queries for d in grades)
    return absent, sum(absent_queries.values())


def _relevant(grades: dict[str, int], document_at: dict[str, int]) -> dict[int, int]:
    """Return the positions of the documents with grades above 0.

    Absent documents are added to ``document_at``, after the corpus. They stay in the ideal ranking, as in BEIR and
    mteb, which call pytrec_eval.
    """
    return {document_at.setdefault(name, len(document_at)): grade for name, grade in grades.items() if grade > 0}


def _similarity(config: EvalConfig, file: Path, folder: Path | None = None) -> SimilaritySet:
    triples = [
        (_number(row["score"], where), row["sentence1"], row["sentence2"])
        for where, row in read_rows(file, ("score", "sentence1", "sentence2"))
    ]
    selected = [triples[i] for i in subsample([f"{a}\t{b}" for _, a, b in triples], config.limit)]
    distinct = len({score for score, _, _ in selected})
    if distinct < 2:
        raise JasperError(
            f"{file}: too few different scores for Spearman's correlation (got {distinct} in {len(selected)} pairs, "
            "expected at least 2). Fix: add pairs with other scores"
        )
    name = config.name or (folder.resolve().name if folder else _file_name(file))
    scores = [score for score, _, _ in selected]
    return SimilaritySet(name, [a for _, a, _ in selected], [b for _, _, b in selected], scores)


def _classification(config: EvalConfig, folder: Path) -> ClassificationSet:
    train, test = find_file(folder, "train", _JSONL), first_split(folder, _JSONL)
    if train is None or test is None or test == train:
        raise JasperError(
            f"evaluation set {folder}: incomplete classification folder (expected train.jsonl and test.jsonl). "
            "Fix: add the missing file"
        )
    parts = []
    for file in (train, test):
        texts, labels = [], []
        for where, row in json_rows(file):
            texts.append(text_cell(row, "text", where))
            label = row.get("label")
            if label is None or isinstance(label, (dict, list, float)):
                raise JasperError(
                    f"{where}: `label` is not text or a whole number (got {label!r}). Fix: correct or remove the row"
                )
            labels.append(check_text(str(label), f"{where}: `label`"))
        selected = subsample(texts, config.limit)
        parts.append(([texts[i] for i in selected], [labels[i] for i in selected]))
    distinct = len(set(parts[0][1]))
    if distinct < 2:
        raise JasperError(
            f"{train}: too few different labels for a classifier (got {distinct}, expected at least 2). Fix: add texts "
            "with other labels"
        )
    return ClassificationSet(config.name or folder.resolve().name, *parts[0], *parts[1])


def _file_name(file: Path) -> str:
    stem = file.name[: file.name.lower().index(".tsv")]
    return f"{file.resolve().parent.name}-{stem}" if stem in SPLITS else stem


def _id(row: dict[str, Any], where: str) -> str:
    name = row.get("_id")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise JasperError(
            f"{where}: `_id` is not text or a whole number (got {name!r}). Fix: correct or remove the row"
        )
    return check_text(str(name).strip(), f"{where}: `_id`")


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise JasperError(f"{where}: not a score (got {cell!r}, expected a finite number). Fix: correct the line")
    return value
