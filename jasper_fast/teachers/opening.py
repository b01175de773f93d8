"""Open the teachers of a run and check their embeddings before any text is encoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from jasper_fast.config.models import TeacherConfig
from jasper_fast.config.run import Config, check_losses, reduced_width
from jasper_fast.models.encode import pool_texts
from jasper_fast.teachers.base import Log, OpenTeacher, teacher_type
from jasper_fast.teachers.cache import TeacherCache, TeacherEmbeddings
from jasper_fast.teachers.reduction import fit_reduction, stored_reduction
from jasper_fast.teachers.row_order import centred_similarities, lexical_similarities
from jasper_fast.utils.atomic import check_disk_space
from jasper_fast.utils.device import pick_device
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import settings_digest

if TYPE_CHECKING:
    from datasets import Dataset

    from jasper_fast.models.student import Student


Worker = tuple[int, int]  # rank of this process, number of processes

ORDER_TOKENS = 128  # tokens of each text that the student reads to check the row order
ROW_BYTES = 48  # bytes per cached row besides its coordinates: digest, scale and Arrow offsets


def open_all(
    config: Config,
    caches: list[TeacherCache],
    texts: Dataset,
    worker: Worker,
    student: Student | None,
    log: Log,
) -> dict[str, OpenTeacher]:
    """Open every teacher with missing shards, so that all errors are raised before any encoding starts.

    Args:
        config: configuration of the run.
        caches: one cache per teacher, in the order of ``config.teachers``.
        texts: training texts with columns ``text``, ``role`` and ``digest``.
        worker: rank of this process and number of processes.
        student: untrained student for the row-order check of embeddings without keys. None builds it when needed.
        log: receiver of messages.

    Returns:
        The first incomplete teacher, which is needed next, by its cache's fingerprint. Empty if all are complete.

    Raises:
        JasperError: a teacher cannot be loaded, precomputed embeddings do not fit the texts, a loss cannot compare the
            widths, or the disk is too small.
    """
    opened: dict[str, OpenTeacher] = {}
    widths: list[int] = []
    needed = 0  # bytes
    for teacher, cache in reversed([*zip(config.teachers, caches, strict=True)]):
        if all(cache.has(shard) for shard in range(cache.shards)):
            widths.insert(0, cache.facts(0)["width"])
            continue
        opened.clear()  # free the previous model first: all of them might not fit into memory
        opened[cache.fingerprint] = _open_checked(config, teacher, cache, texts, worker, student, log)
        widths.insert(0, opened[cache.fingerprint].width)
        needed += missing_bytes(cache, widths[0])
    check_losses(config, widths)
    if (width := reduced_width(config, widths)) is not None:
        log(f"the teachers' embeddings, {sum(widths):,} wide, are reduced to the widest head, {width:,}, by PCA")
    fix = "use another folder for the cache (--cache or data.cache), or set data.cache_dtype to int8"
    check_disk_space(caches[0].folder.parent, needed, "the teacher embeddings", fix)
    return opened


def open_teacher(config: Config, teacher: TeacherConfig, cache: TeacherCache) -> OpenTeacher:
    """Open a teacher by its type: load its model, or open its precomputed embeddings.

    Args:
        config: configuration of the run, for the precision and the sources of the texts.
        teacher: one of its teachers.
        cache: that teacher's cache. Temporary copies of files go next to it.

    Raises:
        JasperError: the model or a file cannot be used, or the cache's folder cannot be created.
    """
    return teacher_type(teacher).open(teacher, cache.rows, cache.folder.parent, config.precision, config.data)


def assigned_shards(cache: TeacherCache, worker: Worker) -> range:
    """Return the shards that this process computes."""
    rank, world = worker
    return range(rank, cache.shards, world)


def _open_checked(
    config: Config,
    teacher: TeacherConfig,
    cache: TeacherCache,
    texts: Dataset,
    worker: Worker,
    student: Student | None,
    log: Log,
) -> OpenTeacher:
    """Open one teacher. Check precomputed embeddings and the width of shards that are already cached."""
    opened = open_teacher(config, teacher, cache)
    spans = [range(*cache.span(shard)) for shard in assigned_shards(cache, worker) if not cache.has(shard)]
    similarities = partial(_similarities, config, student, log)
    opened.check(texts, spans, config.data, similarities, log if worker[0] == 0 else None)
    _check_width(cache, opened.width)
    return opened


def _similarities(
    config: Config, student: Student | None, log: Log, texts: list[str], roles: list[str]
) -> list[np.ndarray]:
    """Similarities of the texts by their words, and by the untrained student if it can be built. Each (n, n)."""
    from jasper_fast.models.student import build_student

    lexical = lexical_similarities(texts)
    try:
        student = student or build_student(config)
    except JasperError as error:
        log(f"the row order is checked only by the words of the texts, as the student cannot be built: {error}")
        return [lexical]
    return [lexical, _student_similarities(student, config, texts, roles)]


def _student_similarities(student: Student, config: Config, texts: list[str], roles: list[str]) -> np.ndarray:
    """Similarities of the texts' pooled states, (n, n)."""
    return centred_similarities(_pooled(student, config, texts, roles))


