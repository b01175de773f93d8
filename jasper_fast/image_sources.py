"""Pictures and their captions from where they lie: folders, zips, WebDataset tars, parquet, `datasets`, the glyphs.

Each source gives (where it stands, the picture's bytes, its captions) one after the other; bytes are not decoded here.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jasper_fast.config import ImageSourceConfig, SourceConfig
from jasper_fast.errors import JasperError
from jasper_fast.glyphs import GLYPHS, draw_glyphs, glyph_names
from jasper_fast.models import looks_like_path
from jasper_fast.sources import file_rows, numbered

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
CAPTION_FILES = (".jsonl", ".jsonl.gz")
TEXT_FILES = ("txt", "caption")  # of a WebDataset sample; its .json is asked for the caption columns

Item = tuple[str, bytes, list[str]]  # where it stands, the file's bytes, captions


def read_images(source: ImageSourceConfig) -> Iterator[Item]:
    """Yield every picture of a source with its captions, in the source's order; without captions the list is empty.

    Raises:
        JasperError: nothing there, unreadable, no such column, or captions and pictures that do not fit each other.
    """
    return islice(_read(source), source.limit)


def source_stamp(source: ImageSourceConfig) -> list[Any]:
    """What changes when a source's content does: file sizes and times, or the glyphs' names."""
    if source.path == GLYPHS:
        return [glyph_names()]
    path = Path(source.path).expanduser()
    files = [path, *([Path(source.captions).expanduser()] if source.captions else [])]
    files += sorted(path.rglob("*")) if path.is_dir() else []
    stats = [(str(p), p.stat()) for p in files if p.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _read(source: ImageSourceConfig) -> Iterator[Item]:
    path = Path(source.path).expanduser()
    try:
        if source.path == GLYPHS:
            yield from _glyphs()
        elif path.is_dir():
            tars = sorted(path.glob("*.tar"))
            if tars and source.captions is None:
                for tar in tars:
                    yield from _tar(tar, source)
            else:
                yield from _captioned(source, _folder_files(path), _caption_file(source, path))
        elif not path.exists():
            if looks_like_path(source.path) or path.suffix:
                raise JasperError(f"{source.path}: no such file or folder (images.sources)")
            yield from _dataset(source)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [info.filename for info in archive.infolist() if not info.is_dir()]
                files = {name: (lambda name=name: archive.read(name)) for name in names}
                yield from _captioned(source, files, _caption_file(source, path.parent))
        elif path.name.endswith((".tar", ".tar.gz", ".tgz")):
            yield from _tar(path, source)
        elif path.suffix == ".parquet":
            yield from _dataset(source)
        else:
            raise JasperError(
                f"{source.path}: expected a folder, .zip, .tar, .parquet, a `datasets` name, or the word {GLYPHS!r}"
            )
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise JasperError(f"{source.path}: cannot be read to its end ({error}); is it complete?") from error


def _glyphs() -> Iterator[Item]:
    from PIL import Image

    for number, (pixels, names) in enumerate(draw_glyphs()):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        yield f"glyph {number}", file.getvalue(), names


def _folder_files(folder: Path) -> dict[str, Any]:
    return {p.relative_to(folder).as_posix(): p.read_bytes for p in sorted(folder.rglob("*")) if p.is_file()}


def _caption_file(source: ImageSourceConfig, near: Path) -> Path:
    if source.captions is not None:
        file = Path(source.captions).expanduser()
        if not file.is_file():
            raise JasperError(f"{source.path}: its captions {source.captions} are not there (images.sources.captions)")
        return file
    found = sorted(p for p in near.iterdir() if p.name.endswith(CAPTION_FILES))
    if len(found) != 1:
        raise JasperError(
            f"{source.path}: expected one JSONL file of captions in {near}, found {len(found)}; name it with `captions`"
        )
    return found[0]


def _captioned(source: ImageSourceConfig, files: dict[str, Any], captions: Path) -> Iterator[Item]:
    """Files in the order in which the caption rows first name them; every row's captions together."""
    of_file: dict[str, list[str]] = {}
    for where, row in file_rows(captions, SourceConfig(path=str(captions))):
        name = row.get(source.image_column)
        if not isinstance(name, str):
            raise JasperError(
                f"{where}: no file name in column {source.image_column!r}; there are: {', '.join(row)} (`image_column`)"
            )
        if name not in files:
            raise JasperError(f"{where}: the picture {name!r} is not in {source.path}; mend the row or add the picture")
        of_file.setdefault(name, []).extend(_captions(row, source, where))
    for name, found in of_file.items():
        yield f"{source.path}: {name}", files[name](), list(dict.fromkeys(found))
    for name in files:  # a picture without a row: told like one with an empty caption
        if name not in of_file and name.lower().endswith(PICTURES):
            yield f"{source.path}: {name}", b"", []


