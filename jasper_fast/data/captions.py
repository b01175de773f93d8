"""Read image captions: find the caption file, and take the captions from its rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jasper_fast.config.data import ImageSourceConfig
from jasper_fast.data.image_files import BadImage
from jasper_fast.data.listing import listed_files, user_path
from jasper_fast.data.rows import with_compressed
from jasper_fast.data.text import lone_surrogate
from jasper_fast.utils.errors import JasperError

CAPTION_FILES = with_compressed(".jsonl")

Item = tuple[str, bytes | str, list[str]]  # position of an image, content of its file or the problem, and captions


def caption_file(source: ImageSourceConfig, near: Path) -> Path:
    """Find the caption file of an image folder or zip.

    Args:
        source: the source. Its ``captions`` is the path of the file.
        near: the folder to search if ``captions`` is None. It must contain exactly one JSONL file.

    Raises:
        JasperError: the file is missing, or the folder does not contain exactly one JSONL file.
    """
    if source.captions is not None:
        file = user_path(source.captions)
        if not os.path.isfile(file):
            raise JasperError(
                f"{source.path}: its caption file {source.captions} is missing. Fix: correct images.sources.captions"
            )
        return file
    files = listed_files(near, CAPTION_FILES, recursive=False)
    if len(files) != 1:
        raise JasperError(
            f"{source.path}: no unique caption file in {near} (got {len(files)} JSONL files, expected 1). Fix: set "
            "`captions` to the file"
        )
    return files[0]


def captions_of(row: dict[str, Any], source: ImageSourceConfig, where: str) -> list[str]:
    """Return the captions in a row, without empty ones and with collapsed white space.

    Args:
        row: the cells by column. It needs at least one of the caption columns. A cell is a text, null, or a list of
            these.
        source: the source, with the names of the caption columns.
        where: the position of the row, for error messages.

    Raises:
        BadImage: a caption is not text, or has a lone surrogate.
        JasperError: the row has none of the caption columns.
    """
    columns = [column for column in source.caption_columns if column in row]
    if not columns:
        expected = " or ".join(map(repr, source.caption_columns))
        raise JasperError(
            f"{where}: no column {expected} (got columns: {', '.join(map(str, row))}). Fix: set `caption_columns`"
        )
    captions = []
    for column in columns:
        for value in row[column] if isinstance(row[column], list) else [row[column]]:
            if value is not None and not isinstance(value, str):
                raise BadImage(f"column {column!r} is not text but {type(value).__name__}")
            if problem := lone_surrogate(value or ""):
                raise BadImage(f"column {column!r} {problem}")
            captions.append(" ".join((value or "").split()))
    return [caption for caption in captions if caption]
