"""References for adapted models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

PROMPTS = {"query": "the city council ", "document": ""}
TEACHER_PROMPTS = {"query": "not used: ", "document": "apples, "}
H, D = 24, 32  # widths of the student's embeddings and of the teacher's
TEXTS = [
    "forty boxes",
    "  The OLD lighthouse keeper\n",
    "an engine that runs on warm air. " * 20,
    "it took three weeks",
]


def random_matrix(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, rows, width]).standard_normal((rows, width))


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def source(model: Any, role: str, max_length: int | None = None, texts: list[str] = TEXTS) -> np.ndarray:
    """Return a model's own embeddings, (n, D) float64 unit rows."""
    if max_length is not None:
        model = copy.deepcopy(model)
        model.max_seq_length = max_length
    return unit((model.encode_query if role == "query" else model.encode_document)(texts))
