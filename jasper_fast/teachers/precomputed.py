"""Read precomputed teacher embeddings, matched to the training texts by digest, by text, by id, or by position.

``python -m jasper_fast.teach --texts FILE`` writes the training texts with their digests, and ``--missing FILE`` those
without an embedding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.config.data import DataConfig
from jasper_fast.config.models import TeacherConfig
from jasper_fast.data.listing import user_path
from jasper_fast.data.text import normal_form
from jasper_fast.teachers.base import Log, Precision, Progress, Similarities
from jasper_fast.teachers.embedding_files import Keys, joined_keys, open_embedding_file, texts_of, unit_rows
from jasper_fast.teachers.embedding_folder import ADD_KEYS, check_names, embedding_files, folder_anomalies
from jasper_fast.teachers.reuse import digest_keys
from jasper_fast.teachers.row_order import MIN_ROWS, centred_similarities, fit_of_order, order_problem, other_orders
from jasper_fast.teachers.source_keys import checked_id, count_documents, digests_by_id, document_digests
from jasper_fast.utils.atomic import disk_errors
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 2  # incremented when the same files would give other embeddings
MIN_COSINE = 0.999  # minimum cosine of two embeddings of one text that count as equal
MISSING = "jasper-fast teach --missing missing.jsonl"
SOURCE_ORDER = "position in the sources"
SAMPLE, MAX_SAMPLE, SAMPLE_OF_FILE = 512, 1024, 8  # rows in the check of the order: usual, at most, per file
CHUNK = 4096  # rows


def describe_precomputed(config: TeacherConfig) -> dict[str, Any]:
    """Return everything that determines the embeddings: files by name, size and time, and ``truncate_dim``.

    Raises:
        JasperError: there are no files of embeddings.
    """
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in embedding_files(config)]
    order = {} if config.order is None else {"order": config.order}
    return {"vectors": config.vectors, "files": stats, "truncate_dim": config.truncate_dim, "format": FORMAT, **order}


class PrecomputedEmbeddings:
    """Precomputed embeddings, read in parts.

    Rows with a ``digest`` or a ``text`` (and ``role``) are matched to the training texts, in any order. So are rows
    with an ``id``, if a source has an ``id_column``. Without these columns, row i is the embedding of training text i,
    or of document i with ``order: source``.

    Args:
        config: teacher with ``vectors``: a .npy, .parquet or .jsonl file, or a folder of them in natural order.
        rows: number of training texts. None: it is not checked.
        scratch: folder for temporary copies of .parquet and .jsonl files. None is the system's temporary folder.
        data: configuration of the texts, for ids and for ``order: source``. None: neither is used.

    Attributes:
        name: path as in the configuration.
        width: coordinates of an embedding.
        rows: number of rows in all files.
        key: what matches the rows: "digest or text", "id", "position in the sources", or None for the position
            among the training texts.

    Raises:
        JasperError: a file is missing, unreadable or in another format, or two rows of a text differ. Without keys,
            also if the order of the files is ambiguous, or the number of rows differs from that of the texts.
    """

    precision = "ready"
    reusable = False  # reading a file is no slower than reading a cache
    note = None

    def __init__(
        self, config: TeacherConfig, rows: int | None, scratch: Path | None = None, data: DataConfig | None = None
    ) -> None:
        self.name, self.order, self.data = str(config.vectors), config.order, data
        self.files = [open_embedding_file(file, scratch) for file in embedding_files(config)]
        self.width = self._width(config.truncate_dim)
        self.starts = np.cumsum([0, *(len(file.vectors) for file in self.files)]).tolist()
        self.rows: int = self.starts[-1]
        keyed = [file.keys is not None for file in self.files]
        if any(keyed) and not all(keyed):
            raise JasperError(
                f"{self.name}: {self.files[keyed.index(False)].file.name} has no column `digest` or `text`, and "
                f"{self.files[keyed.index(True)].file.name} has one. Fix: {ADD_KEYS}"
            )
        if self.order is not None and all(keyed):
            raise JasperError(
                f"{self.name}: has a column `digest` or `text`, which decides the order (got order: {self.order}). "
                "Fix: leave `order` out"
            )
        self.key = self._choose_key(all(keyed))
        if self.key in (None, SOURCE_ORDER):
            check_names([file.file for file in self.files])
            self._check_count(rows if rows is not None else self.rows)
        if self.key is not None:
            self._sort_keys(self._all_keys())

    @staticmethod
    def describe(config: TeacherConfig) -> dict[str, Any]:
        """See `describe_precomputed`."""
        return describe_precomputed(config)

    @classmethod
    def open(
        cls, config: TeacherConfig, rows: int | None, scratch: Path, precision: Precision, data: DataConfig
    ) -> PrecomputedEmbeddings:
        """Open the files of a teacher for a number of training texts; see the class."""
        with disk_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        return cls(config, rows, scratch, data)

    def check(
        self, texts: Dataset, spans: Sequence[range], data: DataConfig, similarities: Similarities, log: Log | None
    ) -> None:
        """Match the embeddings to the texts, check their order, and read the rows of this process."""
        from tqdm import tqdm

        if log is not None:
            outcome = [self.match(texts, data)]
            if self.key in (None, SOURCE_ORDER):
                outcome.append(self.check_order(texts, similarities))
            log(f"teacher {self.name}: {'; '.join(outcome)}")
        digests = texts.select_columns(["digest"])
        for span in tqdm(spans, desc=f"checking {self.name}", unit=" shards", delay=2, disable=None):
            self.read(span.start, span.stop, digests[span.start : span.stop]["digest"])

    def embed(
        self, rows: dict[str, list[Any]], start: int, wanted: np.ndarray, vectors: np.ndarray, progress: Progress
    ) -> None:
        """Write the embeddings of a shard; see `base.OpenTeacher`."""
        vectors[:] = self.read(start, start + len(vectors), rows["digest"])
        progress(len(vectors), 0)

    def read(self, start: int, stop: int, digests: Sequence[str]) -> np.ndarray:
        """Return the L2-normalised embeddings of the training texts ``start`` to ``stop`` (exclusive).

        Args:
            start: first text.
            stop: last text + 1.
            digests: digests of these texts. They are ignored without keys.

        Returns:
            (stop − start, width) float32.

        Raises:
            JasperError: a text has no embedding, or its embedding is not finite or is zero. The message names its row.
        """
        rows = np.arange(start, stop)
        if self.key is not None:
            rows = self.find(digests)
            for missing in np.flatnonzero(rows < 0)[:1]:
                raise JasperError(f"{self.name}: training text {start + missing} has no embedding. Fix: {ADD_KEYS}")
        return unit_rows(self._gather(rows), self.name, lambda row: self._place(rows[row]))

    def match(self, texts: Dataset, data: DataConfig) -> str:
        """Check that every training text has an embedding, and describe how the rows were matched.

        Args:
            texts: training texts with columns ``text``, ``role`` and ``digest``.
            data: configuration of the texts, for the fix in the error.

        Raises:
            JasperError: texts have no embedding. The message has their number, the first of them and a likely reason.
        """
        if self.key is None:
            return f"{self.rows} embeddings in the order of the training texts, from {self._listed()}"
        rows = self.find_all(texts)
        if (rows < 0).any():
            raise self._missing(texts.select(np.flatnonzero(rows < 0)), len(texts), data)
        unused = self.rows - len(np.unique(rows))
        left = f"{unused} of {self.rows} rows belong to no training text"
        return f"{len(texts)} training texts matched by {self.key}; {left}"

    def find_all(self, texts: Dataset) -> np.ndarray:
        """Find the rows of all texts, (n,) int64. -1 for a text without a row.

        Args:
            texts: texts with a column ``digest``. Embeddings that only have a position belong to training texts, so
                other texts have no row.
        """
        if self.key is None:
            return np.full(len(texts), -1)
        batches = texts.select_columns(["digest"]).with_format("arrow").iter(65_536)
        return np.concatenate([np.empty(0, np.int64), *(self.find(b.column("digest").to_pylist()) for b in batches)])

    def check_order(self, texts: Dataset, reference: Similarities) -> str:
        """Check that embeddings without keys are in the order of the texts, and describe the outcome.

        Args:
            texts: training texts with columns ``text`` and ``role``.
            reference: function from n texts and n roles to a list of similarity matrices, (n, n) float64 each.

        Raises:
            JasperError: the embeddings fit the texts no better than in a random order, or better in another order,
                everywhere or in a part. With ``order: texts`` this is a warning in the outcome.
        """
        chosen = rows = self._sample()
        if self.key is not None:
            chosen = np.unique(np.linspace(0, len(texts) - 1, SAMPLE).round().astype(np.int64))
            rows = self.find(texts[chosen.tolist()]["digest"])
            chosen, rows = chosen[np.argsort(rows)], np.sort(rows)  # a wrong block is one of the file
        vectors = unit_rows(self._gather(rows), self.name, lambda row: self._place(rows[row]))
        self._check_distinct(vectors)
        if len(rows) < MIN_ROWS:
            if self.order is None:
                raise JasperError(
                    f"{self.name}: the order of its rows cannot be checked (got {len(rows)} rows, expected at least "
                    f"{MIN_ROWS}). Fix: {ADD_KEYS}. Or set order: texts, if row i belongs to training text i"
                )
            return f"WARNING: the order of {len(rows)} rows cannot be checked"
        sampled = texts[chosen.tolist()]
        references = reference(sampled["text"], sampled["role"])
        fit = fit_of_order(centred_similarities(vectors), references, other_orders(rows, self.rows, self._gather))
        problem = order_problem(fit, lambda part: self._between(rows, part))
        if problem and self.order == "texts":
            return f"WARNING: row order? {problem}. It is used as it is, because of order: texts"
        if problem:
            raise JasperError(f"{self.name}: row order? {problem}. Fix: {ADD_KEYS}{self._other_order()}")
        return f"their order fits the texts (rank correlation {fit.correlation:.2f} on {len(rows)} texts)"

    def _width(self, truncate_dim: int | None) -> int:
        widths = sorted({file.vectors.shape[1] for file in self.files})
        if len(widths) > 1:
            raise JasperError(
                f"{self.name}: its files differ in width (got {widths}, expected one width). Fix: keep files of one "
                "model"
            )
        if truncate_dim is not None and truncate_dim > widths[0]:
            raise JasperError(
                f"{self.name}: truncate_dim exceeds the width of the embeddings (got {truncate_dim}, expected at most "
                f"{widths[0]}). Fix: lower truncate_dim"
            )
        return truncate_dim or widths[0]

    def _check_count(self, rows: int) -> None:
        if self.key == SOURCE_ORDER:
            if self.rows != len(self._documents):
                raise JasperError(
                    f"{self.name}: {self.rows:,} embeddings for {len(self._documents):,} documents "
                    f"(expected one row per document, in {self._listed()}). Fix: {ADD_KEYS}"
                )
        elif self.rows != rows:
            raise JasperError(
                f"{self.name}: {self.rows:,} embeddings for {rows:,} training texts (expected one row per text, in "
                f"{self._listed()}). Fix: {ADD_KEYS}{self._other_order()}"
            )

    @cached_property
    def _documents(self) -> list[str]:
        """Digests of the documents in the order of the sources."""
        assert self.data is not None
        return document_digests(self.data)

    def _other_order(self) -> str:
        """Suggest the order of the sources if the number of documents allows it, and ids if a file has them."""
        ids = all(file.ids is not None for file in self.files)
        hint = (
            ". Or set --id-column (id_column of a source), to match the column `id`" if ids and self.key is None else ""
        )
        if self.key is None and self.order is None and self.rows == count_documents(self.data):
            hint += ". Or set order: source, if row i belongs to document i of the sources, of which there are as many"
        return hint

    def _choose_key(self, keyed: bool) -> str | None:
        if keyed:
            return "digest or text"
        if self.order is not None or self.data is None:
            return SOURCE_ORDER if self.order == "source" else None
        identified = any(source.id_column is not None for source in self.data.sources)
        return "id" if identified and all(file.ids is not None for file in self.files) else None

    def _all_keys(self) -> Keys:
        """Return the keys of the rows of all files."""
        if self.key == SOURCE_ORDER:
            return Keys(digest_keys(self._documents), np.arange(self.rows), np.ones(self.rows, bool))
        if self.key == "id":
            return self._id_keys()
        return joined_keys(
            [
                Keys(file.keys.digests, file.keys.rows + start, file.keys.exact)
                for file, start in zip(self.files, self.starts, strict=False)
                if file.keys is not None
            ]
        )

    def _id_keys(self) -> Keys:
        assert self.data is not None
        digests, known = digests_by_id(self.data), list[tuple[int, str]]()
        for row, value in enumerate(value for file in self.files for value in file.ids or ()):
            if (digest := digests.get(own := checked_id(value, self._place(row)))) is not None:
                known.append((row, digest))
        if not known:
            raise JasperError(
                f"{self.name}: no row has an id of the documents (got ids such as {own!r}, expected ids such as "
                f"{next(iter(digests), '')!r}). Fix: correct --id-column (id_column of a source), or {ADD_KEYS}"
            )
        rows, found = (np.array(part) for part in zip(*known, strict=True))
        return Keys(digest_keys(found.tolist()), rows, np.ones(len(rows), bool))

    def _sort_keys(self, keys: Keys) -> None:
        digests, rows, exact = keys
        order = np.lexsort((~exact, digests[:, 1], digests[:, 0]))  # exact texts first
        self._keys = Keys(digests[order], rows[order], exact[order])
        self._check_duplicates()

    def _check_duplicates(self) -> None:
        digests, rows, exact = self._keys
        same = (digests[1:] == digests[:-1]).all(axis=1) & (exact[1:] == exact[:-1])
        doubles = np.flatnonzero(same)
        for start in range(0, len(doubles), CHUNK):
            first = doubles[start : start + CHUNK]
            one, other = (_unit(self._gather(rows[place])) for place in (first, first + 1))
            for differs in np.flatnonzero((one * other).sum(axis=1) < MIN_COSINE)[:1]:
                places = [self._place(rows[first[differs] + i]) for i in (0, 1)]
                raise JasperError(
                    f"{self.name}: {places[0]} and {places[1]} have the same text and different embeddings. Fix: keep "
                    "one of them, or distinguish them by a column `role` (query or document)"
                )

    def find(self, digests: Sequence[str]) -> np.ndarray:
        """Find the rows of texts among all files, (n,) int64. -1 for a text without a row."""
        text_keys, keys = digest_keys(digests), self._keys
        # Among a billion texts, two share their first 64 bits with a probability of 3 %. Such a text counts as missing.
        places = np.minimum(np.searchsorted(keys.digests[:, 0], text_keys[:, 0]), len(keys.rows) - 1)
        return np.where((keys.digests[places] == text_keys).all(axis=1), keys.rows[places], -1)

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Read some rows among all files, (n, width) float32."""
        out = np.empty((len(rows), self.width), np.float32)
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            chosen = chosen[np.argsort(rows[chosen], kind="stable")]  # in the order of the disk
            out[chosen] = self.files[owner].vectors[rows[chosen] - self.starts[owner], : self.width]
        return out

    def _place(self, row: int) -> str:
        owner = bisect_right(self.starts, int(row)) - 1
        return f"{self.files[owner].file.name} row {int(row) - self.starts[owner]}"

    def _missing(self, missing: Dataset, count: int, data: DataConfig) -> JasperError:
        examples = ", ".join(
            f"{row['text'][:50]!r} ({row['role']})" for row in missing.select(range(min(3, len(missing))))
        )
        missing_forms = {normal_form(text) for text in missing[:CHUNK]["text"]}
        near = len(missing_forms.intersection(normal_form(text) for file in self.files for text in texts_of(file.file)))
        reason = f"At least {near} of them differ only in role, Unicode form, case or white space. " if near else ""
        fix = f"add the missing texts. `{MISSING}` writes those of a configuration"
        if not near and (data.cut_share or data.shuffle_share):
            fix += ". Or set data.cut_share: 0 and data.shuffle_share: 0 to train on whole texts only"
        return JasperError(
            f"{self.name}: {len(missing):,} of {count:,} training texts have no embedding among {self.rows:,} rows: "
            f"{examples}. {reason}Fix: {fix}"
        )

    def _sample(self) -> np.ndarray:
        """Choose rows that are spread over all files, with some rows of each file."""
        rows = [np.linspace(0, self.rows - 1, SAMPLE)]
        rows += [np.linspace(a, b - 1, SAMPLE_OF_FILE) for a, b in zip(self.starts, self.starts[1:], strict=False)]
        chosen = np.unique(np.concatenate(rows).round().astype(np.int64))
        thinned = np.linspace(0, len(chosen) - 1, min(len(chosen), MAX_SAMPLE)).round().astype(np.int64)
        return chosen[thinned]

    def _check_distinct(self, vectors: np.ndarray) -> None:
        if len(vectors) > 1 and np.allclose(vectors, vectors[0], atol=1e-6):
            raise JasperError(f"{self.name}: all embeddings are equal. Fix: encode the texts again")

    def _between(self, rows: np.ndarray, part: tuple[int, int]) -> str:
        """Name the first and last row of a part of the sampled rows."""
        first, last = (self._place(rows[row]) for row in (part[0], part[1] - 1))
        return f"From {first} to {last}"

    def _listed(self) -> str:
        names = [file.file.name for file in self.files]
        listed = ", ".join(names if len(names) < 4 else [names[0], names[1], "...", names[-1]])
        return "; ".join([listed, *folder_anomalies(user_path(self.name), [file.file for file in self.files])])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
