"""Read precomputed teacher embeddings, matched to the training texts by digest, by text, or by position.

``python -m jasper_fast.teach --texts FILE.parquet`` writes the training texts with their digests.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.config.data import DataConfig
from jasper_fast.config.models import TeacherConfig
from jasper_fast.data.listing import listed_files, user_path
from jasper_fast.data.text import normal_form
from jasper_fast.teachers.base import Log, Precision, Progress, Similarities
from jasper_fast.teachers.embedding_files import KINDS, SUFFIXES, Keys, embedding_paths, open_embedding_file, texts_of
from jasper_fast.teachers.model import normalised
from jasper_fast.teachers.reuse import digest_keys
from jasper_fast.teachers.row_order import MIN_ROWS, Fit, centred_similarities, fit_of_order
from jasper_fast.utils.atomic import disk_errors
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 2  # incremented when the same files would give other embeddings
TEXTS = "`python -m jasper_fast.teach --texts texts.parquet`, with this configuration, writes the training texts"
ADD_KEYS = f"add a column `digest` or `text` to the embeddings. {TEXTS} with both"
MIN_COSINE = 0.999  # minimum cosine of two embeddings of one text that count as equal
SAMPLE, MAX_SAMPLE, SAMPLE_OF_FILE = 512, 1024, 8  # rows in the check of the order: usual, at most, per file
CHUNK = 4096  # rows


def describe_precomputed(config: TeacherConfig) -> dict[str, Any]:
    """Return everything that determines the embeddings: files by name, size and time, and ``truncate_dim``.

    Raises:
        JasperError: there are no files of embeddings.
    """
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in _files(config)]
    return {"vectors": config.vectors, "files": stats, "truncate_dim": config.truncate_dim, "format": FORMAT}


class PrecomputedEmbeddings:
    """Precomputed embeddings, read in parts.

    Rows with a ``digest`` or a ``text`` (and ``role``) are matched to the training texts, in any order. Without these
    columns, row i is the embedding of training text i.

    Args:
        config: teacher with ``vectors``: a .npy, .parquet or .jsonl file, or a folder of them in natural order.
        rows: number of training texts.
        scratch: folder for temporary copies of .parquet and .jsonl files. None is the system's temporary folder.

    Attributes:
        name: path as in the configuration.
        width: coordinates of an embedding.
        rows: number of rows in all files.
        keyed: True if rows are matched by digest or text.

    Raises:
        JasperError: a file is missing, unreadable or in another format, or two rows of a text differ. Without keys,
            also if the order of the files is ambiguous, or the number of rows differs from that of the texts.
    """

    precision = "ready"
    reusable = False  # reading a file is no slower than reading a cache
    note = None

    def __init__(self, config: TeacherConfig, rows: int, scratch: Path | None = None) -> None:
        self.name = str(config.vectors)
        self.files = [open_embedding_file(file, scratch) for file in _files(config)]
        self.width = self._width(config.truncate_dim)
        self.starts = np.cumsum([0, *(len(file.vectors) for file in self.files)]).tolist()
        self.rows: int = self.starts[-1]
        keyed = [file.keys is not None for file in self.files]
        if any(keyed) and not all(keyed):
            raise JasperError(
                f"{self.name}: {self.files[keyed.index(False)].file.name} has no column `digest` or `text`, and "
                f"{self.files[keyed.index(True)].file.name} has one. Fix: {ADD_KEYS}"
            )
        self.keyed = all(keyed)
        if self.keyed:
            self._sort_keys()
        else:
            _check_names([file.file for file in self.files])
            self._check_count(rows)

    @staticmethod
    def describe(config: TeacherConfig) -> dict[str, Any]:
        """See `describe_precomputed`."""
        return describe_precomputed(config)

    @classmethod
    def open(cls, config: TeacherConfig, rows: int, scratch: Path, precision: Precision) -> PrecomputedEmbeddings:
        """Open the files of a teacher for a number of training texts; see the class."""
        with disk_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        return cls(config, rows, scratch)

    def check(
        self, texts: Dataset, spans: Sequence[range], data: DataConfig, similarities: Similarities, log: Log | None
    ) -> None:
        """Match the embeddings to the texts, check their order, and read the rows of this process."""
        from tqdm import tqdm

        if log is not None:
            outcome = [self.match(texts, data)]
            if not self.keyed:
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
        if self.keyed:
            rows = self._find(digests)
            for missing in np.flatnonzero(rows < 0)[:1]:
                raise JasperError(f"{self.name}: training text {start + missing} has no embedding. Fix: {ADD_KEYS}")
        return normalised(self._gather(rows), self.name, range(start, stop), None)

    def match(self, texts: Dataset, data: DataConfig) -> str:
        """Check that every training text has an embedding, and describe how the rows were matched.

        Args:
            texts: training texts with columns ``text``, ``role`` and ``digest``.
            data: configuration of the texts, for the fix in the error.

        Raises:
            JasperError: texts have no embedding. The message has their number, the first of them and a likely reason.
        """
        if not self.keyed:
            return f"{self.rows} embeddings in the order of the training texts, from {self._listed()}"
        batches = texts.select_columns(["digest"]).with_format("arrow").iter(65_536)
        rows = np.concatenate([self._find(batch.column("digest").to_pylist()) for batch in batches])
        if (rows < 0).any():
            raise self._missing(texts.select(np.flatnonzero(rows < 0)), len(texts), data)
        unused = self.rows - len(np.unique(rows))
        return f"{len(texts)} training texts matched by digest or text; {unused} of {self.rows} rows are unused"

    def check_order(self, texts: Dataset, reference: Similarities) -> str:
        """Check that embeddings without keys are in the order of the training texts, and describe the outcome.

        Args:
            texts: training texts with columns ``text`` and ``role``.
            reference: function from n texts and n roles to a list of similarity matrices, (n, n) float64 each.

        Raises:
            JasperError: the embeddings fit the texts no better than in a random order, everywhere or in a part.
        """
        rows = self._sample()
        vectors = normalised(self._gather(rows), self.name, rows.tolist(), None)
        self._check_distinct(vectors)
        if len(rows) < MIN_ROWS:
            return f"the order of {len(rows)} rows cannot be checked"
        sampled = texts[rows.tolist()]
        fit = fit_of_order(centred_similarities(vectors), reference(sampled["text"], sampled["role"]))
        problem = self._order_problem(fit, rows)
        if problem:
            raise JasperError(f"{self.name}: row order? {problem}. Fix: {ADD_KEYS}")
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
        if self.rows != rows:
            raise JasperError(
                f"{self.name}: {self.rows} embeddings for {rows} training texts (expected one row per text, got "
                f"{self._listed()}). Fix: {ADD_KEYS}"
            )

    def _sort_keys(self) -> None:
        shifted = [
            Keys(file.keys.digests, file.keys.rows + start, file.keys.exact)
            for file, start in zip(self.files, self.starts, strict=False)
            if file.keys is not None
        ]
        digests, rows, exact = (np.concatenate(part) for part in zip(*shifted, strict=True))
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

    def _find(self, digests: Sequence[str]) -> np.ndarray:
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
        fix = f"add the missing texts. {TEXTS}"
        if not near and (data.cut_share or data.shuffle_share):
            fix += ". Or set data.cut_share: 0 and data.shuffle_share: 0 to train on whole texts only"
        return JasperError(
            f"{self.name}: {len(missing)} of {count} training texts have no embedding among {self.rows} rows: "
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

    def _order_problem(self, fit: Fit, rows: np.ndarray) -> str | None:
        measured = (
            f"rank correlation with the texts' similarities: got {fit.correlation:.2f}, expected about 0.1 to 0.9"
        )
        if not fit.is_significant:
            return f"The embeddings fit the training texts no better than in a random order ({measured})"
        if fit.block is not None:
            first, last = (self._place(rows[row]) for row in (fit.block[0], fit.block[1] - 1))
            return f"From {first} to {last} the embeddings do not fit the training texts ({measured})"
        if fit.wrong:
            return f"About {fit.wrong:.0%} of the embeddings do not fit the training texts ({measured})"
        return None

    def _listed(self) -> str:
        names = [file.file.name for file in self.files]
        listed = ", ".join(names if len(names) < 4 else [names[0], names[1], "...", names[-1]])
        return "; ".join([listed, *_folder_anomalies(user_path(self.name), [file.file for file in self.files])])


def _files(config: TeacherConfig) -> list[Path]:
    path, files = user_path(str(config.vectors)), embedding_paths(str(config.vectors))
    if not files:
        nested = ", ".join(_nested(path)[:3]) if path.is_dir() else ""
        raise JasperError(
            f"{path}: no teacher embeddings here (expected a {KINDS} file, or a folder of them"
            + (f"; subfolders are not read: {nested}" if nested else "")
            + f"). Fix: write one embedding per training text there. {TEXTS}"
        )
    return files


def _nested(folder: Path) -> list[str]:
    """List the subfolders that hold files of embeddings."""
    inner = {file.relative_to(folder).parts[0] for file in listed_files(folder, SUFFIXES) if file.parent != folder}
    return sorted(inner)


def _check_names(files: list[Path]) -> None:
    """Reject file names whose order is ambiguous, and incomplete sets of shards."""
    seen: dict[str, Path] = {}
    for file in files:
        stem = re.sub(r"\d+", lambda digits: digits[0].lstrip("0"), _stem(file).casefold())
        other = seen.setdefault(stem, file)
        if other != file:
            raise JasperError(
                f"{file}: its order relative to {other.name} is ambiguous. Fix: delete one of them, or {ADD_KEYS}"
            )
    totals = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)$", _stem(file)))}
    if totals and totals != {len(files)}:
        raise JasperError(
            f"{files[0].parent}: incomplete shards (got {len(files)} files, expected {sorted(totals)} from their "
            "names). Fix: add the missing files, and remove others"
        )


def _folder_anomalies(path: Path, files: list[Path]) -> list[str]:
    """Describe anomalies of a folder: a gap in the numbers of its files, and subfolders that are not read."""
    if not path.is_dir():
        return []
    numbers = [int(digits[-1]) for file in files if (digits := re.findall(r"\d+", _stem(file)))]
    steps = {after - before for before, after in zip(numbers, numbers[1:], strict=False)}
    nested = _nested(path)
    gaps = ["their numbers have a gap"] if len(numbers) == len(files) and len(steps) > 1 else []
    return gaps + ([f"subfolders are not read: {', '.join(nested[:3])}"] if nested else [])


def _stem(file: Path) -> str:
    return next(file.name[: -len(suffix)] for suffix in SUFFIXES if file.name.lower().endswith(suffix))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
