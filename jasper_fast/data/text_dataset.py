"""Build the training dataset: read texts, exclude evaluation texts, augment, deduplicate, shuffle and publish.

Memory use does not grow with the number of texts. A hash assigns each text to a bucket, and one bucket at a time is
sorted in memory. The hash is keyed by the seed, so the order depends only on the seed and the set of texts.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.config.data import DataConfig, SourceConfig
from jasper_fast.data.augment import WordReplacer, cut_and_shuffle
from jasper_fast.data.held_out import (
    HeldOutChoice,
    HeldOutDocument,
    HeldOutTexts,
    read_held_out,
    write_held_out,
)
from jasper_fast.data.text import join_columns, normal_form, text_digest
from jasper_fast.data.text_counts import TextCounts
from jasper_fast.data.text_sources import check_source, read_source, report_ignored, sample_texts, source_stamp
from jasper_fast.utils.arrow_files import read_mapped, stream_bytes, write_index
from jasper_fast.utils.atomic import TEMPORARY, locked, publish_dir, write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest, file_sha256, settings_digest, sha256

if TYPE_CHECKING:
    from datasets import Dataset, Features


FORMAT = 3  # increment it when a code change makes the same settings give other texts
BUCKETS = 256
MAX_BUFFERED_CHARS = 2**26  # characters held in memory before the buckets are written to disk
FILE_CHARACTERS = 2**28  # characters per published file
REPLACER_ROWS = 100_000  # rows of a source that supply words for its variants

Text = tuple[str, str, str]  # text, role, digest


def texts_fingerprint(texts: Dataset) -> str:
    """Return the identity of a dataset of texts: a hash of its ``digest`` column, in row order.

    Raises:
        ValueError: the dataset has no column ``digest``.
    """
    if "digest" not in texts.column_names:
        raise ValueError(f"expected a dataset with a column `digest`, got {texts.column_names}")
    batches = texts.select_columns(["digest"]).with_format("arrow").iter(65_536)
    return content_digest("".join(batch.column("digest").to_pylist()) for batch in batches)


@dataclass(frozen=True)
class BuiltTexts:
    """The texts of a run.

    Args:
        texts: the training texts: a memory-mapped dataset of distinct texts in random order, with the string columns
            ``text``, ``role`` and ``digest``.
        held_out: the held-out documents, with the string columns ``text``, ``role``, ``digest``, ``query`` (title or
            first sentence, or "") and ``body`` (the text without the query, or "").
        counts: what became of the texts of the sources.
    """

    texts: Dataset
    held_out: Dataset
    counts: TextCounts


def build_texts(data: DataConfig, seed: int, exclude: Collection[str] = ()) -> Dataset:
    """Return the training texts of `build_all_texts`."""
    return build_all_texts(data, seed, exclude).texts


def build_all_texts(data: DataConfig, seed: int, exclude: Collection[str] = ()) -> BuiltTexts:
    """Build the texts of a run, or load them from the cache folder ``{data.cache}/texts-<settings>``.

    Args:
        data: the sources and the augmentation. A source's ``limit`` draws from its documents, ``data.limit`` from the
            final texts.
        seed: the seed of the draws, the augmentation and the order.
        exclude: the normal forms of texts to exclude. A document is dropped before cutting if it, or one of its
            columns, has such a form. A piece of a cut document is dropped if it has one.

    Raises:
        JasperError: a source is unreadable or empty, a row is malformed, or no text is left.
    """
    from datasets import load_from_disk

    excluded = frozenset(exclude)
    settings = {
        "format": FORMAT,
        "seed": seed,
        "data": data.model_dump(
            mode="json",
            exclude={"cache": True, "cache_dtype": True, "seed": True, "sources": {"__all__": {"id_column"}}},
        ),
        "sources": [source_stamp(source) for source in data.sources],
        "excluded": sha256("\0".join(sorted(excluded))),
    }
    key = settings_digest(settings)
    folder = Path(data.cache).expanduser() / f"texts-{key}"
    with locked(folder):  # the other processes of the run wait here for the first one
        if not (folder / "state.json").is_file() or not _files_intact(folder):
            _remove_unfinished(folder)
            with publish_dir(folder, replace=True) as temporary:
                _build(data, seed, excluded, settings, temporary)
    facts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return BuiltTexts(load_from_disk(str(folder)), read_held_out(folder), TextCounts.from_dict(facts["counts"]))


def _build(data: DataConfig, seed: int, excluded: frozenset[str], settings: dict[str, Any], folder: Path) -> None:
    from tqdm import tqdm

    for source in data.sources:
        check_source(source)
        report_ignored(source)
    counts: Counter[str] = Counter()
    limits: list[str] = []
    choice = HeldOutChoice(data.held_out, seed) if data.held_out else None
    with publish_dir(folder / "spool") as spool:
        buckets = _Buckets(spool, seed)
        for number, source in enumerate(data.sources):
            reader = _Reader(source, data, seed, excluded, choice, f"data.sources.{number}.limit")
            with tqdm(desc=f"reading {source.path}", unit=" texts", delay=2, leave=False, disable=None) as bar:
                for text, place in reader.texts(counts):
                    buckets.add((text, source.role, text_digest(text, source.role)), place)
                    bar.update()
            limits += reader.limits
        held_out = choice.chosen() if choice is not None else {}
        for document in held_out.values():
            counts.subtract({name: number for name, number in document.tally.items() if name != "rows"})
            counts["held_out_texts"] += document.tally["documents"]
        counts["documents"] += counts["held_out_texts"]
        counts["held_out"] = len(held_out)
        texts = _limited(_trained(buckets.drain(held_out, counts), held_out, counts), data.limit)
        files = _write_files(folder, texts, counts)
        for file in spool.iterdir():
            file.unlink()
    (folder / "spool").rmdir()
    counts["beyond_limit"] = counts["made"] - counts["duplicates"] - counts["like_held_out"] - counts["texts"]
    summary = TextCounts.from_counter(counts, limits)
    if not summary.texts:
        raise JasperError(
            f"no training text is left ({summary.line()}; texts with fewer than {data.min_chars} characters are left "
            "out). Fix: give a source with more or longer texts, or other columns (--columns), or lower min_chars of a "
            "configuration"
        )
    hashes = {f: file_sha256(folder / f) for f in files}
    held_out_file = write_held_out(folder, held_out.values())
    facts = {
        "counts": summary.to_dict(),
        "settings": settings,
        "sha256": {**hashes, held_out_file: file_sha256(folder / held_out_file)},
    }
    write_atomic(folder / "texts.json", json.dumps(facts, indent=2, sort_keys=True))
    write_index(folder, files, _features(), sha256(hashes.values())[:16])


class _Reader:
    """The texts of a source: read, checked against the excluded ones, cut, shuffled and varied.

    Args:
        source: the source.
        data: the settings of all sources.
        seed: the seed of all draws.
        excluded: the normal forms of texts to exclude.
        choice: the choice of the held-out documents. None: no document is held out.
        limit_name: the name of the source's limit.
    """

    def __init__(
        self,
        source: SourceConfig,
        data: DataConfig,
        seed: int,
        excluded: frozenset[str],
        choice: HeldOutChoice | None,
        limit_name: str,
    ) -> None:
        self.source, self.data, self.seed, self.excluded = source, data, seed, excluded
        self.choice = choice if source.role == "document" else None
        self.limit_name = limit_name
        self.limits: list[str] = []  # the source's limit, if it leaves texts out
        self.replacer = _word_replacer(source) if source.variants else None

    def texts(self, counts: Counter[str]) -> Iterator[tuple[str, int]]:
        """Yield each text, and the hash of its row if the row can be held out, else 0. Add to the counts."""
        for cells, sampled in sample_texts(self.source, self.seed, self._tell_limit):
            tally = Counter(rows=1)
            documents = [join_columns(cells)] if self.source.join else [cells[i].strip() for i in sampled]
            texts = [text for document in documents for text in self._texts_of(document, cells, tally)]
            place = 0
            if self.choice is not None and texts and not tally["excluded"] and not self._evaluated(cells):
                place = self.choice.place(cells)
                self.choice.add(place, cells, self.source.join, tally)
            counts.update(tally)
            yield from ((text, place) for text in texts)

    def _evaluated(self, cells: tuple[str, ...]) -> bool:
        """Return whether a column is excluded, also one that the source's limit leaves out."""
        return bool(self.excluded) and any(normal_form(cell) in self.excluded for cell in cells)

    def _texts_of(self, document: str, cells: tuple[str, ...], tally: Counter[str]) -> Iterator[str]:
        data, excluded = self.data, self.excluded
        tally["documents"] += 1
        parts = [document, *cells] if self.source.join else [document]
        if excluded and any(normal_form(part) in excluded for part in parts):
            tally["excluded"] += 1
            return
        pieces = [document]
        if self.source.role == "document":
            pieces = cut_and_shuffle(document, self.seed, data.cut_share, data.cut_sentences, data.shuffle_share)
            tally["kept"] += 1
        if len(pieces) > 1:
            tally.update(cut=1, pieces=len(pieces))
        tally["too_short"] += not pieces  # white space has no sentence
        for piece in pieces:
            tally["shuffled"] += piece not in document
            if len(piece) < data.min_chars:
                tally["too_short"] += 1
            elif len(pieces) > 1 and normal_form(piece) in excluded:
                tally["excluded"] += 1
            else:
                added = [text for text in self._variants(piece) if normal_form(text) not in excluded]
                tally.update(variants=len(added), made=1 + len(added))
                yield from (piece, *added)

    def _variants(self, text: str) -> list[str]:
        if self.replacer is None:
            return []
        return [self.replacer.variant(text, number, self.seed) for number in range(self.source.variants)]

    def _tell_limit(self, total: int | None) -> None:
        of_total = f" of {total:,} texts" if total is not None else " texts"
        self.limits.append(f"{self.limit_name}: {self.source.limit:,}{of_total}")


