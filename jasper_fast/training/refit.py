"""Refit the heads of a trained student in closed form, where held-out documents show that it helps.

Outputs are divided by the length of the widest head's output: S are the widest embeddings, X the outputs of a head. The
head gets the correction S D with D = (SᵀS + λI)⁻¹ Sᵀ(G − X), a ridge regression towards the trained head. The targets G
are the teacher's embeddings. For a head in another space, they are the part of the head's outputs that the
teacher's embeddings explain. D is added to the head's weights, since S is linear in the pooled states up to its length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.config.run import trained_in_teacher_space
from jasper_fast.fitting import PairStatistics, ridge_map
from jasper_fast.models.student import Student
from jasper_fast.training.data import Teachers
from jasper_fast.training.held_out import LabelledDocuments
from jasper_fast.training.refit_figures import DOCUMENTS, NDCG, Figures, HeldOutFigures, is_better
from jasper_fast.training.run.log import append_event
from jasper_fast.training.run.run import Run
from jasper_fast.training.sample import Sample, can_refit
from jasper_fast.utils.errors import JasperError

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)  # λ
VIEW_STRENGTH = 1.0  # λ of the map from the teacher's embeddings to a head in another space


@dataclass(frozen=True)
class Head:
    """A linear head.

    Args:
        weight: (width, H) float64.
        bias: (width,) float64.
    """

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """Return the outputs of pooled states (n, H), (n, width) float64, without normalisation."""
        outputs: np.ndarray = states @ self.weight.T + self.bias
        return outputs

    def corrected(self, widest: Head, correction: np.ndarray) -> Head:
        """Return the head plus the widest head's output times a correction (h, width), rounded to float32."""
        parts = self.weight + correction.T @ widest.weight, self.bias + correction.T @ widest.bias
        return Head(*(part.astype(np.float32).astype(np.float64) for part in parts))


def refit_run(
    run: Run,
    student: Student,
    labels: Teachers,
    documents: LabelledDocuments | None,
    sample: Sample | None,
) -> dict[str, Any] | None:
    """Refit the heads of a run's student in place, and print and log what was chosen.

    Args:
        run: the run.
        student: the whole trained student on the run's device.
        labels: the teacher embeddings of the training texts.
        documents: the held-out documents with the teacher's embeddings.
        sample: training texts and their pooled states.

    Returns:
        The facts of :func:`refit_heads`, with a sentence ``line``. None: the configuration turns the refit off, or the
        run has images, or too few held-out documents with an embedding.

    Raises:
        JasperError: an embedding of a training text contains NaN or infinity.
    """
    if documents is None or sample is None or not can_refit(run.config, len(documents.documents.texts)):
        return None
    figures = HeldOutFigures.of(documents, student, run.device, run.precision)
    targets = labels.read(sample.rows).numpy()
    try:
        facts = refit_heads(student, sample.states, targets, figures, trained_in_teacher_space(run.config))
    except ValueError as error:
        raise JasperError(f"refit of the heads: {error}, or train with `refit: false`") from error
    facts["line"] = refit_line(facts)
    append_event(run.path, "refit", **facts)
    print(facts["line"], flush=True)
    return facts


