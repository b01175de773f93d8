"""Measured speeds of a run: a few real steps of each stage on a copy of the student, and a few encoded texts."""

from __future__ import annotations

import copy
import gc
import resource
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from jasper_fast.config.run import Config, check_losses, reduced_width
from jasper_fast.evaluation.score import STUDENT_PCA_ROWS
from jasper_fast.models.encode import student_encoder
from jasper_fast.models.quantization import CALIBRATION_TEXTS
from jasper_fast.models.student import Student
from jasper_fast.teachers.cache import joined_fingerprint
from jasper_fast.teachers.encoder import has_embeddings
from jasper_fast.teachers.label import print_error, teacher_caches
from jasper_fast.teachers.opening import embedding_width, missing_bytes, open_teacher
from jasper_fast.teachers.reuse import CacheReuse, text_keys
from jasper_fast.training.data import TrainingData
from jasper_fast.training.loop import train_step
from jasper_fast.training.neighbours import graph_folder
from jasper_fast.training.plan import Costs, StageCost
from jasper_fast.training.rng import random_state, set_random_state
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.run.log import SilentLog
from jasper_fast.training.run.run import Run
from jasper_fast.training.sample import most_sampled
from jasper_fast.training.search_costs import RandomTeachers, RankingCost, graph_seconds, query_seconds, spread
from jasper_fast.training.stages.base import BaseStage, build_stage
from jasper_fast.training.step import StepTimer
from jasper_fast.utils.device import pick_device

STEPS, LEAST_STEPS = 13, 3  # measured steps of a stage, at most and at least, after one that warms up
STEP_SECONDS, SLOW_SECONDS = 4.0, 20.0  # after so long, no further step is measured; then one step suffices
SAMPLE = 96  # texts that are encoded to measure a model
POOLED_TEXTS = 384  # texts that are pooled to measure a stage: batches of few texts have more padding than the run's
# Seconds of loading models, scores and plots, which do not depend on the texts, and written bytes per second.
EXPORT_SECONDS, EXPORT_BYTES = 6.0, 1e8

Texts = tuple[list[str], str]  # distinct texts, and their role


class PoolingLog(SilentLog):
    """A log that keeps the time of pooling and prints nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds_per_text = 0.0

    def event(self, event: str, **facts: Any) -> None:
        """Keep the seconds per pooled text."""
        if event == "pooling":
            self.seconds_per_text = facts["seconds"] / max(1, facts["texts"])


def measure_costs(config: Config, student: Student, data: TrainingData, ranks: int = 1) -> Costs:
    """Measure what a run costs, on this process's device. The student and all random numbers stay as they are.

    Args:
        config: the run's configuration.
        student: the untrained student.
        data: the training data.
        ranks: the number of processes, which divide each batch. Their communication is not measured.

    Raises:
        JasperError: a teacher or a text cannot be used, or a step does not fit in memory.
    """
    print_error("measuring the speed of each part …")
    device = pick_device()
    state = random_state(device)
    try:
        teacher = TeacherCosts(config, data)
        evaluation, evaluated, encode = evaluation_cost(config, student, data, teacher, device)
        missing = teacher.missing_seconds()
        teacher.close()
        stages = tuple(
            measure_stage(config, index, student, data, teacher, device, ranks) for index in range(len(config.stages))
        )
    finally:
        set_random_state(state, device)
    weights = 4 * sum(parameter.numel() for parameter in student.parameters())
    return Costs(
        stages,
        teacher=missing / ranks,
        missing=teacher.missing,
        evaluation=evaluation,
        evaluated=evaluated,
        texts=len(data.texts),
        most_sampled=most_sampled(config, data),
        encode=encode,
        export=EXPORT_SECONDS + weights / EXPORT_BYTES,
        memory=_peak_memory(device),
        teacher_bytes=teacher.bytes,
    )


def measure_stage(
    config: Config,
    index: int,
    student: Student,
    data: TrainingData,
    teacher: TeacherCosts,
    device: torch.device,
    ranks: int = 1,
) -> StageCost:
    """Time a few steps of a stage on a copy of the student, with real texts and random targets.

    Batches are random: those of neighbours have the same size, and need embeddings of the teachers that are missing.

    Args:
        config: the run's configuration.
        index: the stage's position in it.
        student: the student, which is copied.
        data: the training data.
        teacher: the teachers.
        device: the device that trains.
        ranks: the number of processes, which divide each batch.
    """
    settings, full = config.stages[index], build_stage(config, index, data)
    available = full.available()
    share = -(-settings.batch_size // ranks)
    changed: dict[str, Any] = {"batch_size": share, "steps": STEPS, "batches": "random", "narrow_start": "as_is"}
    unlimited = settings.model_copy(update={"steps": 10**9, "minutes": None})
    rows = build_stage(_with_stage(config, index, unlimited), index, data).pooled_rows(student)
    if rows and settings.max_chars is None:
        changed["texts"] = min(available, max(share, POOLED_TEXTS))  # so that few texts are pooled
    run = Run.local(_with_stage(config, index, settings.model_copy(update=changed)), device, log=PoolingLog())
    copied = copy.deepcopy(student).to(device)
    stage = build_stage(run.config, index, data, RandomTeachers(teacher.target_width))
    stage.rehearse()
    optimizer = stage.begin(run, copied, Position(0, index, 0))
    seconds = _time_steps(run, copied, stage, optimizer, index)
    assert isinstance(run.log, PoolingLog)
    stage.end(run)
    setup = 0.0
    if settings.batches == "neighbours" and not teacher.has_graph(available, settings.neighbours):
        setup = graph_seconds(available, settings.neighbours, teacher.width)
    ranking = ranking_cost(full, teacher, ranks)
    del copied, optimizer, stage
    _free(device)
    return StageCost(
        settings.name,
        seconds,
        settings.batch_size,
        available,
        row=run.log.seconds_per_text / ranks,
        rows=rows,
        setup=setup,
        query=ranking.query,
        queries=ranking.queries,
        pairs=ranking.pairs,
    )


def ranking_cost(stage: BaseStage, teacher: TeacherCosts, ranks: int) -> RankingCost:
    """Return the cost of the candidates and scores of a stage's queries. 0: it ranks nothing."""
    rank = stage.config.rank
    if rank is None:
        return RankingCost()
    queries, _ = stage.source()

    def embed(texts: list[str], roles: list[str]) -> float:
        return sum(teacher.seconds_per_text(index, texts, roles) for index in range(len(teacher.caches)))

    cost = query_seconds(rank, queries, stage.data.texts, embed, teacher.width, ranks)
    teacher.close()
    return cost


