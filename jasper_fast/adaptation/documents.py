"""The texts of an adaptation: whole documents, held-out ones with questions, and sentences of the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.config.data import DataConfig
from jasper_fast.data.augment import sentences
from jasper_fast.data.held_out import HeldOutDocument, HeldOutTexts
from jasper_fast.data.text import COLUMN_SEPARATOR, text_digest
from jasper_fast.data.text_counts import TextCounts
from jasper_fast.data.text_dataset import build_all_texts, texts_fingerprint
from jasper_fast.utils.arrow_files import stream_bytes, write_index
from jasper_fast.utils.atomic import locked, publish_dir
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest, settings_digest

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1  # increment it when the same documents give other sentences
FEWEST_DOCUMENTS = 30  # below, too few are held out to compare anything
FEWEST_WORDS = 2  # of a question or sentence
FILE_ROWS = 65_536  # sentences per file
BLOCK = 8192  # rows that are read at once
TITLES, FIRST_SENTENCES = "titles", "first sentences"

Sentence = tuple[str, str, str]  # text, role, digest


@dataclass(frozen=True)
class Corpus:
    """The texts of an adaptation, in one dataset.

    Args:
        texts: string columns ``text``, ``role`` and ``digest``: the held-out documents, the other documents, the
            questions, and the sentences, in this order. Documents and sentences are distinct.
        held_out: number of held-out documents.
        documents: number of all documents.
        questions: number of questions. 0: there are none, as for precomputed vectors.
        answers: (questions,) int64, the held-out document that each question is from.
        kinds: number of questions by kind.
        counts: what became of the documents.
        one_word: documents of one word.
    """

    texts: Dataset
    held_out: int
    documents: int
    questions: int
    answers: np.ndarray
    kinds: dict[str, int]
    counts: TextCounts
    one_word: int

    def digests(self, rows: range) -> Iterator[list[str]]:
        """Yield the digests of consecutive rows in blocks of at most `BLOCK`. Texts are not read."""
        column = self.texts.select_columns(["digest"])
        for start in range(rows.start, rows.stop, BLOCK):
            yield column[start : min(start + BLOCK, rows.stop)]["digest"]

    @property
    def fitted(self) -> range:
        """Rows of the documents that the map is fitted on."""
        return range(self.held_out, self.documents)

    @property
    def asked(self) -> range:
        """Rows of the questions."""
        return range(self.documents, self.documents + self.questions)

    @property
    def sentences(self) -> range:
        """Rows of the sentences that the map is fitted on."""
        return range(self.documents + self.questions, len(self.texts))


def whole_documents(data: DataConfig) -> DataConfig:
    """Return the settings of the same texts without cutting and shuffling."""
    return data.model_copy(update={"cut_share": 0.0, "shuffle_share": 0.0, "limit": None})


def read_corpus(
    data: DataConfig,
    is_new: Callable[[list[str]], np.ndarray] = lambda digests: np.ones(len(digests), bool),
    with_questions: bool = True,
) -> Corpus:
    """Read documents as ``train --texts`` does, and hold out the same ones.

    Args:
        data: settings of the texts.
        is_new: function from the digests of n documents to (n,) bool. Documents that are not new, because a map was
            fitted on them before, are not held out.
        with_questions: False to leave questions and sentences out, because the teacher cannot encode them.

    Raises:
        JasperError: a source cannot be read, or there are too few documents.
    """
    from datasets import concatenate_datasets

    data = whole_documents(data)
    built = build_all_texts(data, data.seed)
    columns = ["text", "role", "digest"]
    held = built.held_out
    fresh = is_new(held["digest"][:])
    held_out, known = held.select(np.flatnonzero(fresh)), held.select(np.flatnonzero(~fresh))
    _check_number(len(held) + len(built.texts), len(held_out), built.counts)
    documents = concatenate_datasets([held_out.select_columns(columns), known.select_columns(columns), built.texts])
    parts, answers = [documents], np.empty(0, np.int64)
    kinds: dict[str, int] = {}
    if with_questions:
        titled = any(source.join and len(source.columns) > 1 for source in data.sources)
        questions, answers, kinds = _questions(held_out, titled)
        parts += [questions, _sentences(documents, held_out, titled, Path(data.cache).expanduser())]
    return Corpus(
        texts=concatenate_datasets(parts),
        held_out=len(held_out),
        documents=len(documents),
        questions=len(answers),
        answers=answers,
        kinds=kinds,
        counts=built.counts,
        one_word=_one_word(documents),
    )


def texts_in(texts: Dataset, rows: range) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of consecutive rows in blocks of at most `BLOCK` rows."""
    for start in range(rows.start, rows.stop, BLOCK):
        yield texts[start : min(start + BLOCK, rows.stop)]


