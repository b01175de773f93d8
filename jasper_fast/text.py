"""Rules about single texts: when two count as the same, and which cannot be stored."""

from __future__ import annotations

import re
import unicodedata

# Code points that show nothing (Unicode's Default_Ignorable_Code_Point): soft hyphens, zero-width spaces and joiners,
# byte order marks, variation selectors.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def normal_form(text: str) -> str:
    """Reduce a text to what decides that it equals another one.

    Case, white space, invisible characters and compatibility forms (full-width letters, ligatures, composed or
    decomposed accents) do not count. Evaluation texts are kept out of training by this form.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
        text = unicodedata.normalize("NFKC", text)  # casefold decomposes some letters
    return " ".join(text.split()).casefold()


def lone_surrogate(text: str) -> str | None:
    """Describe the first lone surrogate of a text, which no file can store, or return None.

    JSON escapes such as "\\ud83d" and command lines that are not UTF-8 bring them in.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has a lone surrogate ({text[error.start]!a}, half a character) at character {error.start + 1}"
    return None
