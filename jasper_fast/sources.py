"""Reading training texts: files, folders, `datasets` names, and the docstrings of installed packages.

Every row is checked as it is read; an error names the file and the row.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.config import ImageSourceConfig, SourceConfig
from jasper_fast.errors import JasperError
from jasper_fast.glyphs import GLYPHS, glyph_names
from jasper_fast.models import looks_like_path

DOCSTRINGS = "docstrings"
BUILT_IN = (DOCSTRINGS, GLYPHS)
SUFFIXES = tuple(f".{kind}{end}" for kind in ("jsonl", "csv", "tsv", "txt") for end in ("", ".gz")) + (".parquet",)
STREAM_BUFFER = 10_000  # rows among which a hub stream is shuffled before a limit is taken

Row = tuple[str, dict[str, Any]]  # where it stands, and its cells


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
    rows = (row for file in source_files(source) for row in file_rows(file, source))
    empty = True
    for where, cells in rows if is_local(source) else _read_hub(source):
        for row in _texts(source, cells, where):
            empty = False
            yield row
    if empty:
        raise JasperError(f"{source.path}: no rows in it; give a source with at least one text")


def try_source(source: SourceConfig) -> None:
    """Read the first row of each file, or of the stream: what is wrong with all rows is told before any source is read.

    Raises:
        JasperError: as `read_source`, of these rows.
    """
    if source.path in BUILT_IN:
        return
    next(read_source(source))
    for file in source_files(source)[1:]:
        for where, cells in islice(file_rows(file, source), 1):
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
    """Whether a source is read from this machine; otherwise its path is a `datasets` name."""
    path = Path(source.path).expanduser()
    return source.path in BUILT_IN or path.exists() or looks_like_path(source.path) or path.name.endswith(SUFFIXES)


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a local source, sorted; none for docstrings and hub names.

    Raises:
        JasperError: there is no such path, or no file of a known kind.
    """
    if source.path in BUILT_IN or not is_local(source):
        return []
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    elif not path.exists():
        raise JasperError(f"{source.path}: no such file or folder (data.sources)")
    else:
        found = [path] if path.name.endswith(SUFFIXES) else []
    if not found:
        raise JasperError(f"{source.path}: no file of a known kind here; known: {', '.join(SUFFIXES)}")
    return found


def source_stamp(source: SourceConfig) -> list[Any]:
    """What changes when a source's content does: file sizes and times, or the digest of the docstrings."""
    if source.path in BUILT_IN:
        whole = hashlib.sha256()
        for pair in read_source(source):
            whole.update("\0".join((*pair, "")).encode())
        return [whole.hexdigest()]
    stats = [(str(p), p.stat()) for p in source_files(source)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _texts(source: SourceConfig, cells: dict[str, Any], where: str) -> Iterator[tuple[str, ...]]:
    """The chosen cells of a row; a list in the only chosen column holds texts of their own."""
    column = source.columns[0]
    if len(source.columns) == 1 and isinstance(values := cells.get(column), list):
        for number, value in enumerate(values, 1):
            yield (_text(value, f"column {column!r}, item {number}", where),)
    else:
        for column in source.columns:
            if column not in cells:
                raise _no_column(column, cells, where)
        yield tuple(_text(cells[column], f"column {column!r}", where) for column in source.columns)


def _text(value: Any, place: str, where: str) -> str:
    if isinstance(value, str):
        given = half_character(value)
        if given is None:
            return value
    else:
        given = "is null" if value is None else f"is not text but {type(value).__name__} ({str(value)[:40]})"
    raise JasperError(f"{where}: {place} {given}; remove or mend the row, or choose other `columns`")


def half_character(text: str) -> str | None:
    """What keeps a text from being stored: JSON can escape half a character. None if nothing does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a character ({text[error.start]!a}, a lone surrogate) at position {error.start}"
    return None


def _no_column(column: str, there: Iterable[str], where: str) -> JasperError:
    return JasperError(
        f"{where}: no column {column!r}; there are: {', '.join(map(str, there)) or 'none'} (set `columns`)"
    )


def file_rows(file: Path, source: SourceConfig) -> Iterator[Row]:
    """Each row of one file with where it stands.

    Raises:
        JasperError: the file is broken; its row is named.
    """
    name = file.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(file, source)
        elif name.endswith(".csv"):
            yield from _table(file, strict=True)
        elif name.endswith(".tsv"):  # tabs cannot stand in a cell, so quotes are text
            yield from _table(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        elif name.endswith(".jsonl"):
            yield from _jsonl(file)
        else:
            column = source.columns[0]  # a text file has one column, whatever it is called
            yield from ((f"{file}, line {n}", {column: text}) for n, line in _lines(file) if (text := line.strip()))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise JasperError(f"{file}: cannot be read to its end ({error}); is it complete, and UTF-8 text?") from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with _open(file) as lines:
        yield from enumerate(lines, 1)


def _open(file: Path, **options: Any) -> Any:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8", **options)
    return open(file, encoding="utf-8", **options)


def _jsonl(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise JasperError(f"{file}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise JasperError(
                f"{file}, line {number}: expected an object with named columns, found {type(row).__name__}"
            )
        yield f"{file}, line {number}", row


def _table(file: Path, **dialect: Any) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with _open(file, newline="") as lines:
        reader = csv.DictReader(lines, **dialect)
        try:
            for row in reader:
                if None in row:
                    raise JasperError(f"{file}, line {reader.line_num}: more cells than columns ({reader.fieldnames})")
                yield f"{file}, line {reader.line_num}", row
        except csv.Error as error:
            raise JasperError(f"{file}, line {reader.line_num}: not a table ({error})") from None


def _parquet(file: Path, source: SourceConfig) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            for column in source.columns:
                if column not in names:
                    raise _no_column(column, names, str(file))
            number = 0
            for batch in parquet.iter_batches(1024, columns=source.columns):
                for cells in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", cells
    except pa.ArrowException as error:
        raise JasperError(f"{file}: not a readable parquet file ({error})") from error


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
