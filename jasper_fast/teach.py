"""Cache the teachers' vectors of a run's texts.

    python -m jasper_fast.teach [--config FILE|RECIPE] [--key.sub value …]
    python -m jasper_fast.teach … --texts texts.parquet                    # only the texts, for vectors made elsewhere
    torchrun --standalone --nproc-per-node gpu -m jasper_fast.teach …      # the processes share the shards

The same command goes on where it was stopped. Texts that another set of texts in the cache holds are not read again.
Training does the same by itself where vectors are missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.cache import SHARD_ROWS, TeacherCache, TeacherVectors, nearest_cache
from jasper_fast.command_line import Once
from jasper_fast.config import Config, TeacherConfig, load_arguments
from jasper_fast.data import prepare_texts, texts_fingerprint
from jasper_fast.distributed.ranks import join_ranks
from jasper_fast.errors import JasperError, Problems, run_cli
from jasper_fast.files import TEMPORARY, check_file, disk_errors, locked
from jasper_fast.lending import Lenders
from jasper_fast.targets import Opened, Place, open_all, open_teacher, share
from jasper_fast.teachers import Teacher, check_own_code, describe_teacher
from jasper_fast.vectors import ReadyVectors, describe_vectors

if TYPE_CHECKING:
    from datasets import Dataset

    from jasper_fast.model import Student

SILENCE = 1800.0  # seconds without a new shard after which the other processes are taken for dead


def open_teachers(config: Config, texts: Dataset, *, shard_rows: int = SHARD_ROWS) -> TeacherVectors:
    """The teachers' vectors of these texts, which must be complete.

    Raises:
        JasperError: a cache is missing (and in what the nearest one differs), is not finished, belongs to another
            teacher or other texts, or is damaged.
    """
    caches = teacher_caches(config, texts, shard_rows)
    for cache in caches:
        if not cache.complete:
            near = nearest_cache(cache)
            told = "unfinished" if cache.folder.exists() else "missing"
            raise JasperError(
                f"the vectors of {cache.name} for these texts are {told} ({cache.folder})"
                + (f"\n{near}" if near and told == "missing" else "")
                + "\ntype `python -m jasper_fast.teach` with this configuration"
            )
        found = _damaged(cache, texts, range(cache.shards))
        if found:
            first = next(iter(found.values()))
            raise JasperError(f"{first}; type `python -m jasper_fast.teach` with this configuration to make it again")
    return TeacherVectors(caches)


def ensure_teachers(
    config: Config,
    texts: Dataset,
    progress: bool = True,
    *,
    shard_rows: int = SHARD_ROWS,
    student: Student | None = None,
) -> TeacherVectors:
    """Return the teachers' vectors of these texts, and compute what is missing or damaged, shard by shard.

    Before any text is encoded, every teacher is opened, precomputed vectors are checked, and the stages' losses are
    compared with the teachers' widths.

    Args:
        config: the run.
        texts: columns ``text``, ``role`` and ``digest``.
        progress: whether to show bars and messages.
        shard_rows: texts per shard.
        student: before training, for the order of vectors without keys. None: built if it is needed.

    Raises:
        JasperError: a teacher or file of vectors cannot be used or has another width than a stage needs, a training
            text has no vector, vectors are in another order, a vector is not finite, a cache belongs to something
            else, or the disk is too small.
    """
    caches = teacher_caches(config, texts, shard_rows)
    place = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    say = print_error if progress and place[0] == 0 else _silent
    for cache in caches:
        _drop_damaged(cache, texts, place)
    _meet()  # nobody looks what is missing before everybody has dropped what is damaged
    opened = open_all(config, caches, texts, place, student, say)
    _meet()  # nobody encodes before everybody has found all teachers sound
    for teacher, cache in zip(config.teachers, caches, strict=True):
        _fill(config, teacher, cache, texts, place, opened.pop(cache.fingerprint, None), say)
        error, dtype = cache.header["cosine_distance_of_storing"], cache.identity["dtype"]
        say(
            f"teacher {cache.name}: {cache.rows} vectors of width {cache.header['width']} in {cache.folder}; storing "
            f"them as {dtype} costs a cosine distance of {error['mean']:.1e} (largest {error['max']:.1e})"
        )
    return TeacherVectors(caches)


def teacher_caches(config: Config, texts: Dataset, shard_rows: int = SHARD_ROWS) -> list[TeacherCache]:
    """Where each teacher's vectors of these texts belong, whether they are there or not.

    Raises:
        JasperError: a teacher does not exist, or a cache's folder holds something else.
    """
    of_texts = {"texts": texts_fingerprint(texts), "dtype": config.data.cache_dtype}
    identities = [_describe(teacher) for teacher in config.teachers]
    return [TeacherCache(config.data.cache, {**i, **of_texts}, len(texts), shard_rows) for i in identities]


def check_teachers(config: Config) -> None:
    """Refuse teachers that are missing, or bring code of their own that was not allowed, before the texts are built.

    Raises:
        JasperError: every such teacher.
    """
    problems = Problems()
    for teacher in config.teachers:
        with problems:
            _describe(teacher)
            check_own_code(teacher)
    problems.tell()


def write_texts(texts: Dataset, file: Path) -> None:
    """Write the texts that ready vectors must be of, in their order: columns ``text``, ``role`` and ``digest``.

    Args:
        file: a .parquet file; one that is there gives way, whole or not at all.

    Raises:
        JasperError: the place cannot be written.
    """
    temporary = file.with_name(f"{TEMPORARY}{file.name}")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            texts.to_parquet(str(temporary))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def _describe(teacher: TeacherConfig) -> dict[str, Any]:
    return describe_teacher(teacher) if teacher.model is not None else describe_vectors(teacher)


def _drop_damaged(cache: TeacherCache, texts: Dataset, place: Place) -> None:
    with _held(cache, place):
        for shard, reason in _damaged(cache, texts, [s for s in share(cache, place) if cache.has(s)]).items():
            print_error(f"{reason}; it is made again")
            cache.drop(shard)


def check_targets(
    config: Config,
    texts: Dataset,
    student: Student,
    *,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Check what `ensure_teachers` checks before it encodes: load every teacher that has work left, one at a time.

    Args:
        config: the run.
        texts: columns ``text``, ``role`` and ``digest``.
        student: before training, for the order of vectors without keys.
        shard_rows: texts per shard.

    Raises:
        JasperError: as `ensure_teachers`, for models, vectors, widths and the disk.
    """
    caches = teacher_caches(config, texts, shard_rows)
    open_all(config, caches, texts, (0, 1), student, print_error)


