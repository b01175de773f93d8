"""Extract (summary, body) pairs from the docstrings of installed packages: real text without a download.

The packages are parsed, not imported. The first paragraph of a docstring is its summary and the rest its body.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from jasper_fast.data.text import lone_surrogate, normal_form
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import sha256

PACKAGES = ("torch", "numpy", "transformers", "datasets", "pandas", "pyarrow", "sympy", "networkx")  # plus the stdlib
MIN_BODY, MAX_BODY, MIN_SUMMARY = 64, 20_000, 12  # characters; a docstring longer than MAX_BODY is a manual
HELD_OUT_FRACTION = 0.1  # fraction of the pairs that is held out, even if an evaluation uses fewer
SKIP = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "__pycache__", "_vendor"}

QUOTES = '"""'
BREAKS = {ord(c): " " for c in "\n\t\xa0"}


@functools.cache
def docstring_pairs() -> list[tuple[str, str]]:
    """Extract the pairs of the standard library and of the installed packages of ``PACKAGES``.

    No two pairs share a summary or a body by their normal form, so each summary has exactly one correct answer.

    Returns:
        The (summary, body) pairs, sorted.

    Raises:
        JasperError: this machine has no sources with docstrings.
    """
    candidates = sorted({pair for root in _roots() for file in _sources(root) for pair in _pairs(file)})
    bodies: set[str] = set()
    summaries: set[str] = set()
    pairs = []
    for summary, body in candidates:
        keys = normal_form(summary), normal_form(body)
        if keys[0] not in summaries and keys[1] not in bodies:
            pairs.append((summary, body))
        summaries.add(keys[0])
        bodies.add(keys[1])
    if not pairs:
        raise JasperError(
            "docstrings: no docstrings found; the sources of the standard library are missing. Fix: use a Python that "
            "has its .py files"
        )
    return pairs


def split_docstrings(held_out: int | None = None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split the pairs into training pairs and held-out pairs.

    A fixed tenth, selected by the hash of the body, is never used for training. So the split of a pair does not depend
    on the other installed packages, and fewer held-out pairs do not add any to training.

    Args:
        held_out: the number of held-out pairs to return, in the order of their hashes. None returns all of them.

    Returns:
        The training pairs and the held-out pairs. No held-out summary or body is among the training texts.

    Raises:
        JasperError: the installed packages have fewer held-out pairs than requested.
    """
    hashed = sorted((_key(body), (head, body)) for head, body in docstring_pairs())
    pool = [pair for key, pair in hashed if _is_held_out(key)]
    pool_forms = {normal_form(text) for pair in pool for text in pair}
    train = [p for key, p in hashed if not _is_held_out(key) and not any(normal_form(text) in pool_forms for text in p)]
    if held_out is not None and held_out > len(pool):
        raise JasperError(
            f"docstrings: too few held-out pairs in the installed packages (got {len(pool)}, expected {held_out}). "
            f"Fix: request at most {len(pool)}"
        )
    return train, pool[:held_out]


def training_rows() -> list[tuple[str, str]]:
    """Return the training pairs as the rows of a built-in text source.

    Raises:
        JasperError: this machine has no sources with docstrings.
    """
    return split_docstrings()[0]


def _key(body: str) -> str:
    """Hash the case-folded words of a body. Do not change this form: pairs would move between the two parts."""
    return sha256(" ".join(body.split()).casefold())


def _is_held_out(key: str) -> bool:
    return int(key[:8], 16) < HELD_OUT_FRACTION * 2**32


def _roots() -> list[Path]:
    """Find the folders of the standard library and the packages on ``sys.path``, without importing them."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        folders = (Path(entry or ".") / package for entry in sys.path)
        roots += [next((folder for folder in folders if (folder / "__init__.py").is_file()), None)]  # type: ignore[list-item]
    return [root for root in roots if root is not None]


def _sources(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*.py")):
        if SKIP.isdisjoint(file.relative_to(root).parts):
            yield file


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    try:
        source = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # a file in another encoding, or deleted since it was listed
        return
    for literal in _literals(source):
        pair = _split(_value(literal))
        if pair is not None and lone_surrogate(pair[0] + pair[1]) is None:
            yield pair


def _literals(source: str) -> Iterator[str]:
    """Yield the triple-quoted strings at the start of the file or directly after a line that opens a block.

    ``ast.parse`` finds the same strings, but takes a minute for these packages instead of seconds.
    """
    end = 0
    while (start := source.find(QUOTES, end)) >= 0:
        end = source.find(QUOTES, start + 3)
        while end >= 0 and source[end - 1] == "\\" and end > start + 3:  # an escaped quote inside the string
            end = source.find(QUOTES, end + 1)
        if end < 0:
            return
        end += 3
        line = source.rfind("\n", 0, start) + 1
        prefix = source[line:start].strip()
        if prefix in ("", "r", "R", "u", "U") and _opens_block(source, line):
            yield source[start - len(prefix) : end]


def _opens_block(source: str, line: int) -> bool:
    """Return whether the code before position ``line``, the start of a line, ends with a colon or is empty."""
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
            warnings.simplefilter("ignore")  # the user cannot fix unknown escapes in the docstrings of other packages
            return ast.literal_eval(literal)
    except (SyntaxError, ValueError):  # an escape that Python rejects
        return ""


def _split(docstring: str) -> tuple[str, str] | None:
    """Split a docstring into its first paragraph, as one line, and the rest. Return None if it is unsuitable."""
    text = inspect.cleandoc(docstring).replace("\r\n", "\n")
    if not text.translate(BREAKS).isprintable():
        return None  # control characters come from examples of binary data
    parts = re.split(r"\n[ \t]*\n", text, maxsplit=1)
    if len(parts) < 2:
        return None
    summary, body = " ".join(parts[0].split()), parts[1].strip()
    if len(summary) < MIN_SUMMARY or not MIN_BODY <= len(body) <= MAX_BODY:
        return None
    return summary, body
