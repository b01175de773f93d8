"""Write the adapted models, one folder for each form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.adaptation.choose import ASYMMETRIC, SYMMETRIC, Choice, HeldOutVectors
from jasper_fast.adaptation.request import Request
from jasper_fast.evaluation.score import STUDENT
from jasper_fast.exporting.adapted import export_asymmetric, export_symmetric
from jasper_fast.models.embedder import load_model, model_widths
from jasper_fast.models.quantization import int8_ranges
from jasper_fast.reporting.model_card import adapted_facts
from jasper_fast.teachers.model import Teacher, describe_teacher, load_teacher
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import public_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

NARROW = (128, 64, 32)  # widths for a student without narrow heads


@dataclass(frozen=True)
class Fitted:
    """The choices that make the models.

    Args:
        student: the student's folder or name.
        max_length: tokens that it reads.
        width: the teacher's width d.
        maps: (h, d) map by form.
        projections: (d, w) projection by width below d, of both forms.
        ranges: (2, w) float32 ranges of int8 codes by form and width.
    """

    student: str
    max_length: int
    width: int
    maps: Mapping[str, Choice]
    projections: Mapping[int, Choice]
    ranges: Mapping[str, Mapping[int, np.ndarray]]

    def heads(self, form: str) -> dict[int, np.ndarray]:
        """Return the matrix (h, w) of each width, which follows the student's widest embedding."""
        matrix = self.maps[form].map
        return {self.width: matrix} | {w: matrix @ axes.map for w, axes in self.projections.items()}


def narrow_widths(asked: Sequence[int] | None, student: str, width: int, trust_remote_code: bool) -> list[int]:
    """Return the widths below the teacher's to export, widest first.

    Args:
        asked: widths of the call. None: those of the student, or the default ones.
        student: folder or name.
        width: the teacher's width.
        trust_remote_code: permission to run the student's code.
    """
    if asked is None:
        own = model_widths(load_model(student, trust_remote_code=trust_remote_code))
        asked = [narrow for narrow in own if narrow < max(own)] or list(NARROW)
    return sorted({narrow for narrow in asked if narrow < width}, reverse=True)


def document_ranges(
    held: HeldOutVectors, maps: Mapping[str, Choice], projections: Mapping[int, Choice]
) -> dict[str, dict[int, np.ndarray]]:
    """Return the int8 ranges of each form and width, from the embeddings of the searched documents.

    Args:
        held: held-out embeddings with the searched documents.
        maps: the chosen map of each form.
        projections: the chosen projection of each width below d.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for form, choice in maps.items():
        axes = {held.corpus_teacher.shape[1]: None} | {width: narrow.map for width, narrow in projections.items()}
        found[form] = {
            width: int8_ranges(held.embeddings(form, choice.map, matrix)[1]) for width, matrix in axes.items()
        }
    return found


def export_forms(request: Request, fitted: Fitted, results: Mapping[str, Any]) -> None:
    """Write ``symmetric/``, and ``asymmetric/`` if there is a map for it. Each is published whole or not at all.

    Args:
        request: the call.
        fitted: what was chosen.
        results: the results so far, for the model cards.

    Raises:
        JasperError: a folder cannot be written, or an exported model differs from its source.
    """
    student = load_model(fitted.student, trust_remote_code=request.trust_remote_code)
    options: dict[str, Any] = {
        "max_length": fitted.max_length,
        "replace": True,
        "trust_remote_code": request.trust_remote_code,
    }
    path = request.out / SYMMETRIC
    card = _card(request, fitted, results, SYMMETRIC)
    export_symmetric(student, fitted.heads(SYMMETRIC), path, card=card, ranges=fitted.ranges[SYMMETRIC], **options)
    if ASYMMETRIC not in fitted.maps:
        return
    teacher = load_teacher(request.teacher)
    card = _card(request, fitted, results, ASYMMETRIC)
    card["adapted"]["documents_by"] = {  # `search build` finds the teacher's embeddings in the cache by it
        "identity": describe_teacher(request.teacher),
        "max_length": teacher.max_length,
        "width": fitted.width,
    }
    export_asymmetric(
        student,
        _as_stock(teacher),
        fitted.heads(ASYMMETRIC),
        _projections(teacher, fitted),
        request.out / ASYMMETRIC,
        card=card,
        ranges=fitted.ranges[ASYMMETRIC],
        **options,
    )


def _as_stock(teacher: Teacher) -> SentenceTransformer:
    """Return the teacher's model with its configured prompts.

    Raises:
        JasperError: a prompt has the text in its middle, which stock models cannot do.
    """
    prompts = teacher.fingerprint["prompts"]
    if any("{text}" in prompt for prompt in prompts.values()):
        raise JasperError(
            f"{teacher.name}: a prompt has the text inside (got {prompts}, expected prompts before the text), which no "
            "stock model can have. Fix: give --teacher a model, whose own prompts are then used"
        )
    teacher.model.prompts = {**teacher.model.prompts, **prompts}
    return teacher.model


def _projections(teacher: Teacher, fitted: Fitted) -> dict[int, np.ndarray | None]:
    """Return the projection of each width from the teacher's whole embedding. A cut teacher has more coordinates."""
    full = model_widths(teacher.model)[0]
    narrow = {width: axes.map for width, axes in fitted.projections.items()}
    if full == fitted.width:
        return {fitted.width: None, **narrow}
    cut = np.eye(full, fitted.width)
    return {fitted.width: cut} | {width: cut @ axes for width, axes in narrow.items()}


def _card(request: Request, fitted: Fitted, results: Mapping[str, Any], form: str) -> dict[str, Any]:
    scored = results["label_free"].get("rows", [])
    rows = [row for row in scored if (row["model"], row["form"]) == (STUDENT, form)]
    names = {
        "width": "width",
        "overlap": "neighbours",
        "answer_ndcg": "nDCG@10",
        "kept": "kept",
        "expected": "expected",
    }
    return adapted_facts(
        fitted.student,
        request.teacher_name,
        name=f"{request.config.name} {form}",
        sources=[public_name(request.documents)],
        documents=results["documents"]["used"] - results["held_out"]["documents"],
        held_out=results["held_out"]["documents"],
        chosen=fitted.maps[form].name,
        projections={width: choice.name for width, choice in fitted.projections.items()},
        scores=[{name: row[key] for key, name in names.items() if key in row} for row in rows],
    )
