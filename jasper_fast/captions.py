"""Captions of images: the file that lists them, and the cells of a row that hold them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jasper_fast.config import ImageSourceConfig
from jasper_fast.errors import JasperError
from jasper_fast.images import BadImage
from jasper_fast.listing import listed_files, user_path
from jasper_fast.row_reader import packed
from jasper_fast.text import lone_surrogate

CAPTION_FILES = packed(".jsonl")

Item = tuple[str, bytes | str, list[str]]  # an image's place, its file's bytes or what is wrong with it, its captions


def caption_file(source: ImageSourceConfig, near: Path) -> Path:
    """Return the file that lists the captions of a folder or zip.

    Args:
        source: names the file, or leaves it to be found.
        near: the folder in which it is found if it is the only JSONL file.

    Raises:
        JasperError: there is no such file, or there are several.
    """
    if source.captions is not None:
        file = user_path(source.captions)
        if not os.path.isfile(file):
            raise JasperError(
                f"{source.path}: its caption file {source.captions} is missing. Fix: correct images.sources.captions"
            )
        return file
    found = listed_files(near, CAPTION_FILES, recursive=False)
    if len(found) != 1:
        raise JasperError(
            f"{source.path}: expected one JSONL file of captions in {near}, found {len(found)}. Fix: name it with "
            "`captions`"
        )
    return found[0]


def captions_of(row: dict[str, Any], source: ImageSourceConfig, where: str) -> list[str]:
    """Return the captions of a row, which may lack some of the columns.

    Raises:
        BadImage: one is not text, or has a lone surrogate.
        JasperError: the row has none of the columns.
    """
    columns = [column for column in source.caption_columns if column in row]
    if not columns:
        wanted = " or ".join(map(repr, source.caption_columns))
        raise JasperError(f"{where}: no column {wanted}; there are: {', '.join(map(str, row))} (set `caption_columns`)")
    found = []
    for column in columns:
        for value in row[column] if isinstance(row[column], list) else [row[column]]:
            if value is not None and not isinstance(value, str):
                raise BadImage(f"column {column!r} is not text but {type(value).__name__}")
            if problem := lone_surrogate(value or ""):
                raise BadImage(f"column {column!r} {problem}")
            found.append(" ".join((value or "").split()))
    return [caption for caption in found if caption]
