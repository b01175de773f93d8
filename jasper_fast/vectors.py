"""Ready teacher vectors from .npy and .parquet files, one row per training text in order.

``python -m jasper_fast.teach --texts FILE.parquet`` writes the texts that they are to be of.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.config import TeacherConfig
from jasper_fast.errors import JasperError
from jasper_fast.teachers import normalised

SUFFIXES = (".npy", ".parquet")
TEXTS = "`python -m jasper_fast.teach --texts texts.parquet`, with this configuration, writes the texts in their order"


def describe_vectors(config: TeacherConfig) -> dict[str, Any]:
    """What decides the vectors: the files by name, size and time, and the coordinates that are kept."""
    files = _files(config)
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"vectors": config.vectors, "files": stats, "truncate_dim": config.truncate_dim}


class ReadyVectors:
    """Ready vectors, read in pieces.

    Args:
        config: a teacher with ``vectors``: a .npy or .parquet file, or a folder of either (sorted by name). In parquet
            the vectors are the only column of lists of numbers, or the one called ``vector`` or ``embedding``; a column
            ``digest``, if there, must match the texts.
        rows: how many training texts there are.

    Raises:
        JasperError: no such file, another form, or another number of rows than texts.
    """

    precision = "ready"

    def __init__(self, config: TeacherConfig, rows: int) -> None:
        self.name = str(config.vectors)
        self.parts = [_Npy(file) if file.suffix == ".npy" else _Parquet(file) for file in _files(config)]
        widths = sorted({part.width for part in self.parts})
        if len(widths) > 1:
            raise JasperError(f"{self.name}: its files have vectors of different widths: {widths}")
        if config.truncate_dim is not None and config.truncate_dim > widths[0]:
            raise JasperError(f"{self.name}: truncate_dim {config.truncate_dim} is more than the width {widths[0]}")
        self.width = config.truncate_dim or widths[0]
        self.starts = np.cumsum([0, *(part.rows for part in self.parts)]).tolist()
        if self.starts[-1] != rows:
            raise JasperError(
                f"{self.name}: {self.starts[-1]} vectors for {rows} training texts; there must be one for each: {TEXTS}"
            )

    def read(self, start: int, stop: int, digests: list[str]) -> np.ndarray:
        """Unit vectors of the texts from ``start`` to before ``stop``. (stop − start, width) float32

        Raises:
            JasperError: a vector that is not finite or is zero, or a digest of another text; the row is named.
        """
        pieces = []
        at = start
        while at < stop:
            number = bisect_right(self.starts, at) - 1
            part, first = self.parts[number], self.starts[number]
            end = min(stop, self.starts[number + 1])
            given = part.digests(at - first, end - first)
            for offset, digest in enumerate(given or []):
                if digest != digests[at - start + offset]:
                    raise JasperError(
                        f"{part.file}: row {at - first + offset} is the vector of another text (its digest differs); "
                        + TEXTS
                    )
            pieces.append(part.read(at - first, end - first)[:, : self.width])
            at = end
        vectors = np.concatenate(pieces).astype(np.float32)
        return normalised(vectors, self.name, range(start, stop), None)


class _Npy:
    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise JasperError(f"{file}: not a readable .npy file ({error})") from error
        if self.array.ndim != 2 or self.array.dtype.kind != "f":
            raise JasperError(
                f"{file}: expected floats of shape (texts, width), got {self.array.dtype} {self.array.shape}"
            )
        self.rows, self.width = self.array.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]

    def digests(self, start: int, stop: int) -> list[str] | None:
        return None


class _Parquet:
    def __init__(self, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.file = file
        try:
            self.parquet = pq.ParquetFile(file, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            raise JasperError(f"{file}: not a readable parquet file ({error})") from error
        schema = self.parquet.schema_arrow
        lists = [field.name for field in schema if _is_vector(field.type)]
        named = [name for name in lists if name in ("vector", "embedding")] or lists
        if len(named) != 1:
            raise JasperError(
                f"{file}: expected one column of vectors (lists of numbers), called `vector`; columns: "
                + ", ".join(f"{field.name} ({field.type})" for field in schema)
            )
        self.column = named[0]
        self.has_digests = "digest" in schema.names
        groups = [self.parquet.metadata.row_group(i).num_rows for i in range(self.parquet.num_row_groups)]
        self.starts = np.cumsum([0, *groups]).tolist()
        self.rows = self.starts[-1]
        self.width = len(self._table(0, 1).column(self.column)[0]) if self.rows else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        column = self._table(start, stop).column(self.column)
        rows = column.to_pylist() if column.null_count else None
        for offset, row in enumerate(rows or []):
            if row is None:
                raise JasperError(f"{self.file}: row {start + offset} is null")
        flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        if flat.size != (stop - start) * self.width:
            lengths = [len(row) for row in column.to_pylist()]
            offset = next(i for i, n in enumerate(lengths) if n != self.width)
            raise JasperError(
                f"{self.file}: row {start + offset} has {lengths[offset]} coordinates, the first row {self.width}"
            )
        return flat.reshape(stop - start, self.width)

    def digests(self, start: int, stop: int) -> list[str] | None:
        return self._table(start, stop).column("digest").to_pylist() if self.has_digests else None

    def _table(self, start: int, stop: int):  # type: ignore[no-untyped-def]
        first, last = bisect_right(self.starts, start) - 1, bisect_right(self.starts, stop - 1)
        columns = [self.column] if not self.has_digests else [self.column, "digest"]
        table = self.parquet.read_row_groups(list(range(first, last)), columns=columns)
        return table.slice(start - self.starts[first], stop - start)


def _is_vector(kind: Any) -> bool:
    """Whether an Arrow type is that of lists of numbers."""
    from pyarrow import types

    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return False
    return types.is_floating(kind.value_type) or types.is_integer(kind.value_type)


def _files(config: TeacherConfig) -> list[Path]:
    path = Path(str(config.vectors)).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    else:
        found = [path] if path.is_file() and path.suffix in SUFFIXES else []
    if not found:
        raise JasperError(
            f"{path}: no teacher vectors here; expected a .npy or .parquet file, or a folder of them, with a row for "
            f"each training text: {TEXTS}"
        )
    return found
