"""Find the files of an evaluation set and read their JSONL rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jasper_fast.data.listing import listed_files
from jasper_fast.data.rows import check_text, read_rows
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest

SPLITS = ("test", "dev", "validation", "valid", "val", "train")  # in order of preference


def find_file(folder: Path, stem: str, endings: Sequence[str]) -> Path | None:
    """Find the file of a folder with a given stem, or return None.

    Args:
        folder: the folder, without its subfolders.
        stem: the file name without the ending, in lower case. The case of the file's name does not matter.
        endings: the accepted endings, in order of preference.

    Raises:
        JasperError: the folder cannot be listed, or a link in it is broken.
    """
    files = {file.name.lower(): file for file in listed_files(folder, tuple(endings), recursive=False)}
    return next((files[name] for ending in endings if (name := f"{stem}{ending}") in files), None)


def first_split(folder: Path, endings: Sequence[str]) -> Path | None:
    """Find the file of the most preferred split in a folder, or return None.

    Args:
        folder: the folder, without its subfolders.
        endings: the accepted endings, in order of preference.

    Raises:
        JasperError: the folder cannot be listed, or a link in it is broken.
    """
    return next((file for split in SPLITS if (file := find_file(folder, split, endings))), None)


def json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a JSONL file, each with its position (file and line) for error messages.

    Raises:
        JasperError: the file is empty, or `read_rows` rejects it.
    """
    empty = True
    for where, row in read_rows(file):
        empty = False
        yield where, row
    if empty:
        raise JasperError(f"{file}: the file is empty. Fix: write one JSON object per line")


def text_cell(row: dict[str, Any], key: str, where: str, optional: bool = False) -> str:
    """Return the text in a cell of a row.

    Args:
        row: the cells by column.
        key: the column.
        where: the position of the row, for error messages.
        optional: whether the cell may be missing or null. Such a cell gives an empty text.

    Raises:
        JasperError: the cell is not text, or has a lone surrogate.
    """
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise JasperError(f"{where}: `{key}` is not text (got {value!r}). Fix: correct or remove the row")
    return check_text(value, f"{where}: `{key}`")


def subsample(texts: Sequence[str], limit: int | None) -> list[int]:
    """Return the positions of at most ``limit`` texts: those with the smallest digests.

    The first rows of a file are often similar, so they would not be a fair sample.

    Args:
        texts: the texts that identify the items.
        limit: the largest number of items. None selects all.
    """
    if limit is None or limit >= len(texts):
        return list(range(len(texts)))
    digests = [content_digest(text) for text in texts]
    return sorted(sorted(range(len(texts)), key=lambda i: (digests[i], i))[:limit])
