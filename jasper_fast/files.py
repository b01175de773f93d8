"""Writing that is whole or absent: everything is made under a temporary name beside its place, synced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jasper_fast.errors import JasperError

TEMPORARY = ".unfinished-"  # what starts with this was never published and may be deleted


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
    if path.exists() and not replace:
        raise JasperError(f"{path} exists already; remove it or choose another place")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o755)  # mkdtemp makes it private
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    _sync(file)
            _sync(temporary)
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}old-{path.name}-", dir=path.parent))
                os.rename(path, old / path.name)
                os.rename(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
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
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
            _sync(path.parent)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)


def sweep_unfinished(folder: str | Path) -> None:
    """Delete what a killed process left unpublished in ``folder``. Only the folder's single writer may call this."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


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
    """Turn what a full or closed disk raises into an error that tells the mend."""
    try:
        yield
    except OSError as error:
        mend = {
            errno.ENOSPC: "the disk is full: free some space or choose another place",
            errno.EDQUOT: "the disk quota is used up: free some space or choose another place",
            errno.EACCES: "the folder cannot be written: choose another place or change its permissions",
            errno.EFBIG: "the file is larger than this account may write (ulimit -f)",
            errno.EROFS: "the file system is read-only: choose another place",
        }.get(error.errno or 0)
        if mend is None:
            raise
        raise JasperError(f"could not write {path}: {mend}; what was there before is untouched") from error
