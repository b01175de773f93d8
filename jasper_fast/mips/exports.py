"""Taking an index to what others run: FAISS, parquet for vector databases, a ``datasets`` column."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_fast.errors import JasperError
from jasper_fast.files import publish_dir
from jasper_fast.mips.index import FlatIPIndex

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ROWS_AT_ONCE = 8192


def to_faiss(index: FlatIPIndex) -> Any:
    """A ``faiss.IndexFlatIP`` of the stored vectors in float32; save it with ``faiss.write_index``.

    Raises:
        JasperError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise JasperError("FAISS is not installed; type `pip install faiss-cpu`") from None
    flat = faiss.IndexFlatIP(index.dim)
    for _, vectors in _blocks(index):
        flat.add(vectors)
    return flat


def to_parquet(index: FlatIPIndex, path: str | Path, columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Write ``id`` and ``vector`` (a fixed-size list of float32), and other columns beside them, to one parquet file.

    Args:
        index: the vectors.
        path: the file, in a folder of its own making: ``path/vectors.parquet`` appears whole or not at all.
        columns: more columns by name, one value per row, e.g. {"text": texts}.

    Raises:
        JasperError: the place cannot be written or is taken.
        ValueError: a column of another length.
    """
    import pyarrow.parquet as pq

    with publish_dir(path) as folder:
        writer = None
        for table in _tables(index, columns or {}):
            writer = writer or pq.ParquetWriter(folder / "vectors.parquet", table.schema)
            writer.write_table(table)
        if writer is None:
            raise JasperError("the index is empty: there is nothing to export")
        writer.close()


def to_dataset(index: FlatIPIndex, columns: Mapping[str, Sequence[Any]] | None = None) -> Dataset:
    """A ``datasets.Dataset`` with columns ``id`` and ``vector`` and those given; on disk, memory-mapped."""
    from datasets import Dataset

    folder = tempfile.mkdtemp(prefix="jasper-fast-dataset-")
    to_parquet(index, Path(folder) / "export", columns)
    return Dataset.from_parquet(str(Path(folder) / "export" / "vectors.parquet"), cache_dir=folder)


def _blocks(index: FlatIPIndex) -> Iterator[tuple[int, np.ndarray]]:
    for first, piece in index.pieces():
        for start in range(0, len(piece), ROWS_AT_ONCE):
            yield first + start, piece.values(start, start + ROWS_AT_ONCE, torch.float32).cpu().numpy()


def _tables(index: FlatIPIndex, columns: Mapping[str, Sequence[Any]]) -> Iterator[pa.Table]:
    import pyarrow as pa

    for name, values in columns.items():
        if len(values) != len(index):
            raise ValueError(f"columns: {name!r} has {len(values)} values for {len(index)} rows")
    for first, vectors in _blocks(index):
        stop = first + len(vectors)
        table = {
            "id": pa.array(np.arange(first, stop)),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), index.dim),
        }
        yield pa.table(table | {name: pa.array(values[first:stop]) for name, values in columns.items()})
