"""Agreement of a model with its teacher's ranking: neighbours kept, nDCG@10, and questions that find their document.

The teacher ranks the documents for each question, and its ten nearest documents are relevant. A document's gain is the
number of these ten that the teacher scores no higher than it. So the nearest has gain 10, the tenth has gain 1, and
others have 0. Gains are graded because judged answers are mostly among the teacher's first few documents. A model that
loses these loses more than one that loses the tenth.

Scores of the teacher that differ by less than ``TIE`` are equal. Documents that tie have the same gain. Of several
copies of a document, any one counts, so the result does not depend on the order of the documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jasper_fast.mips import topk
from jasper_fast.utils.errors import JasperError

DEPTH = 10
# Rounding changes cosines of float32 embeddings by about 1e-7, for example if a text is encoded in another batch.
TIE = 1e-6


@dataclass(frozen=True)
class Agreement:
    """Scores of one model, by question.

    Args:
        overlap: (q,) float64, the fraction of the teacher's ten nearest documents among the model's ten.
        ndcg: (q,) float64, nDCG@10 of the model's ranking with the teacher's graded gains.
        answer_ndcg: (q,) float64, nDCG@10 with the question's own document as the only right answer. None: the
            questions have no document.
    """

    overlap: np.ndarray
    ndcg: np.ndarray
    answer_ndcg: np.ndarray | None = None


class Reference:
    """The teacher's ranking of documents for some questions, to measure models with.

    Args:
        questions: (q, d) float32 unit rows, the teacher's embeddings of the questions.
        documents: (n, d) float32 unit rows, the teacher's embeddings of the documents.
        answers: (q,) integers, the row of each question's own document. None: questions without a document.

    Raises:
        JasperError: no rows, shapes that do not match, an answer that is no row, or NaN.
    """

    def __init__(self, questions: np.ndarray, documents: np.ndarray, answers: np.ndarray | None = None) -> None:
        _check(questions, documents, "teacher")
        if answers is not None:
            answers = np.asarray(answers)
            _check_answers(answers, len(questions), len(documents))
        self.questions, self.documents, self.answers = questions, documents, answers
        self.depth = min(DEPTH, len(documents))
        _, nearest = topk(questions, documents, self.depth)
        self.best = self._scores(nearest)  # (q, depth) float64, the teacher's highest scores
        self.discounts = 1 / np.log2(np.arange(2, self.depth + 2))  # (depth,)
        self.ideal = np.sort(self._gains(nearest), axis=1)[:, ::-1] @ self.discounts  # (q,)

    def measure(self, questions: np.ndarray, documents: np.ndarray) -> Agreement:
        """Compare a model's ranking of the same documents with the teacher's.

        Args:
            questions: (q, w) float32 unit rows, the model's embeddings of the questions.
            documents: (n, w) float32 unit rows, the embeddings that the model searches.

        Returns:
            The agreement by question. The model's ties go to the lower row. With ten documents or fewer, every
            document is a neighbour, and the overlap is 1.

        Raises:
            JasperError: the numbers of rows or the widths do not match, or an embedding contains NaN or infinity.

        Example:
            >>> import numpy as np
            >>> rows = np.eye(12, dtype=np.float32)
            >>> Reference(rows, rows, answers=np.arange(12)).measure(rows, rows).answer_ndcg.mean()
            np.float64(1.0)
        """
        _check(questions, documents, "model")
        got, expected = (len(questions), len(documents)), (len(self.questions), len(self.documents))
        if got != expected:
            raise JasperError(
                f"agreement: the model has embeddings of {got[0]} questions and {got[1]} documents (got {got}, "
                f"expected {expected}, the teacher's). Fix: embed the same texts with both"
            )
        _, ranked = topk(questions, documents, self.depth)
        gains = self._gains(ranked)
        overlap = (gains > 0).mean(axis=1)
        return Agreement(overlap, gains @ self.discounts / self.ideal, self._answer_ndcg(ranked))

    def _scores(self, rows: np.ndarray) -> np.ndarray:
        """Return the teacher's scores (q, k) float64 of the documents ``rows`` (q, k) for each question."""
        return _products(self.questions, self.documents, rows)

    def _gains(self, rows: np.ndarray) -> np.ndarray:
        scores = self._scores(rows)
        return (scores[:, :, None] >= self.best[:, None, :] - TIE).sum(axis=2).astype(np.float64)

    def _answer_ndcg(self, ranked: np.ndarray) -> np.ndarray | None:
        """Return the discount of the best rank at which the own document, or a copy of it, was found; else 0."""
        if self.answers is None:
            return None
        own = self.documents[self.answers]
        lengths = _products(own, self.documents, self.answers[:, None])
        found = (ranked == self.answers[:, None]) | (_products(own, self.documents, ranked) >= lengths - TIE)
        return (found * self.discounts).max(axis=1)


