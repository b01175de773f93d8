"""Normalization and validation of single texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from jasper_fast.utils.fingerprint import content_digest

COLUMN_SEPARATOR = "\n"  # between the columns of a row that make one text
# Invisible code points (Unicode's Default_Ignorable_Code_Point): soft hyphens, zero-width spaces and joiners,
# byte order marks, variation selectors.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def normal_form(text: str) -> str:
    """Normalize a text for comparison with others.

    Texts with the same normal form count as equal. The form ignores case, invisible characters, the amount of white
    space, and Unicode compatibility forms (full-width letters, ligatures, composed or decomposed accents). Training
    excludes evaluation texts by this form.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
        text = unicodedata.normalize("NFKC", text)  # casefold() decomposes some letters
    return " ".join(text.split()).casefold()


def join_columns(cells: Sequence[str]) -> str:
    """Join the columns of a row to one text, for training and for search.

    Args:
        cells: one text per column.
    """
    return COLUMN_SEPARATOR.join(cells).strip()


def lone_surrogate(text: str) -> str | None:
    r"""Describe the first lone surrogate of a text. Return None if the text has none.

    No UTF-8 file can store a lone surrogate. It comes from a JSON escape such as "\ud83d" or from a command line
    in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has a lone surrogate ({text[error.start]!a}, half a character) at character {error.start + 1}"
    return None


def text_digest(text: str, role: str = "document") -> str:
    """Return the identity of a training text, as 32 hexadecimal digits.

    It is the BLAKE2b-128 digest of role and text.

    Args:
        text: the text.
        role: "document" or "query". The default is "document".
    """
    return content_digest(f"{role}\0{text}")
