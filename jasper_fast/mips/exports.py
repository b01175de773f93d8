"""Exports of an index: FAISS, parquet for vector databases, and a ``datasets`` column."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_fast.mips.index import FlatIPIndex
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

EXPORT_CHUNK_ROWS = 8192


def to_faiss(index: FlatIPIndex) -> Any:
    """Return a ``faiss.IndexFlatIP`` of the stored embeddings in float32. Save it with ``faiss.write_index``.

    If the ids are not the row numbers, a ``faiss.IndexIDMap`` around it holds them.

    Args:
        index: index to export.

    Raises:
        JasperError: FAISS is not installed.

    Example:
        >>> import torch
        >>> index = FlatIPIndex(4)
        >>> index.add(torch.eye(4))
        >>> to_faiss(index).ntotal
        4
    """
    try:
        import faiss
    except ImportError:
        raise JasperError("FAISS is not installed. Fix: type `pip install faiss-cpu`") from None
    flat = faiss.IndexFlatIP(index.dim)
    for _, vectors in _blocks(index):
        flat.add(vectors)
    ids = index.ids.numpy()
    if (ids == np.arange(len(ids))).all():
        return flat
    named = faiss.IndexIDMap(faiss.IndexFlatIP(index.dim))
    for first, vectors in _blocks(index):
        named.add_with_ids(vectors, ids[first : first + len(vectors)])
    return named


def to_parquet(index: FlatIPIndex, path: str | Path, columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Write ``id``, ``vector`` (a fixed-size list of float32) and other columns to one parquet file.

    Args:
        index: index to export.
        path: new folder for ``vectors.parquet``, written atomically.
        columns: more columns by name, with one value per row, e.g. {"text": texts}. None adds no column.

    Raises:
        JasperError: the index is empty, or the folder exists or cannot be written.
        ValueError: a column of another length.

    Example:
        >>> import pyarrow.parquet, tempfile, torch
        >>> index = FlatIPIndex(4)
        >>> index.add(torch.eye(4)[:2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_parquet(index, f"{folder}/export", {"text": ["a", "b"]})
        ...     pyarrow.parquet.read_table(f"{folder}/export/vectors.parquet").to_pylist()
        [{'id': 0, 'vector': [1.0, 0.0, 0.0, 0.0], 'text': 'a'}, {'id': 1, 'vector': [0.0, 1.0, 0.0, 0.0], 'text': 'b'}]
    """
    import pyarrow.parquet as pq

    with publish_dir(path) as folder:
        writer = None
        for table in _tables(index, columns or {}):
            writer = writer or pq.ParquetWriter(folder / "vectors.parquet", table.schema)
            writer.write_table(table)
        if writer is None:
            raise JasperError("the index is empty: there is nothing to export. Fix: add rows first")
        writer.close()


def to_dataset(index: FlatIPIndex, columns: Mapping[str, Sequence[Any]] | None = None) -> Dataset:
    """Return a memory-mapped ``datasets.Dataset`` with the columns of `to_parquet`.

    Args:
        index: index to export.
        columns: more columns by name, with one value per row. None adds no column.

    Raises:
        JasperError: the index is empty.
        ValueError: a column of another length.

    Example:
        >>> import torch
        >>> index = FlatIPIndex(4)
        >>> index.add(torch.eye(4))
        >>> to_dataset(index, {"text": ["a", "b", "c", "d"]}).column_names
        ['id', 'vector', 'text']
    """
    from datasets import Dataset

    folder = tempfile.mkdtemp(prefix="jasper-fast-dataset-")
    to_parquet(index, Path(folder) / "export", columns)
    return Dataset.from_parquet(str(Path(folder) / "export" / "vectors.parquet"), cache_dir=folder)


def _blocks(index: FlatIPIndex) -> Iterator[tuple[int, np.ndarray]]:
    for first, segment in index.segments():
        for start in range(0, len(segment), EXPORT_CHUNK_ROWS):
            yield first + start, segment.values(start, start + EXPORT_CHUNK_ROWS, torch.float32).cpu().numpy()


def _tables(index: FlatIPIndex, columns: Mapping[str, Sequence[Any]]) -> Iterator[pa.Table]:
    import pyarrow as pa

    for name, values in columns.items():
        if len(values) != len(index):
            raise ValueError(f"columns: {name!r} has {len(values)} values for {len(index)} rows")
    ids = index.ids.numpy()
    for first, vectors in _blocks(index):
        stop = first + len(vectors)
        table = {
            "id": pa.array(ids[first:stop]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), index.dim),
        }
        yield pa.table(table | {name: pa.array(values[first:stop]) for name, values in columns.items()})
