"""Label texts with teacher embeddings: fill the caches, in one process or several."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jasper_fast.config.data import DataConfig
from jasper_fast.config.models import TeacherConfig
from jasper_fast.config.run import Config
from jasper_fast.data.text_dataset import texts_fingerprint
from jasper_fast.data.text_sources import source_stamp
from jasper_fast.teachers.base import Log, OpenTeacher, teacher_type
from jasper_fast.teachers.cache import SHARD_ROWS, TeacherCache, TeacherEmbeddings
from jasper_fast.teachers.model import check_custom_code
from jasper_fast.teachers.opening import Worker, assigned_shards, open_all, open_teacher, reduce_to_head
from jasper_fast.teachers.precomputed import PrecomputedEmbeddings
from jasper_fast.teachers.reuse import CacheReuse, text_keys
from jasper_fast.utils.atomic import locked
from jasper_fast.utils.errors import JasperError, Problems

if TYPE_CHECKING:
    from datasets import Dataset

    from jasper_fast.models.student import Student


LINE_SECONDS = 30.0  # between two lines of progress in a log
MIN_STORING_COST = 1e-6  # cosine distance between stored and computed embeddings, from which it is reported
MAX_WAIT_SECONDS = 1800.0  # seconds without a new shard after which the other processes count as dead


def ensure_teachers(
    config: Config,
    texts: Dataset,
    progress: bool = True,
    *,
    shard_rows: int = SHARD_ROWS,
    student: Student | None = None,
    alone: bool = False,
    called: str = "teacher",
) -> TeacherEmbeddings:
    """Return the teacher embeddings of these texts, and compute missing or damaged shards.

    All teachers, precomputed embeddings and widths are checked before any text is encoded.

    Args:
        config: configuration of the run.
        texts: training texts with columns ``text``, ``role`` and ``digest``.
        progress: progress bars and messages on stderr.
        shard_rows: texts per shard.
        student: untrained student for the row-order check of embeddings without keys. None builds it when needed.
        alone: True if this process computes all shards, and the other processes of the run do not call this.
        called: what messages call the models.

    Raises:
        JasperError: a teacher, file, width or cache cannot be used, or the disk is too small. Precomputed embeddings
            also raise if one is missing, not finite or zero, or if their rows are in another order.
    """
    caches = teacher_caches(config, texts, shard_rows)
    worker = (0, 1) if alone else (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    meet = (lambda: None) if alone else _meet
    log = print_error if progress and worker[0] == 0 else _silent
    for cache in caches:
        _drop_damaged(cache, texts, worker)
    meet()  # no process looks for missing shards before all have dropped their damaged ones
    opened = open_all(config, caches, texts, worker, student, log)
    meet()  # no process encodes before all have checked every teacher
    for teacher, cache in zip(config.teachers, caches, strict=True):
        _fill(config, teacher, cache, texts, worker, opened.pop(cache.fingerprint, None), log, called)
        _log_finished(cache, log, called)
    return reduce_to_head(config, caches, texts, student, log)


def teacher_caches(config: Config, texts: Dataset, shard_rows: int = SHARD_ROWS) -> list[TeacherCache]:
    """Return the cache of these texts for each teacher. It need not exist yet.

    Args:
        config: configuration of the run.
        texts: training texts with columns ``text``, ``role`` and ``digest``.
        shard_rows: texts per shard.

    Raises:
        JasperError: a teacher does not exist, or a cache's folder holds something else.
    """
    of_texts = {"texts": texts_fingerprint(texts), "dtype": config.data.cache_dtype}
    identities = [
        teacher_type(teacher).describe(teacher) | _sources_of_keys(config.data, teacher) for teacher in config.teachers
    ]
    return [TeacherCache(config.data.cache, {**i, **of_texts}, len(texts), shard_rows) for i in identities]


def _sources_of_keys(data: DataConfig, teacher: TeacherConfig) -> dict[str, Any]:
    """Identify the sources if ids or the order of documents match precomputed embeddings to their texts."""
    by_id = any(source.id_column is not None for source in data.sources)
    if teacher.vectors is None or not (teacher.order == "source" or by_id):
        return {}
    return {"sources": [[source.model_dump(mode="json"), source_stamp(source)] for source in data.sources]}


class Labels(NamedTuple):
    """Teacher embeddings of some texts that are not training texts."""

    rows: np.ndarray  # (n,) int64, the texts that have an embedding of every teacher, in order
    embeddings: Tensor  # (n, D) float32, unit rows of the teachers' full widths together
    missing: int  # texts that precomputed embeddings lack


def label_dataset(config: Config, texts: Dataset, progress: bool = True) -> Labels:
    """Return the teachers' embeddings of texts that the run does not train on, such as held-out documents.

    Models encode the texts, once: the cache keeps them. Precomputed embeddings are matched by digest, text, id, or
    position in the sources. The position among the training texts says nothing about other texts. Any process may call
    this alone.

    Args:
        config: configuration of the run.
        texts: M texts with columns ``text``, ``role`` and ``digest``.
        progress: progress bars and messages on stderr.

    Returns:
        the labels. Texts that precomputed embeddings lack are left out and counted.

    Raises:
        JasperError: a teacher or file cannot be used, or an embedding is not finite or is zero.

    Example:
        >>> labels = label_dataset(config, held_out)
        >>> texts = held_out.select(labels.rows)  # row i of labels.embeddings belongs to text i
    """
    rows, scratch = np.arange(len(texts)), Path(config.data.cache).expanduser()
    ready: dict[int, PrecomputedEmbeddings] = {}
    for index, teacher in enumerate(config.teachers):
        if teacher.vectors is not None and len(rows):
            # The number of rows is checked against the training texts, where the position among them is the key.
            ready[index] = PrecomputedEmbeddings.open(teacher, None, scratch, config.precision, config.data)
            rows = rows[ready[index].find_all(texts.select(rows)) >= 0]
    labelled = texts.select(rows)
    if not len(rows):
        return Labels(rows, torch.empty(0, 0), len(texts))
    parts = []
    for index, teacher in enumerate(config.teachers):
        if index in ready:
            parts.append(torch.from_numpy(ready[index].read(0, len(rows), labelled["digest"][:])))
        else:  # no stage: the width of one teacher need not fit a head
            alone = config.model_copy(update={"teachers": [teacher], "stages": []})
            parts.append(ensure_teachers(alone, labelled, progress, alone=True).read(np.arange(len(rows))))
    return Labels(rows, torch.nn.functional.normalize(torch.cat(parts, dim=1), dim=1), len(texts) - len(rows))


def check_teachers(config: Config) -> None:
    """Reject missing teachers and teachers with custom code that is not allowed, before the texts are built.

    Raises:
        JasperError: one or more teachers cannot be used. The message lists all of them.
    """
    problems = Problems()
    for teacher in config.teachers:
        with problems:
            teacher_type(teacher).describe(teacher)
            check_custom_code(teacher)
    problems.raise_all()


def check_targets(
    config: Config,
    texts: Dataset,
    student: Student,
    progress: bool = True,
) -> None:
    """Run the checks that `ensure_teachers` makes before encoding. Teachers with missing shards load one at a time.

    Args:
        config: configuration of the run.
        texts: training texts with columns ``text``, ``role`` and ``digest``.
        student: untrained student for the row-order check of embeddings without keys.
        progress: whether to print how rows were matched.

    Raises:
        JasperError: a model, file of embeddings or width cannot be used, or the disk is too small.
    """
    caches = teacher_caches(config, texts)
    open_all(config, caches, texts, (0, 1), student, print_error if progress else _silent)


def _drop_damaged(cache: TeacherCache, texts: Dataset, worker: Worker) -> None:
    with _locked(cache, worker):
        for shard, reason in _damaged(
            cache, texts, [s for s in assigned_shards(cache, worker) if cache.has(s)]
        ).items():
            print_error(f"{reason}. Recomputing it")
            cache.drop(shard)


def _fill(
    config: Config,
    teacher: TeacherConfig,
    cache: TeacherCache,
    texts: Dataset,
    worker: Worker,
    opened: OpenTeacher | None,
    log: Log,
    called: str,
) -> None:
    """Compute this process's missing shards, then wait for the other processes. Rank 0 finishes the cache."""
    with _locked(cache, worker):
        missing = [shard for shard in assigned_shards(cache, worker) if not cache.has(shard)]
        if missing:
            cache.begin()
            _compute(opened or open_teacher(config, teacher, cache), cache, texts, missing, log, called)
    if worker[0] == 0:
        _wait(cache, lambda: all(cache.has(shard) for shard in range(cache.shards)))
        with locked(cache.folder.with_name(f"{cache.folder.name}-finish")):  # two runs may fill the same cache
            if not cache.complete:
                cache.finish()
    else:
        _wait(cache, lambda: cache.complete)


