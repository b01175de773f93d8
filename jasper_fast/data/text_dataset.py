"""Build the training dataset: read texts, exclude evaluation texts, augment, deduplicate, shuffle and publish.

Memory use does not grow with the number of texts. A hash assigns each text to a bucket, and one bucket at a time is
sorted in memory. The hash is keyed by the seed, so the order depends only on the seed and the set of texts.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.config.data import DataConfig, SourceConfig
from jasper_fast.data.augment import WordReplacer, cut_and_shuffle
from jasper_fast.data.text import normal_form, text_digest
from jasper_fast.data.text_sources import check_source, read_source, report_ignored, sample_texts, source_stamp
from jasper_fast.utils.arrow_files import read_mapped, stream_bytes, write_index
from jasper_fast.utils.atomic import TEMPORARY, locked, publish_dir, write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest, file_sha256, settings_digest, sha256

if TYPE_CHECKING:
    from datasets import Dataset, Features


FORMAT = 2  # increment it when a code change makes the same settings give other texts
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


def build_texts(data: DataConfig, seed: int, exclude: Collection[str] = ()) -> Dataset:
    """Build the training texts, or load them from the cache folder ``{data.cache}/texts-<settings>``.

    Args:
        data: the sources and the augmentation. A source's ``limit`` draws from its documents, ``data.limit`` from the
            final texts.
        seed: the seed of the draws, the augmentation and the order.
        exclude: the normal forms of texts to exclude. A document is dropped before cutting if it, or one of its
            columns, has such a form. A piece of a cut document is dropped if it has one.

    Returns:
        A memory-mapped dataset of distinct texts in random order, with the string columns ``text``, ``role`` and
        ``digest``.

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
    return load_from_disk(str(folder))


def _build(data: DataConfig, seed: int, excluded: frozenset[str], settings: dict[str, Any], folder: Path) -> None:
    from tqdm import tqdm

    for source in data.sources:
        check_source(source)
        report_ignored(source)
    counts: Counter[str] = Counter()
    with publish_dir(folder / "spool") as spool:
        buckets = _Buckets(spool, seed)
        for source in data.sources:
            with tqdm(desc=f"reading {source.path}", unit=" texts", delay=2, leave=False) as bar:
                for text in _source_texts(source, data, seed, excluded, counts):
                    buckets.add((text, source.role, text_digest(text, source.role)))
                    bar.update()
        texts = _limited(buckets.drain(), data.limit)
        files = _write_files(folder, texts, counts)
        for file in spool.iterdir():
            file.unlink()
    (folder / "spool").rmdir()
    if not counts["texts"]:
        totals = ", ".join(f"{counts[k]} {k}" for k in ("documents", "excluded", "too short"))
        raise JasperError(
            f"data: no training text is left (got {totals}; `min_chars` is {data.min_chars}). Fix: add sources in "
            "data.sources, or lower data.min_chars"
        )
    facts = {
        "counts": dict(sorted(counts.items())),
        "settings": settings,
        "sha256": {f: file_sha256(folder / f) for f in files},
    }
    write_atomic(folder / "texts.json", json.dumps(facts, indent=2, sort_keys=True))
    write_index(folder, files, _features(), sha256(facts["sha256"].values())[:16])


def _source_texts(
    source: SourceConfig, data: DataConfig, seed: int, excluded: frozenset[str], counts: Counter[str]
) -> Iterator[str]:
    replacer = _word_replacer(source) if source.variants else None
    for cells, sampled in sample_texts(source, seed):
        for document in ["\n".join(cells)] if source.join else [cells[i] for i in sampled]:
            document = document.strip()
            counts["documents"] += 1
            parts = [document, *cells] if source.join else [document]
            if excluded and any(normal_form(part) in excluded for part in parts):
                counts["excluded"] += 1
                continue
            pieces = [document]
            if source.role == "document":
                pieces = cut_and_shuffle(document, seed, data.cut_share, data.cut_sentences, data.shuffle_share)
            counts["cut"] += len(pieces) > 1
            for piece in pieces:
                if len(piece) < data.min_chars:
                    counts["too short"] += 1
                elif len(pieces) > 1 and normal_form(piece) in excluded:
                    counts["excluded"] += 1
                else:
                    yield piece
                    variants = (replacer.variant(piece, n, seed) for n in range(source.variants)) if replacer else ()
                    yield from (text for text in variants if normal_form(text) not in excluded)


def _word_replacer(source: SourceConfig) -> WordReplacer:
    rows = islice(read_source(source), REPLACER_ROWS)
    return WordReplacer(text for cells in rows for text in (["\n".join(cells)] if source.join else cells))


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
        self.waiting: list[list[tuple[bytes, Text]]] = [[] for _ in range(BUCKETS)]
        self.characters = self.written = 0

    def add(self, text: Text) -> None:
        place = bytes.fromhex(content_digest(text[2], size=8, key=self.key))
        self.waiting[place[0]].append((place, text))
        self.characters += len(text[0])
        if self.characters > MAX_BUFFERED_CHARS:
            self._write_out()

    def drain(self) -> Iterator[Text]:
        """Yield all distinct texts in order. Add no text afterwards."""
        for bucket, waiting in enumerate(self.waiting):
            rows = set(waiting)
            for file in self.folder.glob(f"{bucket:03d}-*"):
                table = read_mapped(file)
                columns = [table.column(name).to_pylist() for name in ("place", "text", "role", "digest")]
                rows.update((place, (text, role, digest)) for place, text, role, digest in zip(*columns, strict=True))
            waiting.clear()
            yield from (text for _, text in sorted(rows))

    def _write_out(self) -> None:
        import pyarrow as pa

        for bucket, waiting in enumerate(self.waiting):
            if waiting:
                names = ("text", "role", "digest")
                columns: dict[str, Any] = {name: [text[i] for _, text in waiting] for i, name in enumerate(names)}
                columns["place"] = [place for place, _ in waiting]
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
