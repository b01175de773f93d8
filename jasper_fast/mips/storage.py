"""An index on disk: a folder with one safetensors file per segment and a manifest with their checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from jasper_fast.mips.ids import RowIds
from jasper_fast.mips.segment import BIN, Planes, Segment
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import file_sha256

MANIFEST = "manifest.json"
IDS = "ids.safetensors"
PLANE = "code_"  # before the names of a segment's planes; earlier versions had other planes, with "plane_"
FORMAT = "jasper_fast.FlatIPIndex"
VERSION, WITH_IDS = 1, 2  # an index whose ids are row numbers is written in version 1


def save(path: str | Path, dim: int, dtype: str, segments: Sequence[Segment], ids: RowIds) -> None:
    """Write segments as a folder, atomically.

    Args:
        path: folder to write. An index at this path is replaced.
        dim: width of the embeddings.
        dtype: name of the storage dtype.
        segments: segments in order.
        ids: ids of the rows.

    Raises:
        JasperError: the disk is full, the folder cannot be written, or the path holds something else than an index.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file():
        raise JasperError(f"{path}: exists and is not an index. Fix: choose another path, or remove it")
    with publish_dir(path, replace=True) as folder:
        files = []
        for number, segment in enumerate(segments):
            file = folder / f"piece-{number:05d}.safetensors"  # part of the format
            with open(file, "wb") as out:  # safetensors' own writer hides the reason of a failed write
                out.write(to_bytes(_tensors(segment)))
            files.append({"name": file.name, "rows": len(segment), "sha256": file_sha256(file)})
        rows = sum(map(len, segments))
        manifest = {"format": FORMAT, "version": VERSION, "dim": dim, "dtype": dtype, "rows": rows, "files": files}
        if ids.explicit is not None:
            (folder / IDS).write_bytes(to_bytes({"ids": ids.explicit}))
            stored = {"sha256": file_sha256(folder / IDS), "own": ids.own, "next": ids.following}
            manifest |= {"version": WITH_IDS, "ids": stored}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path, verify: bool, dtypes: Mapping[str, torch.dtype]) -> tuple[int, str, list[Segment], RowIds]:
    """Return the width, dtype name, memory-mapped segments and ids of a saved index.

    Args:
        path: folder of the index.
        verify: compare every file with its checksum.
        dtypes: storage dtypes by name.

    Raises:
        JasperError: the folder has no index or a newer format, or a file is missing, truncated or changed.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JasperError(
            f"{path}: no index here ({MANIFEST} is missing). Fix: write one with FlatIPIndex.save"
        ) from None
    except (OSError, ValueError) as error:
        raise JasperError(f"{path / MANIFEST}: not readable ({error}). Fix: build the index again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise JasperError(f"{path}: {MANIFEST} is not that of an index. Fix: give the folder of a FlatIPIndex")
    if manifest.get("version") not in (VERSION, WITH_IDS):
        raise JasperError(
            f"{path}: written in version {manifest.get('version')} of the format; this jasper_fast reads {VERSION} and "
            f"{WITH_IDS}. "
            "Fix: build the index again"
        )
    try:
        dim, dtype, files = int(manifest["dim"]), manifest["dtype"], list(manifest["files"])
        stored = dtypes[dtype]
        segments = [_load_segment(path / file["name"], file, verify, dim, stored) for file in files]
        rows = sum(map(len, segments))
        if rows != manifest["rows"]:
            raise JasperError(
                f"{path}: the files hold {rows} rows, but the manifest says {manifest['rows']}. "
                "Fix: build the index again"
            )
        ids = _load_ids(path / IDS, manifest["ids"], verify, rows) if "ids" in manifest else RowIds(following=rows)
    except (KeyError, TypeError, ValueError) as error:
        raise JasperError(f"{path / MANIFEST}: damaged ({error!r}). Fix: build the index again") from error
    return dim, dtype, segments, ids


def _check_file(file: Path, entry: dict[str, Any], verify: bool) -> None:
    """Reject a missing file, or one whose checksum differs from the manifest's."""
    if not file.is_file():
        raise JasperError(f"{file}: the file is missing. Fix: build the index again, or restore the file")
    if verify and file_sha256(file) != entry["sha256"]:
        raise JasperError(f"{file}: damaged, its checksum differs from the manifest's. Fix: build the index again")


def _load_ids(file: Path, entry: dict[str, Any], verify: bool, rows: int) -> RowIds:
    _check_file(file, entry, verify)
    try:
        with safe_open(file, framework="pt") as opened:
            ids = opened.get_tensor("ids").clone()
    except (SafetensorError, OSError) as error:
        raise JasperError(f"{file}: damaged or truncated ({error}). Fix: build the index again") from error
    if tuple(ids.shape) != (rows,) or ids.dtype != torch.int64:
        raise JasperError(f"{file}: damaged, ids should be int64 of shape ({rows},). Fix: build the index again")
    return RowIds(ids, bool(entry["own"]), int(entry["next"]))


def _tensors(segment: Segment) -> dict[str, Tensor]:
    assert segment.norms is not None
    tensors = {"rows": segment.rows, "norms": segment.norms}
    if segment.rows.dtype == torch.int8:
        tensors["scales"] = segment.scales
    if segment.planes is not None:
        tensors |= {PLANE + name: tensor for name, tensor in segment.planes.tensors().items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _load_segment(file: Path, entry: dict[str, Any], verify: bool, dim: int, dtype: torch.dtype) -> Segment:
    _check_file(file, entry, verify)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise JasperError(f"{file}: damaged or truncated ({error}). Fix: build the index again") from error
    planed = PLANE + "coarse" in tensors
    if planed:  # Earlier versions never rotated.
        tensors.setdefault(PLANE + "rotated", torch.zeros(1, dtype=torch.uint8))
    for name, (shape, kind) in _expected_tensors(entry["rows"], dim, dtype, planed).items():
        if name not in tensors or tuple(tensors[name].shape) != shape or tensors[name].dtype != kind:
            raise JasperError(f"{file}: damaged, {name} should be {kind} of shape {shape}. Fix: build the index again")
    rows = tensors["rows"]
    # Planes are made again for an index of an earlier version or of a GPU.
    stored = {name: tensors[PLANE + name] for name in Planes.shapes(0, dim)} if planed else {}
    planes = Planes(**stored) if planed else Planes.of(rows)
    return Segment(rows, tensors.get("scales", torch.empty(0)), tensors["norms"], planes=planes)


def _expected_tensors(
    rows: int, dim: int, dtype: torch.dtype, planed: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and dtypes of a file's tensors by name."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "rows": ((rows, dim), dtype),
        "norms": ((-(-rows // BIN),), torch.float64),
    }
    if dtype == torch.int8:
        expected["scales"] = ((rows,), torch.float32)
    if planed:
        expected |= {PLANE + name: form for name, form in Planes.shapes(rows, dim).items()}
    return expected
