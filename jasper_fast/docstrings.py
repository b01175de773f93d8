"""Real text on every machine: (summary, body) pairs from the docstrings of installed packages.

The sources are read, never imported. A docstring's first paragraph is the summary, the rest its body.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from jasper_fast.errors import JasperError
from jasper_fast.text import lone_surrogate, normal_form

PACKAGES = ("torch", "numpy", "transformers", "datasets", "pandas", "pyarrow", "sympy", "networkx")  # and the stdlib
MIN_BODY, MAX_BODY, MIN_SUMMARY = 64, 20_000, 12  # characters; beyond MAX_BODY a docstring is a manual
POOL_SHARE = 0.1  # of the pairs are kept from training, whatever part of them an evaluation then uses
SKIP = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "__pycache__", "_vendor"}

QUOTES = '"""'
BREAKS = {ord(c): " " for c in "\n\t\xa0"}


@functools.cache
def docstring_pairs() -> list[tuple[str, str]]:
    """Distinct (summary, body) pairs of the standard library and of those ``PACKAGES`` that are installed, sorted.

    No two pairs share a body or a summary (compared by their normal form), so that each summary has one right answer.
    """
    found = sorted({pair for root in _roots() for file in _sources(root) for pair in _pairs(file)})
    bodies: set[str] = set()
    summaries: set[str] = set()
    pairs = []
    for summary, body in found:
        keys = normal_form(summary), normal_form(body)
        if keys[0] not in summaries and keys[1] not in bodies:
            pairs.append((summary, body))
        summaries.add(keys[0])
        bodies.add(keys[1])
    if not pairs:
        raise JasperError("no docstrings found: the sources of the standard library are not on this machine")
    return pairs


def split_docstrings(held_out: int | None = None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Part the pairs into training and held-out ones.

    A fixed tenth, chosen by the hash of the body, is never trained on; so the parts do not depend on what else is
    installed, and asking for fewer held-out pairs does not move any into training.

    Args:
        held_out: how many pairs of that tenth are wanted, in the order of their hashes; None means all.

    Returns:
        (training pairs, held-out pairs); no held-out summary or body is among the training texts.
    """
    hashed = sorted((_key(body), (head, body)) for head, body in docstring_pairs())
    pool = [pair for key, pair in hashed if _in_pool(key)]
    kept = {normal_form(text) for pair in pool for text in pair}
    train = [p for key, p in hashed if not _in_pool(key) and not any(normal_form(text) in kept for text in p)]
    if held_out is not None and held_out > len(pool):
        raise JasperError(
            f"{held_out} held-out docstring pairs were asked for; the installed packages give {len(pool)}"
        )
    return train, pool[:held_out]


def _key(body: str) -> bytes:
    """Hash a body by its case-folded words. Do not change this form: pairs would move between the parts."""
    return hashlib.sha256(" ".join(body.split()).casefold().encode()).digest()


def _in_pool(key: bytes) -> bool:
    return int.from_bytes(key[:4]) < POOL_SHARE * 2**32


def _roots() -> list[Path]:
    """The standard library and the folders of the packages, found on ``sys.path`` without importing them."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        places = (Path(entry or ".") / package for entry in sys.path)
        roots += [next((place for place in places if (place / "__init__.py").is_file()), None)]  # type: ignore[list-item]
    return [root for root in roots if root is not None]


def _sources(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*.py")):
        if SKIP.isdisjoint(file.relative_to(root).parts):
            yield file


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    try:
        source = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # a file in another encoding, or gone since it was listed
        return
    for literal in _literals(source):
        pair = _split(_value(literal))
        if pair is not None and lone_surrogate(pair[0] + pair[1]) is None:
            yield pair


def _literals(source: str) -> Iterator[str]:
    """The triple-quoted strings that stand first in the file or right after a line that opens a block.

    ``ast.parse`` finds the same strings, but takes a minute for these packages where this takes seconds.
    """
    end = 0
    while (start := source.find(QUOTES, end)) >= 0:
        end = source.find(QUOTES, start + 3)
        while end >= 0 and source[end - 1] == "\\" and end > start + 3:  # an escaped quote inside
            end = source.find(QUOTES, end + 1)
        if end < 0:
            return
        end += 3
        line = source.rfind("\n", 0, start) + 1
        prefix = source[line:start].strip()
        if prefix in ("", "r", "R", "u", "U") and _opens_block(source, line):
            yield source[start - len(prefix) : end]


def _opens_block(source: str, line: int) -> bool:
    """Whether the code before position ``line`` (a line's start) ends with a colon, or there is none."""
    while line > 0:
        previous = source.rfind("\n", 0, line - 1) + 1
        code = source[previous:line].strip()
        if code and not code.startswith("#"):
            return code.endswith(":") or (":" in code and "#" in code and code.split("#")[0].rstrip().endswith(":"))
        line = previous
    return True


def _value(literal: str) -> str:
    if "\\" not in literal or literal[0] in "rR":
        return literal[literal.index('"') + 3 : -3]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown escapes in other people's docstrings are not the user's concern
            return ast.literal_eval(literal)
    except (SyntaxError, ValueError):  # an escape that Python itself refuses
        return ""


def _split(docstring: str) -> tuple[str, str] | None:
    """First paragraph, collapsed to one line, and the rest; None where either is too short to mean anything."""
    text = inspect.cleandoc(docstring).replace("\r\n", "\n")
    if not text.translate(BREAKS).isprintable():
        return None  # control characters: binary examples
    parts = re.split(r"\n[ \t]*\n", text, maxsplit=1)
    if len(parts) < 2:
        return None
    summary, body = " ".join(parts[0].split()), parts[1].strip()
    if len(summary) < MIN_SUMMARY or not MIN_BODY <= len(body) <= MAX_BODY:
        return None
    return summary, body
