"""Augmentation of training texts.

Two methods come from the paper (arXiv 2412.19048): cut documents into pieces of sentences, and shuffle the words of a
few texts. The third is our own: variants of a text with some words exchanged.

Random draws depend only on the seed and the text, never on the position of the text in the data.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from jasper_fast.utils.fingerprint import content_digest

REPLACED_FRACTION = 0.3  # fraction of a variant's words that are replaced, if a replacement is available

# A sentence ends at one of three places:
# - at . ! ? … with closing quotes or brackets, if white space and a possible start of a sentence follow
# - at a full-width mark of Chinese or Japanese
# - at a blank line
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]*[^\W_a-z])|[。！？]+[」』”’]*|\n[ \t]*\n", re.UNICODE)
_ABBREVIATION = re.compile(  # a full stop after one of these, or after a single capital, rarely ends a sentence
    r"(?:^|[\s(\[\"'])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|cf|al|Fig|Figs|Eq|Eqs|Sec|Ref|No|Nos|Vol|pp|e\.g|i\.e|etc|approx|Gen|Col|Lt)\.$"
)


def sentences(text: str) -> list[tuple[int, int]]:
    """Split a text into sentences.

    Returns:
        One (start, end) pair of character positions per sentence, in order. The spans cover all of the text except
        white space.
    """
    return list(sentence_spans(text))


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the spans of `sentences`, one at a time."""
    start = 0
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        if match[0] == "." and _ABBREVIATION.search(text[max(start, end - 12) : end]):
            continue
        if text[start:end].strip():
            yield start, end
            start = end
    if text[start:].strip():
        yield start, len(text)


def cut_and_shuffle(text: str, seed: int, cut_share: float, span: tuple[int, int], shuffle_share: float) -> list[str]:
    """Cut a document into pieces and shuffle words, each with a given probability.

    Args:
        text: the document.
        seed: the seed of all draws.
        cut_share: the fraction of documents to cut, from 0 to 1.
        span: the minimum and maximum number of sentences per piece, both inclusive.
        shuffle_share: the fraction of the resulting texts whose words are shuffled, from 0 to 1.

    Returns:
        The whole document, or its pieces in order.
    """
    pieces = _cut(text, span, _random(seed, "lengths", text)) if _uniform(seed, "cut", text) < cut_share else [text]
    return [_shuffle_words(p, seed) if _uniform(seed, "shuffle", p) < shuffle_share else p for p in pieces]


class WordReplacer:
    """Generator of text variants: it replaces a word by another one seen between the same two neighbours.

    The teacher can label any text, so variants multiply a few thousand texts of the target domain. For example,
    "A man is playing a guitar" and "A dog is eating a bone" also give "A dog is playing a bone".

    Args:
        texts: the texts to learn words and their neighbours from.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.words_between: dict[tuple[str, str], list[str]] = {}
        for text in texts:
            words = ["", *text.split(), ""]
            for before, word, after in zip(words, words[1:], words[2:], strict=False):
                self.words_between.setdefault((before.casefold(), after.casefold()), []).append(word)

    def variant(self, text: str, number: int, seed: int) -> str:
        """Return a variant of a text. The result equals the text if no word has a replacement.

        Args:
            text: the original text.
            number: the index of the variant. Each index gives another draw.
            seed: the seed of all draws.
        """
        generator = _random(seed, f"variant {number}", text)
        words = text.split()
        for i in range(len(words)):
            if generator.random() < REPLACED_FRACTION:
                before = words[i - 1].casefold() if i else ""
                after = words[i + 1].casefold() if i + 1 < len(words) else ""
                words[i] = generator.choice(self.words_between.get((before, after), words[i : i + 1]))
        return " ".join(words)


def _cut(text: str, span: tuple[int, int], generator: random.Random) -> list[str]:
    spans = sentences(text)
    pieces = []
    first = 0
    while first < len(spans):
        last = min(first + generator.randint(*span), len(spans))
        pieces.append(text[spans[first][0] : spans[last - 1][1]].strip())
        first = last
    return pieces


def _shuffle_words(text: str, seed: int) -> str:
    words = text.split()
    _random(seed, "words", text).shuffle(words)
    return " ".join(words)


def _hash(seed: int, purpose: str, text: str) -> int:
    return int(content_digest(f"{seed}\0{purpose}\0{text}", size=8), 16)


def _uniform(seed: int, purpose: str, text: str) -> float:
    return _hash(seed, purpose, text) / 2**64


def _random(seed: int, purpose: str, text: str) -> random.Random:
    return random.Random(_hash(seed, purpose, text))
