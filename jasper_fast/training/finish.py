"""The end of a run: the exported model, its scores beside the teacher's, the report and the last line."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from jasper_fast.batches import Teachers
from jasper_fast.card import run_facts, write_card
from jasper_fast.codes import CALIBRATION_TEXTS, int8_ranges
from jasper_fast.config import Config
from jasper_fast.data import with_trained_piece
from jasper_fast.encode import student_encoder
from jasper_fast.encoders import load_model, model_encoder
from jasper_fast.env import cpu_name
from jasper_fast.evalsets import RetrievalSet
from jasper_fast.evaluate import PCA_ROWS, evaluate_run, load_evals
from jasper_fast.export import export_student
from jasper_fast.image_data import Images
from jasper_fast.log import LOG, seconds_spent
from jasper_fast.model import Student
from jasper_fast.pictures import load_student
from jasper_fast.report import final_line, write_report
from jasper_fast.run_folder import RESULTS, RunFolder
from jasper_fast.vision_eval import SHEET, evaluate_pictures, pictures_line, write_sheet

VERSIONS_OF = ("jasper_fast", "torch", "transformers", "sentence-transformers", "datasets", "numpy")


def finish(
    config: Config,
    folder: RunFolder,
    student: Student,
    before: Student,
    teachers: Teachers,
    texts: Any,
    transductive: list[str],
    device: torch.device,
    pictures: tuple[Images, Images] | None = None,
) -> None:
    """Export, evaluate and report; ``results.json`` comes last and marks the run as finished.

    Args:
        student: trained.
        before: the student as it was, whose pooled states are the score before.
        texts: the training texts (``datasets.Dataset``).
        transductive: names of evaluation sets of which texts were trained on.
        pictures: those trained on and those held out.
    """
    began = time.perf_counter()
    facts = run_facts(config, texts=len(texts), revisions=teachers.revisions)
    ranges = _int8_ranges(config, student, texts, device)
    export_student(student, folder.model, card=facts, ranges=ranges, replace=True)
    untrained = student_encoder(before.to(device), None, student.max_length, device, config.precision)
    rows = np.arange(min(len(texts), PCA_ROWS))
    exported = load_model(str(folder.model), trust_remote_code=config.student.trust_remote_code)
    evalsets = load_evals(config.evaluate)
    scores = evaluate_run(
        config,
        evalsets,
        untrained,
        model_encoder(exported),  # what users will load
        teachers.read(rows).numpy(),
        ranges,
    )
    results: dict[str, Any] = {
        "recipe": config.name,
        **scores,
        "transductive": transductive,
        "facts": {
            "texts": len(texts),
            "student_parameters": sum(p.numel() for p in student.parameters()),
            "teacher_width": teachers.width,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": {name: found for name in VERSIONS_OF if (found := _version(name))},
        },
    }
    for evalset in evalsets:  # the held-out docstrings are of packages that were trained on
        if isinstance(evalset, RetrievalSet) and evalset.kind == "docstrings":
            trained = with_trained_piece(evalset.documents, texts, config.data.cut_sentences[1])
            results["facts"]["held_out_docstrings"] = {"all": len(evalset.documents), "with a trained piece": trained}
    if student.vision is not None and pictures is not None and len(pictures[1]):
        seeing = load_student(
            folder.model,
            trust_remote_code=config.student.trust_remote_code,
            trust_tower_code=config.student.vision is not None and config.student.vision.trust_remote_code,
        ).to(device)
        results["pictures"], sheet = evaluate_pictures(seeing, *pictures, device, config.precision)
        write_sheet(folder.path / "plots" / SHEET, sheet, pictures[1])
    if pictures is not None and pictures[0].left_out:
        results["facts"]["pictures_left_out"] = pictures[0].left_out
    results["facts"]["seconds"] = _seconds(folder, time.perf_counter() - began)
    card = run_facts(config, results=results, texts=len(texts), revisions=teachers.revisions)
    write_card(folder.model, card, student.widths)  # the model itself is published, checked and scored
    write_report(folder.path, results)
    folder.write_json(RESULTS, results)
    print(f"model: {folder.model}\nreport: {folder.path / 'report.md'}")
    if scores:
        print(final_line(results))
    if "pictures" in results:
        print(pictures_line(results["pictures"]))


def _seconds(folder: RunFolder, evaluation: float) -> dict[str, float]:
    """Wall-clock seconds of the run, however often it was stopped; all of them hold texts and teachers' vectors too."""
    spent = seconds_spent(folder.path / LOG)
    training = sum(spent.get(event, 0.0) for event in ("plan", "pooling", "step"))
    return {
        "training": training,
        "evaluation": evaluation,
        "in all": training + evaluation + spent.get("preparation", 0.0),
    }


def _int8_ranges(config: Config, student: Student, texts: Any, device: torch.device) -> dict[int, np.ndarray]:
    """Of every width, from a spread of the training texts."""
    rows = np.unique(np.linspace(0, len(texts) - 1, CALIBRATION_TEXTS).astype(np.int64))
    encode = student_encoder(student.to(device), student.widths, student.max_length, device, config.precision)
    vectors = encode(texts[rows.tolist()]["text"], "document")
    return {width: int8_ranges(found) for width, found in vectors.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
