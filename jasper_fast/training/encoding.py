"""The encoding speed of student and teacher on this machine, measured in a few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from jasper_fast.models.embedder import load_model, model_encoder
from jasper_fast.teachers.encoder import teacher_encoder
from jasper_fast.training.data import TrainingData
from jasper_fast.training.run.run import Run
from jasper_fast.utils.errors import JasperError

TEXTS, FIRST = 256, 8  # the largest and the first number of texts
LONG_ENOUGH = 1.0  # seconds that a measurement should take
REPEATS = 3

Encode = Callable[[list[str]], Any]


def encoding_speed(run: Run, data: TrainingData) -> dict[str, float | int | None]:
    """Measure how many documents a second the exported student and the teacher encode.

    Both read the same held-out documents by turns, so that other load on the machine meets both. Without held-out
    documents, they read training texts.

    Args:
        run: the run, whose model is exported.
        data: the training data.

    Returns:
        ``student_texts_per_s`` and ``teacher_texts_per_s`` (None: it cannot encode), the number of ``texts``, and
        ``mean_tokens``, which the student reads of a text.
    """
    held_out = data.held_out_texts
    documents = _documents(held_out if held_out is not None and len(held_out) else data.texts)
    exported = load_model(str(run.path / "model"), trust_remote_code=run.config.student.trust_remote_code)
    student = model_encoder(exported)
    encoders: dict[str, Encode] = {"student": lambda texts: student(texts, "document")}
    with suppress(JasperError):  # the teacher's files may be gone by the end of a run
        teacher = teacher_encoder(run.config.teachers, None, "fp32")  # as users run both
        if teacher is not None:
            encoders["teacher"] = lambda texts: teacher(texts, "document")
    speeds, count = measure_speeds(encoders, documents)
    tokens = exported.tokenizer(documents[:count], truncation=True, max_length=run.config.student.max_length)
    return {
        "student_texts_per_s": round(speeds["student"], 1),
        "teacher_texts_per_s": round(speeds["teacher"], 1) if "teacher" in speeds else None,
        "texts": count,
        "mean_tokens": round(float(np.mean([len(ids) for ids in tokens["input_ids"]])), 1),
    }


def measure_speeds(encoders: dict[str, Encode], texts: list[str]) -> tuple[dict[str, float], int]:
    """Return the median speed of each encoder, in texts per second, and the number of texts.

    Args:
        encoders: functions that encode texts. The slowest decides the number of texts.
        texts: texts in random order.
    """
    count = min(FIRST, len(texts))
    for encode in encoders.values():  # the first call of a model is slow
        encode(texts[:count])
    while count < len(texts) and max(_seconds(encode, texts[:count]) for encode in encoders.values()) < LONG_ENOUGH / 2:
        count = min(2 * count, len(texts))
    spent: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(REPEATS):
        for name, encode in encoders.items():
            spent[name].append(_seconds(encode, texts[:count]))
    return {name: count / statistics.median(seconds) for name, seconds in spent.items()}, count


def _seconds(encode: Encode, texts: list[str]) -> float:
    began = time.perf_counter()
    encode(texts)
    return time.perf_counter() - began


def _documents(texts: Any) -> list[str]:
    """Return up to `TEXTS` texts, in an order that is the same in every run."""
    rows = np.random.default_rng(0).permutation(len(texts))[:TEXTS]
    return list(texts[rows.tolist()]["text"])