def _log_finished(cache: TeacherCache, log: Log, called: str) -> None:
    header = cache.header
    error = header["cosine_distance_of_storing"]
    cost = ""
    if error["mean"] >= MIN_STORING_COST:
        cost = (
            f". Storing {cache.identity['dtype']} costs a cosine distance of {error['mean']:.1e} "
            f"(largest {error['max']:.1e})"
        )
    log(f"{called} {cache.name}: {cache.rows:,} embeddings of width {header['width']} are ready{cost}")


def _locked(cache: TeacherCache, worker: Worker) -> AbstractContextManager[None]:
    """Lock this process's part of a cache. A second run of the same command waits here."""
    rank, world = worker
    return locked(cache.folder.with_name(f"{cache.folder.name}-{rank}-of-{world}"))


def _compute(
    teacher: OpenTeacher, cache: TeacherCache, texts: Dataset, missing: list[int], log: Log, called: str
) -> None:
    """Compute and publish the missing shards, one after the other."""
    from tqdm import tqdm

    remaining = sum(stop - start for start, stop in map(cache.span, missing))
    if remaining < cache.rows and cache.has(0):
        log(f"{called} {cache.name}: resuming, {remaining:,} of {cache.rows:,} embeddings are missing")
    if teacher.note is not None:
        log(f"{called} {cache.name}: {teacher.note}")
    lenders = CacheReuse(cache, text_keys(texts) if teacher.reusable else None)
    if len(lenders):
        log(f"{called} {cache.name}: reusing {len(lenders):,} of {cache.rows:,} embeddings from other caches")
    # A log gets lines in place of the bar.
    options: dict[str, Any] = {"disable": True if log is _silent else None, "smoothing": 0.05}
    with tqdm(desc=cache.name, total=remaining, unit=" texts", **options) as bar:
        started, tokens, done = time.perf_counter(), 0, 0
        said = started

        def progress(count: int, read: int) -> None:
            nonlocal tokens, done, said
            tokens, done, now = tokens + read, done + count, time.perf_counter()
            speed = f"{tokens / (now - started):,.0f} tokens/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update(count)
            if bar.disable and (now - said >= LINE_SECONDS or done == remaining):
                said = now
                rate = done / (now - started)
                log(f"{called} {cache.name}: {done:,} of {remaining:,} texts, {rate:,.1f} texts/s, {speed}")

        for shard in missing:
            start, stop = cache.span(shard)
            tokens_before = tokens
            rows = texts[start:stop]
            reused = lenders.read(start, stop, teacher.width)
            progress(int(reused.available.sum()), 0)
            teacher.embed(rows, start, ~reused.available, reused.embeddings, progress)
            stored_error = reused.error, reused.error_max
            cache.write(
                shard, rows["digest"], reused.embeddings, teacher.precision, tokens - tokens_before, stored_error
            )


