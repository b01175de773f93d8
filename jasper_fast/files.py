"""Writing that is whole or absent: everything is made under a temporary name next to its place, synced, then renamed.

Published files and folders have the permissions that the user's umask gives to new ones. Without this, files of
safetensors and ``tempfile`` would be private.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from jasper_fast.errors import JasperError

TEMPORARY = ".unfinished-"  # what starts with this was never published and may be deleted
ASIDE = ".replaced-"  # .replaced-NAME-xxxxxxxx holds what was published as NAME while something else takes its place
FILE_IN_THE_WAY = "a file is where a folder should be: move it or choose another place"
CLOSED = "the folder cannot be written: choose another place or change its permissions"
MENDS = {
    errno.ENOSPC: "the disk is full: free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another place",
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.EFBIG: "the file is larger than this account may write (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOTDIR: FILE_IN_THE_WAY,
    errno.EEXIST: FILE_IN_THE_WAY,
    errno.EISDIR: "a folder is where a file should be: move it or choose another place",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EIO: "the disk failed: look after it, or choose another place",
}


@contextmanager
def publish_dir(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` if the block ends well and vanishes otherwise.

    Args:
        path: where the folder is to appear.
        replace: whether a folder that is already there gives way; otherwise it is an error.

    Raises:
        JasperError: the disk is full or the place cannot be written, or ``path`` exists and ``replace`` is False.
    """
    path = Path(path)
    with disk_errors(path):
        _bring_back(path.parent, path.name)
        if path.exists() and not replace:
            raise JasperError(f"{path} exists already; remove it or choose another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            yield temporary
            _share_tree(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    _sync(file)
            _sync(temporary)
            if path.exists():
                _replace(path, temporary)
            else:
                os.rename(temporary, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        JasperError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            with open(temporary, "xb") as file:
                file.write(_encoded(content) if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write a text file into a folder that is not published yet."""
    path.write_bytes(_encoded(content))


def _encoded(text: str) -> bytes:
    """Encode as UTF-8; half characters, as in file names that are not UTF-8, become escapes, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def _share_tree(folder: Path) -> None:
    """Give everything in a folder the permissions of new files and folders, read off the folder, which is new."""
    of_folder = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(of_folder if path.is_dir() else of_folder & 0o666)


def _replace(path: Path, new: Path) -> None:
    """Put ``new`` where ``path`` is; what was there lies under the name ``new`` then, as rubbish."""
    aside = Path(tempfile.mkdtemp(prefix=f"{ASIDE}{path.name}-", dir=path.parent))
    try:
        os.rename(path, aside / path.name)
        os.rename(new, path)
        os.rename(aside, new)
    except BaseException:  # Ctrl-C as well: between the first two there is nothing at ``path``
        _bring_back(path.parent, path.name)
        raise


def _bring_back(folder: Path, name: str | None = None) -> None:
    """End replacements (of ``name``) that were cut short: what was set aside returns where nothing took its place."""
    for aside in list(folder.glob(f"{ASIDE}*")):
        of = aside.name.removeprefix(ASIDE).rpartition("-")[0]
        if name not in (None, of):
            continue
        if (aside / of).exists() and not (folder / of).exists():
            os.rename(aside / of, folder / of)
        shutil.rmtree(aside, ignore_errors=True)


def sweep_unfinished(folder: str | Path) -> None:
    """Delete what a killed process left unpublished in ``folder``. Only the folder's single writer may call this.

    What it had published and was about to replace is brought back.
    """
    _bring_back(Path(folder))
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make what belongs at ``path``; the others wait here. The lock lies in ``.locks``.

    Raises:
        JasperError: the place cannot be written.
    """
    from filelock import FileLock

    lock = FileLock(path.parent / ".locks" / f"{path.name}.lock")
    with disk_errors(path.parent):
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_writable(folder: str | Path) -> None:
    """Make a folder, and a file in it that is gone at once.

    Raises:
        JasperError: one of both is not possible.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def check_place(path: str | Path) -> None:
    """Check that a file or folder can be made at ``path``, and make nothing.

    Raises:
        JasperError: it cannot.
    """
    path = Path(path)
    with disk_errors(path):
        _temporary(path).exists()  # an error if the name is too long
        if path.is_symlink() and not path.exists():
            raise FileExistsError(errno.EEXIST, "a link that leads nowhere")
        there = next(place for place in path.absolute().parents if place.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()
        except FileNotFoundError:  # a file system of the kernel's, such as /proc
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def check_file(path: str | Path) -> None:
    """Check that a file can be written at ``path``, and write nothing.

    Raises:
        JasperError: it cannot, or a folder is there.
    """
    check_place(path)
    with disk_errors(Path(path)):
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def check_room(folder: str | Path, needed: int, what: str, mend: str) -> None:
    """Refuse work whose results would not fit, before it begins.

    Args:
        folder: where they will lie; it need not be there yet.
        needed: bytes.
        what: they are, in the plural.
        mend: what helps besides freeing some space.

    Raises:
        JasperError: fewer bytes are free.
    """
    there = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise JasperError(
            f"{folder}: {what} need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free some space, {mend}"
        )


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full or closed disk raises into an error that says how to fix it.

    Raises:
        JasperError: the disk is full, or the place cannot be written or named.
    """
    _check_name(path)
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        mend = MENDS.get(number)
        if mend is None and number and not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), str(path)) from error
        if mend is None:
            raise
        raise JasperError(f"could not write {path}: {mend}; what was there before is untouched") from error


def _check_name(path: Path) -> None:
    """Reject names that safetensors and tokenizers, which take file names as UTF-8, would not find or not write."""
    try:
        readable = os.fsencode(path) == str(path).encode() and "\0" not in str(path)
    except UnicodeEncodeError:
        readable = False
    if not readable:
        raise JasperError(
            f"{str(path)!r}: not a name in UTF-8, which models need (the system's encoding is "
            f"{sys.getfilesystemencoding()}). Fix: choose a name of plain letters, or set PYTHONUTF8=1"
        )


def _number(error: Exception) -> int:
    """The system's number for what went wrong; safetensors' own writer tells it only in its message."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else 0
