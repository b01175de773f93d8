"""Pair documents with the rows of an old index: by id, by text, or by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jasper_fast.adaptation.migration.old_index import OldIndex
from jasper_fast.config.data import SourceConfig
from jasper_fast.data.held_out import held_out_document
from jasper_fast.data.text import join_columns, normal_form, text_digest
from jasper_fast.data.text_sources import BUILT_IN, read_located, read_source
from jasper_fast.teachers.embedding_files import Keys
from jasper_fast.teachers.embedding_folder import check_names
from jasper_fast.teachers.reuse import digest_keys
from jasper_fast.teachers.source_keys import checked_id
from jasper_fast.utils.errors import JasperError

BY_ID, BY_TEXT, BY_POSITION = "id", "text", "position"


@dataclass(frozen=True)
class Pairs:
    """Documents with their rows of the old index, drawn at random.

    Args:
        texts: n different documents.
        questions: title or first sentence of each, "" if it has neither.
        rows: (n,) int64, row of each document in the old index.
        key: what matched them, "id", "text" or "position".
        counts: number of ``documents``, of those ``without a row``, ``repeated`` and ``blank``, of the ``rows`` of the
            index, and of these ``without a document``.
    """

    texts: list[str]
    questions: list[str]
    rows: np.ndarray
    key: str
    counts: dict[str, int]


def draw_pairs(source: SourceConfig, index: OldIndex, number: int, seed: int) -> Pairs:
    """Match the documents of a source to the rows of an index, and draw some of the pairs.

    The source is read twice, so memory grows with the ids and digests, and not with the texts. A blank document, and
    one with the normal form of an earlier one, makes no pair.

    Args:
        source: the documents. Several columns make one text. With ``id_column``, ids match them.
        index: the old index.
        number: largest number of pairs.
        seed: seed of the draw.

    Raises:
        JasperError: the source cannot be read, the ids are unusable or missing on one side, or no document has a row.
    """
    key = _choose_key(source, index)
    digests, forms, ids = list[str](), list[str](), list[str]()
    for identity, cells in _documents(source):
        text = join_columns(cells)
        digests.append(text_digest(text))
        forms.append(text_digest(normal_form(text)) if text.strip() else "")
        ids.append(identity)
    rows = {BY_ID: lambda: _rows_by_id(ids, index, source), BY_TEXT: lambda: _rows_by_text(digests, index)}.get(
        key, lambda: _rows_by_position(len(digests), index, source)
    )()
    if not (rows >= 0).any():
        raise JasperError(_no_match(key, ids, index))
    blank = np.array([not form for form in forms])
    _, first = np.unique(np.array(forms), return_index=True)
    new = np.zeros(len(forms), bool)
    new[first] = True
    usable = np.flatnonzero((rows >= 0) & new & ~blank)
    drawn = np.sort(np.random.default_rng(seed).permutation(usable)[:number])
    texts, questions = _read(source, set(drawn.tolist()))
    counts = {
        "documents": len(rows),
        "without a row": int((rows < 0).sum()),
        "repeated": int((~new & ~blank).sum()),
        "blank": int(blank.sum()),
        "rows": index.rows,
        "without a document": index.rows - len(np.unique(rows[rows >= 0])),
    }
    return Pairs(texts, questions, rows[drawn], key, counts)


def _choose_key(source: SourceConfig, index: OldIndex) -> str:
    if source.id_column is None:
        return BY_TEXT if index.texts is not None else BY_POSITION
    if source.path in BUILT_IN:
        raise JasperError(f"{source.path}: a built-in source has no ids. Fix: leave out --id-column")
    if index.ids is None:
        has = "texts" if index.texts is not None else "positions only"
        raise JasperError(
            f"{index.name}: its rows have no ids (got {has}, and --id-column {source.id_column}). "
            "Fix: leave out --id-column, or give an index with ids"
        )
    return BY_ID


def _documents(source: SourceConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the id of each document, "" without an id column, and its cells."""
    column, seen, last = source.id_column, dict[str, str](), ""
    if column is None:
        yield from (("", cells) for cells in read_source(source))
        return
    for where, cells, row in read_located(source, [column]):
        if column not in row:
            raise JasperError(
                f"{where}: no column {column!r} for the ids (got columns: {', '.join(map(str, row))}). "
                "Fix: set --id-column to one of these, or leave it out"
            )
        if where == last:
            raise JasperError(f"{where}: a list of texts cannot have one id. Fix: write one text per row")
        last, identity = where, checked_id(row[column], where)
        if identity in seen:
            raise JasperError(
                f"{where}: the id {identity!r} appears twice (first: {seen[identity]}). Fix: give each document its id"
            )
        seen[identity] = where
        yield identity, cells


def _rows_by_id(ids: list[str], index: OldIndex, source: SourceConfig) -> np.ndarray:
    rows: dict[Any, int] = {}
    for row, identity in enumerate(index.ids or ()):
        if rows.setdefault(identity, row) != row:
            raise JasperError(
                f"{index.name}: rows {rows[identity]} and {row} have the id {identity!r}. Fix: keep one of them, or "
                f"leave out --id-column {source.id_column}"
            )
    return np.array([rows.get(identity, -1) for identity in ids], np.int64)


def _rows_by_text(digests: list[str], index: OldIndex) -> np.ndarray:
    assert index.texts is not None
    keys, wanted = index.texts, digest_keys(digests)
    order = np.lexsort((keys.rows, ~keys.exact, keys.digests[:, 1], keys.digests[:, 0]))  # the first exact row first
    keys = Keys(*(part[order] for part in keys))
    # A text whose first 64 bits equal those of another text counts as missing.
    places = np.minimum(np.searchsorted(keys.digests[:, 0], wanted[:, 0]), len(keys.rows) - 1)
    return np.where((keys.digests[places] == wanted).all(axis=1), keys.rows[places], -1)


def _rows_by_position(documents: int, index: OldIndex, source: SourceConfig) -> np.ndarray:
    if documents != index.rows:
        ids = ", or match them by id with --id-column" if index.ids is not None else ""
        raise JasperError(
            f"{index.name}: its rows have no text, and their number is not that of the documents (got {index.rows:,} "
            f"rows and {documents:,} documents of {source.path}, expected one row per document in the same order). "
            f"Fix: give the documents of the index{ids}"
        )
    if len(index.files) > 1:
        check_names(index.files)
    return np.arange(documents)


def _no_match(key: str, ids: list[str], index: OldIndex) -> str:
    if key == BY_ID:
        return (
            f"{index.name}: no row has the id of a document (got ids such as {(index.ids or [''])[0]!r}, expected ids "
            f"such as {ids[0]!r}). Fix: correct --id-column"
        )
    return (
        f"{index.name}: no row has the text of a document. Fix: set --columns to the columns that the index was made "
        "from, or match by id with --id-column"
    )


def _read(source: SourceConfig, drawn: set[int]) -> tuple[list[str], list[str]]:
    """Return the texts and questions of the drawn documents, in the order of the source."""
    texts, questions = list[str](), list[str]()
    for number, (_, cells) in enumerate(_documents(source)):
        if number in drawn:
            texts.append(join_columns(cells))
            questions.append(held_out_document(cells, join=True).query)
    return texts, questions
