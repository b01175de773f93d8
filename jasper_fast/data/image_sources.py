"""Read images and their captions from folders, zips, WebDataset tars, parquet, hub datasets, and the glyphs.

A source yields (position, content of the image file, captions) for each image, without decoding it. For an unreadable
image or caption, the reason replaces the content.
"""

from __future__ import annotations

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

from jasper_fast.config.data import ImageSourceConfig
from jasper_fast.data.captions import CAPTION_FILES, Item, caption_file, captions_of
from jasper_fast.data.glyphs import GLYPHS, draw_glyphs, font_file
from jasper_fast.data.image_files import IMAGE_SUFFIXES, BadImage, check_size
from jasper_fast.data.listing import all_files, is_hidden, listed_files, user_path
from jasper_fast.data.rows import read_rows
from jasper_fast.data.text_sources import enumerate_rows
from jasper_fast.data.webdataset import TAR_SUFFIXES, read_tar
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest
from jasper_fast.utils.names import first_line, looks_like_path


def read_images(source: ImageSourceConfig) -> Iterator[Item]:
    """Yield at most ``limit`` images of a source with their captions, in the order of the source.

    Yields:
        The position of the image, the content of its file (or, as a string, why it cannot be read), and its captions.
        The list of captions may be empty.

    Raises:
        JasperError: the source is missing or unreadable, or a column is missing or has another type.
    """
    for where, data, captions in islice(_read(source), source.limit):
        yield printable(where), printable(data) if isinstance(data, str) else data, captions


def source_stamp(source: ImageSourceConfig) -> list[Any]:
    """Return a JSON-serializable value that changes with the content of a source.

    For files it holds their names, sizes in bytes and modification times in nanoseconds. For the glyphs it holds a
    digest of the font and the version of the Unicode names.
    """
    if source.path == GLYPHS:
        font = font_file(source.font).read_bytes()
        return [content_digest(font, size=8), unicodedata.unidata_version]
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
        elif name.endswith(TAR_SUFFIXES):
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
            f"{source.path}: cannot be read completely ({error}). Fix: copy or download the source again"
        ) from error


def _glyphs(font: str) -> Iterator[Item]:
    from PIL import Image

    for number, (pixels, names) in enumerate(draw_glyphs(font=font)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        yield f"glyph {number} of {font}", file.getvalue(), names


def _folder(path: Path, source: ImageSourceConfig) -> Iterator[Item]:
    tars = listed_files(path, TAR_SUFFIXES, recursive=False)
    captioned = source.captions is not None or bool(listed_files(path, CAPTION_FILES, recursive=False))
    if source.captions is None and tars:
        for tar in tars:
            yield from read_tar(tar, source)
    elif not captioned and (_is_saved_dataset(path) or listed_files(path, (".parquet",))):
        _check_links(path)
        yield from _dataset(source)
    else:
        files = {_plain_name(p.relative_to(path).as_posix()): p.read_bytes for p in all_files(path)}
        yield from _captioned(source, files, caption_file(source, path))


def _check_links(folder: Path) -> None:
    """Check that no parquet file is in a linked folder, which `datasets` would ignore.

    Raises:
        JasperError: a parquet file is in a linked folder.
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
            earlier = first.setdefault(name, info)
            if (earlier.CRC, earlier.file_size) != (info.CRC, info.file_size):
                files[name] = partial(_reject_duplicate, name)
            else:
                files.setdefault(name, partial(_member, archive, info))
        yield from _captioned(source, files, caption_file(source, path.parent))


def _member_name(info: zipfile.ZipInfo) -> str:
    """Return the name of a member. macOS and other systems write UTF-8 names without setting the UTF-8 flag."""
    if info.flag_bits & 0x800:  # the UTF-8 flag
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _plain_name(name: str) -> str:
    """Normalize a file name: forward slashes, composed accents, no leading "./"."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/").removeprefix("./"))


def _reject_duplicate(name: str) -> bytes:
    raise BadImage("appears twice in the archive, with different content")


