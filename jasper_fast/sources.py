"""Read training texts: files, folders, `datasets` names, and the docstrings of installed packages.

Every row is checked as it is read; an error names the file and the row.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.config import ImageSourceConfig, SourceConfig
from jasper_fast.errors import JasperError
from jasper_fast.glyphs import GLYPHS, glyph_names
from jasper_fast.listing import all_files, listed_files, user_path
from jasper_fast.models import looks_like_path
from jasper_fast.row_reader import KNOWN, SUFFIXES, Row, check_text, no_column, packed, read_rows

DOCSTRINGS = "docstrings"
BUILT_IN = (DOCSTRINGS, GLYPHS)
STREAM_BUFFER = 10_000  # rows among which a hub stream is shuffled before a limit is taken
NAMED = 5  # files left out of a folder that are named
# Text files in a folder of data that are no data themselves.
NOTES = re.compile(
    r"(?:read[-_ ]?me|licen[cs]es?)(?![a-z]).*"
    r"|(?:copying|copyright|notice|changelog|contributing|citation|requirements|cmakelists)(?:\.md|\.rst)?\.txt.*"
)


def read_source(source: SourceConfig) -> Iterator[tuple[str, ...]]:
    """Yield the chosen columns of each row, in file order, all of them text.

    Where the only column holds a list of texts, each of them is a row of its own.
    Docstrings give (summary, body). Text files give one text per line; blank lines are left out.

    Raises:
        JasperError: nothing there, unreadable, an unknown column, or a cell that is null or not text (with its row).
    """
    if source.path == DOCSTRINGS:
        from jasper_fast.docstrings import split_docstrings

        yield from split_docstrings()[0]
        return
    if source.path == GLYPHS:
        yield from ((name,) for name in glyph_names())
        return
    rows = (row for file in source_files(source) for row in read_rows(file, source.columns))
    empty = True
    for where, cells in rows if is_local(source) else _read_hub(source):
        for row in _texts(source, cells, where):
            empty = False
            yield row
    if empty:
        raise JasperError(f"{source.path}: no rows in it. Fix: give a source with at least one text")


def try_source(source: SourceConfig) -> None:
    """Read the first row of each file, or of the stream, to find what is wrong with all rows before any are read.

    Raises:
        JasperError: as `read_source`, of these rows.
    """
    if source.path in BUILT_IN:
        return
    next(read_source(source))
    for file in source_files(source)[1:]:
        for where, cells in islice(read_rows(file, source.columns), 1):
            list(_texts(source, cells, where))


def draw(source: SourceConfig, seed: int) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """Yield each row with the positions of its columns that the source's ``limit`` keeps, drawn by the seed.

    Without a limit all are kept. A hub stream is shuffled in a buffer and cut off, since its length is unknown;
    everything else is read twice, so that each text is equally likely.
    """
    width = 1 if source.join else None
    if source.limit is None or not is_local(source):
        left = source.limit
        for row in _shuffled_stream(source, seed) if left is not None else read_source(source):
            kept = list(range(width or len(row)))[:left]
            yield row, kept
            if left is not None and (left := left - len(kept)) == 0:
                return
        return
    total = sum(width or len(row) for row in read_source(source))
    name = hashlib.sha256(source.model_dump_json().encode()).digest()
    generator = np.random.default_rng([seed, int.from_bytes(name[:8])])
    chosen = np.zeros(total, dtype=bool)
    chosen[generator.choice(total, size=min(source.limit, total), replace=False, shuffle=False)] = True
    position = 0
    for row in read_source(source):
        count = width or len(row)
        kept = np.flatnonzero(chosen[position : position + count]).tolist()
        position += count
        if kept:
            yield row, kept


def is_local(source: SourceConfig) -> bool:
    """Tell whether a source is read from this machine; otherwise its path is a `datasets` name."""
    path = user_path(source.path)
    return (
        source.path in BUILT_IN
        or os.path.lexists(path)
        or looks_like_path(source.path)
        or path.name.lower().endswith(SUFFIXES)
    )


def source_files(source: SourceConfig) -> list[Path]:
    """List the files of a local source in natural order; none for docstrings and hub names.

    Links to folders are followed. Hidden files, and texts about data such as README.txt, are left out of folders.

    Raises:
        JasperError: there is no such path, no file of a known kind, or a link in the folder is broken.
    """
    if source.path in BUILT_IN or not is_local(source):
        return []
    path = user_path(source.path)
    if os.path.isdir(path):
        found = [file for file in listed_files(path, SUFFIXES) if not _is_note(file)]
    elif not os.path.exists(path):
        raise JasperError(f"{source.path}: no such file or folder. Fix: correct the path in data.sources")
    else:
        found = [path] if path.name.lower().endswith(SUFFIXES) else []
    if not found:
        raise JasperError(f"{source.path}: no file of a known kind here. Fix: give one of {KNOWN}")
    return found


def say_ignored(source: SourceConfig) -> None:
    """Print which files in a source's folder are not read: those of other kinds, and texts about data.

    Raises:
        JasperError: as `source_files`.
    """
    read, path = set(source_files(source)), user_path(source.path)
    if not read or not os.path.isdir(path):
        return
    ignored = [file.relative_to(path).as_posix() for file in all_files(path) if file not in read]
    if ignored:
        rest = f" and {len(ignored) - NAMED} more" if len(ignored) > NAMED else ""
        print(f"{source.path}: left out {', '.join(ignored[:NAMED])}{rest}: not data of a known kind", flush=True)


def source_stamp(source: SourceConfig) -> list[Any]:
    """Return what changes when a source's content does: file sizes and times, or the digest of the docstrings."""
    if source.path in BUILT_IN:
        whole = hashlib.sha256()
        for pair in read_source(source):
            whole.update("\0".join((*pair, "")).encode())
        return [whole.hexdigest()]
    stats = [(str(p), p.stat()) for p in source_files(source)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _is_note(file: Path) -> bool:
    return file.name.lower().endswith(packed(".txt")) and NOTES.fullmatch(file.name.lower()) is not None


def _texts(source: SourceConfig, cells: dict[str, Any], where: str) -> Iterator[tuple[str, ...]]:
    """Yield the chosen cells of a row; each item of a list in the only chosen column is a row."""
    column = source.columns[0]
    if len(source.columns) == 1 and isinstance(values := cells.get(column), list):
        for number, value in enumerate(values, 1):
            yield (_text(value, f"{where}: column {column!r}, item {number}"),)
    else:
        for column in source.columns:
            if column not in cells:
                raise no_column(column, cells, where)
        yield tuple(_text(cells[column], f"{where}: column {column!r}") for column in source.columns)


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return check_text(value, where)
    given = "is null" if value is None else f"is not text but {type(value).__name__} ({str(value)[:40]})"
    raise JasperError(f"{where} {given}. Fix: remove or correct the row, or choose other `columns`")


def _read_hub(source: SourceConfig) -> Iterator[Row]:
    for number, cells in numbered(source, _stream(source)):
        yield f"{source.path} ({source.split}), row {number}", cells


def _shuffled_stream(source: SourceConfig, seed: int) -> Iterator[tuple[str, ...]]:
    stream = _stream(source).shuffle(seed=seed, buffer_size=STREAM_BUFFER)
    for number, cells in numbered(source, stream):
        where = f"{source.path} ({source.split}), row {number} of its shuffled stream"
        yield from _texts(source, cells, where)


def _stream(source: SourceConfig) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(source.path, source.config, split=source.split, streaming=True, revision=source.revision)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise JasperError(
            f"{source.path}: neither a file or folder here nor a dataset that can be loaded by name "
            f"(config {source.config}, split {source.split!r}): {_first_line(error)}"
        ) from error


def numbered(
    source: SourceConfig | ImageSourceConfig, stream: Iterable[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a stream, counted from 1; the network may break at any of them."""
    from huggingface_hub.errors import HTTPError  # of the library that the hub's client uses: not always an OSError

    number = 0
    try:
        for number, cells in enumerate(stream, 1):
            yield number, cells
    except (OSError, ValueError, EOFError, zlib.error, HTTPError) as error:
        raise JasperError(
            f"{source.path} ({source.split}): reading it broke off after {number} rows ({_first_line(error)}). If it "
            "was the network, type the same command again: this source is read anew, all other work is kept"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
