"""List the files of a folder in natural order, with linked folders and without hidden and system files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from jasper_fast.utils.errors import JasperError

# Names that operating systems write next to data. Names with a leading dot are hidden too.
SYSTEM_NAMES = {
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "@eadir",
    "lost+found",
}
BACKUPS = re.compile(r"~\$.*|#.*#|.*~", re.DOTALL)


def user_path(name: str) -> Path:
    """Convert a path from the user, in which "~" means the home folder.

    Raises:
        JasperError: the name contains a NUL character, or is empty.
    """
    if "\0" in name:
        raise JasperError(f"{name!r}: the path contains a NUL character. Fix: correct the path")
    if not name.strip():  # Path("") would be the current folder
        raise JasperError('the path of a file or folder is empty. Fix: give a path; "." is the current folder')
    return Path(os.path.expanduser(name))


def natural_key(name: str | os.PathLike[str]) -> tuple[Any, ...]:
    """Return a sort key that compares numbers in a name or path by value: part-2 comes before part-10.

    Paths are compared folder by folder. Case matters only between names that are otherwise equal.
    """
    parts = PurePath(name).parts
    return tuple(_part_key(part) for part in parts), parts


def _part_key(part: str) -> tuple[Any, ...]:
    pieces = re.split(r"([0-9]+)", part.casefold())
    return tuple(_number_key(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def _number_key(digits: str) -> tuple[int, str]:
    significant = digits.lstrip("0")
    return len(significant), significant  # orders like int(digits), without its limit of 4300 digits


def is_hidden(name: str | os.PathLike[str]) -> bool:
    """Return whether any part of a relative path is hidden, or a file of the operating system or an editor."""
    return any(
        part.startswith(".") or part.casefold() in SYSTEM_NAMES or BACKUPS.fullmatch(part) is not None
        for part in PurePath(name).parts
        if part not in (".", "..")
    )


def all_files(folder: Path, *, recursive: bool = True) -> Iterator[Path]:
    """Yield the files of a folder in natural order, with broken links and without hidden and system files.

    Linked folders are followed, except links to a parent folder.

    Args:
        folder: the folder.
        recursive: whether to list subfolders too.

    Raises:
        JasperError: a folder cannot be listed.
    """
    yield from _walk(folder, recursive, frozenset())


def listed_files(folder: Path, suffixes: tuple[str, ...], *, recursive: bool = True) -> list[Path]:
    """List the files of a folder with one of the suffixes, in natural order.

    Args:
        folder: the folder. Links to folders in it are followed.
        suffixes: the lower-case endings, such as ".txt". The case of a file's name does not matter. ("",) lists all
            files.
        recursive: whether to list subfolders too.

    Raises:
        JasperError: a folder cannot be listed, or a link in it is broken. With a broken link, data may be missing.
    """
    files = list(all_files(folder, recursive=recursive))
    for file in files:
        if not file.exists():
            target = os.readlink(file)
            raise JasperError(f"{file}: broken link ({target} is missing). Fix: restore its target or delete the link")
    return [file for file in files if file.name.lower().endswith(suffixes)]


def _walk(folder: Path, recursive: bool, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        entries = [] if here in above else sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
        kinds = [(path, path.is_dir(), path.is_file() or path.is_symlink()) for path in entries]
    except OSError as error:
        raise JasperError(f"{folder}: cannot be listed ({error.strerror}). Fix: check its permissions") from error
    for path, is_folder, is_file in kinds:
        if is_hidden(path.name):
            continue
        if is_folder and recursive:
            yield from _walk(path, recursive, above | {here})
        elif is_file and not is_folder:
            yield path
