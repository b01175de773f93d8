"""The figures of held-out documents by which a refitted head is compared with the trained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.evaluation.label_free import NEIGHBOURS, cosines, neighbour_weights, standard_error
from jasper_fast.evaluation.metrics import score_embeddings
from jasper_fast.evaluation.score import embed
from jasper_fast.models.embedder import normalise
from jasper_fast.models.encode import pool_texts
from jasper_fast.models.student import Student
from jasper_fast.training.data import Precision
from jasper_fast.training.held_out import LabelledDocuments

MARGIN = 2.0  # standard errors by which neighbours must rise, paired over documents or questions
DOCUMENTS, QUESTIONS, NDCG = "neighbours", "neighbours of questions", "nDCG@10"

Outputs = Callable[[np.ndarray], np.ndarray]  # pooled states (n, H) -> outputs of a head (n, width)


@dataclass(frozen=True)
class Figures:
    """Figures of one head at one width.

    Args:
        overlaps: {figure: (n,) fraction of the teacher's ten neighbours, by document or question}.
        ndcg: nDCG@10 of finding the rest of a document by its question. None: there are no questions.
    """

    overlaps: Mapping[str, np.ndarray]
    ndcg: float | None = None

    def means(self) -> dict[str, float]:
        """Return the figures by name."""
        means = {name: float(values.mean()) for name, values in self.overlaps.items()}
        return means if self.ndcg is None else means | {NDCG: self.ndcg}

    def compared(self, other: Figures) -> dict[str, dict[str, float]]:
        """Return the figures ``trained`` and ``refitted``, and the paired standard ``error`` of each difference."""
        errors = {name: standard_error(other.overlaps[name] - values) for name, values in self.overlaps.items()}
        return {"trained": self.means(), "refitted": other.means(), "error": errors}


def is_better(before: Mapping[int, Figures], after: Mapping[int, Figures]) -> bool:
    """Return whether no figure falls, and neighbours rise by the margin in the mean over the widths.

    Args:
        before: figures by width.
        after: the same of a candidate.
    """
    for width, trained in before.items():
        refitted = after[width].means()
        if any(refitted[name] < value for name, value in trained.means().items()):
            return False
    for name in next(iter(before.values())).overlaps:
        change = np.mean([after[width].overlaps[name] - of.overlaps[name] for width, of in before.items()], axis=0)
        if change.mean() > MARGIN * standard_error(change):
            return True
    return False


@dataclass(frozen=True)
class HeldOutFigures:
    """Pooled states of held-out documents and their questions, and the teacher's neighbours of these.

    Args:
        states: (m, H) float64, pooled states of the documents.
        wanted: (m, m) float64, weights of the teacher's neighbours of each document.
        question_set: the set "question → rest of the document". None: there are no questions.
        question_states: pooled states of its groups.
        question_wanted: (q, n) float64, weights of the teacher's neighbours of each question. None: the teacher cannot
            encode questions.
    """

    states: np.ndarray = field(repr=False)
    wanted: np.ndarray = field(repr=False)
    question_set: RetrievalSet | None = None
    question_states: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    question_wanted: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, labelled: LabelledDocuments, student: Student, device: torch.device, precision: Precision
    ) -> HeldOutFigures:
        """Encode the documents and questions with the student, and the questions with the teacher.

        Args:
            labelled: the documents with the teacher's embeddings.
            student: the student on the device.
            device: the device.
            precision: precision of the student's forward pass.
        """

        def pool(texts: list[str], role: str) -> dict[int, np.ndarray]:
            parts = pool_texts(student, texts, [role] * len(texts), student.max_length, device, precision)
            return {student.hidden_size: np.concatenate(list(parts)).astype(np.float64)}

        states = pool(labelled.documents.texts, "document")[student.hidden_size]
        wanted = neighbour_weights(cosines(labelled.vectors))
        questions = labelled.documents.questions
        if questions is None:
            return cls(states, wanted)
        question_states = embed(questions, pool)[student.hidden_size]
        question_wanted = None
        if labelled.teacher is not None and len(questions.documents) > NEIGHBOURS:
            ((_, groups),) = embed(questions, labelled.teacher).items()
            question_wanted = nearest_weights(groups)
        return cls(states, wanted, questions, question_states, question_wanted)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.states)

    @property
    def questions(self) -> int:
        """Number of questions."""
        return len(self.question_set.queries) if self.question_set is not None else 0

    def measure(self, head: Outputs, widths: Sequence[int]) -> dict[int, Figures]:
        """Return the figures of a head at each width.

        Args:
            head: function from pooled states to outputs, which need no normalisation.
            widths: widths of the first coordinates of the outputs.
        """
        documents = head(self.states)
        groups = {name: head(states) for name, states in self.question_states.items()}
        return {
            width: self._figures(documents[:, :width], {name: rows[:, :width] for name, rows in groups.items()})
            for width in widths
        }

    def _figures(self, documents: np.ndarray, groups: Mapping[str, np.ndarray]) -> Figures:
        overlaps = {DOCUMENTS: (neighbour_weights(cosines(documents)) * self.wanted).sum(axis=1) / NEIGHBOURS}
        if self.question_set is None:
            return Figures(overlaps)
        if self.question_wanted is not None:
            overlaps[QUESTIONS] = (nearest_weights(groups) * self.question_wanted).sum(axis=1) / NEIGHBOURS
        unit = {name: normalise(rows) for name, rows in groups.items()}
        return Figures(overlaps, score_embeddings(self.question_set, unit)[NDCG])


def nearest_weights(groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the weights of the ten documents nearest to each query, (q, n) float64.

    Args:
        groups: embeddings of "queries" (q, D) and "documents" (n, D), with n > 10.
    """
    return neighbour_weights(cosines(groups["queries"], groups["documents"]), own=False)
