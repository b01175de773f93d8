"""The held-out documents of a run, with the teacher's embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jasper_fast.config.run import Config
from jasper_fast.evaluation.label_free import HeldOut
from jasper_fast.models.embedder import EncodeWidths
from jasper_fast.teachers.encoder import teacher_encoder
from jasper_fast.teachers.label import label_dataset


@dataclass(frozen=True)
class LabelledDocuments:
    """Held-out documents and the teacher's embeddings of them.

    Args:
        documents: the documents that have an embedding.
        vectors: (n, D) float32 teacher embeddings.
        teacher: encode function of the teacher. None: it is a file of embeddings.
        unlabelled: a sentence on documents without an embedding. Empty: there are none.
    """

    documents: HeldOut
    vectors: np.ndarray = field(repr=False)
    teacher: EncodeWidths | None = None
    unlabelled: str = ""


def label_held_out(config: Config, rows: Any) -> LabelledDocuments | None:
    """Return the held-out documents with the teacher's embeddings, which the cache keeps.

    Args:
        config: the run's configuration.
        rows: the held-out documents, a dataset as ``TrainingData.held_out_texts``. None or empty: there are none.
    """
    if rows is None or not len(rows):
        return None
    held_out = HeldOut.of(rows[:])
    if (teacher := teacher_encoder(config.teachers, config.data.cache, config.precision)) is not None:
        ((_, vectors),) = teacher(held_out.texts, "document").items()
        return LabelledDocuments(held_out, vectors, teacher)
    labels = label_dataset(config, rows, progress=False)
    unlabelled = ""
    if labels.missing:
        unlabelled = f"{labels.missing} of {len(rows)} held-out documents have no teacher embedding"
    labelled = rows.select(labels.rows)
    held_out = HeldOut.of(labelled[:])
    first = {text: at for at, text in reversed([*enumerate(labelled["text"])])}
    vectors = labels.embeddings[[first[text] for text in held_out.texts]].numpy()
    return LabelledDocuments(held_out, vectors, None, unlabelled)
