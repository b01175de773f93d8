r"""Read rows of text, JSONL, CSV, TSV and Parquet files, with the same rules for all user data.

Files are UTF-8 with or without a byte order mark, or UTF-16/32 with one. Only \n, \r\n and \r end a line. A file with
the suffix .gz, .bz2, .xz or .zst is compressed. Errors give the file and the line.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jasper_fast.data.text import lone_surrogate
from jasper_fast.utils.errors import JasperError

COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BYTE_ORDER_MARKS = (  # byte order marks; UTF-32 first, because its mark begins with the mark of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
COMPRESSION_SIGNATURES = {b"\x1f\x8b": ".gz", b"BZh91AY": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
BOM = "\ufeff"
QUOTED_CELL = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')  # a quoted CSV cell with at least one doubled quote

Row = tuple[str, dict[str, Any]]  # position (file and line) and cells by column


def with_compressed(*endings: str) -> tuple[str, ...]:
    """Return the endings, then each ending with each suffix of compressed files."""
    return (*endings, *(ending + suffix for suffix in COMPRESSION_SUFFIXES for ending in endings))


TEXT_SUFFIXES = (".jsonl", ".csv", ".tsv", ".txt")
SUFFIXES = (*with_compressed(*TEXT_SUFFIXES), ".parquet")
SUPPORTED_FILES = f"{', '.join(TEXT_SUFFIXES)} (each also with {', '.join(COMPRESSION_SUFFIXES)}), .parquet"


def read_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file, without blank lines and empty table rows.

    Args:
        file: a .jsonl, .csv, .tsv or .parquet file. Any other file is text with one row per line.
        columns: the names of the columns to read, all required in tables. None reads all columns. A text file has one
            column, with the first of these names, or "text".

    Yields:
        The position of the row (file and line) for error messages, and its cells by column.

    Raises:
        JasperError: the file is damaged or not text, a table lacks a column, or a row is malformed.
    """
    kind = uncompressed_name(file).rpartition(".")[2]
    if kind == "parquet":
        yield from _parquet(file, columns)
    elif kind == "jsonl":
        yield from _jsonl(file)
    elif kind in ("csv", "tsv"):
        yield from _table(file, _csv(file) if kind == "csv" else _tsv(file), columns or ())
    else:
        column = columns[0] if columns else "text"
        yield from ((f"{file}, line {n}", {column: text}) for n, line in read_lines(file) if (text := line.strip()))


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file without line ends, numbered from 1.

    Raises:
        JasperError: the file is missing, damaged or not text.
    """
    for number, line in _lines(file, newline=None):
        yield number, line.removesuffix("\n")


def uncompressed_name(file: Path) -> str:
    """Return the name of a file in lower case, without the suffix of a compressed file."""
    name = file.name.lower()
    return name.removesuffix(file.suffix.lower()) if file.suffix.lower() in COMPRESSION_SUFFIXES else name


def decode(data: bytes) -> str:
    """Decode the content of a text file: UTF-8, or the encoding of its byte order mark.

    Raises:
        UnicodeError: the bytes are not text in this encoding.
    """
    return data.decode(_encoding(data)).removeprefix(BOM)


def missing_column(column: str, present: Iterable[str], where: str) -> JasperError:
    """Return the error for a missing column.

    Args:
        column: the name of the missing column.
        present: the names of the columns of the file.
        where: the position, for the message.
    """
    names = list(map(str, present))
    separator = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    fix = (
        f"separate the cells by commas, not by {separator!r}"
        if separator
        else "set --columns (columns of a source) to one of these"
    )
    return JasperError(f"{where}: no column {column!r} (got columns: {', '.join(names) or 'none'}). Fix: {fix}")


@contextmanager
def explain_read_errors(file: Path) -> Iterator[None]:
    """Convert errors about the content of a file to a JasperError with the name of the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise JasperError(
            f"{file}: cannot be read completely ({reason}). Fix: replace it with a complete, readable file"
        ) from error


def _open(file: Path) -> io.BufferedReader:
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(open(file, "rb"), "zstd"))
    return io.BufferedReader(OPENERS.get(suffix, open)(file, "rb"))


def _encoding(start: bytes) -> str:
    return next((name for mark, name in BYTE_ORDER_MARKS if start.startswith(mark)), "utf-8")


def _lines(file: Path, newline: str | None) -> Iterator[tuple[int, str]]:
    with explain_read_errors(file), _open(file) as stream:
        start = stream.peek(8)
        if suffix := next((suffix for mark, suffix in COMPRESSION_SIGNATURES.items() if start.startswith(mark)), None):
            raise JasperError(f"{file}: the content is that of a {suffix} file. Fix: add {suffix} to the file name")
        text = io.TextIOWrapper(stream, _encoding(start), errors="surrogateescape", newline=newline)
        for number, line in enumerate(text, 1):
            yield number, _without_marks(line, file, number)


