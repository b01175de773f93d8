"""The files of a text index: settings, texts, ids and embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.data.document_ids import DocumentId
from jasper_fast.mips import FlatIPIndex
from jasper_fast.models.folder import MIGRATION_FILE, read_json
from jasper_fast.models.hub import adapted_form, model_revision, resolve_model
from jasper_fast.utils.arrow_files import read_mapped, stream_bytes
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    import pyarrow as pa

SETTINGS, TEXTS, VECTORS = "search.json", "texts.arrow", "vectors"
SETTING_TYPES: dict[str, Any] = {
    "model": str,
    "model_from_index": (str, type(None)),
    "revision": str,
    "width": int,
    "max_length": (int, type(None)),
    "role": str,
}


def check_replace(out: str | Path, replace: bool) -> None:
    """Check that an index may be written at a path.

    Args:
        out: folder to write.
        replace: allow an index at this path, which is then replaced.

    Raises:
        JasperError: the path holds something else, or an index and ``replace`` is False.
    """
    out = Path(out)
    if not out.exists():
        return
    if not (out / SETTINGS).is_file():
        raise JasperError(f"{out}: exists and is not a text index. Fix: choose another path, or remove it")
    if not replace:
        try:
            settings = read_settings(out / SETTINGS)
            content = f"an index of {settings['texts']:,} documents, built with {settings['model']}"
        except (ValueError, KeyError, OSError):
            content = "a damaged index"
        raise JasperError(f"{out}: exists ({content}). Fix: add --replace, or choose another --out")


def text_table(texts: list[str], ids: Sequence[DocumentId] | None) -> pa.Table:
    """Return a table with the texts, and with their ids if there are some."""
    import pyarrow as pa

    columns = {"text": pa.array(texts, pa.large_string())}
    if ids is not None:
        columns["id"] = pa.array(ids, pa.large_string() if isinstance(ids[0], str) else pa.int64())
    return pa.table(columns)


def write(folder: Path, index: FlatIPIndex, table: pa.Table, settings: dict[str, Any]) -> None:
    """Write the files of an index into a folder."""
    index.save(folder / VECTORS)
    (folder / TEXTS).write_bytes(stream_bytes(table))
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def open_index(path: Path, verify: bool) -> tuple[dict[str, Any], pa.Table, FlatIPIndex]:
    """Return the settings, the texts and the embeddings of an index.

    Raises:
        JasperError: the folder has no index, or a damaged one.
    """
    import pyarrow as pa

    try:
        settings = read_settings(path / SETTINGS)
        table = read_mapped(path / TEXTS)
        table.column("text")
    except FileNotFoundError as error:
        missing = f"no text index here ({Path(error.filename or SETTINGS).name} is missing)"
        raise JasperError(
            f"{path}: {missing if path.exists() else 'there is no such folder'}. Fix: make an index with "
            "`jasper-fast search build MODEL TEXTS --out DIR`"
        ) from None
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        raise JasperError(f"{path}: damaged ({error}). Fix: build the index again") from error
    vectors = FlatIPIndex.load(path / VECTORS, verify=verify)
    if len(vectors) != len(table):
        raise JasperError(
            f"{path}: damaged ({len(table)} texts, {len(vectors)} embeddings). Fix: build the index again"
        )
    return settings, table, vectors


def read_settings(file: Path) -> dict[str, Any]:
    """Read an index's settings.

    Raises:
        OSError: the file cannot be read.
        ValueError: a setting is missing or of another type.
    """
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{file.name} has no settings")
    settings = {"role": "query", "max_length": None, "model_from_index": None, **settings}  # missing in older versions
    for name, kinds in SETTING_TYPES.items():
        if not isinstance(settings.get(name), kinds):
            raise ValueError(f"{file.name}: {name} is {settings.get(name)!r}")
    if settings["role"] not in ("query", "document"):
        raise ValueError(f"{file.name}: role is {settings['role']!r}")
    return settings


def model_location(model: str, out: Path) -> dict[str, str | None]:
    """Return the settings that say where the model is: its path, and for a local one that from the index's folder."""
    if not Path(model).exists():
        return {"model": model, "model_from_index": None}
    there = Path(model)
    if form := adapted_form(there):  # the form, because the folder may gain another one
        there /= form
    there = there.resolve()
    return {"model": str(there), "model_from_index": os.path.relpath(there, out.resolve())}


def find_model(settings: dict[str, Any], path: Path) -> str:
    """Return the model of an index: from the index's folder if it is there, else where it was at the build."""
    near = settings["model_from_index"]
    moved = near is not None and (path.resolve() / near).exists()
    return os.path.normpath(path.resolve() / near) if moved else settings["model"]


def check_model(model: str, path: Path, settings: dict[str, Any], *, migrated: bool = False) -> None:
    """Check that a model built an index.

    Args:
        model: the model.
        path: folder of the index.
        settings: settings of the index.
        migrated: allow a model whose questions were mapped into an index of the same model.

    Raises:
        JasperError: it is another model.
    """
    if migrated and is_migrated(model, settings):
        return
    if model_revision(weights(model)) != settings["revision"]:
        fix = "build the index again, or map the model into it with `jasper-fast adapt --into`"
        raise JasperError(f"{model}: not the model that {path} was built with. Fix: {fix}")


def is_migrated(model: str, settings: dict[str, Any]) -> bool:
    """Return whether a model's questions were mapped into an index of the model that built this one."""
    file = Path(weights(model)) / MIGRATION_FILE
    return file.is_file() and read_json(file)["index_model"] == settings["revision"]


def weights(model: str) -> str:
    """Return a run folder's model, so that checkpoints are not part of its identity."""
    path = Path(resolve_model(model))
    return str(path / "model") if (path / "model" / "modules.json").is_file() else model