def _word_replacer(source: SourceConfig) -> WordReplacer:
    rows = islice(read_source(source), REPLACER_ROWS)
    return WordReplacer(text for cells in rows for text in ([join_columns(cells)] if source.join else cells))


def _trained(texts: Iterable[Text], held_out: dict[int, HeldOutDocument], counts: Counter[str]) -> Iterator[Text]:
    """Yield the texts that do not equal a held-out text or a part of one."""
    barred = HeldOutTexts(held_out.values())
    for text in texts:
        if text[0] in barred:
            counts["like_held_out"] += 1
        else:
            yield text


class _Buckets:
    """External sort of texts by a hash keyed with the seed.

    The first byte of the hash selects the bucket. So equal texts fall into the same bucket, and the sorted buckets in
    sequence give the total order.

    Args:
        folder: an existing folder for the texts that do not fit in memory.
        seed: the key of the hash.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.key = folder, f"order {seed}".encode()[:64]
        self.waiting: list[list[tuple[bytes, Text, int]]] = [[] for _ in range(BUCKETS)]
        self.characters = self.written = 0

    def add(self, text: Text, row: int = 0) -> None:
        """Add a text.

        Args:
            text: the text.
            row: the hash of its row, by which `drain` leaves it out. 0: it stays.
        """
        place = bytes.fromhex(content_digest(text[2], size=8, key=self.key))
        self.waiting[place[0]].append((place, text, row))
        self.characters += len(text[0])
        if self.characters > MAX_BUFFERED_CHARS:
            self._write_out()

    def drain(self, left_out: Container[int], counts: Counter[str]) -> Iterator[Text]:
        """Yield all distinct texts in order, and count the duplicates. Add no text afterwards.

        Args:
            left_out: the hashes of the rows to leave out.
            counts: the counts to add to.
        """
        for bucket, waiting in enumerate(self.waiting):
            rows = set()
            for place, text, row in self._stored(bucket, waiting):
                if row not in left_out:
                    counts["duplicates"] += (place, text) in rows
                    rows.add((place, text))
            waiting.clear()
            yield from (text for _, text in sorted(rows))

    def _stored(self, bucket: int, waiting: list[tuple[bytes, Text, int]]) -> Iterator[tuple[bytes, Text, int]]:
        yield from waiting
        for file in self.folder.glob(f"{bucket:03d}-*"):
            table = read_mapped(file)
            columns = [table.column(name).to_pylist() for name in ("place", "text", "role", "digest", "row")]
            for place, text, role, digest, row in zip(*columns, strict=True):
                yield place, (text, role, digest), row

    def _write_out(self) -> None:
        import pyarrow as pa

        for bucket, waiting in enumerate(self.waiting):
            if waiting:
                names = ("text", "role", "digest")
                columns: dict[str, Any] = {name: [text[i] for _, text, _ in waiting] for i, name in enumerate(names)}
                columns["place"] = [place for place, _, _ in waiting]
                columns["row"] = [row for _, _, row in waiting]
                (self.folder / f"{bucket:03d}-{self.written}").write_bytes(stream_bytes(pa.table(columns)))
                waiting.clear()
        self.characters, self.written = 0, self.written + 1


def _limited(texts: Iterable[Text], limit: int | None) -> Iterator[Text]:
    for number, text in enumerate(texts):
        if number == limit:
            return
        yield text


def _write_files(folder: Path, texts: Iterator[Text], counts: Counter[str]) -> list[str]:
    import pyarrow as pa

    schema = _features().arrow_schema
    names: list[str] = []
    rows: list[Text] = []

    def write() -> None:
        names.append(f"texts-{len(names):05d}.arrow")
        columns = [list(column) for column in zip(*rows, strict=True)]
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.table(columns, schema=schema), max_chunksize=1000)
        rows.clear()

    characters = 0
    for text in texts:
        rows.append(text)
        counts["texts"] += 1
        characters += len(text[0])
        if characters > FILE_CHARACTERS:
            write()
            characters = 0
    if rows:
        write()
    return names


def _features() -> Features:
    from datasets import Features, Value

    return Features({name: Value("string") for name in ("text", "role", "digest")})


def _files_intact(folder: Path) -> bool:
    """Return whether all published files match their checksums. The caller rebuilds a damaged folder."""
    facts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return all(
        (folder / name).is_file() and file_sha256(folder / name) == digest for name, digest in facts["sha256"].items()
    )


def _remove_unfinished(folder: Path) -> None:
    """Delete the temporary folders of killed processes. The caller holds the lock, so no process is writing there."""
    for leftover in folder.parent.glob(f"{TEMPORARY}{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
