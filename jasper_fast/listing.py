"""List the files of a folder: links followed, hidden and system files left out, numbered files in natural order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from jasper_fast.errors import JasperError

# Names that systems and editors write next to data; a name with a leading dot is hidden as well.
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
    """Return the path that a user means by a name; "~" is the home folder.

    Raises:
        JasperError: the name has a NUL, or is empty, which would be the current folder.
    """
    if "\0" in name:
        raise JasperError(f"{name!r}: no path has a NUL in it. Fix: correct the path")
    if not name.strip():
        raise JasperError('the path of a file or folder is empty. Fix: give one; "." is the current folder')
    return Path(os.path.expanduser(name))


def natural_key(name: str | os.PathLike[str]) -> tuple[Any, ...]:
    """Sort key of a name or path that compares numbers by value: part-2 comes before part-10.

    Folders compare one by one, as paths do. Case decides only between names that are otherwise equal.
    """
    parts = PurePath(name).parts
    return tuple(_part_key(part) for part in parts), parts


def _part_key(part: str) -> tuple[Any, ...]:
    pieces = re.split(r"([0-9]+)", part.casefold())
    return tuple(_number_key(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def _number_key(digits: str) -> tuple[int, str]:
    significant = digits.lstrip("0")
    return len(significant), significant  # as int(digits) compares, without its limit of 4300 digits


def is_hidden(name: str | os.PathLike[str]) -> bool:
    """Tell whether any part of a relative path is hidden, or is a system's or an editor's own file."""
    return any(
        part.startswith(".") or part.casefold() in SYSTEM_NAMES or BACKUPS.fullmatch(part) is not None
        for part in PurePath(name).parts
        if part not in (".", "..")
    )


def all_files(folder: Path, *, recursive: bool = True) -> Iterator[Path]:
    """Yield the files of a folder in natural order, broken links included, hidden and system files not.

    Linked folders are followed unless they lead back to a folder above them.

    Raises:
        JasperError: a folder cannot be listed.
    """
    yield from _walk(folder, recursive, frozenset())


def listed_files(folder: Path, suffixes: tuple[str, ...], *, recursive: bool = True) -> list[Path]:
    """List the files of a folder whose names end with one of the suffixes, in natural order.

    Args:
        folder: the folder; links to folders in it are followed.
        suffixes: lower-case endings such as ".txt"; the case of a file's name does not matter. ("",) lists all files.
        recursive: whether folders in the folder are listed too.

    Raises:
        JasperError: a folder cannot be listed, or a link in it is broken: data may be missing.
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
