"""Read .npy, .parquet and .jsonl files of precomputed embeddings, with the keys of their rows.

A row's key is the digest of its training text (`text_digest`). It comes from a column ``digest``, or from ``text``
and ``role``. Without these, a column ``id`` is read. Embeddings stay on disk: .npy files are memory-mapped, and others
are copied to a temporary file first.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jasper_fast.data.listing import listed_files, user_path
from jasper_fast.data.rows import read_rows, with_compressed
from jasper_fast.data.text import text_digest
from jasper_fast.teachers.reuse import digest_keys
from jasper_fast.utils.atomic import disk_errors
from jasper_fast.utils.errors import JasperError

SUFFIXES = (".npy", ".parquet", *with_compressed(".jsonl"))
KINDS = ".npy, .parquet or .jsonl (also .jsonl.gz)"
NAMES = ("vector", "embedding")  # columns to prefer if several columns hold lists of numbers
KEY_COLUMNS = ("digest", "text", "role", "id")
ROLES = ("document", "query")
BATCH = 1024  # rows
MAX_VALUE = 10**38  # just below the largest float32


class Keys(NamedTuple):
    """Keys of the rows of a file. A row may have several keys."""

    digests: np.ndarray  # (k, 2) uint64
    rows: np.ndarray  # (k,) int64
    exact: np.ndarray  # (k,) bool; False: digest of the text stripped of white space at its ends


class EmbeddingFile(NamedTuple):
    """Rows of one file."""

    file: Path
    vectors: np.ndarray  # (rows, width) float, memory-mapped
    keys: Keys | None  # None: the file has no column ``digest`` or ``text``
    ids: list[Any] | None = None  # None: the file has no column ``id``, or it has keys, which are used instead


class Batch(NamedTuple):
    """Consecutive rows of a parquet or JSONL file."""

    vectors: np.ndarray  # (B, width) float
    columns: dict[str, list[Any]]  # those of `KEY_COLUMNS` that the file has
    place: Callable[[int], str]  # describes the position of a row of the batch, for errors


def embedding_paths(name: str) -> list[Path]:
    """List one file, or the files of a folder in natural order. The list is empty if no file has a known suffix."""
    path = user_path(name)
    if path.is_dir():
        return listed_files(path, SUFFIXES, recursive=False)
    return [path] if path.is_file() and path.name.lower().endswith(SUFFIXES) else []


def open_embedding_file(file: Path, scratch: Path | None = None, *, of_index: bool = False) -> EmbeddingFile:
    """Open a file of embeddings.

    Args:
        file: .npy file with floats of shape (rows, width), or .parquet or .jsonl file (compressed or not) with one
            column of lists of floats. With several such columns, one is called ``vector`` or ``embedding``.
        scratch: folder for the temporary copy of a .parquet or .jsonl file. None is the system's temporary folder.
        of_index: the rows are those of an existing index. They may then be whole numbers, which are codes of quantized
            embeddings, and ids are kept next to texts.

    Raises:
        JasperError: the file cannot be read or has another format, a row has another width, or a key is missing.
    """
    if file.suffix.lower() == ".npy":
        return EmbeddingFile(file, _open_npy(file, "fiu" if of_index else "f"), None)
    return _copy(file, _batches(file, of_index), scratch, of_index)


def texts_of(file: Path) -> Iterator[str]:
    """Yield the column ``text`` of a parquet or JSONL file. Files without this column yield nothing."""
    if file.suffix.lower() != ".npy":
        for batch in _batches(file):
            yield from batch.columns.get("text", ())


def _batches(file: Path, codes: bool = False) -> Iterator[Batch]:
    return _parquet_batches(file, codes) if file.suffix.lower() == ".parquet" else _jsonl_batches(file)


def _open_npy(file: Path, kinds: str) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError, SyntaxError) as error:
        raise JasperError(f"{file}: not a readable .npy file ({error}). Fix: write it with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise JasperError(f"{file}: holds an .npz archive (expected one array). Fix: write it with numpy.save")
    if array.ndim != 2 or array.dtype.kind not in kinds or 0 in array.shape:
        raise JasperError(
            f"{file}: unusable array (got {array.dtype} {array.shape}, expected floats of shape (texts, width)). "
            "Fix: save floats, one row per text"
        )
    return array


def _copy(file: Path, batches: Iterator[Batch], scratch: Path | None, keep_ids: bool) -> EmbeddingFile:
    """Copy the embeddings of all batches to an unnamed temporary file and map it."""
    keys: list[Keys] = []
    ids: list[Any] = []
    rows = width = 0
    dtype = np.dtype(np.float32)
    with disk_errors(scratch or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=scratch) as copy:
        for batch in batches:
            if rows and batch.vectors.shape[1] != width:
                raise _width_error(batch.place(0), batch.vectors.shape[1], width)
            if not rows:
                width, dtype = batch.vectors.shape[1], batch.vectors.dtype
            copy.write(batch.vectors.astype(dtype, copy=False).tobytes())
            keys += _keys(batch, rows)
            if keep_ids or not keys:
                ids += batch.columns.get("id", ())
            rows += len(batch.vectors)
        if not rows or not width:
            raise JasperError(f"{file}: holds no embeddings. Fix: write one row per training text")
        copy.flush()
        vectors = np.memmap(copy, dtype, "r", shape=(rows, width))
    return EmbeddingFile(file, vectors, joined_keys(keys) if keys else None, ids or None)


def joined_keys(parts: Sequence[Keys]) -> Keys:
    """Concatenate keys."""
    return Keys(*map(np.concatenate, zip(*parts, strict=True)))


def _keys(batch: Batch, first: int) -> list[Keys]:
    """Return the keys of a batch from its digests, or from its texts. Texts without a role get keys of both roles."""
    columns, place, rows = batch.columns, batch.place, np.arange(first, first + len(batch.vectors))
    if "digest" in columns:
        _check(columns["digest"], r"[0-9a-fA-F]{32}", "digest", "one that `teach --texts` wrote", place)
        _check_digests_of_texts(columns, place)
        return [Keys(digest_keys(columns["digest"]), rows, np.ones(len(rows), bool))]
    if "text" not in columns:
        return []
    texts = columns["text"]
    _check(texts, "(?s).*", "text", "a text", place)
    roles: list[tuple[str, ...]] = [ROLES] * len(texts)
    if "role" in columns:
        _check(columns["role"], "document|query", "role", "'document' or 'query'", place)
        roles = [(role,) for role in columns["role"]]
    stripped = [text.strip() for text in texts]
    changed = [row for row, text in enumerate(texts) if text != stripped[row]]
    return [_text_keys(texts, roles, rows, range(len(texts)), True), _text_keys(stripped, roles, rows, changed, False)]


def _check_digests_of_texts(columns: dict[str, list[Any]], place: Callable[[int], str]) -> None:
    """Reject a row whose digest is that of another text than its own."""
    roles = columns.get("role", [None] * len(columns["digest"]))
    for row, (digest, text, role) in enumerate(zip(columns["digest"], columns.get("text", ()), roles, strict=False)):
        if not isinstance(text, str):
            continue
        possible = [role] if role in ROLES else ROLES
        if not any(digest.lower() == text_digest(form, role) for form in (text, text.strip()) for role in possible):
            raise JasperError(
                f"{place(row)}: `digest` and `text` contradict each other (got the digest of another text than "
                f"{text[:50]!r}). Fix: put them in the same order, or leave out the wrong one of the two columns"
            )


def _text_keys(
    texts: list[str], roles: Sequence[tuple[str, ...]], rows: np.ndarray, chosen: Sequence[int], exact: bool
) -> Keys:
    digests = [text_digest(texts[row], role) for row in chosen for role in roles[row]]
    owners = np.array([rows[row] for row in chosen for _ in roles[row]], np.int64)
    return Keys(digest_keys(digests), owners, np.full(len(owners), exact))


def _check(values: list[Any], form: str, column: str, expected: str, place: Callable[[int], str]) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, str) or re.fullmatch(form, value) is None:
            raise JasperError(
                f"{place(row)}: unusable `{column}` (got {str(value)[:60]!r}, expected {expected}). "
                f"Fix: give every row a `{column}`, or omit this column"
            )


def _parquet_batches(file: Path, codes: bool) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            schema = parquet.schema_arrow
            described = ", ".join(f"{field.name} ({field.type})" for field in schema)
            name = _embedding_column(_embedding_names(schema, codes), file, described)
            if len(set(schema.names)) < len(schema.names):
                raise JasperError(f"{file}: two columns have the same name ({described}). Fix: rename one of them")
            keys = [key for key in KEY_COLUMNS if key in schema.names]
            first, width = 0, 0
            for batch in parquet.iter_batches(BATCH, columns=[name, *keys]):
                if not len(batch):
                    continue
                column, place = batch.column(name), _row_labels(f"{file}: row", first)
                width = width or len(column[0] if column[0].is_valid else ())
                vectors = _to_matrix(column, width, place)
                yield Batch(vectors, {key: batch.column(key).to_pylist() for key in keys}, place)
                first += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise JasperError(
            f"{file}: not a readable parquet file ({error}). Fix: check that it is complete, or write it again"
        ) from error


def _row_labels(before: str, first: int) -> Callable[[int], str]:
    return lambda row: f"{before} {first + row}"


def _to_matrix(column: Any, width: int, place: Callable[[int], str]) -> np.ndarray:
    """Convert an Arrow column of lists of one length to an array, (B, width) float."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)  # NaN: null
    for row in np.flatnonzero(lengths != width)[:1]:
        if not np.isfinite(lengths[row]):
            raise JasperError(f"{place(row)} is null. Fix: give every row an embedding")
        raise _width_error(place(row), int(lengths[row]), width)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)