def split_title(text: str, titled: bool) -> tuple[str, str]:
    """Return the title of a document and the rest. Without a title, the first is empty.

    Args:
        text: the document, its columns joined by line breaks.
        titled: whether several columns were joined. The first one is a title if it is shorter than the rest.
    """
    first, separator, rest = text.partition(COLUMN_SEPARATOR)
    if titled and separator and len(first) < len(rest):
        return first.strip(), rest.strip()
    return "", text


def sentence_of(text: str) -> str:
    """Return a sentence of a text with several ones, chosen by a hash of the text. Empty: it has none to choose."""
    spans = [span for span in sentences(text) if _words(text[slice(*span)]) >= FEWEST_WORDS]
    if len(spans) < 2:
        return ""
    return text[slice(*spans[int(content_digest(text, size=4), 16) % len(spans)])].strip()


def _questions(held_out: Dataset, titled: bool) -> tuple[Dataset, np.ndarray, dict[str, int]]:
    """Return the titles and first sentences of held-out documents, their documents, and their number by kind."""
    from datasets import Dataset

    rows, answers, kinds = [], [], {TITLES: 0, FIRST_SENTENCES: 0}
    for number, row in enumerate(held_out):
        title, body = split_title(row["text"], titled)
        spans = sentences(body)
        first = body[slice(*spans[0])].strip() if len(spans) >= 3 else ""
        for kind, question in ((TITLES, title), (FIRST_SENTENCES, first)):
            if _words(question) >= FEWEST_WORDS or (kind == TITLES and question):
                rows.append((question, "query", text_digest(question, "query")))
                answers.append(number)
                kinds[kind] += 1
    return (
        Dataset.from_dict(_columns(rows), features=_features()),
        np.array(answers, np.int64),
        {kind: count for kind, count in kinds.items() if count},
    )


def _sentences(documents: Dataset, held_out: Dataset, titled: bool, cache: Path) -> Dataset:
    """Return the title and one sentence of each document that is not held out, from the cache if it has them."""
    from datasets import load_from_disk

    identity = [FORMAT, texts_fingerprint(documents), len(held_out), titled]
    folder = cache / f"sentences-{settings_digest(identity)}"
    with locked(folder):
        if not (folder / "state.json").is_file():
            with publish_dir(folder, replace=True) as temporary:
                _write(temporary, _distinct(documents, held_out, titled), settings_digest(identity))
    facts = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
    if not facts["rows"]:
        from datasets import Dataset

        return Dataset.from_dict(_columns([]), features=_features())
    return load_from_disk(str(folder))


def _distinct(documents: Dataset, held_out: Dataset, titled: bool) -> Iterator[Sentence]:
    """Yield distinct titles and sentences that are no text of a held-out document."""
    barred = HeldOutTexts(HeldOutDocument(row["text"], row["query"], row["body"]) for row in held_out)
    yielded: set[int] = set()  # halves of the digests, which take less memory
    for block in texts_in(documents, range(len(held_out), len(documents))):
        for text in block["text"]:
            title, body = split_title(text, titled)
            for sentence in (title, sentence_of(body)):
                digest = text_digest(sentence, "query")
                key = int(digest[:16], 16)
                if sentence and key not in yielded and sentence not in barred:
                    yielded.add(key)
                    yield sentence, "query", digest


def _write(folder: Path, rows: Iterator[Sentence], fingerprint: str) -> None:
    """Write sentences as a dataset folder, a file at a time."""
    import pyarrow as pa

    files: list[str] = []
    waiting: list[Sentence] = []
    count = 0

    def write() -> None:
        files.append(f"sentences-{len(files):05d}.arrow")
        table = pa.table(_columns(waiting), schema=_features().arrow_schema)
        (folder / files[-1]).write_bytes(stream_bytes(table))
        waiting.clear()

    for row in rows:
        waiting.append(row)
        count += 1
        if len(waiting) == FILE_ROWS:
            write()
    if waiting:
        write()
    (folder / "sentences.json").write_text(json.dumps({"rows": count}), encoding="utf-8")
    write_index(folder, files, _features(), fingerprint)


def _columns(rows: list[Sentence]) -> dict[str, list[str]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(("text", "role", "digest"))}


def _features() -> Any:
    from datasets import Features, Value

    return Features({name: Value("string") for name in ("text", "role", "digest")})


def _words(text: str) -> int:
    return len(text.split())


def _one_word(documents: Dataset) -> int:
    blocks = texts_in(documents, range(len(documents)))
    return sum(_words(text) == 1 for block in blocks for text in block["text"])


def _check_number(documents: int, held_out: int, counts: TextCounts) -> None:
    if documents < FEWEST_DOCUMENTS or not held_out:
        raise JasperError(
            f"too few documents to adapt to (got {documents:,} distinct ones of which {held_out:,} are held out, "
            f"expected at least {FEWEST_DOCUMENTS}; {counts.line(kept='document')}). Fix: give more documents"
        )
