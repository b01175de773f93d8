"""Folders that ``datasets.load_from_disk`` reads, written file by file so that a part can be made again alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_fast.files import write_atomic

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features


def stream_bytes(table: pa.Table) -> bytes:
    """A table as one Arrow stream, the form `datasets` memory-maps."""
    import pyarrow as pa

    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read_mapped(file: Path) -> pa.Table:
    """The table of an Arrow stream file, memory-mapped; the mapping outlives the descriptor, so files may be many."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def write_index(folder: Path, files: list[str], features: Features, fingerprint: str) -> None:
    """Write the two JSON files that turn Arrow stream files into a dataset; ``state.json``, last, makes it complete."""
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
