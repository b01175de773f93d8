"""One side of a comparison: something that has embeddings of texts, and what is known about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.exporting.golden import ROLES, Text
from jasper_fast.utils.errors import JasperError

Prompts = Mapping[str, str]
NO_PROMPTS: Prompts = dict.fromkeys(ROLES, "")


@dataclass(frozen=True)
class Facts:
    """Declared settings of a side. None, or an empty mapping, means unknown.

    Args:
        prompts: prefixes by role.
        modules: class names of the modules, in order.
        pooling: pooling mode.
        max_tokens: tokens after which texts are truncated.
        versions: versions of packages by name.
        weights: SHA-256 of files of weights by path.
        int8: True if the weights are int8.
        model: name of the model.
    """

    prompts: Prompts | None = None
    modules: Sequence[str] | None = None
    pooling: str | None = None
    max_tokens: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    int8: bool | None = None
    model: str | None = None


class Side(ABC):
    """One side of a comparison.

    Args:
        name: argument of the command.
        kind: kind of the side in words.
        facts: declared settings.
    """

    live = True  # can embed any text

    def __init__(self, name: str, kind: str, facts: Facts) -> None:
        self.name, self.kind, self.facts = name, kind, facts

    @abstractmethod
    def embed(self, texts: Sequence[Text], prompts: Prompts | None = None, *, together: bool = True) -> np.ndarray:
        """Embed texts as the side gives them, without normalising them here.

        Args:
            texts: n texts with roles.
            prompts: prefixes by role. None: those that the side applies by itself.
            together: False to embed each text alone, so that no batch is padded.

        Returns:
            (n, D) float64 rows, all finite.

        Raises:
            JasperError: the side cannot embed a text, or an embedding is not finite.
        """

    def model_source(self) -> Path | None:
        """Return the folder of a model whose modules can be changed. None: no such folder."""
        return None


def checked_rows(rows: Any, count: int, name: str) -> np.ndarray:
    """Check embeddings and return them as (n, D) float64.

    Raises:
        JasperError: the number of rows is another one, rows differ in width, or a number is not finite.
    """
    try:
        array = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        raise JasperError(
            f"{name}: embeddings are not rows of numbers of one width. Fix: check what the model returns"
        ) from None
    if array.ndim != 2 or len(array) != count or not array.shape[1]:
        raise JasperError(
            f"{name}: wrong number of embeddings (got an array of shape {array.shape}, expected {count} rows). Fix: "
            "check that the model gives one embedding for each text"
        )
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise JasperError(
            f"{name}: the embedding of text {bad + 1} is not finite (got NaN or infinity, expected numbers). Fix: use "
            "float32 in place of float16, or check the weights"
        )
    return array
