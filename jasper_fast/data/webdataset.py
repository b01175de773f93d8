"""Read WebDataset tars, in which the files of a sample have the same name up to the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jasper_fast.config.data import ImageSourceConfig
from jasper_fast.data.captions import Item, captions_of
from jasper_fast.data.image_files import IMAGE_SUFFIXES, BadImage, check_size
from jasper_fast.data.listing import is_hidden
from jasper_fast.data.rows import decode
from jasper_fast.utils.errors import JasperError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TEXT_FILES = ("txt", "caption")  # suffixes of caption files; a .json file can contain caption columns too


@dataclass
class _Sample:
    """Files of a WebDataset tar with the same name up to the first dot."""

    key: tuple[str, str]  # folder and name
    where: str  # position, for messages
    image: bytes | None = None  # content of the image file
    plain: bool = False  # whether the image is called x.png, not x.mask.png
    captions: list[str] = field(default_factory=list)
    problem: str = ""  # why the sample cannot be used
    kinds: set[str] = field(default_factory=set)  # the suffixes seen so far

    def wants(self, kind: str) -> bool:
        """Return whether to read a file, given the part of its name after the first dot.

        An image called x.png takes precedence over x.mask.png. Otherwise the first image counts.
        """
        if f".{kind}".endswith(IMAGE_SUFFIXES):
            return self.image is None or (not self.plain and f".{kind}" in IMAGE_SUFFIXES)
        return kind in (*TEXT_FILES, "json")

    def add(self, kind: str, content: bytes, where: str, source: ImageSourceConfig) -> None:
        """Add a file to the sample.

        Raises:
            BadImage: the captions in the file cannot be read.
        """
        if f".{kind}".endswith(IMAGE_SUFFIXES):
            self.image, self.plain, self.where = content, f".{kind}" in IMAGE_SUFFIXES, where
        elif kind in TEXT_FILES:
            caption = " ".join(_decoded(kind, content).split())
            self.captions += [caption] if caption else []
        else:
            try:
                row = json.loads(_decoded(kind, content))
            except (ValueError, RecursionError) as error:
                raise BadImage(f"its .json is not JSON ({error})") from None
            if isinstance(row, dict) and any(column in row for column in source.caption_columns):
                self.captions += captions_of(row, source, where)

    def take(self, kind: str, read: Callable[[], bytes], where: str, source: ImageSourceConfig) -> None:
        """Add a file if it is needed. Record the problem if it makes the sample unusable."""
        try:
            if kind in self.kinds:
                raise BadImage(f"its .{kind} file appears twice in the archive")
            self.kinds.add(kind)
            if self.wants(kind):
                self.add(kind, read(), where, source)
        except BadImage as bad:
            self.problem = self.problem or str(bad)

    def item(self) -> Iterator[Item]:
        """Yield the image with its captions, or the problem. Yield nothing without an image and captions."""
        if self.problem or (self.image is None and self.captions):
            yield self.where, self.problem or "has a caption but no image", []
        elif self.image is not None:
            yield self.where, self.image, list(dict.fromkeys(self.captions))


def _decoded(kind: str, content: bytes) -> str:
    try:
        return decode(content)
    except UnicodeError as error:
        raise BadImage(f"its .{kind} is not UTF-8 ({error})") from None


def read_tar(path: Path, source: ImageSourceConfig) -> Iterator[Item]:
    """Yield the images of a tar with their captions, in one sequential pass.

    Args:
        path: the tar, with one of the suffixes ``TAR_SUFFIXES``.
        source: the source, with the names of the caption columns in .json files.

    Raises:
        JasperError: the tar is truncated.
        OSError: the tar cannot be read. `tarfile.TarError`, `EOFError`, `zlib.error` and `lzma.LZMAError` are raised
            for damaged content.
    """
    if path.suffix.lower() == ".tar" and path.stat().st_size % tarfile.BLOCKSIZE:  # tarfile ignores a cut header
        raise JasperError(
            f"{path}: truncated (got {path.stat().st_size} bytes, expected a multiple of {tarfile.BLOCKSIZE}). Fix: "
            "copy or download it again"
        )
    sample = _Sample(("", ""), "")
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            if not member.isfile() or is_hidden(member.name):
                continue
            where = f"{path}: {member.name}"
            folder, _, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            if (folder, stem) != sample.key:
                yield from sample.item()
                sample = _Sample((folder, stem), where)
            sample.take(kind.lower(), partial(_tar_member, tar, member), where, source)
        yield from sample.item()


def _tar_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    check_size(member.size)
    reader = tar.extractfile(member)
    return reader.read() if reader is not None else b""
