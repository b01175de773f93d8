"""Scores of an adapted student without labels, next to the unadapted student, PCA and the teacher.

Held-out questions are asked, and the teacher's ranking is the truth. ``overlap`` is the fraction of the teacher's ten
nearest documents that a model finds, and the figure that models are compared by. ``ndcg`` also counts their order.
``answer_ndcg`` is the nDCG@10 of finding the question's document, and ``kept`` its fraction of the teacher's. These two
can be close to 1 for every model, if a question repeats words of its document. ``expected`` is an estimate of the
fraction of the teacher's judged nDCG@10, see :func:`expected_fraction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jasper_fast.adaptation.choose import ASYMMETRIC, SYMMETRIC, HeldOutVectors, points, projected_rows
from jasper_fast.evaluation.label_free import MIN_DOCUMENTS
from jasper_fast.evaluation.score import BEFORE, PCA, STUDENT, STUDENT_PCA, TEACHER
from jasper_fast.fitting.agreement import DEPTH, Agreement, mean_error
from jasper_fast.fitting.projections import principal_axes

UNTRAINED = "student before training"
BY_TEACHER = "teacher"  # the form of rows without a student
FULL = "full width"  # in differences: the same form at the teacher's width
LOSS = 0.05  # a narrower width is recommended if it loses at most this fraction of the full width's overlap
EXPECTED_LOSS = 0.1  # fraction of the judged nDCG@10 that losing all neighbours at full width would cost
FEWEST_FOUND = 0.4  # fraction of neighbours at full width below which nothing is estimated
CERTAIN = 2.0  # standard errors from which a difference is claimed
MIN_QUESTIONS = 10
BYTES = 4  # of a float32 number

Embeddings = tuple[np.ndarray, np.ndarray]  # of questions (q, w) and documents (n, w)


@dataclass
class _Scorer:
    """Rows of the table, and the overlap of each by question."""

    held: HeldOutVectors
    teacher: Agreement
    rows: list[dict[str, Any]] = field(default_factory=list)
    overlap: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)  # (q,) by model, form and width

    def add(self, model: str, form: str, embeddings: Embeddings) -> dict[str, Any]:
        width = embeddings[0].shape[1]
        scores = self.held.reference.measure(*embeddings)
        row: dict[str, Any] = {"model": model, "form": form, "width": width, "bytes": BYTES * width}
        row |= self._mean("overlap", scores.overlap) | self._mean("ndcg", scores.ndcg)
        if scores.answer_ndcg is not None and self.teacher.answer_ndcg is not None:
            row |= self._mean("answer_ndcg", scores.answer_ndcg)
            if self.teacher.answer_ndcg.any():
                row |= self._mean("kept", fractions_of(scores.answer_ndcg, self.teacher.answer_ndcg))
        self.overlap[model, form, width] = scores.overlap
        self.rows.append(row)
        return row

    def add_adapted(self, form: str, head: np.ndarray, projections: Mapping[int, np.ndarray]) -> None:
        """Add the adapted student at full width and at narrower ones, with the expected fraction of the teacher."""
        held = self.held
        full = self.add(STUDENT, form, held.embeddings(form, head))
        near = full["overlap"] >= FEWEST_FOUND
        if near:
            full["expected"] = expected_fraction(full["overlap"])
        for _, axes in sorted(projections.items(), reverse=True):
            row = self.add(STUDENT, form, held.embeddings(form, head, axes))
            cut = [projected_rows(rows, axes) for rows in (held.teacher_questions, held.corpus_teacher)]
            row["teacher_ndcg"] = float(held.reference.measure(*cut).ndcg.mean())
            if near:
                row["expected"] = expected_fraction(full["overlap"], row["teacher_ndcg"])

    def _mean(self, name: str, values: np.ndarray) -> dict[str, float]:
        return {name: float(values.mean()), f"{name}_error": mean_error(values, self.held.answers)}

    def differences(self) -> list[dict[str, Any]]:
        """Compare the adapted student's overlap with that of others, paired over questions."""
        found = []
        for (model, form, width), overlap in self.overlap.items():
            if model != STUDENT:
                continue
            for to, reference in self._references(form, width):
                gain = overlap - reference
                entry = {"form": form, "width": width, "to": to, "difference": float(gain.mean())}
                found.append(entry | {"error": mean_error(gain, self.held.answers)})
        return found

    def _references(self, form: str, width: int) -> Iterator[tuple[str, np.ndarray]]:
        full = self.held.corpus_teacher.shape[1]
        if width < full:
            yield FULL, self.overlap[STUDENT, form, full]
            if (STUDENT_PCA, SYMMETRIC, width) in self.overlap:
                yield STUDENT_PCA, self.overlap[STUDENT_PCA, SYMMETRIC, width]
        else:
            own = self.held.corpus_student.shape[1]
            unadapted = self.overlap[BEFORE, SYMMETRIC, own]
            yield BEFORE, self.overlap.get((BEFORE, form, full), unadapted)
            if (UNTRAINED, SYMMETRIC, own) in self.overlap:
                yield UNTRAINED, self.overlap[UNTRAINED, SYMMETRIC, own]
        if form == ASYMMETRIC and (STUDENT, SYMMETRIC, width) in self.overlap:
            yield SYMMETRIC, self.overlap[STUDENT, SYMMETRIC, width]


