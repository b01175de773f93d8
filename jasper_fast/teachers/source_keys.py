"""Find the training text of a document by its id, or by its position in the sources.

A training text is known by its digest. Both functions return the digests of whole documents, as training reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jasper_fast.config.data import DataConfig, SourceConfig
from jasper_fast.data.text import text_digest
from jasper_fast.data.text_sources import BUILT_IN, is_local, read_located, read_source
from jasper_fast.utils.errors import JasperError


class Document(NamedTuple):
    """One whole document of a source."""

    id: str
    text: str
    digest: str


def document_digests(data: DataConfig) -> list[str]:
    """Return the digests of all documents, in the order of the sources and their files.

    A row with several columns is one document if the source joins them, and one per column otherwise.

    Raises:
        JasperError: a source cannot be read.
    """
    return [
        text_digest(text, source.role)
        for source in data.sources
        for cells in read_source(source)
        for text in documents_of(source, cells)
    ]


def count_documents(data: DataConfig | None) -> int | None:
    """Count the documents of all sources. None: there are none, or they cannot be read on this machine."""
    if data is None or not all(is_local(source) for source in data.sources):
        return None
    try:
        return sum(1 if source.join else len(cells) for source in data.sources for cells in read_source(source))
    except JasperError:
        return None


def digests_by_id(data: DataConfig) -> dict[str, str]:
    """Return the digest of the document of each id, from the sources with an ``id_column``.

    Whole numbers and texts are the same ids: 7 is "7".

    Raises:
        JasperError: a source cannot be read or lacks the column, an id is unusable, two documents have one id, or one
            row has several documents.
    """
    digests: dict[str, str] = {}
    for source in data.sources:
        for document in identified_documents(source):
            if digests.setdefault(document.id, document.digest) != document.digest:
                raise JasperError(
                    f"{source.path}: two documents have the id {document.id!r}. Fix: give each document its own id"
                )
    return digests


def identified_documents(source: SourceConfig) -> Iterator[Document]:
    """Yield the documents of a source with their ids. A source without an ``id_column`` yields nothing.

    Raises:
        JasperError: as in `digests_by_id`.
    """
    column, last = source.id_column, ""
    if column is None:
        return
    if source.path in BUILT_IN:
        raise JasperError(f"{source.path}: a built-in source has no ids. Fix: leave out id_column")
    for where, row, cells in read_located(source, [column]):
        texts = documents_of(source, row)
        if len(texts) > 1 or where == last:
            raise JasperError(f"{where}: one id has several texts. Fix: set join: true, or leave out id_column")
        last = where
        if column not in cells:
            raise JasperError(
                f"{where}: no column {column!r} for the ids (got columns: {', '.join(map(str, cells))}). "
                "Fix: set id_column to one of these, or leave it out"
            )
        yield Document(checked_id(cells[column], where), texts[0], text_digest(texts[0], source.role))


def documents_of(source: SourceConfig, cells: Sequence[str]) -> list[str]:
    """Return the documents of a row: its joined columns, or each column."""
    return [text.strip() for text in (["\n".join(cells)] if source.join else cells)]


def checked_id(value: Any, where: str) -> str:
    """Return an id as text.

    Args:
        value: text or whole number.
        where: position of the id, for the error.

    Raises:
        JasperError: the id is empty or of another type.
    """
    if type(value) is int or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise JasperError(
        f"{where}: unusable id (got {type(value).__name__} {str(value)[:40]!r}, expected text or a whole number). "
        "Fix: give each row an id"
    )