def _without_marks(line: str, file: Path, number: int) -> str:
    """Return a line without leading byte order marks. Concatenated files have such marks inside them.

    Raises:
        JasperError: the line has a byte that is not text.
    """
    if "\0" in line:
        position = line.index("\0") + 1
        raise JasperError(
            f"{file}, line {number}, character {position}: NUL is not a text character. Fix: save the file as UTF-8"
        )
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00  # surrogateescape decodes a byte b to 0xDC00 + b
        raise JasperError(
            f"{file}, line {number}, character {error.start + 1}: byte 0x{byte:02x} is not UTF-8. Fix: save the file "
            "as UTF-8, e.g. with `iconv -f WINDOWS-1252 -t UTF-8`"
        ) from None
    return line.lstrip(BOM)


def _jsonl(file: Path) -> Iterator[Row]:
    for number, line in read_lines(file):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise JasperError(f"{where}: not JSON ({error}). Fix: write one JSON object per line") from None
        if not isinstance(row, dict):
            raise JasperError(
                f"{where}: not a JSON object (got {type(row).__name__}). Fix: write one object per line, with a field "
                "per column"
            )
        yield where, row


Cells = Iterator[tuple[int, list[str]]]  # first line of a row, and its cells


def _csv(file: Path, delimiter: str = ",") -> Cells:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader((line for _, line in _lines(file, newline="")), delimiter=delimiter, strict=True)
    first_line = 1
    try:
        for row in rows:
            yield first_line, row
            first_line = rows.line_num + 1
    except csv.Error as error:
        raise JasperError(
            f"{file}, line {first_line}: not a table row ({error}). Fix: close quoted cells and double quotes in them"
        ) from None


def _tsv(file: Path) -> Cells:
    """Yield the rows of a tab-separated table.

    If the header is quoted, the table is read like CSV. Otherwise quotes are text, except in a cell that a CSV writer
    must have quoted. Such a cell is in quotes, and all quotes in it are doubled.
    """
    lines = read_lines(file)
    number, header = next(((n, line) for n, line in lines if line.strip()), (1, ""))
    cells = header.split("\t")
    if len(cells[0]) > 1 and cells[0][0] == cells[0][-1] == '"':
        lines.close()  # type: ignore[attr-defined]
        yield from _csv(file, "\t")
        return
    yield number, cells
    for number, line in lines:
        yield number, [_unquoted(cell) for cell in line.split("\t")] if '""' in line else line.split("\t")


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if QUOTED_CELL.fullmatch(cell) else cell


def _table(file: Path, rows: Cells, columns: Sequence[str]) -> Iterator[Row]:
    filled = ((number, row) for number, row in rows if any(cell.strip() for cell in row))
    number, header = next(filled, (1, []))
    names = [name.strip() for name in header]
    for column in columns:
        if column not in names:
            raise missing_column(column, names, f"{file}, line {number}")
    if duplicates := sorted({name for name in names if name and names.count(name) > 1}):
        raise JasperError(
            f"{file}, line {number}: column {duplicates[0]!r} appears twice. Fix: give each column a different name"
        )
    for number, row in filled:
        if len(row) != len(names):
            raise JasperError(
                f"{file}, line {number}: wrong number of cells (got {len(row)}, expected {len(names)}: "
                f"{', '.join(names)}). Fix: quote cells that contain separators or line breaks, and save as .csv"
            )
        yield f"{file}, line {number}", dict(zip(names, row, strict=True))


def _parquet(file: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with explain_read_errors(file), pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise missing_column(column, names, str(file))
                if names.count(column) > 1:
                    raise JasperError(
                        f"{file}: {names.count(column)} columns have the name {column!r}. Fix: give each column a "
                        "different name"
                    )
            number = 0
            for batch in parquet.iter_batches(1024, columns=columns):
                for cells in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", cells
    except pa.ArrowException as error:
        raise JasperError(f"{file}: not a readable parquet file ({error}). Fix: write the file again") from error


def check_text(text: str, where: str) -> str:
    """Return the text if it can be stored as UTF-8.

    Args:
        text: the text to check.
        where: the position of the text, for the error message.

    Raises:
        JasperError: the text has a lone surrogate.
    """
    if problem := lone_surrogate(text):
        raise JasperError(f"{where} {problem}. Fix: remove it or write the complete character")
    return text
