"""Write dataset folders for ``datasets.load_from_disk`` file by file, so that a single part can be rewritten."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_fast.utils.atomic import write_atomic

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features


def stream_bytes(table: pa.Table) -> bytes:
    """Serialize a table as one Arrow stream, the format that `datasets` memory-maps."""
    import pyarrow as pa

    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read_mapped(file: Path) -> pa.Table:
    """Memory-map the table of an Arrow stream file.

    The mapping outlives the file descriptor, so many files can be mapped at the same time.
    """
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def write_index(folder: Path, files: list[str], features: Features, fingerprint: str) -> None:
    """Write the two JSON files that turn Arrow stream files into a dataset.

    ``state.json`` is written last: a folder without it is incomplete.

    Args:
        folder: the folder of the stream files.
        files: the names of the stream files, in row order.
        features: the columns of the dataset.
        fingerprint: the fingerprint that `datasets` uses for the dataset.
    """
    info = {"citation": "", "description": "", "features": features.to_dict(), "homepage": "", "license": ""}
    write_atomic(folder / "dataset_info.json", json.dumps(info, indent=2, sort_keys=True))
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_atomic(folder / "state.json", json.dumps(state, indent=2, sort_keys=True))
