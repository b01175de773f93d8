"""The planned time of an adaptation by phase, from the speeds of student and teacher on a few texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.adaptation.choose import candidate_lengths
from jasper_fast.adaptation.documents import Corpus
from jasper_fast.adaptation.embeddings import unread, with_length
from jasper_fast.adaptation.export import NARROW, narrow_widths
from jasper_fast.adaptation.measure import speeds, token_counts
from jasper_fast.adaptation.request import STUDENT, Request
from jasper_fast.adaptation.state import State
from jasper_fast.adaptation.steps import LENGTH_ROWS, SECONDS, lengths_to_compare
from jasper_fast.config.models import TeacherConfig
from jasper_fast.models.backbone import position_limit
from jasper_fast.models.embedder import EncodeWidths, load_model, model_encoder
from jasper_fast.models.encode import student_encoder
from jasper_fast.models.student import build_student
from jasper_fast.teachers.model import Teacher
from jasper_fast.training.run.folder import RunFolder
from jasper_fast.training.run.progress import Phase
from jasper_fast.utils.device import pick_device

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHORT_TEXT = 0.2  # time that a question or sentence takes, as a fraction of a document's
PLANNED = {"fit": 5.0, "scores": 5.0, "export": 15.0}  # seconds
FITTED_PER_S = 20_000  # documents
FIXED = ("training", "projections")  # phases whose time does not depend on the speed of the machine
TITLES = {
    "teacher": "reading by the teacher",
    "training": "training",
    "length": "choosing the length",
    "student": "reading by the student",
    "fit": "fitting",
    "projections": "projections",
    "scores": "scores",
    "export": "export",
}


@dataclass(frozen=True)
class Reading:
    """Speeds of student and teacher on this machine, and the lengths of the documents.

    Args:
        speed: result of `measure.speeds`.
        counts: (n,) int64, tokens of a sample of the documents.
        lengths: lengths of the student to compare, its own first.
    """

    speed: dict[str, Any]
    counts: np.ndarray
    lengths: Sequence[int]


def reading_of(model: SentenceTransformer, teacher: Teacher | None, corpus: Corpus) -> Reading:
    """Measure a student and the teacher on a few documents.

    Args:
        model: the loaded student.
        teacher: the teacher. None: precomputed vectors.
        corpus: the texts.
    """
    counts = token_counts(corpus, model)
    lengths = lengths_to_compare(model, counts)
    return Reading(speeds(model_encoder(model), teacher, corpus, counts, lengths[0]), counts, lengths)


def expected_reading(request: Request, teacher: Teacher | None, corpus: Corpus) -> Reading:
    """Measure the student as it is before its training, which is as fast as the trained one.

    Args:
        request: the call.
        teacher: the teacher. None: precomputed vectors.
        corpus: the texts.

    Raises:
        JasperError: the student cannot be built or loaded.
    """
    if request.model is not None:
        model = load_model(str(request.model.model), trust_remote_code=request.trust_remote_code)
        return reading_of(model, teacher, corpus)
    device = pick_device()
    student = build_student(request.config).to(device)
    encode: EncodeWidths = student_encoder(student, None, student.max_length, device, request.config.precision)
    counts, length = token_counts(corpus, student), student.max_length
    lengths = candidate_lengths(counts, length, position_limit(student.encoder) or length)
    return Reading(speeds(encode, teacher, corpus, counts, length), counts, lengths)


def planned_phases(request: Request, state: State, corpus: Corpus, reading: Reading, width: int) -> list[Phase]:
    """Return the phases of a call with their planned seconds, in order. What the caches have takes no time.

    Args:
        request: the call.
        state: the saved state.
        corpus: the texts.
        reading: measured speeds.
        width: the teacher's width.
    """
    units = corpus.documents + SHORT_TEXT * (len(corpus.texts) - corpus.documents)
    student, teacher = reading.speed["student"]["documents_per_s"], reading.speed["teacher"]
    trains = request.minutes is not None and not RunFolder(request.out / STUDENT).finished
    phases = []
    if teacher is not None:
        share = unread(request.config, request.teacher, corpus.texts)
        phases.append(Phase("teacher", 1, share * units / teacher["documents_per_s"]))
    if trains:
        phases.append(Phase("training", 1, 60 * float(request.minutes or 0)))
    if request.max_length is None and corpus.questions and "length" not in state.facts and len(reading.lengths) > 1:
        documents = min(corpus.documents, LENGTH_ROWS) * sum(reading.lengths) / reading.lengths[0]
        phases.append(Phase("length", 1, documents / student))
    share = 1.0 if trains else _unread_by_student(request, state, corpus)
    phases.append(Phase("student", 1, share * units / student))
    phases.append(Phase("fit", 1, PLANNED["fit"] + corpus.documents / FITTED_PER_S))
    phases.append(Phase("projections", 1, SECONDS * (len(planned_widths(request, width)) + 1)))
    return phases + [Phase(name, 1, PLANNED[name]) for name in ("scores", "export")]


def planned_widths(request: Request, width: int) -> list[int]:
    """Return the widths below the teacher's that a call will export, widest first.

    Args:
        request: the call.
        width: the teacher's width.
    """
    if request.model is not None and request.minutes is None:
        return narrow_widths(request.widths, str(request.model.model), width, request.trust_remote_code)
    own = request.config.student.heads if request.model is None else NARROW  # training on keeps the widest head only
    return sorted({one for one in request.widths or own if one < width}, reverse=True)


def plan_text(seconds: Mapping[str, float]) -> str:
    """Return the planned minutes in all and by phase.

    Args:
        seconds: planned seconds by phase.

    Example:
        >>> plan_text({"teacher": 90, "fit": 30})
        '2.0 minutes: reading by the teacher 1.5, fitting 0.5'
    """
    parts = ", ".join(f"{TITLES[name]} {spent / 60:,.1f}" for name, spent in seconds.items())
    return f"{sum(seconds.values()) / 60:,.1f} minutes: {parts}"


def _unread_by_student(request: Request, state: State, corpus: Corpus) -> float:
    """Return the fraction of the texts that the student must read. All, if its length is not chosen yet."""
    folder = request.out / STUDENT
    name = str(folder) if request.minutes is not None else str(request.model and request.model.model)
    length = request.max_length or (state.facts.get("length") or {}).get("length")
    if length is None:
        return 1.0
    model = TeacherConfig(model=name, trust_remote_code=request.trust_remote_code)
    return unread(request.config, with_length(model, length, request.config.data.cache), corpus.texts)
