"""``adapt --dry-run``: check everything that can be checked without training, and say what would be done."""

from __future__ import annotations

from jasper_fast.adaptation.documents import Corpus
from jasper_fast.adaptation.embeddings import checked_width
from jasper_fast.adaptation.pipeline import read_request_corpus
from jasper_fast.adaptation.plan import expected_reading, plan_text, planned_phases, planned_widths
from jasper_fast.adaptation.request import STUDENT, Request, check_widths
from jasper_fast.adaptation.state import DOCUMENTS, open_state
from jasper_fast.adaptation.student import check_student
from jasper_fast.teachers.model import load_teacher


def describe_request(request: Request) -> str:
    """Describe what a call would do. Nothing is written but texts in the cache.

    Args:
        request: the checked call.

    Raises:
        JasperError: the call would be rejected before its first long step.
    """
    state = open_state(request.out, request.settings())
    state.load_statistics()
    corpus = read_request_corpus(request, state)
    width = checked_width(request.config, request.teacher, corpus.texts)
    check_widths(request, width)
    check_student(request)
    widths = planned_widths(request, width)
    loaded = load_teacher(request.teacher, precision=request.config.precision) if request.teacher.model else None
    phases = planned_phases(request, state, corpus, expected_reading(request, loaded, corpus), width)
    forms = "symmetric and asymmetric" if request.teacher.model is not None else "symmetric only: vectors have no model"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in corpus.kinds.items())
    lines = [
        corpus.counts.line(kept="document"),
        f"questions: {kinds or 'the held-out documents'}",
        f"teacher: {request.teacher_name}, width {width:,}, reads {len(corpus.texts):,} texts",
        f"student: {_student(request, corpus)}",
        f"models in {request.out}: {forms}; widths {', '.join(map(str, [width, *widths]))}",
        f"planned time: {plan_text({phase.name: phase.seconds for phase in phases})}",
    ]
    if len(state.counted[DOCUMENTS]):
        lines.append(f"continues with {len(state.counted[DOCUMENTS]):,} documents that are counted already")
    return "\n".join(lines)


def _student(request: Request, corpus: Corpus) -> str:
    if request.model is None:
        return (
            f"trained for {request.minutes:g} minutes in {request.out / STUDENT}, from {request.config.student.model}"
        )
    name = str(request.model.model)
    reads = f"{name}, reads {len(corpus.texts):,} texts"
    if request.minutes is None:
        return reads
    return f"{reads} after {request.minutes:g} minutes of training in {request.out / STUDENT}"