def _damaged(cache: TeacherCache, texts: Dataset, shards: Iterable[int]) -> dict[int, str]:
    """Return why published shards cannot be used, by shard. Threads help because hashing releases the GIL."""
    digests = texts.select_columns(["digest"])

    def damage(shard: int) -> tuple[int, str | None]:
        start, stop = cache.span(shard)
        return shard, cache.damage(shard, digests[start:stop]["digest"])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {shard: reason for shard, reason in pool.map(damage, shards) if reason}


def _meet() -> None:
    """Wait for the other processes if `join_ranks` has joined them."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise JasperError(
                f"another process ended or did not start ({error}). Fix: correct the error that it printed, then start "
                "all processes again"
            ) from error


def _wait(cache: TeacherCache, ready: Callable[[], bool]) -> None:
    """Wait until ``ready`` is true, or raise if no process has published a shard for `MAX_WAIT_SECONDS` seconds."""
    last_count, since = -1, time.monotonic()
    while not ready():
        count = len(list(cache.folder.glob("data-*.json")))
        if count != last_count:
            last_count, since = count, time.monotonic()
        elif time.monotonic() - since > MAX_WAIT_SECONDS:
            raise JasperError(
                f"{cache.folder}: no new shard for {MAX_WAIT_SECONDS / 60:.0f} minutes (got {count} of "
                f"{cache.shards} shards). The process that computes the rest has probably died. Fix: "
                "run the command again"
            )
        time.sleep(0.2)


def print_error(message: str) -> None:
    """Print a message to stderr without breaking the progress bar."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def _silent(message: str) -> None:
    pass
