"""The paper's treatment of documents (arXiv 2412.19048): some cut into pieces of sentences, a few with shuffled words.

And one of ours: variants of a text with words exchanged.

All draws come from the seed and the text itself, so a text is treated alike wherever it stands and in whatever order.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable

EXCHANGED = 0.3  # share of the words of a variant that are drawn anew, where other words are known to fit

# A sentence ends at . ! ? … (and closing quotes or brackets) before white space and something that can begin a
# sentence, at the full-width marks of Chinese and Japanese, and at a blank line.
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]*[^\W_a-z])|[。！？]+[」』”’]*|\n[ \t]*\n", re.UNICODE)
_ABBREVIATION = re.compile(  # a full stop after these, or after a single capital, rarely ends a sentence
    r"(?:^|[\s(\[\"'])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|cf|al|Fig|Figs|Eq|Eqs|Sec|Ref|No|Nos|Vol|pp|e\.g|i\.e|etc|approx|Gen|Col|Lt)\.$"
)


def sentences(text: str) -> list[tuple[int, int]]:
    """The sentences of a text as (start, end) positions; together they cover all of it but white space."""
    spans = []
    start = 0
    for match in _END.finditer(text):
        end = match.end()
        if match[0] == "." and _ABBREVIATION.search(text[max(start, end - 12) : end]):
            continue
        if text[start:end].strip():
            spans.append((start, end))
            start = end
    if text[start:].strip():
        spans.append((start, len(text)))
    return spans


def treat(text: str, seed: int, cut_share: float, span: tuple[int, int], shuffle_share: float) -> list[str]:
    """A document's training texts: itself, or its pieces; some of them with shuffled words.

    Args:
        text: one document.
        seed: the run's seed.
        cut_share: share of documents that are cut.
        span: fewest and most sentences in a piece.
        shuffle_share: share of the resulting texts whose words are shuffled.
    """
    pieces = _cut(text, span, _random(seed, "lengths", text)) if _share(seed, "cut", text) < cut_share else [text]
    return [_shuffle_words(p, seed) if _share(seed, "shuffle", p) < shuffle_share else p for p in pieces]


class Exchanges:
    """Which words stand between the same two words in a set of texts, to make new texts of old ones.

    A teacher labels whatever it is given, so a few thousand texts of the kind that matters can be made many:
    "A man is playing a guitar" and "A dog is eating a bone" also give "A dog is playing a bone".
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.between: dict[tuple[str, str], list[str]] = {}
        for text in texts:
            words = ["", *text.split(), ""]
            for before, word, after in zip(words, words[1:], words[2:], strict=False):
                self.between.setdefault((before.casefold(), after.casefold()), []).append(word)

    def variant(self, text: str, number: int, seed: int) -> str:
        """The text with some words exchanged, drawn by seed, number and the text itself; at best itself again."""
        generator = _random(seed, f"variant {number}", text)
        words = text.split()
        for i in range(len(words)):
            if generator.random() < EXCHANGED:
                before = words[i - 1].casefold() if i else ""
                after = words[i + 1].casefold() if i + 1 < len(words) else ""
                words[i] = generator.choice(self.between.get((before, after), words[i : i + 1]))
        return " ".join(words)


def _cut(text: str, span: tuple[int, int], generator: random.Random) -> list[str]:
    found = sentences(text)
    pieces = []
    first = 0
    while first < len(found):
        last = min(first + generator.randint(*span), len(found))
        pieces.append(text[found[first][0] : found[last - 1][1]].strip())
        first = last
    return pieces


def _shuffle_words(text: str, seed: int) -> str:
    words = text.split()
    _random(seed, "words", text).shuffle(words)
    return " ".join(words)


def _hash(seed: int, purpose: str, text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed}\0{purpose}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    )


def _share(seed: int, purpose: str, text: str) -> float:
    return _hash(seed, purpose, text) / 2**64


def _random(seed: int, purpose: str, text: str) -> random.Random:
    return random.Random(_hash(seed, purpose, text))
