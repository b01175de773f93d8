"""``python -m bench teachers``: what several teachers are worth together, as they are and centred.

    python -m bench teachers --config RUN --sets FOLDER … [--key value …]

Each teacher of a run is scored alone. Then all of them are scored concatenated, as they are and centred: the mean
embedding of training texts is subtracted from each. The concatenation is also reduced by PCA to the student's widest
head, as training reduces it. Embeddings are kept in the run's cache. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jasper_fast.config.data import EvalConfig
from jasper_fast.config.load import load_arguments
from jasper_fast.config.run import Config
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.prepare import prepare_texts
from jasper_fast.evaluation.score import Row, score_rows, scores_table
from jasper_fast.models.embedder import EncodeWidths, normalise
from jasper_fast.teachers.encoder import teacher_encoder
from jasper_fast.teachers.reduction import fit_reduction, spread_rows
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError

Part = Callable[[list[str], str], np.ndarray]  # n texts and a role -> (n, D) unit rows of one teacher


def main(argv: list[str]) -> int:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench teachers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="two-teachers", help="run with the teachers (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", required=True, help="evaluation sets")
    parser.add_argument(
        "--rows", type=int, default=2000, help="training texts for means and PCA (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/teachers.json"), help="JSON to write")
    options, rest = parser.parse_known_args(argv)
    config = load_arguments(options.config, rest, ("config", "sets", "rows", "out"))
    rows = measure(config, [EvalConfig(path=path) for path in options.sets], options.rows)
    print(scores_table(rows))
    facts = {"config": options.config, "options": rest, "sets": options.sets, "rows": options.rows}
    write_atomic(options.out, json.dumps(facts | {"scores": rows}, indent=1) + "\n")
    return 0


def measure(config: Config, sets: Sequence[EvalConfig], most: int) -> list[Row]:
    """Score the teachers alone and together.

    Args:
        config: run with the teachers and training texts.
        sets: evaluation sets.
        most: largest number of training texts.
    """
    evalsets = load_evals(sets)
    texts = prepare_texts(config.model_copy(update={"evaluate": list(sets)})).texts
    texts = texts.select(spread_rows(len(texts), most))
    parts = {str(teacher.model): _part(config, index) for index, teacher in enumerate(config.teachers)}
    training = [_embed(part, texts["text"][:], texts["role"][:]) for part in parts.values()]
    means = [vectors.mean(axis=0) for vectors in training]
    zeros = [np.zeros_like(mean) for mean in means]
    encoders = {name: _joined([part], [zero]) for (name, part), zero in zip(parts.items(), zeros, strict=True)}
    width = config.student.heads[0]
    for name, shifts in {"together": zeros, "together, centred": means}.items():
        whole = _concatenated(training, shifts)
        matrix = fit_reduction(lambda rows, whole=whole: whole[rows], len(whole), width).matrix
        encoders[name] = _joined([*parts.values()], shifts)
        encoders[f"{name}, PCA"] = _joined([*parts.values()], shifts, matrix)
    rows = score_rows(evalsets, encoders)
    lengths = {name: float(np.linalg.norm(mean) ** 2) for name, mean in zip(parts, means, strict=True)}
    for row in rows:
        if row["model"] in lengths:
            row["mean_cosine"] = lengths[row["model"]]  # of two different training texts
    return rows


def _part(config: Config, index: int) -> Part:
    encode = teacher_encoder([config.teachers[index]], config.data.cache, config.precision)
    if encode is None:
        raise JasperError(
            "teachers: embeddings from a file cannot be computed for evaluation sets. Fix: give teachers with `model`"
        )
    return lambda texts, role: next(iter(encode(texts, role).values()))


def _embed(part: Part, texts: list[str], roles: list[str]) -> np.ndarray:
    """Embed texts with the prompts of their roles, (n, D)."""
    found: dict[int, np.ndarray] = {}
    for role in sorted(set(roles)):
        places = [i for i, other in enumerate(roles) if other == role]
        found |= dict(zip(places, part([texts[i] for i in places], role), strict=True))
    return np.stack([found[i] for i in range(len(texts))])


def _concatenated(parts: Sequence[np.ndarray], shifts: Sequence[np.ndarray]) -> np.ndarray:
    """Return norm(concat(norm(t_i - shift_i))), (n, sum of the widths) float32."""
    moved = [normalise(vectors - shift) for vectors, shift in zip(parts, shifts, strict=True)]
    return normalise(np.concatenate(moved, axis=1))


def _joined(parts: Sequence[Part], shifts: Sequence[np.ndarray], matrix: np.ndarray | None = None) -> EncodeWidths:
    """Make an encoder of the concatenation, reduced by a matrix if there is one."""

    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        whole = _concatenated([part(texts, role) for part in parts], shifts)
        reduced = whole if matrix is None else normalise(whole @ matrix)
        return {reduced.shape[1]: reduced}

    return encode
