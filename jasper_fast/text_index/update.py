"""Add documents to a text index and remove them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.data.document_ids import DocumentId
from jasper_fast.mips import FlatIPIndex
from jasper_fast.models.embedder import load_model, model_encoder
from jasper_fast.text_index.build import chunks, encode_texts, image_encoder, with_ids
from jasper_fast.text_index.cached import rows_encoder
from jasper_fast.text_index.files import TEXTS, check_model, find_model, open_index, text_table, write
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    import pyarrow as pa


def add(
    path: str | Path,
    texts: Iterable[str],
    *,
    ids: Iterable[DocumentId] | None = None,
    model: str | None = None,
    total: int | None = None,
    pictures: bool = False,
    trust_remote_code: bool = False,
    replace: bool = False,
) -> int:
    """Append documents to an index, with the model that built it, atomically.

    Args:
        path: folder that ``build`` wrote.
        texts: documents. Without ids, texts that are in the index already are left out.
        ids: new ids for the documents, of the type that the index has. None for an index without ids.
        model: current location of the model. None takes the location at the time of the build.
        total: number of texts for the progress bar. None shows no total.
        pictures: treat the texts as paths of images. This must be as in the build.
        trust_remote_code: allow code that the model brings to run.
        replace: replace the documents whose ids are given again. By default, such an id is an error.

    Returns:
        number of documents added, those that replace others included.

    Raises:
        JasperError: no usable index, another model, an unusable id, or a folder that cannot be written.
    """
    import pyarrow as pa

    path = Path(path)
    stamp = _stamp(path)
    settings, table, index = open_index(path, verify=True)
    if pictures != (settings["role"] == "document"):
        fix = "texts. Fix: leave out --pictures" if pictures else "images. Fix: add --pictures"
        raise JasperError(f"{path}: an index of {fix}")
    if (ids is not None) != ("id" in table.column_names):
        fix = "without ids. Fix: leave out --id-column" if ids is not None else "with ids. Fix: set --id-column"
        raise JasperError(f"{path}: an index {fix}")
    if ids is not None:
        texts, ids = with_ids(texts, ids)
        table = _without_known(path, table, index, ids, replace)
    elif replace:
        raise JasperError(f"{path}: an index without ids. Fix: leave out --replace")
    name = model or find_model(settings, path)
    check_model(name, path, settings)
    if pictures:
        encode = image_encoder(name, index.dim, trust_remote_code)
    else:
        loaded = load_model(name, settings["max_length"], trust_remote_code=trust_remote_code)
        encode = model_encoder(loaded, [index.dim])
    parts = chunks(texts, None if ids is not None else set(table.column("text").to_pylist()))
    added = encode_texts(
        name, parts, rows_encoder(encode, index.dim), index, total, " images" if pictures else " texts"
    )
    if not added:
        return 0
    table = pa.concat_tables([table, text_table(added, ids)])
    _publish(path, stamp, index, table, settings)
    return len(added)


def remove(path: str | Path, ids: Iterable[DocumentId]) -> int:
    """Remove documents from an index, atomically.

    Args:
        path: folder that ``build`` wrote, with ids.
        ids: ids of the documents. Whole numbers may be given as text.

    Returns:
        number of documents removed.

    Raises:
        JasperError: no usable index, an index without ids, an id that is not in it or is given twice, or no document
            would be left.
    """
    path = Path(path)
    stamp = _stamp(path)
    settings, table, index = open_index(path, verify=True)
    rows = _rows(path, table, ids)
    if len(rows) == len(table):
        raise JasperError(f"{path}: no document would be left. Fix: delete the folder")
    table = _without(table, index, rows)
    _publish(path, stamp, index, table, settings)
    return len(rows)


def _rows(path: Path, table: pa.Table, ids: Iterable[DocumentId]) -> list[int]:
    """Return the rows of documents, after a check of their ids."""
    if "id" not in table.column_names:
        raise JasperError(f"{path}: an index without ids. Fix: build it with --id-column, and remove by these ids")
    numbers = {value: row for row, value in enumerate(table.column("id").to_pylist())}
    number_ids = isinstance(next(iter(numbers)), int)
    rows: dict[int, None] = {}
    for given in ids:
        known = _whole_number(given) if number_ids else given
        if known not in numbers:
            raise JasperError(f"{path}: no document has the id {given!r}. Fix: give ids that `search ask` shows")
        if numbers[known] in rows:
            raise JasperError(f"the id {given!r} is given twice. Fix: give each id once")
        rows[numbers[known]] = None
    if not rows:
        raise JasperError("no ids of documents to remove. Fix: give at least one")
    return list(rows)


def _whole_number(given: DocumentId) -> DocumentId:
    try:
        return int(given)
    except ValueError:
        return given


def _without(table: pa.Table, index: FlatIPIndex, rows: Sequence[int]) -> pa.Table:
    """Remove rows from the embeddings, and return the texts without them."""
    index.remove(list(rows), renumber=True)
    gone = set(rows)
    return table.take([row for row in range(len(table)) if row not in gone])


def _without_known(
    path: Path, table: pa.Table, index: FlatIPIndex, ids: Sequence[DocumentId], replace: bool
) -> pa.Table:
    """Return the texts without those that new documents replace, and remove their embeddings."""
    stored = table.column("id").to_pylist()
    if ids and stored and type(ids[0]) is not type(stored[0]):
        kinds = [type(value).__name__ for value in (ids[0], stored[0])]
        raise JasperError(f"{path}: the new ids are {kinds[0]}, and its ids are {kinds[1]}. Fix: use one type of ids")
    new = set(ids)
    known = [row for row, value in enumerate(stored) if value in new]
    if not known:
        return table
    if not replace:
        raise JasperError(
            f"{path}: the id {stored[known[0]]!r} appears twice: its document {known[0] + 1} has it already. "
            "Fix: add --replace, or run `jasper-fast search remove` first"
        )
    return _without(table, index, known)


def _stamp(path: Path) -> os.stat_result | None:
    return (path / TEXTS).stat() if (path / TEXTS).exists() else None


def _publish(
    path: Path, stamp: os.stat_result | None, index: FlatIPIndex, table: pa.Table, settings: dict[str, Any]
) -> None:
    """Replace an index that has not changed since it was opened."""
    with publish_dir(path, replace=True) as folder:
        write(folder, index, table, {**settings, "texts": len(table)})
        if stamp is None or not (path / TEXTS).exists() or not os.path.samestat(stamp, (path / TEXTS).stat()):
            raise JasperError(f"{path}: changed while documents were written. Fix: run the same command again")
