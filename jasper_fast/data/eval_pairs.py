"""Make retrieval sets from pairs of texts: two columns of any file of rows, or titles and their documents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from jasper_fast.config.data import EvalConfig, SourceConfig
from jasper_fast.data.eval_files import find_file, subsample, text_cell
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.data.listing import user_path
from jasper_fast.data.rows import read_rows, with_compressed
from jasper_fast.data.text import normal_form
from jasper_fast.data.text_sources import BUILT_IN, source_files
from jasper_fast.utils.errors import JasperError


def read_pairs(config: EvalConfig) -> RetrievalSet:
    """Read a retrieval set from two columns of a file or folder of rows, which can have any text format.

    Args:
        config: the settings of the set, with both columns. Its ``limit`` is the maximum number of queries. The corpus
            stays complete.

    Raises:
        JasperError: the path is missing, a BEIR folder or a built-in set, a column is missing, or a cell is empty or
            not text.
    """
    assert config.query is not None and config.document is not None
    columns = [config.query, config.document]
    questions: list[str] = []
    documents: list[str] = []
    for file in _files(config, columns):
        for where, cells in islice(read_rows(file), 1):
            _check_columns(columns, cells, where)
        for where, cells in read_rows(file, columns):
            _check_columns(columns, cells, where)
            for column, texts in zip(columns, (questions, documents), strict=True):
                text = text_cell(cells, column, where)
                if not text.strip():
                    raise JasperError(f"{where}: `{column}` is empty. Fix: fill the cell, or remove the row")
                texts.append(text)
    if not questions:
        raise JasperError(f"evaluation set {config.path!r}: no rows. Fix: give a file with at least one row")
    name = config.name or user_path(config.path).resolve().name.split(".")[0]
    return pair_set(name, questions, documents, limit=config.limit, transductive=config.transductive)


def pair_set(
    name: str,
    questions: Sequence[str],
    documents: Sequence[str],
    *,
    limit: int | None = None,
    transductive: bool = False,
) -> RetrievalSet:
    """Make a retrieval set from pairs of a query and its relevant document.

    Texts that differ only in case, white space or Unicode form are one query or one document. A query of several pairs
    has several relevant documents.

    Args:
        name: the name of the set.
        questions: the query of each pair.
        documents: the document of each pair.
        limit: the maximum number of queries. The corpus stays complete. None keeps all.
        transductive: whether training may use the documents.
    """
    document_at: dict[str, int] = {}
    corpus: list[str] = []
    judged: dict[str, tuple[str, dict[int, int]]] = {}  # by normal form: the query, and its documents
    for question, document in zip(questions, documents, strict=True):
        position = document_at.setdefault(normal_form(document), len(corpus))
        if position == len(corpus):
            corpus.append(document)
        judged.setdefault(normal_form(question), (question, {}))[1][position] = 1
    pairs = [*judged.values()]
    selected = [pairs[i] for i in subsample([question for question, _ in pairs], limit)]
    queries, relevant = [question for question, _ in selected], [grades for _, grades in selected]
    return RetrievalSet(name, queries, corpus, relevant, kind="pairs", transductive=transductive)


def _files(config: EvalConfig, columns: Sequence[str]) -> list[Path]:
    path = user_path(config.path)
    used = f"evaluation set {config.path!r} with `query` and `document`"
    if config.path in BUILT_IN:
        raise JasperError(f"{used}: a built-in set has no columns. Fix: remove `query` and `document`")
    if not os.path.exists(path):
        raise JasperError(f"{used}: no such file or folder. Fix: correct the path")
    if path.is_dir() and find_file(path, "corpus", with_compressed(".jsonl")):
        raise JasperError(
            f"{used}: the folder is a BEIR set, which has its own queries and judgements. Fix: remove `query` and "
            "`document`, or give a file of rows"
        )
    return source_files(SourceConfig(path=config.path, columns=list(columns)))


def _check_columns(columns: Sequence[str], cells: dict[str, object], where: str) -> None:
    for column in columns:
        if column not in cells:
            raise JasperError(
                f"{where}: no column {column!r} (got columns: {', '.join(map(str, cells)) or 'none'}). "
                "Fix: set `query` and `document` to two of these"
            )
