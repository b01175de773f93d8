"""Digests of contents and settings, as lower-case hexadecimal text.

They name cache folders, identify texts and detect damaged files. A change of any byte would make the caches on disk
useless, so tests pin the results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Content = bytes | bytearray | memoryview | str


def content_digest(content: Content | Iterable[Content], *, size: int = 16, key: bytes = b"") -> str:
    """Return the BLAKE2b digest of a content, or of the concatenation of several.

    Args:
        content: bytes or text, or an iterable of them, which is read once. Text is encoded as UTF-8, and surrogates
            are allowed.
        size: length of the digest in bytes, at most 64.
        key: key of at most 64 bytes, for digests that depend on a seed.

    Returns:
        ``2 * size`` hexadecimal digits. Their alphabetical order is the order of the digests.
    """
    return _hexdigest(hashlib.blake2b(digest_size=size, key=key), content)


def settings_digest(settings: Any, *, size: int = 8) -> str:
    """Return the BLAKE2b digest of settings as JSON, in which the order of keys does not count.

    Args:
        settings: value that ``json.dumps`` accepts.
        size: length of the digest in bytes, at most 64.
    """
    return content_digest(json.dumps(settings, sort_keys=True), size=size)


def sha256(content: Content | Iterable[Content]) -> str:
    """Return the SHA-256 of a content, or of the concatenation of several. Text is encoded as UTF-8."""
    return _hexdigest(hashlib.sha256(), content)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(package: Path, extension: Path | None) -> str:
    """Return a digest of a package's Python sources, the kernels included, and of its compiled extension.

    Args:
        package: folder of the package.
        extension: file of the compiled extension. None means that it is not in use.
    """
    # In a checkout, kernels is a link to another folder. rglob does not follow links below its start.
    sources = sorted({*package.rglob("*.py"), *(package / "kernels").rglob("*.py")})
    files = [*sources, *([extension] if extension is not None else [])]
    return content_digest((path.name.encode() + path.read_bytes() for path in files), size=8)


def _hexdigest(digest: Any, content: Content | Iterable[Content]) -> str:
    parts = (content,) if isinstance(content, (bytes, bytearray, memoryview, str)) else content
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()