def _with_stage(config: Config, index: int, stage: Any) -> Config:
    return config.model_copy(update={"stages": [*config.stages[:index], stage, *config.stages[index + 1 :]]})


def _time_steps(run: Run, student: Student, stage: Any, optimizer: torch.optim.Optimizer, index: int) -> float:
    """Return the mean seconds of a step. The first one warms up and is left out."""
    began, times = time.perf_counter(), []
    clock = began
    for step, batch in stage.batches(0):
        position = Position(step + 1, index, step + 1)
        with run.explain_errors(student, stage.config, batch, f"stage {stage.config.name!r}, while it is measured"):
            train_step(run, student, stage, optimizer, step, batch, position, StepTimer(run.device))
        _synchronize(run.device)
        now = time.perf_counter()
        times.append(now - clock)
        clock = now
        least = LEAST_STEPS if now - began < SLOW_SECONDS else 1
        if len(times) > least and now - began > STEP_SECONDS:
            break
    return sum(times[1:]) / len(times[1:])


class TeacherCosts:
    """Speeds of the teachers. A model is loaded only if something has to be encoded.

    Args:
        config: the run's configuration.
        data: the training data.
    """

    def __init__(self, config: Config, data: TrainingData) -> None:
        self.config, self.texts = config, data.texts
        self.caches = teacher_caches(config, data.texts)
        self.fingerprint = joined_fingerprint(self.caches)
        self._opened: dict[int, Any] = {}
        widths = [embedding_width(cache, partial(self.open, index)) for index, cache in enumerate(self.caches)]
        check_losses(config, widths)
        self.width = sum(widths)
        self.target_width = reduced_width(config, widths) or self.width  # of the embeddings that stages learn
        self.bytes = sum(missing_bytes(cache, width) for cache, width in zip(self.caches, widths, strict=True))
        self.missing = 0  # embeddings to compute, known after `missing_seconds`

    def open(self, index: int) -> Any:
        """Open a teacher. Only one is in memory at a time."""
        if index not in self._opened:
            self.close()
            self._opened = {index: open_teacher(self.config, self.config.teachers[index], self.caches[index])}
        return self._opened[index]

    def close(self) -> None:
        """Free the models."""
        self._opened.clear()
        gc.collect()

    def has_graph(self, n: int, k: int) -> bool:
        """Return True if the cache has the graph of the k nearest neighbours of the first n texts."""
        return graph_folder(self.config.data.cache, self.fingerprint, n, k).exists()

    def missing_rows(self, index: int) -> list[int]:
        """Return the rows of a teacher's missing embeddings."""
        cache = self.caches[index]
        return [row for shard in range(cache.shards) if not cache.has(shard) for row in range(*cache.span(shard))]

    def seconds_per_text(self, index: int, texts: list[str], roles: list[str]) -> float:
        """Return the seconds per text of a teacher. 0.0: its embeddings are read from a file."""
        teacher = self.config.teachers[index]
        if teacher.model is None or not texts:
            return 0.0
        opened = self.open(index)

        def embed(part: list[str], of: list[str]) -> None:
            rows = {"text": part, "role": of, "digest": [b""] * len(part)}
            vectors = np.zeros((len(part), opened.width), np.float32)
            opened.embed(rows, 0, np.ones(len(part), bool), vectors, lambda count, tokens: None)

        embed(texts[:8], roles[:8])  # warms up
        started = time.perf_counter()
        embed(texts, roles)
        return (time.perf_counter() - started) / len(texts)

    def missing_seconds(self) -> float:
        """Return the seconds to compute the missing embeddings of all teachers, and count these embeddings.

        Embeddings in a file, or in the cache of other texts, are copied.
        """
        seconds, self.missing = 0.0, 0
        for index, cache in enumerate(self.caches):
            rows = self.missing_rows(index)
            if not rows or self.config.teachers[index].vectors is not None:
                continue
            lent = CacheReuse(cache, text_keys(self.texts))
            share = max(0.0, 1.0 - len(lent) / cache.rows)
            self.missing += round(share * len(rows))
            chosen = self.texts[spread(rows, SAMPLE)]
            seconds += share * len(rows) * self.seconds_per_text(index, chosen["text"], chosen["role"])
        return seconds


