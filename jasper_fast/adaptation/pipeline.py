"""The steps of an adaptation, from documents to exported models. Each continues where an interrupted call stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.adaptation.choose import ASYMMETRIC, FORMS, SYMMETRIC, Choice, HeldOutVectors, candidates, choose_maps
from jasper_fast.adaptation.documents import Corpus, read_corpus
from jasper_fast.adaptation.embeddings import Vectors, embed, fixed_identity, with_length
from jasper_fast.adaptation.export import Fitted, document_ranges, export_forms, narrow_widths
from jasper_fast.adaptation.measure import document_facts, layers_of, model_facts, width_of
from jasper_fast.adaptation.plan import expected_reading, plan_text, planned_phases, reading_of
from jasper_fast.adaptation.report import closing_lines, opening_lines, write_adapt_report
from jasper_fast.adaptation.request import STUDENT, Request, check_widths, same_space
from jasper_fast.adaptation.scores import label_free_table, recommendation, recommended
from jasper_fast.adaptation.state import DOCUMENTS, SENTENCES, State, open_state
from jasper_fast.adaptation.steps import (
    count_pairs,
    held_out_vectors,
    pick_length,
    project,
)
from jasper_fast.adaptation.student import check_student
from jasper_fast.adaptation.work import Work
from jasper_fast.config.data import DataConfig
from jasper_fast.config.models import TeacherConfig
from jasper_fast.data.text_dataset import texts_fingerprint
from jasper_fast.exporting.axes import save_axes
from jasper_fast.models.embedder import load_model
from jasper_fast.reporting.report import step_lines
from jasper_fast.teachers.model import Teacher, load_teacher
from jasper_fast.teachers.reuse import text_keys
from jasper_fast.training.run.folder import RESULTS, RunFolder, hold_folder
from jasper_fast.training.run.log import LOG
from jasper_fast.training.run.signals import leave_on_sigterm
from jasper_fast.utils.atomic import write_atomic

Train = Callable[[Request, Corpus], Path]  # trains the student and returns its run's folder


def adapt_documents(request: Request, train: Train) -> Path:
    """Adapt a student to documents.

    Args:
        request: the checked call.
        train: function that trains the student for ``request.minutes``.

    Returns:
        the folder: ``symmetric/``, ``asymmetric/`` unless the teacher is precomputed, ``report.md``, ``results.json``.

    Raises:
        JasperError: something that a user can fix.
        Stopped: a signal asked the training to stop. A checkpoint was saved first.
    """
    with leave_on_sigterm(), hold_folder(request.out):
        state = open_state(request.out, request.settings())
        state.load_statistics()
        corpus = read_request_corpus(request, state)
        if _is_done(request, state, corpus):
            print(f"{request.out} is finished: see {request.out / 'report.md'}; use --out DIR for another one")
            return request.out
        results = {"name": str(request.out), "notes": list[str](), "seconds": dict[str, float]()}
        _run(Work(request, state, corpus, results), train)
    return request.out


def read_request_corpus(request: Request, state: State | None = None) -> Corpus:
    """Read the texts of a call.

    Args:
        request: the call.
        state: the saved state, whose documents are not held out. None: nothing was saved.
    """
    questions = request.teacher.model is not None
    if state is None:
        return read_corpus(request.config.data, with_questions=questions)
    return read_corpus(request.config.data, lambda digests: state.is_new(DOCUMENTS, digests), questions)


def _is_done(request: Request, state: State, corpus: Corpus) -> bool:
    """Return whether an earlier call has done all that this one asks for."""
    if not state.finished or state.facts.get("widths") != _asked_widths(request):
        return False
    if state.facts.get("texts") == texts_fingerprint(corpus.texts):
        return True
    return not any(state.is_new(DOCUMENTS, digests).any() for digests in corpus.digests(corpus.fitted))


def _asked_widths(request: Request) -> list[int] | None:
    return None if request.widths is None else list(request.widths)


def _run(work: Work, train: Train) -> None:
    request, corpus, results = work.request, work.corpus, work.results
    print(corpus.counts.line(kept="document"), flush=True)
    loaded = load_teacher(request.teacher, precision=request.config.precision) if request.teacher.model else None
    teacher = embed(request.config, request.teacher, corpus.texts) if loaded is None else None
    width = loaded.width if loaded is not None else teacher.width if teacher is not None else 0
    check_widths(request, width)
    check_student(request)
    _begin(work, teacher, width)
    results["teacher"] = model_facts(request.teacher_name, width, loaded and loaded.model)
    results["held_out"] = {
        "documents": corpus.held_out,
        "questions": corpus.questions,
        "kinds": corpus.kinds,
        "question_in_document": True,
    }
    name = request.model.model if request.model is not None else None
    if request.minutes is None and name is not None:
        _measure(work, name, loaded)
    else:
        work.plan(planned_phases(request, work.state, corpus, expected_reading(request, loaded, corpus), width))
        print(f"planned time: {plan_text(results['planned'])}", flush=True)
    del loaded  # the next step loads it again if an embedding is missing
    if teacher is None:
        with work.step("teacher", f"the teacher reads {len(corpus.texts):,} texts"):
            teacher = embed(request.config, request.teacher, corpus.texts)
    if request.minutes is not None:
        earlier = RunFolder(request.out / STUDENT).finished
        with work.step("training", f"the student learns for {request.minutes:g} min in {request.out / STUDENT}"):
            name = str(train(request, corpus))
        results["training"] = _training_facts(request) | ({"earlier": True} if earlier else {})
        _measure(work, name, None if request.teacher.model is None else load_teacher(request.teacher))
    assert name is not None
    _fit(work, name, teacher)


def _begin(work: Work, teacher: Vectors | None, width: int) -> None:
    """Check the vectors against those of earlier calls, mark the folder as ours, and say what is unusual."""
    request, state, corpus = work.request, work.state, work.corpus
    if teacher is not None:
        keys = text_keys(corpus.texts)[: corpus.documents, 0]
        state.check_probes(keys, lambda rows: teacher.cached.read(rows).numpy(), request.teacher_name)
    if state.finished:
        (request.out / RESULTS).unlink()
    state.save_facts(texts=texts_fingerprint(corpus.texts), widths=_asked_widths(request))
    if request.teacher.model is None:
        work.note(
            "the teacher is a set of vectors: the held-out documents are the questions, and only the symmetric model "
            "is written, since nothing can encode new documents as the teacher does"
        )
    if len(corpus.fitted) < width:
        work.note(
            f"{len(corpus.fitted):,} documents for {width:,} dimensions: the map stays as it was where they say "
            "nothing. Expect about a point less than from a thousand documents"
        )
    elif corpus.questions and corpus.questions < 50:
        work.note(f"{corpus.questions:,} held-out questions: scores are uncertain by several points")


def _measure(work: Work, name: str, teacher: Teacher | None) -> None:
    """Measure speeds, describe the documents, print the opening lines and plan the time of the rest."""
    request, corpus, results = work.request, work.corpus, work.results
    model = load_model(name, trust_remote_code=request.trust_remote_code)
    reading = reading_of(model, teacher, corpus)
    work.counts = reading.counts
    width = width_of(model)
    space = _space(work, name)
    results["student"] = model_facts(name, width, model) | {
        "layers": layers_of(name, request.teacher, teacher and teacher.model),
        "same_space": space,
    }
    _describe_documents(work, results["student"]["max_length"])
    results["speed"] = reading.speed
    work.plan(planned_phases(request, work.state, corpus, reading, results["teacher"]["width"]))
    print("\n".join(opening_lines(results)), flush=True)


def _describe_documents(work: Work, max_length: int | None) -> None:
    """Fill in the facts about the documents, for the length that the student reads."""
    state, corpus = work.state, work.corpus
    blocks = corpus.digests(range(corpus.documents))
    known = sum(int((~state.is_new(DOCUMENTS, digests)).sum()) for digests in blocks)
    earlier = len(state.counted[DOCUMENTS]) - known  # counted, and not among the documents of this call
    work.results["documents"] = document_facts(work.request, corpus, work.counts, max_length, earlier)


def _fit(work: Work, name: str, teacher: Vectors) -> None:
    """Embed the texts by the student, choose maps and projections, export and report."""
    request, state, corpus, results = work.request, work.state, work.corpus, work.results
    config = _student(work, name, teacher)
    models = {"student": fixed_identity(config), "teacher": state.settings["teacher"]}
    state.check_models(models)
    with work.step("student", f"the student reads {len(corpus.texts):,} texts, up to {config.max_length:,} tokens"):
        student = embed(request.config, config, corpus.texts, STUDENT)
    with work.step("fit", "fitting the maps"):
        new = count_pairs(state, corpus, student, teacher, lambda: state.save_statistics(models))
        print(f"{new[DOCUMENTS]:,} new documents and {new[SENTENCES]:,} new sentences are counted", flush=True)
        held = held_out_vectors(corpus, student, teacher)
        chosen = choose_maps(
            candidates(state.sums[DOCUMENTS], state.sums.get(SENTENCES), results["student"]["same_space"]), held
        )
    maps = {form: chosen[form] for form in FORMS if form == SYMMETRIC or request.teacher.model is not None}
    widths = narrow_widths(request.widths, name, teacher.width, request.trust_remote_code)
    listed = ", ".join(map(str, widths)) or "no narrower width"
    with work.step("projections", f"projections to {listed}"):
        projections, axes = project(corpus, teacher, state.sums[DOCUMENTS].target, held, maps, widths)
        if axes is not None:
            save_axes(request.out, axes)
    with work.step("scores", "scores without labels"):
        _score(work, name, held, maps, projections)
    ranges = document_ranges(held, maps, projections)
    fitted = Fitted(name, config.max_length, teacher.width, maps, projections, ranges)
    with work.step("export", "writing the models"):
        export_forms(request, fitted, results)
    _report(work, fitted)


def _student(work: Work, name: str, teacher: Vectors) -> TeacherConfig:
    """Return the student as a model to encode with, at the chosen length."""
    request, state, corpus = work.request, work.state, work.corpus
    config = TeacherConfig(model=name, trust_remote_code=request.trust_remote_code)
    if request.max_length is not None:
        length = request.max_length
    elif request.teacher.model is None:  # without questions, lengths cannot be compared
        length = work.results["student"]["max_length"] or int(work.counts.max())
    else:
        if "length" not in state.facts:
            model = load_model(name, trust_remote_code=request.trust_remote_code)
            with work.step("length", "the length that the student reads"):
                choice = pick_length(name, model, corpus, teacher, work.counts)
            state.save_facts(length=choice.record())
        chosen = work.results["length"] = state.facts["length"]
        length = chosen["length"]
        if length != chosen["before"]:
            print(
                f"the student reads at most {length:,} tokens ({chosen['before']:,} before): {chosen['reason']}",
                flush=True,
            )
    work.results["student"]["max_length"] = length
    _describe_documents(work, length)
    return with_length(config, length, request.config.data.cache)


def _space(work: Work, name: str) -> bool:
    """Return whether the student was trained in the teacher's space. What this call has trained was."""
    if work.request.model is None:
        return True
    known = same_space(name, work.request.teacher)
    return known if known is not None else work.request.minutes is not None