def _is_saved_dataset(folder: Path) -> bool:
    """Return whether ``save_to_disk`` of `datasets` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    check_size(info.file_size)
    return archive.read(info)


def _captioned(source: ImageSourceConfig, files: Mapping[str, Callable[[], bytes]], captions: Path) -> Iterator[Item]:
    """Yield the files in the order of their first caption row, each with the captions of all its rows."""
    captions_by_name: dict[str, list[str]] = {}
    row_of: dict[str, str] = {}  # the position of the first row of a file
    for where, row in read_rows(captions):
        if source.image_column not in row:
            raise JasperError(
                f"{where}: no column {source.image_column!r} with the file name (got columns: {', '.join(row)}). Fix: "
                "set `image_column`"
            )
        name = row[source.image_column]
        if not isinstance(name, str):
            yield where, f"column {source.image_column!r} is not a file name ({str(name)[:40]})", []
            continue
        name = _plain_name(name)
        row_of.setdefault(name, where)
        try:
            row_captions = captions_of(row, source, where)
        except BadImage as bad:
            yield where, str(bad), []
        else:
            captions_by_name.setdefault(name, []).extend(row_captions)
    for name, all_captions in captions_by_name.items():
        data = _content(files[name]) if name in files else f"the file is missing (it is listed in {row_of[name]})"
        yield f"{source.path}: {name}", data, list(dict.fromkeys(all_captions))
    for name in files:  # an image without a row is treated like one with an empty caption
        if name not in row_of and name.lower().endswith(IMAGE_SUFFIXES):
            yield f"{source.path}: {name}", b"", []


def _content(read: Callable[[], bytes]) -> bytes | str:
    try:
        return read()
    except BadImage as bad:
        return str(bad)
    except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"  # RuntimeError: encrypted, or a compression that zipfile does not support


def _dataset(source: ImageSourceConfig) -> Iterator[Item]:
    """Yield the images of a `datasets` column: a parquet file, a folder of them, a saved dataset, or a hub dataset."""
    from datasets import Features, Image

    rows = _load_dataset(source)
    features: Features | None = rows.features
    if features is not None and source.image_column not in features:
        raise JasperError(
            f"{source.path}: no column {source.image_column!r} (got columns: {', '.join(features)}). Fix: set "
            "`image_column`"
        )
    if features is not None and isinstance(features[source.image_column], Image):
        # `datasets` must not decode: it would raise at the first damaged image.
        rows = rows.cast_column(source.image_column, Image(decode=False))
    for number, row in enumerate_rows(source, _with_files(rows, source.image_column)):
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
        if path.is_dir() and _is_saved_dataset(path):
            saved = load_from_disk(str(path))
            if isinstance(saved, dict) and source.split not in saved:
                raise JasperError(
                    f"{source.path}: no split {source.split!r} (got splits: {', '.join(saved)}). Fix: set `split`"
                )
            return saved[source.split] if isinstance(saved, dict) else saved
        if path.is_dir():
            return load_dataset(str(path), source.config, **options)
        return load_dataset(source.path, source.config, **options, revision=source.revision)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise JasperError(
            f"{source.path}: not a local file or folder, and loading it as a hub dataset failed (config "
            f"{source.config}, split {source.split!r}: {first_line(error)}). Fix: correct the path in images.sources"
        ) from error


def _with_files(rows: Iterable[dict[str, Any]], column: str) -> Iterator[dict[str, Any]]:
    """Yield rows in which the path of an image file, local or on the hub, is replaced by the content of the file."""
    from datasets.utils.file_utils import xopen

    for row in rows:
        cell = row.get(column)
        if isinstance(cell, dict) and cell.get("path") and not cell.get("bytes"):
            with suppress(FileNotFoundError), xopen(cell["path"], "rb") as file:
                row = {**row, column: file.read()}
        yield row


def _bytes(cell: Any, where: str) -> bytes:
    """Return the content of the image file in a cell.

    Raises:
        BadImage: the cell has no image.
        JasperError: the column has another type.
    """
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, dict) and ("bytes" in cell or "path" in cell):
        if cell.get("bytes"):
            return cell["bytes"]
        raise BadImage(f"its file {cell['path']} is missing" if cell.get("path") else "the row has no image")
    if cell is None:
        raise BadImage("the row has no image")
    raise JasperError(
        f"{where}: not an image (got {type(cell).__name__}, expected a `datasets` Image or bytes). Fix: set "
        "`image_column`"
    )


def printable(text: str) -> str:
    """Replace characters that cannot be stored as UTF-8 by question marks. File names may contain any bytes."""
    return text.encode("utf-8", "replace").decode()
