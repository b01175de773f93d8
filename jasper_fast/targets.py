"""Open the teachers of a run and check everything about their vectors that can be known before a text is encoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from jasper_fast.cache import TeacherCache
from jasper_fast.checks import check_losses
from jasper_fast.config import Config, TeacherConfig
from jasper_fast.encode import pick_device, pool_texts
from jasper_fast.errors import JasperError
from jasper_fast.files import check_room, disk_errors
from jasper_fast.row_order import centred_similarities, lexical_similarities
from jasper_fast.teachers import Teacher, load_teacher
from jasper_fast.vectors import ReadyVectors

if TYPE_CHECKING:
    from datasets import Dataset

    from jasper_fast.model import Student

Opened = Teacher | ReadyVectors
Place = tuple[int, int]  # which of the processes that share the work, and how many there are

ORDER_TOKENS = 128  # of a text that the student reads to check the order of vectors


def open_all(
    config: Config,
    caches: list[TeacherCache],
    texts: Dataset,
    place: Place,
    student: Student | None,
    say: Callable[[str], None],
) -> dict[str, Opened]:
    """Open every teacher that has work left, so that an error of any is raised before another one's long work.

    Args:
        config: the run.
        caches: of its teachers, in their order.
        texts: columns ``text``, ``role`` and ``digest``.
        place: of this process.
        student: before training, for the order of vectors without keys. None: built if it is needed.
        say: shows a message.

    Returns:
        The first of them, which is needed next, by its cache's fingerprint.

    Raises:
        JasperError: a teacher cannot be used, precomputed vectors do not fit the texts, a loss cannot compare the
            widths, or the disk is too small.
    """
    opened: dict[str, Opened] = {}
    widths: list[int] = []
    needed = 0  # bytes
    for teacher, cache in reversed([*zip(config.teachers, caches, strict=True)]):
        missing = [shard for shard in range(cache.shards) if not cache.has(shard)]
        if not missing:
            width: int = cache.facts(0)["width"]
        else:
            opened.clear()  # one at a time: all might not fit into memory
            opened[cache.fingerprint] = open_teacher(config, teacher, cache)
            width = opened[cache.fingerprint].width
            _check_vectors(opened[cache.fingerprint], config, cache, texts, place, student, say)
            _check_width(cache, width)
            rows = sum(stop - start for start, stop in map(cache.span, missing))
            needed += rows * (width * (2 if config.data.cache_dtype == "float16" else 1) + 48)
        widths.insert(0, width)
    check_losses(config, widths)
    check_room(
        caches[0].folder.parent,
        needed,
        "the teachers' vectors",
        "use another data.cache, or set data.cache_dtype to int8",
    )
    return opened


def open_teacher(config: Config, teacher: TeacherConfig, cache: TeacherCache) -> Opened:
    """Load a model, or open precomputed vectors."""
    if teacher.model is not None:
        return load_teacher(teacher, precision=config.precision)
    scratch = cache.folder.parent
    with disk_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    return ReadyVectors(teacher, cache.rows, scratch)


def share(cache: TeacherCache, place: Place) -> range:
    """Return the shards that this process computes."""
    rank, world = place
    return range(rank, cache.shards, world)


def _check_vectors(
    teacher: Opened,
    config: Config,
    cache: TeacherCache,
    texts: Dataset,
    place: Place,
    student: Student | None,
    say: Callable[[str], None],
) -> None:
    """Match precomputed vectors to the texts, check their order, and read this process's share of them."""
    from tqdm import tqdm

    if not isinstance(teacher, ReadyVectors):
        return
    if place[0] == 0:
        outcome = [teacher.match(texts, config.data)]
        if not teacher.keyed:
            outcome.append(teacher.check_order(texts, partial(_similarities, config, student, say)))
        say(f"teacher {teacher.name}: {'; '.join(outcome)}")
    digests = texts.select_columns(["digest"])
    todo = [cache.span(shard) for shard in share(cache, place) if not cache.has(shard)]
    for start, stop in tqdm(todo, desc=f"checking {teacher.name}", unit=" shards", delay=2, disable=None):
        teacher.read(start, stop, digests[start:stop]["digest"])


def _similarities(
    config: Config, student: Student | None, say: Callable[[str], None], texts: list[str], roles: list[str]
) -> list[np.ndarray]:
    """Similarities of texts by their words, and by the untrained student where it can be loaded. Each (n, n)"""
    from jasper_fast.training.preflight import build_student

    found = [lexical_similarities(texts)]
    try:
        student = student or build_student(config)
    except JasperError as error:
        say(f"the order of vectors is checked by the words of the texts alone: {error}")
        return found
    device, back = pick_device(), student.device
    length = min(student.max_length, ORDER_TOKENS)
    pooled = [*pool_texts(student.to(device), texts, roles, length, device, config.precision)]
    student.to(back)
    return [*found, centred_similarities(np.concatenate(pooled))]


def _check_width(cache: TeacherCache, width: int) -> None:
    for shard in range(cache.shards):
        if cache.has(shard) and (there := cache.facts(shard)["width"]) != width:
            raise JasperError(
                f"{cache.folder} holds vectors of width {there}, this teacher gives {width}; delete that folder"
            )