def _fill(
    config: Config,
    teacher: TeacherConfig,
    cache: TeacherCache,
    texts: Dataset,
    place: Place,
    opened: Opened | None,
    say: Callable[[str], None],
) -> None:
    with _held(cache, place):
        missing = [shard for shard in share(cache, place) if not cache.has(shard)]
        if missing:
            cache.begin()
            _compute(opened or open_teacher(config, teacher, cache), cache, texts, missing, say)
    if place[0] == 0:
        _wait(cache, lambda: all(cache.has(shard) for shard in range(cache.shards)))
        if not cache.complete:
            cache.finish()
    else:
        _wait(cache, lambda: cache.complete)


def _held(cache: TeacherCache, place: Place) -> AbstractContextManager[None]:
    """Hold this process's share of a cache: the same command started twice waits here."""
    rank, world = place
    return locked(cache.folder.with_name(f"{cache.folder.name}-{rank}-of-{world}"))


def _compute(
    teacher: Opened, cache: TeacherCache, texts: Dataset, missing: list[int], say: Callable[[str], None]
) -> None:
    from tqdm import tqdm

    todo = sum(stop - start for start, stop in map(cache.span, missing))
    if todo < cache.rows and cache.has(0):
        say(f"teacher {cache.name}: going on, {todo} of {cache.rows} texts are missing in {cache.folder}")
    if isinstance(teacher, Teacher):
        if teacher.max_length < teacher.config.max_length:
            say(
                f"teacher {cache.name}: reads the first {teacher.max_length} tokens of a text, not max_length "
                f"{teacher.config.max_length}: its model or tokenizer takes no more"
            )
        lenders = Lenders(cache, texts["digest"][:])
        if len(lenders):
            say(f"teacher {cache.name}: {len(lenders)} of {cache.rows} texts are known from other sets of texts")
    with tqdm(desc=cache.name, total=todo, unit=" texts", disable=say is _silent, smoothing=0.05) as bar:
        started, tokens = time.perf_counter(), 0

        def progress(count: int, read: int) -> None:
            nonlocal tokens
            tokens += read
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
            bar.update(count)

        for shard in missing:
            start, stop = cache.span(shard)
            before = tokens
            rows = texts[start:stop]
            if isinstance(teacher, ReadyVectors):
                vectors, known = teacher.read(start, stop, rows["digest"]), None
                progress(stop - start, 0)
            else:
                lent = lenders.read(start, stop, teacher.width)
                vectors, known = lent.vectors, (lent.error, lent.error_max)
                progress(int(lent.there.sum()), 0)
                _encode(teacher, rows, start, ~lent.there, vectors, progress)
            cache.write(shard, rows["digest"], vectors, teacher.precision, tokens - before, known)


