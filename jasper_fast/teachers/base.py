"""The interface of a teacher, and the registry of teacher types.

A new type is a module with a class of this interface, and a line in ``TYPES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from jasper_fast.config.data import DataConfig
from jasper_fast.config.models import TeacherConfig

if TYPE_CHECKING:
    from datasets import Dataset

# Field of TeacherConfig that selects the type -> its class, imported when a run has such a teacher.
TYPES = {
    "model": "jasper_fast.teachers.model:Teacher",
    "vectors": "jasper_fast.teachers.precomputed:PrecomputedEmbeddings",
}

Precision = Literal["auto", "fp32", "bf16"]
Log = Callable[[str], None]
Progress = Callable[[int, int], object]  # number of texts and of tokens that were just embedded
Similarities = Callable[[list[str], list[str]], list[np.ndarray]]  # n texts, n roles -> (n, n) float64 each


class OpenTeacher(Protocol):
    """A teacher that is ready to embed texts.

    Attributes:
        width: coordinates of an embedding.
        precision: precision of the forward pass, for the header of the cache.
        reusable: True if an embedding in the cache of other texts may be copied instead of computed.
        note: message to log before texts are embedded. None logs nothing.
    """

    width: int
    precision: str
    reusable: bool
    note: str | None

    @staticmethod
    def describe(config: TeacherConfig) -> dict[str, Any]:
        """Return everything that determines the embeddings, as JSON values, by which the cache is found.

        The field that selects the type must be among them, as it names the cache.
        """
        ...

    @classmethod
    def open(
        cls, config: TeacherConfig, rows: int, scratch: Path, precision: Precision, data: DataConfig
    ) -> OpenTeacher:
        """Open a teacher for a number of training texts. Temporary files go to the folder ``scratch``."""
        ...

    def check(
        self, texts: Dataset, spans: Sequence[range], data: DataConfig, similarities: Similarities, log: Log | None
    ) -> None:
        """Check that the texts can be embedded, before any teacher embeds texts.

        Args:
            texts: training texts with columns ``text``, ``role`` and ``digest``.
            spans: rows of each shard that this process computes.
            data: configuration of the texts, for the fix in an error.
            similarities: function that measures the similarity of texts without the teacher.
            log: receiver of messages. None on all processes but the first, which checks what concerns all texts.
        """
        ...

    def embed(
        self, rows: dict[str, list[Any]], start: int, wanted: np.ndarray, vectors: np.ndarray, progress: Progress
    ) -> None:
        """Write the L2-normalised embeddings of the wanted rows of a shard.

        Args:
            rows: columns ``text``, ``role`` and ``digest`` of the shard's B texts.
            start: number of the first text.
            wanted: (B,) bool. All are wanted if ``reusable`` is False.
            vectors: (B, width) float32, to write.
            progress: function to call with the numbers of embedded texts and of their tokens.
        """
        ...


def teacher_type(config: TeacherConfig) -> type[OpenTeacher]:
    """Return the class of a teacher's type."""
    return resolve_name(TYPES[config.kind])
