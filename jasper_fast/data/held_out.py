"""Choose the documents that are held out of training, and recognize their texts among the others.

The choice is a hash of the document, keyed by the seed. One pass over the sources is enough, and memory grows with the
number of held-out documents only.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from jasper_fast.data.augment import sentence_spans, sentences
from jasper_fast.data.text import join_columns, normal_form, text_digest
from jasper_fast.utils.arrow_files import stream_bytes
from jasper_fast.utils.fingerprint import content_digest

if TYPE_CHECKING:
    from datasets import Dataset

LARGEST_SHARE = 10  # at most one document in ten is held out
FEWEST_SENTENCES = 3  # a document with fewer sentences has none to spare as a query
COLUMNS = ("text", "role", "digest", "query", "body")
FILE = "held-out.arrow"
T = TypeVar("T")


@dataclass
class HeldOutDocument:
    """A document that no training text comes from.

    Args:
        text: the document as training would read it.
        query: its title, or its first sentence. Empty if it has neither.
        body: the text without the query. Empty if ``query`` is.
        parts: more texts of the same row: its columns.
        tally: what the row added to the counts of the texts.
    """

    text: str
    query: str = ""
    body: str = ""
    parts: set[str] = field(default_factory=set)
    tally: Counter[str] = field(default_factory=Counter)


def held_out_document(cells: Sequence[str], join: bool) -> HeldOutDocument:
    """Return the document of a row, with its query.

    The first column is the query if the row has several and it is shorter than the rest. Otherwise, the first sentence
    is, if the document has at least three.

    Args:
        cells: the columns of the row.
        join: whether the columns make one text. Otherwise the longest column is the document.
    """
    cells = [cell.strip() for cell in cells]
    text = join_columns(cells) if join else max(cells, key=len)
    title, rest = cells[0], join_columns(cells[1:])
    document = HeldOutDocument(text, parts=set(cells))
    spans = sentences(text)
    if title and len(title) < len(rest):
        document.query, document.body = title, rest if join else text
    elif len(spans) >= FEWEST_SENTENCES:
        document.query, document.body = text[slice(*spans[0])].strip(), text[spans[1][0] :].strip()
    return document


class HeldOutChoice:
    """The documents with the smallest hashes of all that were added.

    Rows with the same normal form have the same hash, so equal documents are held out together.

    Args:
        most: the largest number of documents to hold out.
        seed: the key of the hash.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.key = f"held out {seed}".encode()[:64]
        self.documents: _Smallest[HeldOutDocument] = _Smallest(most)
        self.distinct: _Smallest[None] = _Smallest(most * LARGEST_SHARE)  # to count the documents up to that number

    def place(self, cells: Sequence[str]) -> int:
        """Return the hash of a row, which is not 0."""
        return int(content_digest(normal_form(join_columns(cells)), size=8, key=self.key), 16) >> 1 or 1

    def add(self, place: int, cells: Sequence[str], join: bool, tally: Counter[str]) -> None:
        """Add a row.

        Args:
            place: the hash of the row.
            cells: the columns of the row.
            join: whether the columns make one text.
            tally: what the row added to the counts of the texts.
        """
        self.distinct.add(place, None)
        if not self.documents.admits(place):
            return
        document = held_out_document(cells, join)
        document.tally.update(tally)
        equal = self.documents.values.get(place)
        if equal is not None:  # of two spellings, the same one whatever the order of the rows
            first, second = sorted((document, equal), key=lambda one: (one.text, one.query))
            document = replace(first, parts=first.parts | second.parts, tally=first.tally + second.tally)
        self.documents.add(place, document)

    def chosen(self) -> dict[int, HeldOutDocument]:
        """Return the held-out documents by hash, in the order of their hashes: at most a tenth of the documents."""
        number = len(self.distinct.values) // LARGEST_SHARE
        return {place: self.documents.values[place] for place in sorted(self.documents.values)[:number]}


class _Smallest(Generic[T]):
    """A mapping that keeps the entries with the smallest keys.

    Args:
        most: the largest number of entries.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.values: dict[int, T] = {}
        self.heap: list[int] = []  # the negated keys, so the largest key is first

    def admits(self, key: int) -> bool:
        """Return whether the key is among the smallest."""
        return key in self.values or len(self.heap) < self.most or key < -self.heap[0]

    def add(self, key: int, value: T) -> None:
        """Set the value of a key if it is among the smallest."""
        if not self.admits(key):
            return
        if key not in self.values:
            heapq.heappush(self.heap, -key)
        self.values[key] = value
        if len(self.heap) > self.most:
            del self.values[-heapq.heappop(self.heap)]


class HeldOutTexts:
    """Texts that must not be trained on: the documents, their columns, and consecutive sentences of these.

    Args:
        documents: the held-out documents.
    """

    def __init__(self, documents: Iterable[HeldOutDocument]) -> None:
        self.whole: set[str] = set()
        self.sentences: list[list[str]] = []
        self.starts: dict[str, list[tuple[int, int]]] = {}
        for document in documents:
            texts = {document.text, document.query, document.body, *document.parts} - {""}
            self.whole |= {normal_form(text) for text in texts}
            for text in texts:
                forms = [normal_form(text[start:end]) for start, end in sentences(text)]
                for position, form in enumerate(forms):
                    self.starts.setdefault(form, []).append((len(self.sentences), position))
                self.sentences.append(forms)

    def __contains__(self, text: str) -> bool:
        """Return whether a text equals one of the texts, by its normal form."""
        if not self.whole:
            return False
        if normal_form(text) in self.whole:
            return True
        first = next(sentence_spans(text), None)
        places = self.starts.get(normal_form(text[slice(*first)])) if first else None
        if not places:
            return False
        forms = [normal_form(text[start:end]) for start, end in sentences(text)]
        return any(self.sentences[n][position : position + len(forms)] == forms for n, position in places)


def write_held_out(folder: Path, documents: Iterable[HeldOutDocument]) -> str:
    """Write the held-out documents into a folder and return the name of the file."""
    import pyarrow as pa

    rows = [(d.text, "document", text_digest(d.text, "document"), d.query, d.body) for d in documents]
    columns = {name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(COLUMNS)}
    (folder / FILE).write_bytes(stream_bytes(pa.table(columns)))
    return FILE


def read_held_out(folder: Path) -> Dataset:
    """Return the held-out documents of a folder: string columns ``text``, ``role``, ``digest``, ``query``, ``body``."""
    from datasets import Dataset

    return Dataset.from_file(str(folder / FILE))
