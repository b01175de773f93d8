"""Read WebDataset tars: the files of a sample share a name up to the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jasper_fast.captions import Item, captions_of
from jasper_fast.config import ImageSourceConfig
from jasper_fast.errors import JasperError
from jasper_fast.images import PICTURES, BadImage, check_size
from jasper_fast.listing import is_hidden
from jasper_fast.row_reader import decode

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TEXT_FILES = ("txt", "caption")  # of a sample; its .json is asked for the caption columns


@dataclass
class _Sample:
    """Files of a WebDataset tar that share a name up to its first dot."""

    key: tuple[str, str]  # folder, name
    where: str
    picture: bytes | None = None
    plain: bool = False  # whether it is called x.png, not x.mask.png
    captions: list[str] = field(default_factory=list)
    problem: str = ""
    kinds: set[str] = field(default_factory=set)

    def wants(self, kind: str) -> bool:
        """Tell whether a file of the sample is read, by what follows the first dot of its name.

        A picture called x.png goes before x.mask.png, and else the first one counts.
        """
        if f".{kind}".endswith(PICTURES):
            return self.picture is None or (not self.plain and f".{kind}" in PICTURES)
        return kind in (*TEXT_FILES, "json")

    def add(self, kind: str, content: bytes, where: str, source: ImageSourceConfig) -> None:
        """Take a file that is wanted.

        Raises:
            BadImage: its captions cannot be read.
        """
        if f".{kind}".endswith(PICTURES):
            self.picture, self.plain, self.where = content, f".{kind}" in PICTURES, where
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
        """Take a file, or note why the sample cannot be used."""
        try:
            if kind in self.kinds:
                raise BadImage(f"its .{kind} is in the archive twice")
            self.kinds.add(kind)
            if self.wants(kind):
                self.add(kind, read(), where, source)
        except BadImage as bad:
            self.problem = self.problem or str(bad)

    def item(self) -> Iterator[Item]:
        """Yield the image with its captions, or the problem; nothing where there is neither image nor caption."""
        if self.problem or (self.picture is None and self.captions):
            yield self.where, self.problem or "has a caption and no picture", []
        elif self.picture is not None:
            yield self.where, self.picture, list(dict.fromkeys(self.captions))


def _decoded(kind: str, content: bytes) -> str:
    try:
        return decode(content)
    except UnicodeError as error:
        raise BadImage(f"its .{kind} is not UTF-8 ({error})") from None


def read_tar(path: Path, source: ImageSourceConfig) -> Iterator[Item]:
    """Yield the images of a tar with their captions, reading it once from front to back.

    Raises:
        JasperError: the tar is cut short, or a sample's .json has none of the caption columns.
    """
    if path.suffix.lower() == ".tar" and path.stat().st_size % tarfile.BLOCKSIZE:  # tarfile ignores a cut header
        raise JasperError(f"{path}: cut short; a tar is a whole number of blocks of {tarfile.BLOCKSIZE} bytes")
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