def label_free_table(
    held: HeldOutVectors,
    maps: Mapping[str, np.ndarray],
    projections: Mapping[int, np.ndarray],
    *,
    start: np.ndarray | None = None,
    earlier: Embeddings | None = None,
) -> dict[str, Any]:
    """Compute the scores of an adapted student, with those of the unadapted student, PCA and the teacher.

    Args:
        held: held-out embeddings.
        maps: {form: (h, d) map W}. A form may be missing.
        projections: {w: (d, w) projection P} for widths below d, of all forms. The full width d is always scored.
        start: (h, d) map of the unadapted student's questions into the teacher's index. None: they are not compared.
        earlier: (q, h') and (n, h') embeddings by the student before training. None: nothing was trained.

    Returns:
        ``documents`` (searched), ``questions``, ``answers`` (whether questions have documents), ``depth`` (10),
        ``chance`` (the overlap of a random order), ``rows`` and ``differences``. A row has ``model``, ``form``,
        ``width`` and ``bytes`` of an embedding. Its figures ``overlap``, ``ndcg``, ``answer_ndcg`` and ``kept`` are
        from 0 to 1. Each has a standard error, such as ``overlap_error``. The adapted student's rows have ``expected``
        if it finds enough neighbours, and narrow ones ``teacher_ndcg``, the teacher's with the same projection.
        Differences are in overlap, paired over questions, with ``form``, ``width``, ``to``, ``difference`` and
        ``error``. With too few documents or questions there are only their numbers and ``missing``, the reason.

    Raises:
        JasperError: an embedding contains NaN or infinity.
    """
    documents, questions = len(held.corpus_teacher), len(held.teacher_questions)
    sizes = {"documents": documents, "questions": questions}
    if reason := _missing(documents, questions):
        return sizes | {"missing": reason}
    scorer = _Scorer(held, held.reference.measure(held.teacher_questions, held.corpus_teacher))
    scorer.add(TEACHER, BY_TEACHER, (held.teacher_questions, held.corpus_teacher))
    widths = sorted(projections, reverse=True)
    _add_pca(scorer, PCA, BY_TEACHER, (held.teacher_questions, held.corpus_teacher), widths)
    unadapted = (held.student_questions, held.corpus_student)
    if earlier is not None:
        scorer.add(UNTRAINED, SYMMETRIC, earlier)
    scorer.add(BEFORE, SYMMETRIC, unadapted)
    if start is not None and ASYMMETRIC in maps:
        scorer.add(BEFORE, ASYMMETRIC, held.embeddings(ASYMMETRIC, start))
    _add_pca(scorer, STUDENT_PCA, SYMMETRIC, unadapted, widths)
    for form, head in maps.items():
        scorer.add_adapted(form, head, projections)
    return sizes | {
        "answers": held.answers is not None,
        "depth": DEPTH,
        "chance": DEPTH / documents,
        "rows": scorer.rows,
        "differences": scorer.differences(),
    }


def expected_fraction(overlap: float, teacher_ndcg: float = 1.0) -> float:
    """Estimate the fraction of the teacher's judged nDCG@10 that an adapted student has.

    Two losses are multiplied. Most documents that replace a neighbour at full width are as relevant, so losing all
    neighbours would cost a tenth. A projection costs the student what it costs the teacher.

    The rule was found on three sets with judgements (cranfield, cisi and vaswani) and a student of three layers. With
    two such students and three draws of held-out documents, it is within 5 points at full width. At narrow widths it is
    too low, by up to 8 points at 128, 12 at 64 and 18 at 32. Queries lose less by a projection than held-out questions.
    Below an overlap of ``FEWEST_FOUND`` it says nothing: no such student was among these.

    Args:
        overlap: fraction of the teacher's ten neighbours that the student finds at full width.
        teacher_ndcg: nDCG@10 of the teacher with the projection on both sides. 1: no projection.

    Example:
        >>> round(expected_fraction(0.7, 0.9), 3)
        0.873
    """
    return (1 - EXPECTED_LOSS * (1 - overlap)) * teacher_ndcg


