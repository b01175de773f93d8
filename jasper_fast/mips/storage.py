"""An index on disk: a folder of safetensors files, one per piece, and a manifest with their checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from jasper_fast.errors import JasperError
from jasper_fast.files import publish_dir, sha256
from jasper_fast.mips.pieces import BIN, Piece, Plane, int8_plane

MANIFEST = "manifest.json"
FORMAT, VERSION = "jasper_fast.FlatIPIndex", 1


def save(path: str | Path, dim: int, dtype: str, pieces: Sequence[Piece]) -> None:
    """Write pieces as a folder that appears whole or not at all.

    Raises:
        JasperError: the disk is full or the place cannot be written, or something that is no index stands there.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file():
        raise JasperError(f"{path} exists and is not an index; remove it or choose another place")
    with publish_dir(path, replace=True) as folder:
        files = []
        for number, piece in enumerate(pieces):
            file = folder / f"piece-{number:05d}.safetensors"
            with open(file, "wb") as out:  # not safetensors' own writer, which hides why writing failed
                out.write(to_bytes(_tensors(piece)))
            files.append({"name": file.name, "rows": len(piece), "sha256": sha256(file)})
        rows = sum(map(len, pieces))
        manifest = {"format": FORMAT, "version": VERSION, "dim": dim, "dtype": dtype, "rows": rows, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path, verify: bool, dtypes: Mapping[str, torch.dtype]) -> tuple[int, str, list[Piece]]:
    """The width, dtype name and memory-mapped pieces of a saved index.

    Raises:
        JasperError: no index there, one of a newer version, or a file that is missing, truncated or changed.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JasperError(f"{path}: no index here ({MANIFEST} is missing); FlatIPIndex.save makes one") from None
    except (OSError, ValueError) as error:
        raise JasperError(f"{path / MANIFEST}: not readable ({error}); build the index again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise JasperError(f"{path}: {MANIFEST} is not that of an index")
    if manifest.get("version") != VERSION:
        raise JasperError(
            f"{path}: written in version {manifest.get('version')} of the format; this jasper_fast reads {VERSION}"
        )
    try:
        dim, dtype, files = int(manifest["dim"]), manifest["dtype"], list(manifest["files"])
        stored = dtypes[dtype]
        pieces = [_load_piece(path / file["name"], file, verify, dim, stored) for file in files]
        if sum(map(len, pieces)) != manifest["rows"]:
            raise JasperError(f"{path}: its files hold {sum(map(len, pieces))} rows, the manifest says otherwise")
    except (KeyError, TypeError, ValueError) as error:
        raise JasperError(f"{path / MANIFEST}: damaged ({error!r}); build the index again") from error
    return dim, dtype, pieces


def _tensors(piece: Piece) -> dict[str, Tensor]:
    assert piece.norms is not None
    tensors = {"rows": piece.rows, "norms": piece.norms}
    if piece.rows.dtype == torch.int8:
        tensors["scales"] = piece.scales
    if piece.plane is not None:
        # Always the plane of a CPU: a GPU's is made again, in no time, from the rows.
        plane = piece.plane if piece.plane.codes.dtype == torch.int8 else int8_plane(piece.rows)
        tensors |= {"codes": plane.codes, "code_scales": plane.scales, "residuals": plane.residuals}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _load_piece(file: Path, listed: dict[str, Any], verify: bool, dim: int, dtype: torch.dtype) -> Piece:
    if not file.is_file():
        raise JasperError(f"{file} is missing; build the index again or bring the file back")
    if verify and sha256(file) != listed["sha256"]:
        raise JasperError(f"{file} is damaged: its checksum differs from the manifest's; build the index again")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise JasperError(f"{file} is damaged or truncated ({error}); build the index again") from error
    rows, n = listed["rows"], -(-listed["rows"] // BIN)
    expected = {"rows": ((rows, dim), dtype), "norms": ((n,), torch.float64)}
    if dtype == torch.int8:
        expected["scales"] = ((rows,), torch.float32)
    if dtype == torch.float32 and "codes" in tensors:
        expected |= {
            "codes": ((rows, dim), torch.int8),
            "code_scales": ((rows,), torch.float32),
            "residuals": ((n,), torch.float64),
        }
    for name, (shape, kind) in expected.items():
        if name not in tensors or tuple(tensors[name].shape) != shape or tensors[name].dtype != kind:
            raise JasperError(f"{file} is damaged: {name} should be {kind} of shape {shape}; build the index again")
    plane = Plane(*(tensors[name] for name in ("codes", "code_scales", "residuals"))) if "codes" in tensors else None
    return Piece(tensors["rows"], tensors.get("scales", torch.empty(0)), tensors["norms"], plane)
