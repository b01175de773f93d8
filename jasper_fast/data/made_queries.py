"""Make queries from documents without a language model: titles, first sentences, keywords and questions.

A query depends on the seed, its document and the number of documents with each word. Questions are English, and made
of English documents only. The other kinds follow the language of the document.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jasper_fast.data.augment import sentences
from jasper_fast.utils.fingerprint import content_digest

KINDS = ("title", "sentence", "text", "keywords", "question")
MIN_QUERY, MAX_QUERY = 12, 200  # characters of a title, sentence or text that serves as a query
MIN_REST = 40  # characters that a document must keep without its title or first sentence
MIN_SENTENCES = 3  # a document with fewer sentences has none to spare as a query
MIN_WORDS = 8  # different words of a document with keywords; the fewest and the most keywords of a query
FEWEST, MOST = 2, 5
PHRASE_WORDS = 3  # longest key phrase of a question
COUNTED = 100_000  # most documents in which words are counted
ENGLISH_SHARE = 0.15  # fraction of function words from which a text counts as English

WORD = re.compile(r"[^\W\d_](?:[\w'’-]{0,28}\w)?")
QUESTIONS = (
    "what is {}",
    "how does {} work",
    "what is known about {}",
    "when is {} used",
    "why is {} important",
    "explain {}",
    "examples of {}",
)
ENGLISH = """
a about above after again all also an and any are as at be because been before being below between both but by
can could did do does doing down during each either else ever every few for from further had has have having he
her here hers him his how however i if in into is it its itself just less many may me might more most much must
my no nor not now of off often on once one only or other our out over own per rather same see shall she should
since so some such than that the their them then there these they this those through thus to too under until up
upon us use used using very via was we well were what when where whether which while who whom whose why will
with within without would yet you your
"""
FUNCTION_WORDS = frozenset(ENGLISH.split())


class MadeQuery(NamedTuple):
    """A query and the document that it was made from.

    Attributes:
        text: the query.
        document: the position of the document.
        kind: one of `KINDS`.
        body: the document without the query. None: the document as it is, or for the kind "text" no document at all.
    """

    text: str
    document: int
    kind: str
    body: str | None = None


def make_queries(texts: Sequence[str], seed: int, limit: int | None = None) -> list[MadeQuery]:
    """Make at most one query from each document, of a kind that the seed draws among those that the document allows.

    - ``title``: the first line of a document with several lines. The document loses it.
    - ``sentence``: the first sentence of a document with at least three. The document loses it.
    - ``text``: a short document of one line as it is. Only other documents answer it.
    - ``keywords``: the words with the highest tf-idf, in the document's order.
    - ``question``: a question about the document's key phrase (RAKE: a run of words without function words).

    Args:
        texts: the documents.
        seed: the seed of all draws.
        limit: largest number of queries, of documents drawn by the seed. None: one of each document that allows it.

    Returns:
        The queries in the order of their documents. Equal queries are made once.
    """
    counts, counted = document_frequencies(texts)
    rows = range(len(texts)) if limit is None else random.Random(seed).sample(range(len(texts)), len(texts))
    made: dict[str, MadeQuery] = {}
    for row in rows:
        if len(made) == limit:
            break
        query = _make(texts[row], row, seed, counts, counted)
        if query is not None:
            made.setdefault(query.text.casefold(), query)
    return sorted(made.values(), key=lambda query: query.document)


def document_frequencies(texts: Sequence[str]) -> tuple[Counter[str], int]:
    """Return the number of documents with each word, among at most `COUNTED` evenly spread ones, and their number."""
    counts: Counter[str] = Counter()
    step = -(-len(texts) // COUNTED) or 1
    rows = range(0, len(texts), step)
    for row in rows:
        counts.update({word.casefold() for word in WORD.findall(texts[row])})
    return counts, len(rows)


def _make(text: str, row: int, seed: int, counts: Counter[str], counted: int) -> MadeQuery | None:
    """Return the query of a document. None: no kind is possible."""
    generator = random.Random(int(content_digest(f"{seed}\0query\0{text}", size=8), 16))
    candidates = _parts(text, row)
    words = WORD.findall(text)
    weights = _weights(words, counts, counted)
    if len(weights) >= MIN_WORDS:
        number = generator.randint(FEWEST, MOST)
        candidates.append(MadeQuery(_keywords(words, weights, number), row, "keywords"))
        if phrase := _key_phrase(text, words, weights):
            candidates.append(MadeQuery(generator.choice(QUESTIONS).format(phrase), row, "question"))
    return generator.choice(candidates) if candidates else None


def _parts(text: str, row: int) -> list[MadeQuery]:
    """Return the queries that are parts of a document, or the whole of a short one."""
    made = []
    first, _, rest = text.strip().partition("\n")
    spans = sentences(text)
    if _is_query(first) and len(first) < len(rest.strip()) and len(rest.strip()) >= MIN_REST:
        made.append(MadeQuery(first.strip(), row, "title", rest.strip()))
    if len(spans) >= MIN_SENTENCES:
        sentence, body = " ".join(text[slice(*spans[0])].split()), text[spans[1][0] :].strip()
        if _is_query(sentence) and len(body) >= MIN_REST:
            made.append(MadeQuery(sentence, row, "sentence", body))
    elif not rest.strip() and _is_query(first):
        made.append(MadeQuery(first.strip(), row, "text"))
    return made


def _is_query(text: str) -> bool:
    return MIN_QUERY <= len(text.strip()) <= MAX_QUERY and len(WORD.findall(text)) >= 2


def _weights(words: list[str], counts: Counter[str], counted: int) -> dict[str, float]:
    """Return the tf-idf of a document's words, in lower case, without function words and words of one letter.

    A word of no other document says nothing about what people search for, unless the document has few others.
    """
    frequencies = Counter(word.casefold() for word in words if len(word) > 1)
    weights = {
        word: (1.0 + math.log(number)) * (1.0 + math.log((1.0 + counted) / (1.0 + counts[word])))
        for word, number in frequencies.items()
        if word not in FUNCTION_WORDS
    }
    known = {word: weight for word, weight in weights.items() if counts[word] > 1}
    return known if len(known) >= MIN_WORDS else weights


def _keywords(words: list[str], weights: dict[str, float], number: int) -> str:
    """Return the words with the highest weights, in the order and spelling of their first appearance."""
    best = set(sorted(weights, key=lambda word: (-weights[word], word))[:number])
    first: dict[str, str] = {}
    for word in words:
        if word.casefold() in best:
            first.setdefault(word.casefold(), word)
    return " ".join(first.values())


def _key_phrase(text: str, words: list[str], weights: dict[str, float]) -> str | None:
    """Return the run of up to three weighted words with the highest weight, None for a text that is not English."""
    functional = sum(word.casefold() in FUNCTION_WORDS for word in words)
    if functional < ENGLISH_SHARE * len(words):
        return None
    best, phrase = 0.0, None
    run: list[str] = []
    end = 0
    for match in WORD.finditer(text):
        word = match[0].casefold()
        if text[end : match.start()].strip(" ") or word not in weights:
            run = []
        end = match.end()
        if word not in weights or word in run:  # a word that is repeated starts a new run
            run = []
        if word in weights:
            run = [*run, word][-PHRASE_WORDS:]
            weight = sum(weights[part] for part in run)
            if weight > best and len(run) > 1:
                best, phrase = weight, " ".join(run)
    return phrase
