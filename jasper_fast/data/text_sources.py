"""Read training texts from files, folders, hub datasets, and sources without a download, such as docstrings.

Every row is checked when it is read. Errors give the file and the row.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np

from jasper_fast.config.data import ImageSourceConfig, SourceConfig
from jasper_fast.data.listing import all_files, listed_files, user_path
from jasper_fast.data.rows import SUFFIXES, SUPPORTED_FILES, Row, check_text, missing_column, read_rows, with_compressed
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import sha256
from jasper_fast.utils.names import looks_like_path

# Path of a built-in source -> the function that yields its rows, imported when it is read.
BUILT_IN: dict[str, str] = {
    "docstrings": "jasper_fast.data.docstrings:training_rows",
    "encyclopedia": "jasper_fast.data.encyclopedia:training_rows",
    "facts": "jasper_fast.data.facts:training_rows",
    "glyphs": "jasper_fast.data.glyphs:training_rows",
}
STREAM_BUFFER = 10_000  # rows in the shuffle buffer of a hub stream with a limit
MAX_LISTED = 5  # maximum number of skipped files to list by name
# Text files about the data in a folder. They are not data themselves.
NOTE_NAMES = re.compile(
    r"(?:read[-_ ]?me|licen[cs]es?)(?![a-z]).*"
    r"|(?:copying|copyright|notice|changelog|contributing|citation|requirements|cmakelists)(?:\.md|\.rst)?\.txt.*"
)


def read_source(source: SourceConfig) -> Iterator[tuple[str, ...]]:
    """Yield the selected columns of each row, in file order.

    If a single column is selected and holds a list of texts, each item becomes a row. Docstrings give (summary, body).
    A text file gives one text per line, without blank lines.

    Yields:
        One string per column.

    Raises:
        JasperError: the source is missing, empty or unreadable, a column is missing, or a cell is null or not text.
    """
    if source.path in BUILT_IN:
        yield from resolve_name(BUILT_IN[source.path])()
        return
    yield from (row for _, row, _ in read_located(source))


def read_located(
    source: SourceConfig, extra: Sequence[str] = ()
) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Yield the rows of a source that is not built in, as `read_source` does, with their positions and cells.

    Args:
        source: the source.
        extra: the names of more columns to read into the cells.

    Yields:
        The position of the row for error messages, one string per column, and the cells by column.

    Raises:
        JasperError: the source cannot be read, as in `read_source`.
    """
    columns = list(dict.fromkeys([*source.columns, *extra]))
    rows = (row for file in source_files(source) for row in read_rows(file, columns))
    empty = True
    for where, cells in rows if is_local(source) else _read_hub(source):
        for row in _texts(source, cells, where):
            empty = False
            yield where, row, cells
    if empty:
        raise JasperError(f"{source.path}: the source has no rows. Fix: give a source with at least one text")


def check_source(source: SourceConfig) -> None:
    """Read the first row of each file, or of the stream, to find errors that affect all rows.

    Raises:
        JasperError: one of these rows cannot be read, as in `read_source`.
    """
    if source.path in BUILT_IN:
        return
    next(read_source(source))
    for file in source_files(source)[1:]:
        for where, cells in islice(read_rows(file, source.columns), 1):
            list(_texts(source, cells, where))


def sample_texts(
    source: SourceConfig, seed: int, on_limit: Callable[[int | None], None] = lambda _: None
) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """Draw at most ``limit`` texts from a source, at random.

    A local source is read twice, so that each text is equally likely. A hub stream has an unknown length, so it is
    shuffled in a buffer and cut off at the limit. Without a limit, all texts are drawn in file order.

    Args:
        source: the source. With ``join``, a row is one text. Otherwise each of its columns is one.
        seed: the seed of the draw.
        on_limit: called if the limit leaves texts out, with the number of texts of the source. None: it is unknown.

    Yields:
        The cells of a row, and the positions of the drawn columns.

    Raises:
        JasperError: the source cannot be read, as in `read_source`.
    """
    width = 1 if source.join else None
    if source.limit is None or not is_local(source):
        remaining = source.limit
        for row in _shuffled_stream(source, seed) if remaining is not None else read_source(source):
            sampled = list(range(width or len(row)))[:remaining]
            yield row, sampled
            if remaining is not None and (remaining := remaining - len(sampled)) == 0:
                on_limit(None)
                return
        return
    total = sum(width or len(row) for row in read_source(source))
    if total > source.limit:
        on_limit(total)
    # `join` means nothing for one column of a file. The draw does not depend on it, as its default was once false.
    one_column = len(source.columns) == 1 and source.path not in BUILT_IN
    drawn = source.model_copy(update={"join": False}) if one_column else source
    generator = np.random.default_rng([seed, int(sha256(drawn.model_dump_json(exclude={"id_column"}))[:16], 16)])
    chosen = np.zeros(total, dtype=bool)
    chosen[generator.choice(total, size=min(source.limit, total), replace=False, shuffle=False)] = True
    position = 0
    for row in read_source(source):
        count = width or len(row)
        sampled = np.flatnonzero(chosen[position : position + count]).tolist()
        position += count
        if sampled:
            yield row, sampled