def evaluation_cost(
    config: Config, student: Student, data: TrainingData, teacher: TeacherCosts, device: torch.device
) -> tuple[float, int, float]:
    """Return the seconds of encoding all that is evaluated, the number of texts, and seconds per sampled text."""
    groups = evaluated_texts(config, data)
    texts = [text for part, _ in groups for text in part]
    own = texts or data.texts[:SAMPLE]["text"]
    copied = copy.deepcopy(student).to(device)
    rate = _student_rate(copied, spread(own, SAMPLE), device, config)
    most = most_sampled(config, data)
    calibration = 0 if most else min(CALIBRATION_TEXTS, len(data.texts))  # a sample has states of these texts
    sampled = data.texts[spread(range(len(data.texts)), SAMPLE)]["text"] if most else []
    encode = _student_rate(copied, sampled, device, config)
    del copied
    held_out = [text for part, _ in _held_out_texts(data) for text in part]
    seconds, encoded = rate * (2 * len(texts) + calibration + len(held_out) * (most > STUDENT_PCA_ROWS)), 2 * len(texts)
    if all(of.model is not None for of in config.teachers):
        for index, of in enumerate(config.teachers):
            new = [
                (text, role)
                for part, role in groups
                if not has_embeddings(of, config.data.cache, config.precision, part, role)
                for text in part
            ]
            chosen = spread(new, SAMPLE)
            rate = teacher.seconds_per_text(index, [text for text, _ in chosen], [role for _, role in chosen])
            seconds, encoded = seconds + rate * len(new), encoded + len(new)
    return seconds, encoded, encode


def evaluated_texts(config: Config, data: TrainingData) -> list[Texts]:
    """Return the distinct texts of each evaluation set and role, and of the documents held out for quality."""
    from jasper_fast.data.eval_loaders import load_evals
    from jasper_fast.evaluation.score import embed

    groups: list[Texts] = []

    def note(texts: list[str], role: str) -> dict[int, np.ndarray]:
        groups.append((texts, role))
        return {1: np.zeros((len(texts), 1), np.float32)}

    for evalset in load_evals(config.evaluate):
        embed(evalset, note)
    return [group for group in [*groups, *_held_out_texts(data)] if group[0]]


def _held_out_texts(data: TrainingData) -> list[Texts]:
    """Return the documents held out for quality, their queries, and the rest of these documents."""
    held_out = data.held_out_texts
    if held_out is None or not len(held_out):
        return []
    parts = [("text", "document"), ("query", "query"), ("body", "document")]
    return [([text for text in held_out[column][:] if text], role) for column, role in parts]


def _student_rate(student: Student, texts: list[str], device: torch.device, config: Config) -> float:
    """Return the seconds per text of the student without gradients."""
    if not texts:
        return 0.0
    encode = student_encoder(student, None, student.max_length, device, config.precision)
    encode(texts[:8], "document")  # warms up
    started = time.perf_counter()
    encode(texts, "document")
    return (time.perf_counter() - started) / len(texts)


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