def _training_facts(request: Request) -> dict[str, Any]:
    """Return what the run that trained the student did, and its scores without labels before and after."""
    folder = request.out / STUDENT
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    steps = step_lines((folder / LOG).read_text(encoding="utf-8").splitlines())
    return {
        "minutes": request.minutes,
        "steps": steps[-1]["step"] if steps else 0,
        "texts": results["facts"]["texts"],
        "label_free": results.get("label_free"),
    }


def _score(
    work: Work,
    name: str,
    held: HeldOutVectors,
    maps: dict[str, Choice],
    projections: dict[int, Choice],
) -> None:
    results, request = work.results, work.request
    same = results["student"]["same_space"] and results["student"]["width"] == results["teacher"]["width"]
    results["maps"] = {form: choice.record() for form, choice in maps.items()}
    results["projections"] = [{"width": width, **choice.record()} for width, choice in projections.items()]
    earlier = None
    if request.minutes is not None and request.model is not None:
        before = embed(request.config, request.model, _compared(work.corpus, held), STUDENT)
        count = len(held.student_questions)
        earlier = (before.read(range(count)), before.read(range(count, len(before.cached))))
    results["label_free"] = label_free_table(
        held,
        {form: choice.map for form, choice in maps.items()},
        {width: choice.map for width, choice in projections.items()},
        start=np.eye(results["teacher"]["width"]) if same else None,
        earlier=earlier,
    )
    results["recommendation"] = recommendation(results["label_free"], results.get("speed"))