def is_local(source: SourceConfig) -> bool:
    """Return whether a source is read from this machine. Otherwise its path is the name of a hub dataset."""
    path = user_path(source.path)
    return (
        source.path in BUILT_IN
        or os.path.lexists(path)
        or looks_like_path(source.path)
        or path.name.lower().endswith(SUFFIXES)
    )


def source_files(source: SourceConfig) -> list[Path]:
    """List the files of a local source in natural order. Return an empty list for built-in and hub sources.

    Links to folders are followed. In a folder, hidden files and notes about the data, such as README.txt, are skipped.

    Raises:
        JasperError: the path is missing, it has no file of a supported format, or a link in the folder is broken.
    """
    if source.path in BUILT_IN or not is_local(source):
        return []
    path = user_path(source.path)
    if os.path.isdir(path):
        files = [file for file in listed_files(path, SUFFIXES) if not _is_note(file)]
    elif not os.path.exists(path):
        raise JasperError(f"{source.path}: no such file or folder. Fix: correct the path")
    else:
        files = [path] if path.name.lower().endswith(SUFFIXES) else []
    if not files:
        raise JasperError(f"{source.path}: no file of a supported format. Fix: give one of {SUPPORTED_FILES}")
    return files


def report_ignored(source: SourceConfig) -> None:
    """Print the files in a source's folder that are skipped: other formats, and notes about the data.

    Raises:
        JasperError: the files cannot be listed, as in `source_files`.
    """
    read, path = set(source_files(source)), user_path(source.path)
    if not read or not os.path.isdir(path):
        return
    ignored = [file.relative_to(path).as_posix() for file in all_files(path) if file not in read]
    if ignored:
        rest = f" and {len(ignored) - MAX_LISTED} more" if len(ignored) > MAX_LISTED else ""
        print(
            f"{source.path}: skipped {', '.join(ignored[:MAX_LISTED])}{rest} (not data of a supported format)",
            flush=True,
        )


def source_stamp(source: SourceConfig) -> list[Any]:
    """Return a JSON-serializable value that changes with the content of a source.

    For files it holds their names, sizes in bytes and modification times in nanoseconds. For built-in sources it holds
    a digest of the texts.
    """
    if source.path in BUILT_IN:
        return [sha256("\0".join((*row, "")) for row in read_source(source))]
    stats = [(str(p), p.stat()) for p in source_files(source)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _is_note(file: Path) -> bool:
    return file.name.lower().endswith(with_compressed(".txt")) and NOTE_NAMES.fullmatch(file.name.lower()) is not None


def _texts(source: SourceConfig, cells: dict[str, Any], where: str) -> Iterator[tuple[str, ...]]:
    """Yield the selected cells of a row. Each item of a list in a single selected column becomes a row."""
    column = source.columns[0]
    if len(source.columns) == 1 and isinstance(values := cells.get(column), list):
        for number, value in enumerate(values, 1):
            yield (_text(value, f"{where}: column {column!r}, item {number}"),)
    else:
        for column in source.columns:
            if column not in cells:
                raise missing_column(column, cells, where)
        yield tuple(_text(cells[column], f"{where}: column {column!r}") for column in source.columns)


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return check_text(value, where)
    problem = "is null" if value is None else f"is not text but {type(value).__name__} ({str(value)[:40]})"
    raise JasperError(f"{where} {problem}. Fix: remove or correct the row, or select other columns (--columns)")


def _read_hub(source: SourceConfig) -> Iterator[Row]:
    for number, cells in enumerate_rows(source, _stream(source)):
        yield f"{source.path} ({source.split}), row {number}", cells


def _shuffled_stream(source: SourceConfig, seed: int) -> Iterator[tuple[str, ...]]:
    stream = _stream(source).shuffle(seed=seed, buffer_size=STREAM_BUFFER)
    for number, cells in enumerate_rows(source, stream):
        where = f"{source.path} ({source.split}), row {number} of the shuffled stream"
        yield from _texts(source, cells, where)


def _stream(source: SourceConfig) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(source.path, source.config, split=source.split, streaming=True, revision=source.revision)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise JasperError(
            f"{source.path}: not a local file or folder, and loading it as a hub dataset failed (config "
            f"{source.config}, split {source.split!r}: {_first_line(error)}). Fix: correct the path"
        ) from error


def enumerate_rows(
    source: SourceConfig | ImageSourceConfig, stream: Iterable[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a stream, numbered from 1.

    Args:
        source: the source of the stream, for error messages.
        stream: the rows, each with its cells by column.

    Raises:
        JasperError: reading failed, for example because the network connection was lost.
    """
    from huggingface_hub.errors import HTTPError  # from the hub client's HTTP library; not always an OSError

    number = 0
    try:
        for number, cells in enumerate(stream, 1):
            yield number, cells
    except (OSError, ValueError, EOFError, zlib.error, HTTPError) as error:
        raise JasperError(
            f"{source.path} ({source.split}): reading failed after {number} rows ({_first_line(error)}). Fix: check "
            "the network connection and run the same command again; only this source is read from its start"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