def _tar(path: Path, source: ImageSourceConfig) -> Iterator[Item]:
    """A WebDataset tar read once from front to back: files that share a name up to the first dot are one sample."""
    if path.suffix == ".tar" and path.stat().st_size % tarfile.BLOCKSIZE:  # tarfile passes over a cut header in silence
        raise JasperError(f"{path}: cut short; a tar is a whole number of blocks of {tarfile.BLOCKSIZE} bytes")
    key, picture, captions, where = None, None, list[str](), ""
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            if (folder, stem) != key:
                if picture is not None:
                    yield where, picture, list(dict.fromkeys(captions))
                key, picture, captions, where = (folder, stem), None, [], f"{path}: {member.name}"
            reader = tar.extractfile(member)
            content = reader.read() if reader is not None else b""
            if f".{kind.lower()}".endswith(PICTURES):
                picture, where = content, f"{path}: {member.name}"
            elif kind in TEXT_FILES:
                captions.append(content.decode("utf-8", "replace").strip())
            elif kind == "json":
                try:
                    row = json.loads(content)
                except ValueError as error:
                    raise JasperError(f"{path}: {member.name} is not JSON ({error})") from None
                if isinstance(row, dict) and any(column in row for column in source.caption_columns):
                    captions += _captions(row, source, f"{path}: {member.name}")
        if picture is not None:
            yield where, picture, list(dict.fromkeys(captions))


def _dataset(source: ImageSourceConfig) -> Iterator[Item]:
    from datasets import Features, Image, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    path = Path(source.path).expanduser()
    try:
        if path.exists():
            rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            rows = load_dataset(
                source.path, source.config, split=source.split, streaming=True, revision=source.revision
            )
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise JasperError(
            f"{source.path}: neither a file or folder here nor a dataset that can be loaded by name "
            f"(config {source.config}, split {source.split!r}): {str(error).splitlines()[0]}"
        ) from error
    known: Features | None = rows.features
    if known is not None and source.image_column not in known:
        raise JasperError(f"{source.path}: no column {source.image_column!r}; there are: {', '.join(known)}")
    if known is not None and isinstance(known[source.image_column], Image):
        rows = rows.cast_column(source.image_column, Image(decode=False))  # broken ones are to be told, not raised
    for number, row in numbered(source, rows):
        where = f"{source.path}, row {number}"
        yield where, _bytes(row.get(source.image_column), where), _captions(row, source, where)


def _bytes(cell: Any, where: str) -> bytes:
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, dict) and (cell.get("bytes") or cell.get("path")):
        return cell["bytes"] or Path(cell["path"]).read_bytes()
    raise JasperError(f"{where}: expected a picture (a `datasets` Image, or bytes), found {type(cell).__name__}")


def _captions(row: dict[str, Any], source: ImageSourceConfig, where: str) -> list[str]:
    found = []
    for column in source.caption_columns:
        if column not in row:
            raise JasperError(
                f"{where}: no column {column!r}; there are: {', '.join(map(str, row))} (set `caption_columns`)"
            )
        for value in row[column] if isinstance(row[column], list) else [row[column]]:
            if value is not None and not isinstance(value, str):
                raise JasperError(f"{where}: column {column!r} is not text but {type(value).__name__}")
            found.append(" ".join((value or "").split()))
    return [caption for caption in found if caption]
