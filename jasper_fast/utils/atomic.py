"""Atomic writing: files and folders get a temporary name first, are synced, and are then renamed.

Published files and folders have the permissions of new files under the user's umask. Files of safetensors and
``tempfile`` would be private otherwise.
"""

from __future__ import annotations

import errno
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

from jasper_fast.utils.errors import JasperError

TEMPORARY = ".unfinished-"  # prefix of unpublished files and folders, which may be deleted
REPLACED = ".replaced-"  # the folder .replaced-NAME-xxxxxxxx holds the old NAME during its replacement
FILE_IN_THE_WAY = ("a file is where a folder should be", "move it or choose another place")
NOT_WRITABLE = ("the folder cannot be written", "choose another place or change its permissions")
# Error number of the system: what happened, and the fix.
WRITE_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another place"),
    errno.EACCES: NOT_WRITABLE,
    errno.EPERM: NOT_WRITABLE,
    errno.EFBIG: ("the file is larger than this account may write", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.ENOTDIR: FILE_IN_THE_WAY,
    errno.EEXIST: FILE_IN_THE_WAY,
    errno.EISDIR: ("a folder is where a file should be", "move it or choose another place"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EIO: ("the disk failed", "check the disk or choose another place"),
}


@contextmanager
def publish_dir(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder. It becomes ``path`` if the block succeeds, and is deleted otherwise.

    Args:
        path: final path of the folder.
        replace: True to replace an existing folder. By default, an existing folder is an error.

    Raises:
        JasperError: the disk is full, the place cannot be written, or ``path`` exists and ``replace`` is False.
    """
    path = Path(path)
    with disk_errors(path):
        _restore_replaced(path.parent, path.name)
        if path.exists() and not replace:
            raise JasperError(f"{path} exists already. Fix: remove it or choose another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            yield temporary
            _set_permissions(temporary)
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
    """Write a file atomically: a reader sees the old content or the new, never a part.

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
    """Write a text file into an unpublished folder."""
    path.write_bytes(_encoded(content))


def _encoded(text: str) -> bytes:
    """Encode text as UTF-8.

    Lone surrogates, as in file names that are not UTF-8, become escapes, which JSON reads back.
    """
    return text.encode("utf-8", "backslashreplace")


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def _set_permissions(folder: Path) -> None:
    """Give everything in a new folder the permissions of new files and folders, which are those of the folder."""
    mode = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


def _replace(path: Path, new: Path) -> None:
    """Rename ``new`` to ``path``. The old content ends under the name ``new``, which the caller deletes."""
    backup = Path(tempfile.mkdtemp(prefix=f"{REPLACED}{path.name}-", dir=path.parent))
    try:
        os.rename(path, backup / path.name)
        os.rename(new, path)
        os.rename(backup, new)
    except BaseException:  # also Ctrl-C: between the first two renames ``path`` is missing
        _restore_replaced(path.parent, path.name)
        raise


def _restore_replaced(folder: Path, name: str | None = None) -> None:
    """Finish interrupted replacements: move the old content back if the new one is missing.

    Args:
        folder: folder with the published files and folders.
        name: only replacements of this name. None means all.
    """
    for backup in list(folder.glob(f"{REPLACED}*")):
        published = backup.name.removeprefix(REPLACED).rpartition("-")[0]
        if name not in (None, published):
            continue
        if (backup / published).exists() and not (folder / published).exists():
            os.rename(backup / published, folder / published)
        shutil.rmtree(backup, ignore_errors=True)


def sweep_unfinished(folder: str | Path) -> None:
    """Delete the unpublished files of a killed process in ``folder``, and restore an unfinished replacement.

    Only the folder's single writer may call this.
    """
    _restore_replaced(Path(folder))
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on ``path``, so that one process at a time creates it and the others wait.

    The lock file is in the folder ``.locks`` next to ``path``.

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
    """Create a folder and check that files can be written in it.

    Raises:
        JasperError: the folder or a file in it cannot be created.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def check_output_path(path: str | Path) -> None:
    """Check that a file or folder can be created at ``path``, without creating it.

    Raises:
        JasperError: it cannot be created.
    """
    path = Path(path)
    with disk_errors(path):
        _temporary(path).exists()  # raises if the name is too long
        if path.is_symlink() and not path.exists():
            raise FileExistsError(errno.EEXIST, "broken link")
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except FileNotFoundError:  # in a virtual file system such as /proc
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def check_file(path: str | Path) -> None:
    """Check that a file can be written at ``path``, without writing it.

    Raises:
        JasperError: it cannot be written, or ``path`` is a folder.
    """
    check_output_path(path)
    with disk_errors(Path(path)):
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def check_disk_space(folder: str | Path, needed: int, what: str, alternative: str) -> None:
    """Check that the disk has enough free space for results, before the work begins.

    Args:
        folder: folder of the results. It may not exist yet.
        needed: size of the results in bytes.
        what: name of the results in the message, in the plural.
        alternative: continuation of "free some space, ", e.g. ``or use another --out``.

    Raises:
        JasperError: less space is free.
    """
    free = free_bytes(folder)
    if needed > free:
        raise JasperError(
            f"{folder}: {what} need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. "
            f"Fix: free some space, {alternative}"
        )


def free_bytes(folder: str | Path) -> int:
    """Return the free bytes on the disk of a folder, which may not exist yet."""
    place = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn write errors of the system, e.g. for a full disk, into an error with a fix.

    Args:
        path: file or folder that the block writes, for the message.

    Raises:
        JasperError: the disk is full, the place cannot be written, or its name is invalid.
    """
    _check_name(path)
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number not in WRITE_ERRORS and number and not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), str(path)) from error
        if number not in WRITE_ERRORS:
            raise
        reason, fix = WRITE_ERRORS[number]
        raise JasperError(f"could not write {path}: {reason}. Earlier content is unchanged. Fix: {fix}") from error


def _check_name(path: Path) -> None:
    """Reject names that are not UTF-8. safetensors and tokenizers could not read or write such files."""
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
    """Return the system's error number. Errors of safetensors have it only in their message."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else 0
