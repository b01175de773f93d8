"""Choose the map, the exported length and the narrow projections by held-out agreement with the teacher's ranking.

Every choice compares options over the same questions, and has a default: the unfitted map, the student's length, the
principal axes. Squared error of embeddings is not enough to choose by: a map can lower it and still lose ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from jasper_fast.fitting.agreement import Reference, mean_error
from jasper_fast.fitting.maps import ridge_map, start_map
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.models.embedder import normalise

SYMMETRIC, ASYMMETRIC = "symmetric", "asymmetric"
FORMS = (SYMMETRIC, ASYMMETRIC)
UNFITTED = "unfitted"
ALONE, BOTH = "documents", "documents and sentences"  # texts that a map is fitted on
STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # λ
CERTAIN = 1.0  # standard errors by which an option must beat the default
FEWEST = 10  # questions from which options are compared
SHORTEST_LENGTH = 128  # tokens; further lengths are its doubles
LONGER_TEXTS = 0.05  # a length is tried if this fraction of the texts is longer than the one before


@dataclass(frozen=True)
class HeldOutVectors:
    """Embeddings of held-out questions and of the documents that are searched, by student and teacher.

    Args:
        student_questions: (q, h) float32 unit rows, the student's widest embeddings.
        teacher_questions: (q, d) float32 unit rows.
        corpus_student: (n, h) float32 unit rows of the same documents as ``corpus_teacher``.
        corpus_teacher: (n, d) float32 unit rows. The held-out documents come first, then others.
        answers: (q,) integers, the row of each question's document. None: questions without a document.
    """

    student_questions: np.ndarray
    teacher_questions: np.ndarray
    corpus_student: np.ndarray
    corpus_teacher: np.ndarray
    answers: np.ndarray | None = None

    @cached_property
    def reference(self) -> Reference:
        """The teacher's ranking."""
        return Reference(self.teacher_questions, self.corpus_teacher, self.answers)

    def embeddings(self, form: str, head: np.ndarray, axes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings of questions (q, w) and documents (n, w) of one form, float32 unit rows.

        Args:
            form: "symmetric" or "asymmetric".
            head: (h, d) map W from the student's space to the teacher's.
            axes: (d, w) projection P. None: the teacher's full width.
        """
        projected = head if axes is None else head @ axes
        questions = projected_rows(self.student_questions, projected)
        if form == SYMMETRIC:
            return questions, projected_rows(self.corpus_student, projected)
        return questions, self.corpus_teacher if axes is None else projected_rows(self.corpus_teacher, axes)


@dataclass(frozen=True)
class Candidate:
    """A map that may be chosen.

    Args:
        name: name for the report, such as "documents and sentences, λ 10".
        map: (h, d) float64. With two kinds of texts, the mean of a map for each.
        texts: "documents" or "documents and sentences", the texts that it was fitted on. Empty: none.
        strength: λ. None: not fitted.
    """

    name: str
    map: np.ndarray
    texts: str = ""
    strength: float | None = None


@dataclass(frozen=True)
class Choice:
    """A chosen matrix, with the measurements it was chosen by.

    Args:
        name: name of the chosen option.
        map: its matrix, a map (h, d) or a projection (d, w), float64.
        table: a row for every option, the default first: ``name``, what describes it, ``overlap``, ``overlap_error``,
            ``difference`` to the default in overlap, ``difference_error`` and ``chosen``. With too few questions, the
            rows have no measurements.
        reason: one clause.
    """

    name: str
    map: np.ndarray
    table: list[dict[str, Any]]
    reason: str

    def record(self) -> dict[str, Any]:
        """Return the choice for results.json, without the matrix."""
        return {"name": self.name, "reason": self.reason, "table": self.table}


@dataclass(frozen=True)
class LengthChoice:
    """The chosen ``max_length``.

    Args:
        length: tokens.
        before: tokens that the student read before.
        table: a row for every length, as in :class:`Choice`, with ``length``.
        reason: one clause.
    """

    length: int
    before: int
    table: list[dict[str, Any]]
    reason: str

    def record(self) -> dict[str, Any]:
        """Return the choice for results.json."""
        return {"length": self.length, "before": self.before, "reason": self.reason, "table": self.table}


def best_option(overlaps: Mapping[str, np.ndarray], groups: np.ndarray | None = None) -> str:
    """Return the option with the highest mean overlap, or the default (the first) unless it is clearly better.

    This is the rule of every choice. The difference to the default is paired over questions, and must exceed its
    standard error by the factor ``CERTAIN``.

    Args:
        overlaps: {option: (q,) overlap by question}, the default first.
        groups: (q,) integers, the document of each question. None: independent questions.
    """
    default = next(iter(overlaps))
    best = max(overlaps, key=lambda name: overlaps[name].mean())
    gain = overlaps[best] - overlaps[default]
    return best if gain.mean() > CERTAIN * mean_error(gain, groups) else default


def candidates(documents: PairStatistics, sentences: PairStatistics | None, same_space: bool) -> Iterator[Candidate]:
    """Yield the maps to choose from: unfitted, then the mean of the maps fitted on documents and on sentences, by λ.

    Neither kind of text is the better one to fit on for every corpus, and held-out questions are too few to tell which
    is. On judged sets, the mean kept more of the teacher's quality than the choice did.

    Args:
        documents: sums over the embeddings of documents.
        sentences: sums over those of titles and sentences. None: only documents.
        same_space: True if the student was trained in the teacher's space.
    """
    start = start_map(documents, same_space)
    yield Candidate(UNFITTED, start)
    kinds, texts = [documents], ALONE
    if sentences is not None and sentences.count:
        kinds, texts = [documents, sentences], BOTH
    for strength in STRENGTHS:
        fitted = [ridge_map(statistics, strength, start) for statistics in kinds]
        yield Candidate(f"{texts}, λ {strength:g}", np.mean(fitted, axis=0), texts, strength)


def choose_maps(options: Iterable[Candidate], held: HeldOutVectors) -> dict[str, Choice]:
    """Choose a map for each form, by the mean overlap of questions that no map was fitted on.

    Args:
        options: the candidates, the default first.
        held: held-out embeddings. A candidate costs a matrix product and a search for each form.

    Returns:
        {form: choice}

    Raises:
        JasperError: an embedding contains NaN or infinity.
    """
    maps = {option.name: option for option in options}
    about = {name: {"texts": option.texts, "strength": option.strength} for name, option in maps.items()}
    chosen = {}
    for form in FORMS:
        pairs = {name: [partial(held.embeddings, form, option.map)] for name, option in maps.items()}
        name, table, reason = _choose(held, pairs, about)
        chosen[form] = Choice(name, maps[name].map, table, reason)
    return chosen


def choose_projection(
    held: HeldOutVectors, maps: Mapping[str, np.ndarray], options: Mapping[str, np.ndarray]
) -> Choice:
    """Choose the narrow projection of a width, the same for all forms: an index may then mix their embeddings.

    Args:
        held: held-out embeddings.
        maps: {form: (h, d) the map chosen for it}. The mean of their overlaps counts.
        options: {name: (d, w) projection}, the default first, such as "PCA" and "learned".
    """
    pairs = {
        name: [partial(held.embeddings, form, head, axes) for form, head in maps.items()]
        for name, axes in options.items()
    }
    name, table, reason = _choose(held, pairs, {name: {} for name in options})
    return Choice(name, options[name], table, reason)


def candidate_lengths(token_counts: np.ndarray, current: int, limit: int) -> list[int]:
    """Return the lengths to compare: the student's, then 128, 256, 512 … tokens while enough texts are longer.

    Args:
        token_counts: (n,) tokens of each document, not truncated.
        current: ``max_length`` of the student.
        limit: most tokens that the student can read: the size of its position table.

    Returns:
        The lengths, the current one first. It is alone if it reads almost all texts and no other reads more.
    """
    lengths, length = [current], SHORTEST_LENGTH
    while length <= limit and (np.asarray(token_counts) > length // 2).mean() >= LONGER_TEXTS:
        lengths += [length] if length != current else []
        length *= 2
    longer = (np.asarray(token_counts) > min(lengths)).mean()
    return lengths if longer >= LONGER_TEXTS else [current]


def choose_length(
    encode: Callable[[int], np.ndarray], lengths: Sequence[int], current: int, held: HeldOutVectors
) -> LengthChoice:
    """Choose the ``max_length`` of the student by the agreement of its unfitted embeddings.

    Args:
        encode: function from a length in tokens to the student's embeddings (n, h) of ``held``'s documents. It is not
            called for ``current``.
        lengths: lengths from :func:`candidate_lengths`.
        current: ``max_length`` of the student, at which ``held`` was encoded.
        held: held-out embeddings.
    """
    names = {str(length): length for length in dict.fromkeys([current, *lengths])}

    def embed(length: int) -> tuple[np.ndarray, np.ndarray]:
        return held.student_questions, held.corpus_student if length == current else encode(length)

    pairs = {name: [partial(embed, length)] for name, length in names.items()}
    name, table, reason = _choose(held, pairs, {name: {"length": length} for name, length in names.items()})
    return LengthChoice(names[name], current, table, reason)


def projected_rows(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return ``norm(rows matrix)``, (n, w) float32 unit rows.

    Args:
        rows: (n, h) float32.
        matrix: (h, w) floats.
    """
    return normalise(rows @ matrix.astype(np.float32))


def _choose(
    held: HeldOutVectors,
    options: Mapping[str, Sequence[Callable[[], tuple[np.ndarray, np.ndarray]]]],
    about: Mapping[str, Mapping[str, Any]],
) -> tuple[str, list[dict[str, Any]], str]:
    """Measure every option, the mean of its forms. Return the chosen name, the table and the reason."""
    default = next(iter(options))
    questions = len(held.student_questions)
    if len(options) == 1 or questions < FEWEST:
        reason = "the only option" if len(options) == 1 else f"{questions} held-out questions are too few to compare"
        return default, [{"name": name, **about[name], "chosen": name == default} for name in options], reason
    overlaps = {
        name: np.mean([held.reference.measure(*embed()).overlap for embed in forms], axis=0)
        for name, forms in options.items()
    }
    chosen = best_option(overlaps, held.answers)
    table = []
    for name, overlap in overlaps.items():
        gain = overlap - overlaps[default]
        row = {"name": name, **about[name], "overlap": float(overlap.mean())}
        row |= {"overlap_error": mean_error(overlap, held.answers), "difference": float(gain.mean())}
        table.append(row | {"difference_error": mean_error(gain, held.answers), "chosen": name == chosen})
    return chosen, table, _reason(table, default)


def _reason(table: Sequence[Mapping[str, Any]], default: str) -> str:
    chosen = next(row for row in table if row["chosen"])
    if chosen["name"] != default:
        return (
            f"{points(chosen['difference'], chosen['difference_error'])} of the teacher's ten neighbours against "
            f"{default}"
        )
    best = max(table, key=lambda row: row["overlap"])
    if best is chosen:
        return "no other option keeps more of the teacher's ten neighbours"
    gain = points(best["difference"], best["difference_error"])
    return f"{best['name']} is not better by more than a standard error ({gain})"


def points(difference: float, error: float) -> str:
    """Return a difference of fractions in points, such as "+1.2 ± 0.4 points".

    Args:
        difference: difference of two fractions.
        error: its standard error.
    """
    return f"{100 * difference:+.1f} ± {100 * error:.1f} points".replace("-", "−")