def fractions_of(values: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Return per-question values whose mean is ``mean(values) / mean(teacher)``, and whose spread is the ratio's.

    Means, differences of means and standard errors of a ratio are then those of plain values (the delta method).

    Args:
        values: (q,) scores of a model.
        teacher: (q,) scores of the teacher on the same questions, not all zero.

    Returns:
        (q,) float64.
    """
    ratio = values.mean() / teacher.mean()
    return np.asarray(ratio + (values - ratio * teacher) / teacher.mean())


def recommendation(label_free: Mapping[str, Any], speed: Mapping[str, Any] | None = None) -> str:
    """Recommend a form and a width in one sentence. It claims differences beyond two standard errors only.

    The form is symmetric, unless asymmetric is measurably better: it needs the teacher for new documents. The width is
    the narrowest that loses at most a twentieth of the neighbours of the full width.

    Args:
        label_free: result of :func:`label_free_table`.
        speed: ``speed`` of results.json: ``student`` and ``teacher`` with ``documents_per_s``. None: not measured.
    """
    if "missing" in label_free:
        return f"No recommendation: {label_free['missing']}."
    form, form_clause = _recommended_form(label_free)
    rows = {row["width"]: row for row in label_free["rows"] if (row["model"], row["form"]) == (STUDENT, form)}
    width, width_clause = _recommended_width(label_free, form, rows)
    row = rows[width]
    found, error = 100 * row["overlap"], 100 * row["overlap_error"]
    clauses = [
        f"it finds {found:.1f} ± {error:.1f} % of the teacher's ten neighbours",
        f"about {100 * row['expected']:.0f} % of the teacher's nDCG@10 is expected"
        if "expected" in row
        else "this student is far from the teacher, so train it on the documents first (--minutes)",
        form_clause,
        width_clause,
    ]
    teacher = (speed or {}).get("teacher")
    if form == ASYMMETRIC and teacher:
        clauses.append(f"new documents need the teacher, which encodes {teacher['documents_per_s']:,.0f} a second here")
    return f"Use {form} at width {width} ({row['bytes']:,} bytes a document): {'; '.join(filter(None, clauses))}."


def recommended(label_free: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the form and the width of :func:`recommendation`. None: there are no scores.

    Args:
        label_free: result of :func:`label_free_table`.
    """
    if "missing" in label_free:
        return None
    form, _ = _recommended_form(label_free)
    rows = {row["width"]: row for row in label_free["rows"] if (row["model"], row["form"]) == (STUDENT, form)}
    return form, _recommended_width(label_free, form, rows)[0]


def difference(label_free: Mapping[str, Any], form: str, width: int, to: str) -> tuple[float, float] | None:
    """Return a difference in overlap and its standard error. None: it was not measured.

    Args:
        label_free: result of :func:`label_free_table`.
        form: form of the adapted student.
        width: its width.
        to: what it is compared with, as in ``differences``.
    """
    wanted = (form, width, to)
    found = (d for d in label_free["differences"] if (d["form"], d["width"], d["to"]) == wanted)
    return next(((d["difference"], d["error"]) for d in found), None)


def _recommended_form(label_free: Mapping[str, Any]) -> tuple[str, str]:
    forms = [row["form"] for row in label_free["rows"] if row["model"] == STUDENT]
    if len(set(forms)) == 1:
        return forms[0], ""
    full = max(row["width"] for row in label_free["rows"] if row["model"] == STUDENT)
    measured = difference(label_free, ASYMMETRIC, full, SYMMETRIC)
    assert measured is not None
    gain, error = measured
    if gain > CERTAIN * error:
        return ASYMMETRIC, f"documents by the teacher gain {points(gain, error)} over symmetric"
    if -gain > CERTAIN * error:
        return SYMMETRIC, f"documents by the teacher lose {points(-gain, error).removeprefix('+')}"
    return SYMMETRIC, "documents by the teacher gain nothing measurable"


def _recommended_width(
    label_free: Mapping[str, Any], form: str, rows: Mapping[int, Mapping[str, Any]]
) -> tuple[int, str]:
    full, *narrow = sorted(rows, reverse=True)
    enough = [width for width in narrow if rows[width]["overlap"] >= (1 - LOSS) * rows[full]["overlap"]]
    width = min(enough, default=full)
    below = [other for other in narrow if other < width]
    if not below:
        return width, ""
    measured = difference(label_free, form, max(below), FULL)
    assert measured is not None
    loss, error = -measured[0], measured[1]
    if loss <= CERTAIN * error:
        return width, ""
    return width, f"width {max(below)} loses {points(loss, error).removeprefix('+')} against width {full}"


def _add_pca(scorer: _Scorer, model: str, form: str, embeddings: Embeddings, widths: Sequence[int]) -> None:
    """Add rows of the principal axes of the searched documents, for widths below that of the embeddings."""
    questions, documents = embeddings
    narrow = [width for width in widths if width < documents.shape[1]]
    if not narrow:
        return
    wide = documents.astype(np.float64)
    axes = principal_axes(wide.T @ wide, narrow[0])
    for width in narrow:
        scorer.add(
            model, form, (projected_rows(questions, axes[:, :width]), projected_rows(documents, axes[:, :width]))
        )


def _missing(documents: int, questions: int) -> str:
    """Return the reason why there are no scores, or an empty string."""
    if documents < MIN_DOCUMENTS:
        return f"too few documents to search (got {documents}, expected at least {MIN_DOCUMENTS}). Give more documents"
    if questions < MIN_QUESTIONS:
        return (
            f"too few held-out questions (got {questions}, expected at least {MIN_QUESTIONS}). At most a tenth of the "
            f"documents is held out, so give {10 * MIN_QUESTIONS} or more that have a title or three sentences"
        )
    return ""