def refit_heads(
    student: Student, states: Tensor, targets: np.ndarray, held_out: HeldOutFigures, same_space: bool
) -> dict[str, Any]:
    """Refit the heads of a student in place, each only if its held-out figures are better.

    Prefix heads share their weights, so they are refitted together.

    Args:
        student: the student.
        states: (n, H) float32, pooled states of training texts.
        targets: (n, d) float32, unit rows: the teacher's embeddings of these texts.
        held_out: the figures of held-out documents that decide.
        same_space: whether the widest head was trained to equal the teacher's embeddings.

    Returns:
        ``texts``, ``documents``, ``questions``, their numbers, and ``heads``, an entry for each width.
        ``strength`` is the chosen λ, or None if the trained head is kept. ``best`` is the λ of the best candidate.
        ``trained`` and ``refitted`` are the figures of the trained head and of that candidate. ``error`` has the
        standard errors of their paired differences.

    Raises:
        ValueError: shapes do not match, or a number is not finite.
    """
    rows = states.double().numpy()
    heads = {name: _read_head(linear) for name, linear in student.heads.items()}
    widest = heads[str(student.widths[0])]
    entries: list[dict[str, Any]] = []
    for name, head in heads.items():
        widths = [int(name)] if student.config.head_type == "independent" else student.widths
        candidates = refitted(head, widest, rows, targets, same_space and name == str(student.widths[0]))
        before = held_out.measure(head, widths)
        after = {strength: held_out.measure(of, widths) for strength, of in candidates.items()}
        better = [strength for strength in after if is_better(before, after[strength])]
        best = max(better or after, key=lambda strength: _rank(after[strength]))  # the smallest of equals
        if better:
            _write_head(student.heads[name], candidates[best])
        entries += [
            {"width": width, "strength": best if better else None, "best": best, **before[width].compared(of)}
            for width, of in after[best].items()
        ]
    return {"texts": len(rows), "documents": held_out.documents, "questions": held_out.questions, "heads": entries}


def refitted(head: Head, widest: Head, states: np.ndarray, targets: np.ndarray, same_space: bool) -> dict[float, Head]:
    """Return a head refitted with each strength.

    Args:
        head: the trained head.
        widest: the widest trained head.
        states: (n, H) float64, pooled states of training texts.
        targets: (n, d) unit rows, the teacher's embeddings.
        same_space: whether the head's embeddings were trained to equal the targets.

    Returns:
        {λ: head}, λ ascending.

    Raises:
        ValueError: shapes do not match, or a number is not finite.
    """
    outputs = widest(states)
    lengths = np.maximum(np.linalg.norm(outputs, axis=1, keepdims=True), 1e-12)
    embeddings, current = outputs / lengths, head(states) / lengths
    goal = targets
    if not same_space:
        seen = PairStatistics(targets.shape[1], current.shape[1])
        seen.add(targets, current)
        goal = targets @ ridge_map(seen, VIEW_STRENGTH)
    statistics = PairStatistics(embeddings.shape[1], current.shape[1])
    statistics.add(embeddings, goal - current)
    return {strength: head.corrected(widest, ridge_map(statistics, strength)) for strength in STRENGTHS}


def _rank(figures: Mapping[int, Figures]) -> float:
    """Return the mean nDCG over all widths, which predicts judged scores best. Without questions: mean neighbours."""
    means = [of.means() for of in figures.values()]
    return float(np.mean([of.get(NDCG, of[DOCUMENTS]) for of in means]))


def _read_head(linear: Any) -> Head:
    return Head(*(part.detach().double().cpu().numpy() for part in (linear.weight, linear.bias)))


@torch.no_grad()
def _write_head(linear: Any, head: Head) -> None:
    for parameter, value in ((linear.weight, head.weight), (linear.bias, head.bias)):
        parameter.copy_(torch.from_numpy(value))


def refit_line(facts: Mapping[str, Any]) -> str:
    """Return a sentence on the refit, for the terminal, the report and the model card.

    Args:
        facts: result of :func:`refit_heads`.
    """
    changed = [head for head in facts["heads"] if head["strength"] is not None]
    kept = [str(head["width"]) for head in facts["heads"] if head["strength"] is None]
    basis = f"{facts['documents']:,} held-out documents"
    if not changed:
        return f"heads stay as trained: no closed-form refit is better on {basis}"
    gains = ", ".join(f"{head['width']} ({_gains(head)})" for head in changed)
    rest = f"; as trained: {', '.join(kept)}" if kept else ""
    return f"heads refitted in closed form on {facts['texts']:,} training texts, better on {basis}: {gains}{rest}"


def _gains(head: Mapping[str, Any]) -> str:
    """Return the figures of a head that other lines of a run have too, before and after."""
    return ", ".join(
        f"{name} {100 * head['trained'][name]:.1f} → {100 * head['refitted'][name]:.1f}"
        for name in (DOCUMENTS, NDCG)
        if name in head["trained"]
    )