def _embedding_names(schema: Any, codes: bool) -> list[str]:
    """Return the columns with lists of floats. Without any, those with lists of whole numbers, if codes are allowed."""
    from pyarrow import types

    lists = [
        (field.name, field.type.value_type)
        for field in schema
        if types.is_list(field.type) or types.is_large_list(field.type) or types.is_fixed_size_list(field.type)
    ]
    floats = [name for name, kind in lists if types.is_floating(kind)]
    return floats or [name for name, kind in lists if codes and types.is_integer(kind)]


def _jsonl_batches(file: Path) -> Iterator[Batch]:
    rows = read_rows(file)
    name, keys, width = "", list[str](), 0
    while batch := list(islice(rows, BATCH)):
        places, cells = zip(*batch, strict=True)
        if not name:
            lists = [key for key, value in cells[0].items() if _is_numbers(value)]
            name = _embedding_column(lists, file, ", ".join(cells[0]))
            keys = [key for key in KEY_COLUMNS if key in cells[0]]
            width = len(cells[0][name])
        vectors = np.empty((len(cells), width), np.float32)
        for row, cell in enumerate(cells):
            if extra := [key for key in KEY_COLUMNS if key in cell and key not in keys]:
                raise JasperError(f"{places[row]}: has {extra[0]!r}, unlike the first row. Fix: give it to all rows")
            vectors[row] = _numbers(cell.get(name), width, places[row])
        yield Batch(vectors, {key: [cell.get(key) for cell in cells] for key in keys}, places.__getitem__)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < MAX_VALUE)


