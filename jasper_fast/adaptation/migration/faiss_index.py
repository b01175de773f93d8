"""Read the rows that FAISS can reconstruct from one of its indexes. The package faiss is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.adaptation.migration.codes import find_codes
from jasper_fast.adaptation.migration.old_index import INNER_PRODUCT, L2, OldIndex
from jasper_fast.teachers.reduction import spread_rows
from jasper_fast.utils.errors import JasperError

SAMPLE = 1000  # rows, to recognize codes
SAVE_ROWS = "Fix: save the rows with their ids to a .parquet or .npy file"


def open_faiss(name: str, path: Path) -> OldIndex:
    """Open a FAISS index.

    Args:
        name: the file, as given.
        path: the file.

    Raises:
        JasperError: faiss is not installed, the file is no FAISS index, or FAISS cannot reconstruct its rows.
    """
    faiss = _faiss(name)
    try:
        return _float_index(name, faiss.read_index(str(path)))
    except RuntimeError as error:
        try:
            binary = faiss.read_index_binary(str(path))
        except RuntimeError:
            reason = str(error).strip().splitlines()[0]
            raise JasperError(
                f"{name}: FAISS cannot read it ({reason}). Fix: give a FAISS index, a .parquet, .npy or .jsonl file, "
                "or the folder of an index"
            ) from error
    return _binary_index(name, binary)


def _faiss(name: str = "the index") -> Any:
    try:
        import faiss
    except ImportError:
        raise JasperError(
            f"{name}: not a known format without the package faiss, which reads FAISS indexes. Fix: run `pip install "
            "faiss-cpu`, or give a .parquet, .npy or .jsonl file"
        ) from None
    return faiss


def _float_index(name: str, whole: Any) -> OldIndex:
    faiss = _faiss(name)
    index, ids = _without_ids(whole)
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    keys = np.arange(index.ntotal)
    if isinstance(inner, faiss.IndexIVF):
        keys = np.sort(_inverted_ids(inner))
        inner.set_direct_map_type(faiss.DirectMap.Hashtable)
        if ids is None and not np.array_equal(keys, np.arange(len(keys))):
            ids = keys
    if not index.ntotal:
        raise JasperError(f"{name}: the FAISS index is empty. Fix: give an index with rows")
    kind = f"FAISS {type(inner).__name__}"

    def read(rows: np.ndarray, owner: Any = whole) -> np.ndarray:  # the owner of the C++ objects must stay alive
        try:
            return np.asarray(index.reconstruct_batch(keys[rows]), np.float32)
        except RuntimeError as error:
            raise JasperError(f"{name}: {kind} cannot reconstruct its rows. {SAVE_ROWS}") from error

    read(np.zeros(1, np.int64))
    notes = [note for note in (_codes_note(inner), _transform_note(index, inner), _metric_note(inner)) if note]
    return OldIndex(
        name,
        kind,
        int(index.ntotal),
        int(index.d),
        read,
        None if ids is None else list(map(str, ids.tolist())),
        metric=L2 if inner.metric_type == faiss.METRIC_L2 else INNER_PRODUCT,
        notes=notes,
    )


def _without_ids(index: Any) -> tuple[Any, np.ndarray | None]:
    """Return the index inside an IndexIDMap, and the ids that it maps."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexIDMap):
        return index, None
    ids = faiss.vector_to_array(index.id_map).copy()
    return faiss.downcast_index(index.index), ids


def _inverted_ids(index: Any) -> np.ndarray:
    faiss = _faiss()
    lists = index.invlists
    parts = [
        faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number)).copy()
        for number in range(lists.nlist)
        if lists.list_size(number)
    ]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _codes_note(index: Any) -> str | None:
    size = int(index.storage.sa_code_size() if hasattr(index, "storage") else getattr(index, "code_size", 4 * index.d))
    if size >= 4 * index.d:
        return None
    return (
        f"it stores {size:,} bytes a row in place of {4 * index.d:,} ({type(index).__name__}), so its rows are "
        "approximate. The map is fitted to the reconstructed rows. The ranking is no better than these"
    )


def _transform_note(outer: Any, inner: Any) -> str | None:
    if outer is inner or inner.d >= outer.d:
        return None
    return f"it keeps {inner.d:,} of {outer.d:,} dimensions. The rows are reconstructed from these"


def _metric_note(index: Any) -> str | None:
    faiss = _faiss()
    if index.metric_type in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        return None
    return f"it ranks by FAISS metric {index.metric_type}. The table ranks by inner product instead"


def _binary_index(name: str, index: Any) -> OldIndex:
    faiss = _faiss(name)
    index, ids = faiss.downcast_IndexBinary(index), None
    if isinstance(index, faiss.IndexBinaryIDMap):
        outer, ids = index, faiss.vector_to_array(index.id_map).copy()
        index = faiss.downcast_IndexBinary(outer.index)
    if not isinstance(index, faiss.IndexBinaryFlat):
        raise JasperError(f"{name}: {type(index).__name__} cannot be read (expected IndexBinaryFlat). {SAVE_ROWS}")
    if not index.ntotal:
        raise JasperError(f"{name}: the FAISS index is empty. Fix: give an index with rows")
    stored = faiss.vector_to_array(index.xb).reshape(index.ntotal, index.code_size).copy()
    codes = find_codes(stored[spread_rows(len(stored), SAMPLE)].astype(np.float32))
    bits = np.unpackbits(stored[:1], axis=1).shape[1]
    assert codes is not None

    def read(rows: np.ndarray) -> np.ndarray:
        return 2 * np.unpackbits(stored[rows], axis=1).astype(np.float32) - 1

    return OldIndex(
        name,
        f"FAISS {type(index).__name__}",
        len(stored),
        bits,
        read,
        None if ids is None else list(map(str, ids.tolist())),
        codes="bits",
        notes=[codes.note],
    )
