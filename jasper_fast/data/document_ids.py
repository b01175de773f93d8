"""Read documents with the ids that the user gave them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, MutableSequence
from itertools import islice
from typing import Any

from jasper_fast.config.data import SourceConfig
from jasper_fast.data.rows import check_text, read_rows
from jasper_fast.data.text import join_columns
from jasper_fast.data.text_sources import BUILT_IN, is_local, read_located, source_files
from jasper_fast.utils.errors import JasperError

DocumentId = str | int
MAX_ID = 2**63  # Arrow stores 64-bit integers.


def read_documents(source: SourceConfig, id_column: str, limit: int | None) -> tuple[list[str], list[DocumentId]]:
    """Read documents and their ids.

    Args:
        source: source of the texts. The columns of a row are joined to one text, as in training.
        id_column: name of the column with the ids.
        limit: largest number of documents, from the start. None reads all.

    Returns:
        the texts and their ids.

    Raises:
        JasperError: the source cannot be read, the column is missing, or an id is null or appears twice.
    """
    texts: list[str] = []
    ids = check_ids(_located_ids(source, id_column, limit, texts))
    return texts, ids


def check_document_ids(source: SourceConfig, id_column: str) -> None:
    """Check the ids of all documents, as :func:`read_documents` does, without keeping the texts.

    Args:
        source: source of the texts.
        id_column: name of the column with the ids.

    Raises:
        JasperError: the source cannot be read, the column is missing, or an id is null or appears twice.
    """
    check_ids(_located_ids(source, id_column, None, deque(maxlen=0)))


def check_ids(located: Iterable[tuple[str, Any]]) -> list[DocumentId]:
    """Return the ids if all are texts or all are whole numbers, and none is empty or appears twice.

    Args:
        located: position of each id for error messages, and the id.

    Raises:
        JasperError: an id is null, empty, of another type, or appears twice.
    """
    first: dict[Any, str] = {}
    kind: type | None = None
    for where, value in located:
        if value is None or (isinstance(value, str) and not value.strip()):
            raise JasperError(f"{where} is {'null' if value is None else 'empty'}. Fix: give each document an id")
        if type(value) not in (str, int) or (isinstance(value, int) and not -MAX_ID <= value < MAX_ID):
            raise JasperError(
                f"{where} is not text or a 64-bit whole number (got {type(value).__name__} {str(value)[:40]}). "
                "Fix: use other ids"
            )
        kind = kind or type(value)
        if type(value) is not kind:
            raise JasperError(
                f"{where} is {type(value).__name__} and the first id is {kind.__name__}. Fix: use one type of ids"
            )
        if value in first:
            raise JasperError(
                f"{where}: the id {value!r} appears twice (first: {first[value]}). Fix: give each document its own id"
            )
        if isinstance(value, str):
            check_text(value, where)
        first[value] = where
    return list(first)


def _located_ids(
    source: SourceConfig, column: str, limit: int | None, texts: MutableSequence[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the position and the value of each id, and append the texts to ``texts``."""
    if source.path in BUILT_IN:
        raise JasperError(f"{source.path}: a built-in source has no ids. Fix: leave out --id-column")
    for file in source_files(source) if is_local(source) else ():
        for where, cells in islice(read_rows(file), 1):
            _check_column(column, cells, where)
    last = ""
    for where, row, cells in islice(read_located(source, [column]), limit):
        _check_column(column, cells, where)
        if where == last:
            raise JasperError(f"{where}: a list of texts cannot have one id. Fix: write one text per row")
        last = where
        texts.append(join_columns(row))
        yield f"{where}: column {column!r}", cells[column]


def _check_column(column: str, cells: dict[str, Any], where: str) -> None:
    if column not in cells:
        raise JasperError(
            f"{where}: no column {column!r} for the ids (got columns: {', '.join(cells)}). "
            "Fix: set --id-column to one of these, or leave it out"
        )
