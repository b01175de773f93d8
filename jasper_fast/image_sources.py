"""Pictures and their captions from where they lie: folders, zips, WebDataset tars, parquet, `datasets`, the glyphs.

Each source gives (where it stands, the picture's bytes, its captions) one after the other; bytes are not decoded here.
A picture that cannot be read, or whose captions cannot, comes with what is wrong in the place of its bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jasper_fast.config import ImageSourceConfig, SourceConfig
from jasper_fast.errors import JasperError
from jasper_fast.glyphs import GLYPHS, draw_glyphs, font_file
from jasper_fast.images import BadImage
from jasper_fast.models import first_line, looks_like_path
from jasper_fast.sources import file_rows, half_character, numbered

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
CAPTION_FILES = (".jsonl", ".jsonl.gz")
TEXT_FILES = ("txt", "caption")  # of a WebDataset sample; its .json is asked for the caption columns
MAX_FILE = 1 << 30  # bytes of one picture's file: 100 million pixels of four times 16 bits fit

Item = tuple[str, bytes | str, list[str]]  # where it stands, the file's bytes or what is wrong with it, captions


def read_images(source: ImageSourceConfig) -> Iterator[Item]:
    """Yield every picture of a source with its captions, in the source's order; without captions the list is empty.

    Raises:
        JasperError: nothing there, unreadable, no such column, or a column of something else.
    """
    for where, data, captions in islice(_read(source), source.limit):
        yield _shown(where), _shown(data) if isinstance(data, str) else data, captions


def source_stamp(source: ImageSourceConfig) -> list[Any]:
    """What changes when a source's content does: file sizes and times, or the font's bytes and who names them."""
    if source.path == GLYPHS:
        font = font_file(source.font).read_bytes()
        return [hashlib.blake2b(font, digest_size=8).hexdigest(), unicodedata.unidata_version]
    path = Path(source.path).expanduser()
    files = [path, *([Path(source.captions).expanduser()] if source.captions else [])]
    files += sorted(path.rglob("*")) if path.is_dir() else []
    stats = [(str(p), p.stat()) for p in files if p.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _read(source: ImageSourceConfig) -> Iterator[Item]:
    path = Path(source.path).expanduser()
    try:
        if source.path == GLYPHS:
            yield from _glyphs(source.font)
        elif path.is_dir():
            yield from _folder(path, source)
        elif not path.exists():
            if looks_like_path(source.path) or path.suffix:
                raise JasperError(f"{source.path}: no such file or folder (images.sources)")
            yield from _dataset(source)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
                files = {info.filename: partial(_member, archive, info) for info in members}
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


def _glyphs(font: str) -> Iterator[Item]:
    from PIL import Image

    for number, (pixels, names) in enumerate(draw_glyphs(font=font)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        yield f"glyph {number} of {font}", file.getvalue(), names


def _folder(path: Path, source: ImageSourceConfig) -> Iterator[Item]:
    tars = sorted(path.glob("*.tar"))
    captioned = source.captions is not None or any(p.name.endswith(CAPTION_FILES) for p in path.iterdir())
    if source.captions is None and tars:
        for tar in tars:
            yield from _tar(tar, source)
    elif not captioned and (_was_saved(path) or any(path.rglob("*.parquet"))):
        yield from _dataset(source)
    else:
        files = {p.relative_to(path).as_posix(): p.read_bytes for p in sorted(path.rglob("*")) if p.is_file()}
        yield from _captioned(source, files, _caption_file(source, path))


def _was_saved(folder: Path) -> bool:
    """Whether `datasets`' ``save_to_disk`` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_FILE:
        raise BadImage(_too_large(info.file_size))
    return archive.read(info)


def _too_large(size: int) -> str:
    return f"unpacks to {size:,} bytes; at most {MAX_FILE:,} are read"


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


def _captioned(source: ImageSourceConfig, files: Mapping[str, Callable[[], bytes]], captions: Path) -> Iterator[Item]:
    """Files in the order in which the caption rows first name them; every row's captions together."""
    of_file: dict[str, list[str]] = {}
    row_of: dict[str, str] = {}  # the first that names it
    for where, row in file_rows(captions, SourceConfig(path=str(captions))):
        if source.image_column not in row:
            raise JasperError(
                f"{where}: no file name in column {source.image_column!r}; there are: {', '.join(row)} (`image_column`)"
            )
        name = row[source.image_column]
        if not isinstance(name, str):
            yield where, f"column {source.image_column!r} names no file ({str(name)[:40]})", []
            continue
        row_of.setdefault(name, where)
        try:
            found = _captions(row, source, where)
        except BadImage as bad:
            yield where, str(bad), []
        else:
            of_file.setdefault(name, []).extend(found)
    for name, found in of_file.items():
        data = _content(files[name]) if name in files else f"is not there, but {row_of[name]} names it"
        yield f"{source.path}: {name}", data, list(dict.fromkeys(found))
    for name in files:  # a picture without a row: told like one with an empty caption
        if name not in row_of and name.lower().endswith(PICTURES):
            yield f"{source.path}: {name}", b"", []


