"""Open an index of any known format: files of embeddings, our own indexes, or FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from jasper_fast.adaptation.migration.codes import find_codes
from jasper_fast.adaptation.migration.faiss_index import SAMPLE, open_faiss
from jasper_fast.adaptation.migration.old_index import OldIndex
from jasper_fast.data.listing import user_path
from jasper_fast.data.text import text_digest
from jasper_fast.mips import FlatIPIndex
from jasper_fast.models.folder import read_json
from jasper_fast.teachers.embedding_files import KINDS, EmbeddingFile, Keys, embedding_paths, joined_keys
from jasper_fast.teachers.embedding_files import open_embedding_file as open_file
from jasper_fast.teachers.reduction import spread_rows
from jasper_fast.teachers.reuse import digest_keys
from jasper_fast.teachers.source_keys import checked_id
from jasper_fast.utils.arrow_files import read_mapped
from jasper_fast.utils.errors import JasperError

# Files of a FlatIPIndex and of a text index, which is in a layer above this one.
MANIFEST, VECTORS, TEXTS, SETTINGS = "manifest.json", "vectors", "texts.arrow", "search.json"


def open_old_index(name: str) -> OldIndex:
    """Open an existing index for reading.

    Args:
        name: .parquet, .jsonl or .npy file of embeddings, or folder of such files. Also the folder of a ``FlatIPIndex``
            or text index, or the file of a FAISS index.

    Raises:
        JasperError: there is no such index, it is damaged, empty or of an unknown format, or its files differ in width.
    """
    path = user_path(name)
    if not path.exists():
        raise JasperError(f"{name}: no such file or folder. Fix: give the vectors of the existing index")
    if (path / MANIFEST).is_file():
        return _flat_index(name, path)
    if (path / VECTORS / MANIFEST).is_file():
        return _text_index(name, path)
    if files := embedding_paths(name):
        return _decoded(_files(name, files))
    if path.is_dir():
        raise JasperError(
            f"{name}: no index in this folder (expected {KINDS} files, a FlatIPIndex or a text index). "
            "Fix: give the file or folder with the vectors"
        )
    return open_faiss(name, path)


def _files(name: str, paths: list[Path]) -> OldIndex:
    files = [open_file(path, of_index=True) for path in paths]
    widths = sorted({file.vectors.shape[1] for file in files})
    if len(widths) > 1:
        raise JasperError(
            f"{name}: its files differ in width (got {widths}, expected one width). Fix: keep the files of one index"
        )
    starts = np.cumsum([0, *(len(file.vectors) for file in files)])

    def read(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), widths[0]), np.float32)
        owners = np.searchsorted(starts, rows, side="right") - 1
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            chosen = chosen[np.argsort(rows[chosen], kind="stable")]  # in the order of the disk
            with np.errstate(over="ignore"):  # becomes infinity, which is counted as an unusable row
                out[chosen] = files[owner].vectors[rows[chosen] - starts[owner]]
        return out

    kinds = sorted({path.name.lower().rpartition(".")[2] for path in paths})
    kind = f"{len(files)} {'/'.join(kinds)} file{'s' if len(files) > 1 else ''}"
    return OldIndex(name, kind, int(starts[-1]), widths[0], read, _ids(files), _texts(files, starts), files=paths)


def _ids(files: Sequence[EmbeddingFile]) -> list[str] | None:
    """Return the ids of all rows, if every file has them."""
    if any(file.ids is None for file in files):
        return None
    return [checked_id(value, f"{file.file}: row {row}") for file in files for row, value in enumerate(file.ids or ())]


def _texts(files: Sequence[EmbeddingFile], starts: np.ndarray) -> Keys | None:
    """Return the keys of all rows by text, if every file has texts or digests."""
    keys = [
        file.keys._replace(rows=file.keys.rows + start)
        for file, start in zip(files, starts, strict=False)
        if file.keys is not None
    ]
    return joined_keys(keys) if len(keys) == len(files) else None


def _decoded(index: OldIndex) -> OldIndex:
    """Recognize codes among the rows, and decode what is read."""
    codes = find_codes(index.read(spread_rows(index.rows, SAMPLE)))
    if codes is None:
        return index
    read, decode = index.read, codes.decode
    return replace(
        index,
        width=codes.width,
        read=lambda rows: decode(read(rows)),
        codes=codes.kind,
        notes=[*index.notes, f"{codes.note}. If they are something else, save decoded floats"],
    )


def _flat_index(name: str, path: Path) -> OldIndex:
    index = FlatIPIndex.load(path)
    if not len(index):
        raise JasperError(f"{name}: the index is empty. Fix: give an index with rows")
    segments = list(index.segments())
    starts = np.array([first for first, _ in segments])

    def read(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), index.dim), np.float32)
        owners = np.searchsorted(starts, rows, side="right") - 1
        for owner in np.unique(owners):
            first, segment = segments[owner]
            chosen = np.flatnonzero(owners == owner)
            stored = torch.from_numpy(rows[chosen] - first)
            values = segment.rows[stored].float()
            out[chosen] = values * segment.scales[stored, None] if index.dtype == "int8" else values
        return out

    numbers = index.ids.numpy()
    ids = None if np.array_equal(numbers, np.arange(len(index))) else list(map(str, numbers.tolist()))
    notes = {
        "float32": [],
        "bfloat16": ["it stores bfloat16, which costs little"],
        "int8": ["it stores int8 codes with a scale for each row, which usually costs under 1 % of the ranking"],
    }
    return OldIndex(name, f"FlatIPIndex ({index.dtype})", len(index), index.dim, read, ids, notes=notes[index.dtype])


def _text_index(name: str, path: Path) -> OldIndex:
    """Open the index that ``search build`` writes."""
    try:
        table = read_mapped(path / TEXTS)
        model = read_json(path / SETTINGS)["revision"]
        texts = table.column("text").to_pylist()
        ids = list(map(str, table.column("id").to_pylist())) if "id" in table.column_names else None
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException) as error:
        raise JasperError(f"{name}: damaged ({error}). Fix: build the index again") from error
    index = _flat_index(name, path / VECTORS)
    if len(texts) != index.rows:
        raise JasperError(f"{name}: damaged ({len(texts)} texts, {index.rows} embeddings). Fix: build the index again")
    rows = np.arange(len(texts))
    keys = Keys(digest_keys([text_digest(text) for text in texts]), rows, np.ones(len(rows), bool))
    return replace(index, kind=f"text index, {index.kind}", ids=ids, texts=keys, model=model)
