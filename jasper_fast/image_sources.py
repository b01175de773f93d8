"""Read images and their captions: folders, zips, WebDataset tars, parquet, `datasets`, the glyphs.

Each source gives (place, the image's bytes, its captions) one after the other; bytes are not decoded here.
An image that cannot be read, or whose captions cannot, comes with the reason instead of its bytes.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jasper_fast.captions import CAPTION_FILES, Item, caption_file, captions_of
from jasper_fast.config import ImageSourceConfig
from jasper_fast.errors import JasperError
from jasper_fast.glyphs import GLYPHS, draw_glyphs, font_file
from jasper_fast.images import PICTURES, BadImage, check_size
from jasper_fast.listing import all_files, is_hidden, listed_files, user_path
from jasper_fast.models import first_line, looks_like_path
from jasper_fast.row_reader import read_rows
from jasper_fast.sources import numbered
from jasper_fast.webdataset import TARS, read_tar


def read_images(source: ImageSourceConfig) -> Iterator[Item]:
    """Yield every picture of a source with its captions, in the source's order; without captions the list is empty.

    Raises:
        JasperError: nothing there, unreadable, no such column, or a column of something else.
    """
    for where, data, captions in islice(_read(source), source.limit):
        yield shown(where), shown(data) if isinstance(data, str) else data, captions


def source_stamp(source: ImageSourceConfig) -> list[Any]:
    """Return what changes when a source's content does: file sizes and times, or the font and its names."""
    if source.path == GLYPHS:
        font = font_file(source.font).read_bytes()
        return [hashlib.blake2b(font, digest_size=8).hexdigest(), unicodedata.unidata_version]
    path = user_path(source.path)
    files = [path, *([user_path(source.captions)] if source.captions else [])]
    files += all_files(path) if path.is_dir() else []
    stats = [(str(p), p.stat()) for p in files if p.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _read(source: ImageSourceConfig) -> Iterator[Item]:
    path = user_path(source.path)
    name = path.name.lower()
    try:
        if source.path == GLYPHS:
            yield from _glyphs(source.font)
        elif os.path.isdir(path):
            yield from _folder(path, source)
        elif not os.path.exists(path):
            if looks_like_path(source.path) or path.suffix:
                raise JasperError(f"{source.path}: no such file or folder. Fix: correct the path in images.sources")
            yield from _dataset(source)
        elif name.endswith(".zip"):
            yield from _zip(path, source)
        elif name.endswith(TARS):
            yield from read_tar(path, source)
        elif name.endswith(".parquet"):
            yield from _dataset(source)
        else:
            raise JasperError(
                f"{source.path}: not a source of images (expected a folder, .zip, .tar, .parquet, a `datasets` name or "
                f"{GLYPHS!r}). Fix: pack the images as one of these"
            )
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise JasperError(
            f"{source.path}: cannot be read completely ({error}). Fix: copy or download it again"
        ) from error


def _glyphs(font: str) -> Iterator[Item]:
    from PIL import Image

    for number, (pixels, names) in enumerate(draw_glyphs(font=font)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        yield f"glyph {number} of {font}", file.getvalue(), names


def _folder(path: Path, source: ImageSourceConfig) -> Iterator[Item]:
    tars = listed_files(path, TARS, recursive=False)
    captioned = source.captions is not None or bool(listed_files(path, CAPTION_FILES, recursive=False))
    if source.captions is None and tars:
        for tar in tars:
            yield from read_tar(tar, source)
    elif not captioned and (_was_saved(path) or listed_files(path, (".parquet",))):
        _check_links(path)
        yield from _dataset(source)
    else:
        files = {_plain_name(p.relative_to(path).as_posix()): p.read_bytes for p in all_files(path)}
        yield from _captioned(source, files, caption_file(source, path))


def _check_links(folder: Path) -> None:
    """Refuse parquet files that `datasets` would not find.

    Raises:
        JasperError: one is in a linked folder.
    """
    for file in listed_files(folder, (".parquet",)):
        if file.parent.resolve() != folder.resolve() / file.parent.relative_to(folder):
            raise JasperError(f"{file.parent}: `datasets` does not follow this link. Fix: give its target as a source")


def _zip(path: Path, source: ImageSourceConfig) -> Iterator[Item]:
    files: dict[str, Callable[[], bytes]] = {}
    first: dict[str, zipfile.ZipInfo] = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = _plain_name(_member_name(info))
            if info.is_dir() or name.endswith("/") or is_hidden(name):
                continue
            other = first.setdefault(name, info)
            if (other.CRC, other.file_size) != (info.CRC, info.file_size):
                files[name] = partial(_twice, name)
            else:
                files.setdefault(name, partial(_member, archive, info))
        yield from _captioned(source, files, caption_file(source, path.parent))


def _member_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name; macOS and others write UTF-8 without the mark that says so."""
    if info.flag_bits & 0x800:  # marked as UTF-8
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _plain_name(name: str) -> str:
    """Return the one form of a file's name: slashes between folders, composed accents."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/").removeprefix("./"))


def _twice(name: str) -> bytes:
    raise BadImage("is in the archive twice, with different content")


def _was_saved(folder: Path) -> bool:
    """Tell whether `datasets`' ``save_to_disk`` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    check_size(info.file_size)
    return archive.read(info)


def _captioned(source: ImageSourceConfig, files: Mapping[str, Callable[[], bytes]], captions: Path) -> Iterator[Item]:
    """Yield files in the order in which the caption rows first name them, each with the captions of all its rows."""
    of_file: dict[str, list[str]] = {}
    row_of: dict[str, str] = {}  # the first that names it
    for where, row in read_rows(captions):
        if source.image_column not in row:
            raise JasperError(
                f"{where}: no file name in column {source.image_column!r}; there are: {', '.join(row)} (`image_column`)"
            )
        name = row[source.image_column]
        if not isinstance(name, str):
            yield where, f"column {source.image_column!r} names no file ({str(name)[:40]})", []
            continue
        name = _plain_name(name)
        row_of.setdefault(name, where)
        try:
            found = captions_of(row, source, where)
        except BadImage as bad:
            yield where, str(bad), []
        else:
            of_file.setdefault(name, []).extend(found)
    for name, found in of_file.items():
        data = _content(files[name]) if name in files else f"is missing, but {row_of[name]} names it"
        yield f"{source.path}: {name}", data, list(dict.fromkeys(found))
    for name in files:  # an image without a row counts like one with an empty caption
        if name not in row_of and name.lower().endswith(PICTURES):
            yield f"{source.path}: {name}", b"", []


def _content(read: Callable[[], bytes]) -> bytes | str:
    try:
        return read()
    except BadImage as bad:
        return str(bad)
    except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"  # RuntimeError: encrypted, or packed in a way that zipfile does not know


def _dataset(source: ImageSourceConfig) -> Iterator[Item]:
    """A column of pictures: a parquet file, a folder of them or of ``save_to_disk``, or a name on the hub."""
    from datasets import Features, Image

    rows = _load_dataset(source)
    known: Features | None = rows.features
    if known is not None and source.image_column not in known:
        raise JasperError(f"{source.path}: no column {source.image_column!r}; there are: {', '.join(known)}")
    if known is not None and isinstance(known[source.image_column], Image):
        rows = rows.cast_column(source.image_column, Image(decode=False))  # broken ones are to be told, not raised
    for number, row in numbered(source, _with_files(rows, source.image_column)):
        where = f"{source.path}, row {number}"
        item: Item
        try:
            item = where, _bytes(row.get(source.image_column), where), captions_of(row, source, where)
        except BadImage as bad:
            item = where, str(bad), []
        yield item


def _load_dataset(source: ImageSourceConfig) -> Any:
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    path = user_path(source.path)
    options: dict[str, Any] = {"split": source.split, "streaming": True}
    try:
        if path.is_file():
            return load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        if path.is_dir() and _was_saved(path):
            saved = load_from_disk(str(path))
            if isinstance(saved, dict) and source.split not in saved:
                raise JasperError(f"{source.path}: no split {source.split!r}; there are: {', '.join(saved)} (`split`)")
            return saved[source.split] if isinstance(saved, dict) else saved
        if path.is_dir():
            return load_dataset(str(path), source.config, **options)
        return load_dataset(source.path, source.config, **options, revision=source.revision)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise JasperError(
            f"{source.path}: neither a file or folder here nor a dataset that can be loaded by name "
            f"(config {source.config}, split {source.split!r}): {first_line(error)}"
        ) from error


def _with_files(rows: Iterable[dict[str, Any]], column: str) -> Iterator[dict[str, Any]]:
    """Rows with the bytes of pictures that lie in files of their own: on the hub, or in an archive there."""
    from datasets.utils.file_utils import xopen

    for row in rows:
        cell = row.get(column)
        if isinstance(cell, dict) and cell.get("path") and not cell.get("bytes"):
            with suppress(FileNotFoundError), xopen(cell["path"], "rb") as file:
                row = {**row, column: file.read()}
        yield row


def _bytes(cell: Any, where: str) -> bytes:
    """A picture's file.

    Raises:
        BadImage: there is none in this row.
        JasperError: the column holds something else.
    """
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, dict) and ("bytes" in cell or "path" in cell):
        if cell.get("bytes"):
            return cell["bytes"]
        raise BadImage(f"its file {cell['path']} is not there" if cell.get("path") else "there is no picture")
    if cell is None:
        raise BadImage("there is no picture")
    raise JasperError(f"{where}: expected a picture (a `datasets` Image, or bytes), found {type(cell).__name__}")


def shown(text: str) -> str:
    """Replace what cannot be stored or printed by question marks: file names may hold any bytes."""
    return text.encode("utf-8", "replace").decode()