def agreement(
    questions: np.ndarray,
    documents: np.ndarray,
    teacher_questions: np.ndarray,
    teacher_documents: np.ndarray,
    answers: np.ndarray | None = None,
) -> Agreement:
    """Compare a model's ranking of documents with its teacher's. :class:`Reference` does it for several models.

    Args:
        questions: (q, w) float32 unit rows, the model's embeddings of the questions.
        documents: (n, w) float32 unit rows, the embeddings that the model searches.
        teacher_questions: (q, d) float32 unit rows.
        teacher_documents: (n, d) float32 unit rows.
        answers: (q,) integers, the row of each question's own document. None: questions without a document.

    Returns:
        The agreement by question.

    Raises:
        JasperError: no rows, shapes that do not match, an answer that is no row, or NaN or infinity.
    """
    return Reference(teacher_questions, teacher_documents, answers).measure(questions, documents)


def mean_error(values: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Return the standard error of a mean. Values of one group may depend on each other.

    A title and a sentence of one document are such a group. The error is then that of a mean over groups.

    Args:
        values: (q,) float64.
        groups: (q,) integers, the group of each value. None: all values are independent.

    Returns:
        The standard error; infinity with fewer than two groups.
    """
    residuals = values - values.mean()
    if groups is not None:
        residuals = np.bincount(np.unique(groups, return_inverse=True)[1], weights=residuals)
    count = len(residuals)
    return float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / len(values)) if count > 1 else np.inf


def _products(left: np.ndarray, right: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the products (q, k) float64 of row i of ``left`` with the rows ``rows[i]`` of ``right``."""
    wide = left.astype(np.float64)
    return np.stack([np.einsum("qd,qd->q", wide, right[column].astype(np.float64)) for column in rows.T], axis=1)


def _check(questions: np.ndarray, documents: np.ndarray, model: str) -> None:
    for what, rows in (("questions", questions), ("documents", documents)):
        if rows.ndim != 2 or not rows.size:
            raise JasperError(
                f"agreement: no embeddings of the {what} by the {model} (got shape {rows.shape}, expected rows and "
                "columns). Fix: give at least one question and one document"
            )
        if bad := int((~np.isfinite(rows).all(axis=1)).sum()):
            raise JasperError(
                f"agreement: embeddings of the {what} by the {model} contain NaN or infinity (got {bad} such rows of "
                f"{len(rows)}, expected finite numbers). Fix: check the model, or encode in float32"
            )
    if questions.shape[1] != documents.shape[1]:
        raise JasperError(
            f"agreement: questions and documents of the {model} differ in width (got {questions.shape[1]} and "
            f"{documents.shape[1]}, expected one width). Fix: embed both at the same width"
        )


def _check_answers(answers: np.ndarray, questions: int, documents: int) -> None:
    if answers.shape != (questions,):
        raise JasperError(
            f"agreement: wrong number of answers (got shape {answers.shape}, expected {(questions,)}). "
            "Fix: give one document for each question"
        )
    if answers.min() < 0 or answers.max() >= documents:
        raise JasperError(
            f"agreement: an answer is no document (got rows {answers.min()} to {answers.max()}, expected 0 to "
            f"{documents - 1}). Fix: give the row of each question's document"
        )
