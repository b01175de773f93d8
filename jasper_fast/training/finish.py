"""The end of a run: the exported model, its scores compared with the teacher's, and the report."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from jasper_fast.config.run import DEFAULT_KEEP
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.data.prepare import count_trained_pieces
from jasper_fast.distributed.fsdp import collect, is_sharded, load_weights
from jasper_fast.evaluation.advice import advice, loss_trend
from jasper_fast.evaluation.images import evaluate_images
from jasper_fast.evaluation.label_free import score_held_out
from jasper_fast.evaluation.score import (
    BEFORE,
    PCA_ROWS,
    STUDENT,
    STUDENT_PCA,
    STUDENT_PCA_ROWS,
    TEACHER,
    TRUNCATED,
    Reduce,
    evaluate_run,
    fit_pca,
    teacher_floors,
)
from jasper_fast.exporting.student import export_student
from jasper_fast.models.embedder import EncodeWidths, load_model, model_encoder
from jasper_fast.models.encode import pool_texts, project_states, student_encoder
from jasper_fast.models.folder import load_student
from jasper_fast.models.quantization import CALIBRATION_TEXTS, int8_ranges
from jasper_fast.models.student import Student, build_student
from jasper_fast.reporting.contact_sheet import SHEET, write_sheet
from jasper_fast.reporting.model_card import run_facts, write_card
from jasper_fast.reporting.quality import quality_lines
from jasper_fast.reporting.report import step_lines, write_report
from jasper_fast.teachers.reduction import spread_rows
from jasper_fast.training.data import Teachers, TrainingData
from jasper_fast.training.early import early_end, early_line, set_untrained_heads
from jasper_fast.training.encoding import encoding_speed
from jasper_fast.training.held_out import LabelledDocuments, label_held_out
from jasper_fast.training.refit import refit_run
from jasper_fast.training.run.checkpoint import Position, delete_spare
from jasper_fast.training.run.folder import CHECKPOINTS, EARLY, RESULTS
from jasper_fast.training.run.log import LOG, seconds_spent
from jasper_fast.training.run.phases import Phases, phase_lines, phase_seconds
from jasper_fast.training.run.progress import duration
from jasper_fast.training.run.run import Run
from jasper_fast.training.run.trackers import score_curves
from jasper_fast.training.sample import Sample, take_sample
from jasper_fast.training.stages.base import build_stages
from jasper_fast.utils.hardware import cpu_name

VERSIONS_OF = ("jasper_fast", "torch", "transformers", "sentence-transformers", "datasets", "numpy")


def finalize(run: Run, student: Student, data: TrainingData, labels: Teachers, position: Position) -> None:
    """Export, evaluate and report on rank 0, after the other ranks have left.

    ``results.json`` is written last and marks the run as finished.

    Args:
        run: the run.
        student: the trained student, sharded or not.
        data: the training data.
        labels: the teacher embeddings.
        position: the progress of the run. Before the end of the last stage, the run is finished early.
    """
    student = _full_student(run, student)
    if not run.leave_ranks():
        return
    assert run.folder is not None
    phases = Phases()
    config, folder, texts = run.config, run.folder, data.texts
    early = early_end(config, position, student)
    if early is not None:
        early["principal_heads"] = set_untrained_heads(run, student, early["untrained_heads"], texts)
    with phases.measure("refit"):
        documents = label_held_out(config, data.held_out_texts)
        sample = take_sample(run, student, data, position)
        refit = refit_run(run, student, labels, documents, sample)
    with phases.measure("export"):
        ranges = _int8_ranges(run, student, texts, sample)
        facts = run_facts(config, texts=len(texts), revisions=labels.revisions)
        export_student(student, folder.model, card=facts, ranges=ranges, replace=True)
    with phases.measure("evaluation"):
        results = _evaluate(run, student, data, labels, ranges, documents, sample)
    if refit is not None:
        results["refit"] = refit
    if early is not None:
        results |= {EARLY: early, "early_line": early_line(early)}
    with phases.measure("speed"):
        results["facts"]["encoding"] = encoding_speed(run, data)
    results["facts"]["seconds"] = _seconds(run, phases.in_all)
    results["facts"]["phases"] = phase_seconds(run.path / LOG, phases)
    results["facts"]["planned_seconds"] = run.planned_seconds
    card = run_facts(config, results=results, texts=len(texts), revisions=labels.revisions)
    write_card(
        folder.model, card, student.widths, flat=student.headless
    )  # the model itself is published, checked and scored
    write_report(folder.path, results)
    with suppress(OSError):  # it is missing or not empty
        folder.pooled.rmdir()
    folder.write_json(RESULTS, results)
    if early is None and config.checkpoint.keep == DEFAULT_KEEP:
        delete_spare(folder.path / CHECKPOINTS)
    run.track(score_curves(results.get("rows", []), STUDENT), position.step)
    if run.planned_seconds:
        took, planned = results["facts"]["seconds"]["in all"], run.planned_seconds["in all"]
        print(f"time: {duration(took)} (planned: {duration(planned)})")
    places = [f"model: {folder.model}", f"report: {folder.path / 'report.md'}"]
    print("\n".join([*phase_lines(results["facts"]["phases"]), *places]))
    print("\n".join(quality_lines(results)))
    if early is not None:
        print(f"{results['early_line']}\nRun the command without --finish to train on")


def _full_student(run: Run, student: Student) -> Student:
    """Return the student with all weights on rank 0. All ranks must call it."""
    if not is_sharded(student):
        return student
    weights = collect(student.state_dict(), run.ranks.is_main)
    if run.ranks.is_main:
        student = build_student(run.config)
        load_weights(student, weights)
    return student


def _evaluate(
    run: Run,
    student: Student,
    data: TrainingData,
    labels: Teachers,
    ranges: dict[int, np.ndarray],
    documents: LabelledDocuments | None,
    sample: Sample | None,
) -> dict[str, Any]:
    """Return the results of the exported model, of the student before training and of the teacher."""
    config, device, texts = run.config, run.device, data.texts
    evalsets = load_evals(config.evaluate)
    before = build_student(config).to(device)
    exported = load_model(str(run.path / "model"), trust_remote_code=config.student.trust_remote_code)
    encode_before = student_encoder(before, None, student.max_length, device, config.precision)
    encode = model_encoder(exported)  # what users will load
    train_vectors = labels.read_full(np.arange(min(len(texts), PCA_ROWS))).numpy()
    student_pca = _student_pca(student, sample) if sample is not None else {}
    scores = evaluate_run(config, evalsets, encode_before, encode, train_vectors, ranges, student_pca)
    if documents is not None:
        floors = teacher_floors(train_vectors, config.student.heads) | {STUDENT_PCA: student_pca}
        encoders = {BEFORE: encode_before, STUDENT: encode}
        scores |= _label_free(run, documents, encoders, floors, ranges)
    lines = [line for stage in build_stages(config, data) for line in stage.lines()]
    results: dict[str, Any] = {
        "recipe": config.name,
        **scores,
        "transductive": list(data.transductive),
        "facts": {
            "texts": len(texts),
            "texts_line": data.texts_line,
            **({"notes": list(config.notes)} if config.notes else {}),
            **({"stage_lines": lines} if lines else {}),
            "student_parameters": sum(p.numel() for p in student.parameters()),
            "teacher_width": labels.width,
            **({"teacher_reduction": labels.reduction.line()} if labels.reduction is not None else {}),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": {name: number for name in VERSIONS_OF if (number := _version(name))},
        },
    }
    for evalset in evalsets:  # held-out docstrings belong to packages that were trained on
        if isinstance(evalset, RetrievalSet) and evalset.kind == "docstrings":
            trained = count_trained_pieces(evalset.documents, texts, config.data.cut_sentences[1])
            results["facts"]["held_out_docstrings"] = {"all": len(evalset.documents), "with a trained piece": trained}
    _evaluate_images(run, student, data, results)
    return results


def _label_free(
    run: Run,
    labelled: LabelledDocuments,
    encoders: dict[str, EncodeWidths],
    floors: dict[str, dict[int, Reduce]],
    ranges: dict[int, np.ndarray],
) -> dict[str, Any]:
    """Return the fields ``label_free`` and ``advice`` of the results, from the held-out documents."""
    if not labelled.documents.texts:
        return {"label_free": {"documents": 0, "queries": 0, "missing": labelled.unlabelled}}
    floors = {name: reduces for name, reduces in floors.items() if name != TRUNCATED}
    if labelled.teacher is not None:
        encoders = {TEACHER: labelled.teacher} | encoders
    scores = score_held_out(labelled.documents, labelled.vectors, encoders, floors, ranges)
    if labelled.unlabelled:
        scores["unlabelled"] = labelled.unlabelled
    return {"label_free": scores, "advice": advice(scores, _main_trend(run))}


def _main_trend(run: Run) -> dict[str, Any] | None:
    """Return the loss trend of the last stage that trains encoder layers and the widest head, None without one."""
    widest = max(run.config.student.heads)
    lines = (run.path / LOG).read_text(encoding="utf-8").splitlines()
    stages = [stage.name for stage in run.config.stages if widest in stage.heads and stage.last_layers]
    return loss_trend(step_lines(lines), stages[-1]) if stages else None


def _student_pca(student: Student, sample: Sample) -> dict[int, Reduce]:
    """Fit the PCA of the student's widest embeddings, on a part of the sampled training texts."""
    states = sample.states[spread_rows(len(sample.rows), STUDENT_PCA_ROWS)].to(student.device)
    return fit_pca(project_states(student, states, student.widths[:1])[student.widths[0]], student.widths)