def _encode(
    teacher: Teacher,
    rows: dict[str, Any],
    start: int,
    wanted: np.ndarray,
    vectors: np.ndarray,
    progress: Callable[[int, int], None],
) -> None:
    """Write the wanted vectors of a shard, role by role, since each has its prompt: (B,) bool into (B, width)."""
    roles = np.array(rows["role"])
    for role in sorted(set(roles[wanted].tolist())):
        at = np.flatnonzero(wanted & (roles == role))
        texts = [rows["text"][i] for i in at]
        vectors[at] = teacher.encode(texts, role, rows=(at + start).tolist(), progress=progress)


def _damaged(cache: TeacherCache, texts: Dataset, shards: Any) -> dict[int, str]:
    """Which of the published shards cannot be used, and why. Hashing releases the interpreter, so threads help."""
    digests = texts.select_columns(["digest"])

    def look(shard: int) -> tuple[int, str | None]:
        start, stop = cache.span(shard)
        return shard, cache.damage(shard, digests[start:stop]["digest"])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {shard: reason for shard, reason in pool.map(look, shards) if reason}


def _meet() -> None:
    """Wait for the other processes, where `join_ranks` has joined them."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise JasperError(
                f"another process ended or did not come ({error}); if it said why, mend that, then start all again"
            ) from error


def _wait(cache: TeacherCache, ready: Callable[[], bool]) -> None:
    """Until the other processes have done their part, which shows in the folder."""
    seen, since = -1, time.monotonic()
    while not ready():
        there = len(list(cache.folder.glob("data-*.json")))
        if there != seen:
            seen, since = there, time.monotonic()
        elif time.monotonic() - since > SILENCE:
            raise JasperError(
                f"{cache.folder}: {there} of {cache.shards} shards, and no new one for {SILENCE / 60:.0f} minutes; the "
                "process that makes the rest seems to have died: start the command again"
            )
        time.sleep(0.2)


def print_error(message: str) -> None:
    """Say something beside the progress bar."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def _silent(message: str) -> None:
    pass


def main(argv: list[str]) -> int:
    """Build the texts of a configuration and cache the vectors of all its teachers."""
    parser = argparse.ArgumentParser(prog="python -m jasper_fast.teach", description=main.__doc__)
    parser.add_argument("--config", action=Once, help="a YAML file or a recipe's name; default: the embedded recipe")
    parser.add_argument(
        "--texts",
        metavar="FILE.parquet",
        action=Once,
        help="write the texts there, in the order of ready vectors, and leave",
    )
    known, rest = parser.parse_known_args(argv)
    config = load_arguments(known.config, rest, ("config", "texts"))
    if known.texts is None:
        check_teachers(config)
    elif not known.texts.endswith(".parquet"):
        raise JasperError(f"--texts writes a parquet file; give a name that ends with .parquet, got {known.texts!r}")
    else:
        check_file(known.texts)
    with join_ranks(config.parallel.timeout) as ranks:
        texts, remaining = prepare_texts(config)
        if ranks.is_main:
            print(f"{len(texts)} training texts ({config.data.cache})")
            for name in remaining:
                print(f"some texts of the evaluation set {name} are among them: its scores will be transductive")
        if known.texts is not None:
            ranks.on_main(lambda: write_texts(texts, Path(known.texts)))
            if ranks.is_main:
                print(f"{known.texts}: written. Next: add a column `vector`, and set teachers: [{{vectors: FILE}}]")
            return 0
        vectors = ensure_teachers(config, texts)
    if ranks.is_main:
        print(f"{len(vectors)} targets are ready, of width {' + '.join(map(str, vectors.widths))}")
    return 0


if __name__ == "__main__":
    run_cli(main, resumes=True)