def _compared(corpus: Corpus, held: HeldOutVectors) -> Any:
    """Return the texts of the held-out embeddings: the questions, then the searched documents."""
    first = 0 if corpus.questions else corpus.held_out
    asked = corpus.asked if corpus.questions else range(corpus.held_out)
    return corpus.texts.select([*asked, *range(first, first + len(held.corpus_student))])


def _report(work: Work, fitted: Fitted) -> None:
    """Write the report, then the results, which mark the adaptation as finished. Print the end."""
    request, results = work.request, work.results
    form, width = recommended(results["label_free"]) or (SYMMETRIC, fitted.width)
    columns = ",".join(request.source.columns)
    index = f"{request.out}-index"
    build = ["jasper-fast search build", str(request.out / form), request.documents]
    build += ["--columns", columns] if columns != "text" else []
    build += ["--id-column", request.source.id_column] if request.source.id_column is not None else []
    build += ["--width", str(width)] if width != fitted.width else []
    cache = str(request.config.data.cache)
    build += (
        ["--cache", cache] if form == ASYMMETRIC and cache != DataConfig.model_fields["cache"].default else []
    )  # has the teacher's embeddings
    results["next"] = [
        " ".join([*build, "--out", index]),
        f'jasper-fast search ask {index} "your question"',
    ]
    write_adapt_report(request.out, results)
    write_atomic(request.out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(closing_lines(results)), flush=True)