def _evaluate_images(run: Run, student: Student, data: TrainingData, results: dict[str, Any]) -> None:
    """Add the scores of the held-out images to the results, and write their contact sheet."""
    if data.images is None or data.held_out_images is None:
        return
    vision = run.config.student.vision
    if student.vision is not None and len(data.held_out_images):
        exported = load_student(
            run.path / "model",
            trust_remote_code=run.config.student.trust_remote_code,
            trust_tower_code=vision is not None and vision.trust_remote_code,
        ).to(run.device)
        results["pictures"], sheet = evaluate_images(
            exported, data.images, data.held_out_images, run.device, run.precision
        )
        write_sheet(run.path / "plots" / SHEET, sheet, data.held_out_images)
    if data.images.left_out:
        results["facts"]["pictures_left_out"] = data.images.left_out


def _seconds(run: Run, evaluation: float) -> dict[str, float]:
    """Return the wall-clock seconds of the run over all resumes. "in all" includes texts and teacher embeddings."""
    spent = seconds_spent(run.path / LOG)
    training = sum(spent.get(event, 0.0) for event in ("plan", "pooling", "ranking", "step"))
    return {
        "training": training,
        "evaluation": evaluation,
        "in all": training + evaluation + spent.get("preparation", 0.0),
    }


def _int8_ranges(run: Run, student: Student, texts: Any, sample: Sample | None) -> dict[int, np.ndarray]:
    """Return the int8 ranges of every width, from texts spread over the training texts, or over their sample."""
    rows = spread_rows(len(texts) if sample is None else len(sample.rows), CALIBRATION_TEXTS)
    if sample is None:
        chosen = texts[rows.tolist()]
        parts = pool_texts(
            student.to(run.device), chosen["text"], chosen["role"], student.max_length, run.device, run.precision
        )
        states = torch.from_numpy(np.concatenate(list(parts)))
    else:
        states = sample.states[rows]
    embeddings = project_states(student, states.to(student.device), student.widths)
    return {width: int8_ranges(of_width) for width, of_width in embeddings.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
