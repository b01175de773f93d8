"""Find the files of an evaluation set, and read their JSONL rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jasper_fast.errors import JasperError
from jasper_fast.listing import listed_files
from jasper_fast.row_reader import check_text, read_rows

SPLITS = ("test", "dev", "validation", "valid", "val", "train")  # the first that is there is used


def find(folder: Path, stem: str, endings: Sequence[str]) -> Path | None:
    """Return the first file with this stem and one of the endings; case does not matter."""
    files = {file.name.lower(): file for file in listed_files(folder, tuple(endings), recursive=False)}
    return next((files[name] for ending in endings if (name := f"{stem}{ending}") in files), None)


def first_split(folder: Path, endings: Sequence[str]) -> Path | None:
    """Return the file of the split that is preferred among those in a folder."""
    return next((file for split in SPLITS if (file := find(folder, split, endings))), None)


def json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a JSONL file with its place.

    Raises:
        JasperError: the file is empty, or as `read_rows`.
    """
    empty = True
    for where, row in read_rows(file):
        empty = False
        yield where, row
    if empty:
        raise JasperError(f"{file}: the file is empty. Fix: give a file with one JSON object per line")


def text_cell(row: dict[str, Any], key: str, where: str, optional: bool = False) -> str:
    """Return the text in a row's cell; an optional one may be missing or null.

    Raises:
        JasperError: the cell is no text.
    """
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise JasperError(f"{where}: `{key}` must be text, got {value!r}")
    return check_text(value, f"{where}: `{key}`")
