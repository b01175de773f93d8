"""Read rows of text, JSONL, CSV, TSV and Parquet files: one set of rules for all data that users bring.

Files are UTF-8 with or without a byte order mark, or UTF-16/32 with one. Only \\n, \\r\\n and \\r end a line. Suffixes
.gz, .bz2, .xz and .zst mean that a file is compressed. Errors name the file and the line.
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

from jasper_fast.errors import JasperError
from jasper_fast.text import lone_surrogate

PACKED = (".gz", ".bz2", ".xz", ".zst")
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = (  # a byte order mark tells the encoding; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
STARTS = {b"\x1f\x8b": ".gz", b"BZh91AY": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
BOM = "\ufeff"
QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')  # a cell as CSV writes one with quotes in it

Row = tuple[str, dict[str, Any]]  # its place in the file, and its cells by column


def packed(*endings: str) -> tuple[str, ...]:
    """Return the endings, plain ones first, and each with the suffixes of compressed files."""
    return (*endings, *(ending + suffix for suffix in PACKED for ending in endings))


KINDS = (".jsonl", ".csv", ".tsv", ".txt")
SUFFIXES = (*packed(*KINDS), ".parquet")
KNOWN = f"{', '.join(KINDS)} (each also with {', '.join(PACKED)}), .parquet"


def read_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield each row of a file with its place; blank lines and table rows without any text are no rows.

    Args:
        file: .jsonl, .csv, .tsv or .parquet, and text of any other name, which has a line per row.
        columns: the columns to read; tables must have them. None reads all. A text's only column takes the first name.

    Raises:
        JasperError: the file is damaged or not text, a table lacks a column, or a row is malformed; its line is named.
    """
    kind = unpacked_name(file).rpartition(".")[2]
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
    """Yield the lines of a text file without their ends, numbered from 1.

    Raises:
        JasperError: the file cannot be read, is damaged, or is not text; the line is named.
    """
    for number, line in _lines(file, newline=None):
        yield number, line.removesuffix("\n")


def unpacked_name(file: Path) -> str:
    """Return a file's name in lower case, without the suffix of a compressed file."""
    name = file.name.lower()
    return name.removesuffix(file.suffix.lower()) if file.suffix.lower() in PACKED else name


def decode(data: bytes) -> str:
    """Decode the whole of a text file by the rules of this module.

    Raises:
        UnicodeError: the bytes are not text in the encoding that they begin with.
    """
    return data.decode(_encoding(data)).removeprefix(BOM)


def no_column(column: str, present: Iterable[str], where: str) -> JasperError:
    """Make the error about a missing column."""
    names = list(map(str, present))
    apart = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    fix = f"separate the cells by commas, not by {apart!r}" if apart else "set `columns` to one of them"
    return JasperError(f"{where}: no column {column!r} (there are: {', '.join(names) or 'none'}). Fix: {fix}")


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn errors about a file's content into one that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise JasperError(
            f"{file}: cannot be read to its end ({reason}). Fix: replace it by a complete, readable file"
        ) from error


def _open(file: Path) -> io.BufferedReader:
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(open(file, "rb"), "zstd"))
    return io.BufferedReader(OPENERS.get(suffix, open)(file, "rb"))


def _encoding(start: bytes) -> str:
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")


def _lines(file: Path, newline: str | None) -> Iterator[tuple[int, str]]:
    with reading(file), _open(file) as stream:
        start = stream.peek(8)
        if suffix := next((suffix for mark, suffix in STARTS.items() if start.startswith(mark)), None):
            raise JasperError(f"{file}: its content is that of a {suffix} file. Fix: add {suffix} to its name")
        text = io.TextIOWrapper(stream, _encoding(start), errors="surrogateescape", newline=newline)
        for number, line in enumerate(text, 1):
            yield number, _checked(line, file, number)


def _checked(line: str, file: Path, number: int) -> str:
    """A line without the byte order mark that files joined together have inside them.

    Raises:
        JasperError: a byte of it is not text.
    """
    if "\0" in line:
        at = line.index("\0") + 1
        raise JasperError(
            f"{file}, line {number}, character {at}: NUL, which no text has. Fix: save the file as UTF-8 text"
        )
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00  # as surrogateescape decodes it
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
                f"{where}: not a JSON object (got {type(row).__name__}). Fix: write an object with named columns"
            )
        yield where, row


Cells = Iterator[tuple[int, list[str]]]  # the line on which a row begins, and its cells


def _csv(file: Path, delimiter: str = ",") -> Cells:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader((line for _, line in _lines(file, newline="")), delimiter=delimiter, strict=True)
    begin = 1
    try:
        for row in rows:
            yield begin, row
            begin = rows.line_num + 1
    except csv.Error as error:
        raise JasperError(f"{file}, line {begin}: not a table ({error}). Fix: close and double its quotes") from None


def _tsv(file: Path) -> Cells:
    """Rows of a tab-separated table: quotes are text, except in tables that quote their header.

    A cell that CSV must have written, with every quote in it doubled, is unquoted as well.
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
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


def _table(file: Path, rows: Cells, columns: Sequence[str]) -> Iterator[Row]:
    full = ((number, row) for number, row in rows if any(cell.strip() for cell in row))
    number, header = next(full, (1, []))
    names = [name.strip() for name in header]
    for column in columns:
        if column not in names:
            raise no_column(column, names, f"{file}, line {number}")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise JasperError(f"{file}, line {number}: column {twice[0]!r} appears twice. Fix: give each column one name")
    for number, row in full:
        if len(row) != len(names):
            raise JasperError(
                f"{file}, line {number}: wrong number of cells (got {len(row)}, expected {len(names)}: "
                f"{', '.join(names)}). Fix: quote cells with separators or line breaks in them, and save as .csv"
            )
        yield f"{file}, line {number}", dict(zip(names, row, strict=True))


def _parquet(file: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with reading(file), pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise no_column(column, names, str(file))
                if names.count(column) > 1:
                    raise JasperError(f"{file}: {names.count(column)} columns are named {column!r}. Fix: rename them")
            number = 0
            for batch in parquet.iter_batches(1024, columns=columns):
                for cells in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", cells
    except pa.ArrowException as error:
        raise JasperError(f"{file}: not a readable parquet file ({error}). Fix: write it again") from error


def check_text(text: str, where: str) -> str:
    """Return a text that can be stored.

    Args:
        text: the text.
        where: its place, for the error.

    Raises:
        JasperError: it has a lone surrogate.
    """
    if problem := lone_surrogate(text):
        raise JasperError(f"{where} {problem}. Fix: remove it or write the whole character")
    return text