def _numbers(value: Any, width: int, place: str) -> list[float]:
    if not _is_numbers(value):
        raise JasperError(f"{place}: has no embedding (expected a list of numbers). Fix: give every row an embedding")
    if len(value) != width:
        raise _width_error(place, len(value), width)
    return value


def _embedding_column(lists: list[str], file: Path, described: str) -> str:
    candidates = [name for name in lists if name in NAMES] or lists
    if len(candidates) == 1:
        return candidates[0]
    raise JasperError(
        f"{file}: expected one column of embeddings (lists of floats; got columns {described}). "
        "Fix: rename the column of embeddings to `vector`"
    )


def _width_error(place: str, got: int, expected: int) -> JasperError:
    return JasperError(
        f"{place}: another width than the first row (got {got}, expected {expected}). Fix: use one width for all rows"
    )


def unit_rows(vectors: np.ndarray, name: str, place: Callable[[int], str]) -> np.ndarray:
    """Return rows of files as unit vectors, (n, width) float32.

    Args:
        vectors: (n, width) floats.
        name: files, for messages.
        place: function that names a row in its file.

    Raises:
        JasperError: a row is not finite or is zero. The message names the first of each in its file.
    """
    norms = np.linalg.norm(vectors.astype(np.float32, copy=False), axis=1, keepdims=True)
    kinds = {"not finite": ~np.isfinite(norms[:, 0]), "zero": norms[:, 0] == 0}
    found = [
        f"{place(int(bad.argmax()))} is {kind} ({int(bad.sum()):,} of {len(vectors):,} rows read)"
        for kind, bad in kinds.items()
        if bad.any()
    ]
    if found:
        raise JasperError(
            f"{name}: {', and '.join(found)}, counted from 0. Fix: give every training text an embedding of finite "
            "numbers that are not all 0"
        )
    return np.asarray(vectors / norms)