def _pooled(student: Student, config: Config, texts: list[str], roles: list[str]) -> np.ndarray:
    """Pooled states of the beginnings of texts, (n, hidden) float32. The student returns to its device."""
    device, previous = pick_device(), student.device
    length = min(student.max_length, ORDER_TOKENS)
    pooled = [*pool_texts(student.to(device), texts, roles, length, device, config.precision)]
    student.to(previous)
    return np.concatenate(pooled)


def reduce_to_head(
    config: Config, caches: list[TeacherCache], texts: Dataset, student: Student | None, log: Log
) -> TeacherEmbeddings:
    """Return the embeddings of complete caches, reduced to the widest head if a loss needs that.

    A student whose heads do not start at random gets targets that are rotated towards its untrained embeddings.

    Args:
        config: configuration of the run.
        caches: complete caches of the texts, one per teacher.
        texts: training texts with columns ``text`` and ``role``.
        student: untrained student. None builds it when needed.
        log: receiver of messages.
    """
    from jasper_fast.models.student import build_student

    full = TeacherEmbeddings(caches)
    width = reduced_width(config, full.widths)
    if width is None:
        return full
    aligned = config.student.head_init != "random"

    def start(rows: np.ndarray) -> np.ndarray:
        model, sampled = student or build_student(config), texts[rows.tolist()]
        weight, bias = (tensor.cpu().float().numpy() for tensor in model.head(width))
        return _pooled(model, config, sampled["text"], sampled["role"]) @ weight.T + bias

    untrained = config.student.model_dump(mode="json") if aligned else None
    key = settings_digest({"teachers": full.fingerprint, "width": width, "student": untrained})
    reduction = stored_reduction(
        caches[0].folder.parent / f"reduction-{key}.npz",
        lambda: fit_reduction(lambda rows: full.read(rows).numpy(), len(full), width, start if aligned else None),
    )
    log(reduction.line())
    return TeacherEmbeddings(caches, reduction)


def embedding_width(cache: TeacherCache, open_one: Callable[[], OpenTeacher]) -> int:
    """Return the width of a teacher's embeddings: that of a cached shard, or of the teacher opened for it."""
    cached = next((shard for shard in range(cache.shards) if cache.has(shard)), None)
    return open_one().width if cached is None else cache.facts(cached)["width"]


def missing_bytes(cache: TeacherCache, width: int) -> int:
    """Estimate the disk space of the missing shards."""
    spans = [cache.span(shard) for shard in range(cache.shards) if not cache.has(shard)]
    rows = sum(stop - start for start, stop in spans)
    return rows * (width * (2 if cache.identity["dtype"] == "float16" else 1) + ROW_BYTES)


def _check_width(cache: TeacherCache, width: int) -> None:
    for shard in range(cache.shards):
        if cache.has(shard) and (cached := cache.facts(shard)["width"]) != width:
            raise JasperError(
                f"{cache.folder}: cached embeddings have another width than the teacher (got {cached}, expected "
                f"{width}). Fix: delete that folder"
            )