def _content(read: Callable[[], bytes]) -> bytes | str:
    try:
        return read()
    except BadImage as bad:
        return str(bad)
    except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"  # RuntimeError: encrypted, or packed in a way that zipfile does not know


@dataclass
class _Sample:
    """Files of a WebDataset tar that share a name up to its first dot."""

    key: tuple[str, str]  # folder, name
    where: str
    picture: bytes | None = None
    plain: bool = False  # whether it is called x.png, not x.mask.png
    captions: list[str] = field(default_factory=list)
    problem: str = ""

    def wants(self, kind: str) -> bool:
        """Whether a file of the sample is read, by what follows the first dot of its name.

        A picture called x.png goes before x.mask.png, and else the first one counts.
        """
        if f".{kind}".endswith(PICTURES):
            return self.picture is None or (not self.plain and f".{kind}" in PICTURES)
        return kind in (*TEXT_FILES, "json")

    def add(self, kind: str, content: bytes, where: str, source: ImageSourceConfig) -> None:
        """Take a file that is wanted."""
        if f".{kind}".endswith(PICTURES):
            self.picture, self.plain, self.where = content, f".{kind}" in PICTURES, where
        elif kind in TEXT_FILES:
            caption = content.decode("utf-8", "replace").strip()
            self.captions += [caption] if caption else []
        else:
            try:
                row = json.loads(content)
            except ValueError as error:
                raise BadImage(f"its .json is not JSON ({error})") from None
            if isinstance(row, dict) and any(column in row for column in source.caption_columns):
                self.captions += _captions(row, source, where)

    def item(self) -> Iterator[Item]:
        """The picture with its captions, or what is wrong; nothing where there is neither picture nor caption."""
        if self.problem or (self.picture is None and self.captions):
            yield self.where, self.problem or "has a caption and no picture", []
        elif self.picture is not None:
            yield self.where, self.picture, list(dict.fromkeys(self.captions))


def _tar(path: Path, source: ImageSourceConfig) -> Iterator[Item]:
    """A WebDataset tar read once from front to back: files that share a name up to the first dot are one sample."""
    if path.suffix == ".tar" and path.stat().st_size % tarfile.BLOCKSIZE:  # tarfile passes over a cut header in silence
        raise JasperError(f"{path}: cut short; a tar is a whole number of blocks of {tarfile.BLOCKSIZE} bytes")
    sample = _Sample(("", ""), "")
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            where = f"{path}: {member.name}"
            folder, _, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            if (folder, stem) != sample.key:
                yield from sample.item()
                sample = _Sample((folder, stem), where)
            kind = kind.lower()
            if not sample.wants(kind):
                continue
            reader = tar.extractfile(member)
            try:
                if member.size > MAX_FILE:
                    raise BadImage(_too_large(member.size))
                sample.add(kind, reader.read() if reader is not None else b"", where, source)
            except BadImage as bad:
                sample.problem = sample.problem or str(bad)
        yield from sample.item()


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
            item = where, _bytes(row.get(source.image_column), where), _captions(row, source, where)
        except BadImage as bad:
            item = where, str(bad), []
        yield item


def _load_dataset(source: ImageSourceConfig) -> Any:
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    path = Path(source.path).expanduser()
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


def _captions(row: dict[str, Any], source: ImageSourceConfig, where: str) -> list[str]:
    """The captions of a row; it may lack some of the columns.

    Raises:
        BadImage: one is no text.
        JasperError: the row has none of the columns.
    """
    columns = [column for column in source.caption_columns if column in row]
    if not columns:
        wanted = " or ".join(map(repr, source.caption_columns))
        raise JasperError(f"{where}: no column {wanted}; there are: {', '.join(map(str, row))} (set `caption_columns`)")
    found = []
    for column in columns:
        for value in row[column] if isinstance(row[column], list) else [row[column]]:
            if value is not None and not isinstance(value, str):
                raise BadImage(f"column {column!r} is not text but {type(value).__name__}")
            if half := half_character(value or ""):
                raise BadImage(f"column {column!r} {half}")
            found.append(" ".join((value or "").split()))
    return [caption for caption in found if caption]


def _shown(text: str) -> str:
    """The text with a question mark for what cannot be stored or printed: file names may hold any bytes."""
    return text.encode("utf-8", "replace").decode()
