"""What a model is worth: retrieval, similarity and classification scores for every width, student beside teacher.

python -m jasper_fast.evaluate runs/minilm-docstrings docstrings path/to/beir path/to/dev.tsv
python -m jasper_fast.evaluate MODEL DATA --teacher TEACHER --widths 384,128 --json scores.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.codes import PRECISIONS, known_precisions, read_ranges
from jasper_fast.command_line import check_model_argument, whole_number
from jasper_fast.config import Config, EvalConfig
from jasper_fast.encoders import EncodeWidths, load_model, model_encoder, normalise, routes, teacher_encoder
from jasper_fast.errors import JasperError, run_cli
from jasper_fast.evalsets import EvalSet, RetrievalSet, load_eval, load_evals
from jasper_fast.files import check_file, write_atomic
from jasper_fast.metrics import score_codes, score_vectors

__all__ = [
    "EvalSet",
    "evaluate_run",
    "evaluate_vectors",
    "evaluate_widths",
    "load_eval",
    "load_evals",
    "score_rows",
    "scores_table",
    "teacher_floors",
]

TEACHER, BEFORE, STUDENT, PCA, TRUNCATED = "teacher", "student before", "student", "teacher PCA", "teacher truncated"
PCA_ROWS = 20_000  # training vectors that PCA is fitted on

Reduce = Callable[[np.ndarray], np.ndarray]
Row = dict[str, Any]  # {"model": str, "width": int, "scores": {"set/metric": float}}


def embed(evalset: EvalSet, encode: EncodeWidths) -> dict[int, dict[str, np.ndarray]]:
    """Vectors of every group of a set for every width; a text that stands there twice is encoded once.

    Returns:
        {width: {group: (n, width) float32}}
    """
    groups = evalset.groups()
    found: dict[int, dict[str, np.ndarray]] = {}
    for role in sorted({role for _, role in groups.values()}):
        members = {name: texts for name, (texts, r) in groups.items() if r == role}
        distinct = {text: at for at, text in enumerate(dict.fromkeys(t for texts in members.values() for t in texts))}
        for width, vectors in encode(list(distinct), role).items():
            if vectors.shape != (len(distinct), width):
                raise ValueError(f"encode gave {vectors.shape} for {len(distinct)} texts at width {width}")
            for name, texts in members.items():
                found.setdefault(width, {})[name] = vectors[[distinct[text] for text in texts]]
    return found


def evaluate_widths(evalset: EvalSet, encode: EncodeWidths) -> dict[int, dict[str, float]]:
    """Scores of one set for every width that ``encode`` gives, each text encoded once.

    Args:
        evalset: from ``load_eval``.
        encode: (texts, role "query" | "document") -> {width: (n, width) float32 of length one}.

    Returns:
        {width: {metric: score}}
    """
    return {width: score_vectors(evalset, vectors) for width, vectors in embed(evalset, encode).items()}


def evaluate_vectors(evalset: EvalSet, encode: Callable[[list[str], str], np.ndarray]) -> dict[str, float]:
    """Scores of one set with vectors of one width.

    Args:
        evalset: from ``load_eval``.
        encode: (texts, role) -> (n, D) float32, rows of length one.
    """

    def one(texts: list[str], role: str) -> dict[int, np.ndarray]:
        vectors = encode(texts, role)
        return {vectors.shape[1]: vectors}

    ((_, scores),) = evaluate_widths(evalset, one).items()
    return scores


def teacher_floors(train_vectors: np.ndarray, widths: Sequence[int]) -> dict[str, dict[int, Reduce]]:
    """What can be had without training: the teacher's vectors made narrow by PCA, and by keeping the first coordinates.

    Args:
        train_vectors: (n, D) teacher vectors of training texts, on which PCA is fitted (centred).
        widths: those below D are used; PCA also needs as many vectors as coordinates.

    Returns:
        {"teacher PCA": {width: reduce}, "teacher truncated": {width: reduce}}; ``reduce`` maps (m, D) to (m, width)
        float32, rows of length one.
    """
    from sklearn.decomposition import PCA as Projection

    n, dimension = train_vectors.shape
    narrow = sorted({w for w in widths if w < dimension}, reverse=True)
    fitted = [w for w in narrow if w <= n]
    floors: dict[str, dict[int, Reduce]] = {TRUNCATED: {w: _first(w) for w in narrow}}
    if fitted:
        projection = Projection(n_components=fitted[0], random_state=0).fit(train_vectors)
        mean, axes = projection.mean_.astype(np.float32), projection.components_.astype(np.float32)
        floors[PCA] = {w: _project(mean, axes[:w]) for w in fitted}
    return floors


def _first(width: int) -> Reduce:
    return lambda vectors: normalise(vectors[:, :width])


def _project(mean: np.ndarray, axes: np.ndarray) -> Reduce:
    return lambda vectors: normalise((vectors - mean) @ axes.T)


def score_rows(
    evalsets: Sequence[EvalSet],
    encoders: Mapping[str, EncodeWidths],
    floors: Mapping[str, Mapping[int, Reduce]] | None = None,
    precisions: Sequence[str] = ("float32",),
    ranges: Mapping[int, np.ndarray] | None = None,
) -> list[Row]:
    """One row per model, width and precision with its scores on every set, widest first.

    Args:
        evalsets: the sets.
        encoders: the models by name; every text is encoded once by each.
        floors: from ``teacher_floors``; they reduce the vectors of the encoder named "teacher".
        precisions: of ``codes.PRECISIONS``; a row of codes names its ``precision``.
        ranges: of int8 codes, by width; where there are none, the set's own vectors give them.
    """
    scores: dict[tuple[str, int, str], dict[str, float]] = {}

    def add(model: str, width: int, evalset: EvalSet, vectors: Mapping[str, np.ndarray]) -> None:
        for precision in precisions:
            found = score_codes(evalset, vectors, precision, (ranges or {}).get(width))
            named = {f"{evalset.name}/{metric}": value for metric, value in found.items()}
            scores.setdefault((model, width, precision), {}).update(named)

    from tqdm import tqdm

    turns = tqdm([(model, evalset) for model in encoders for evalset in evalsets], unit="set", leave=False)
    for model, evalset in turns:
        turns.set_description(f"evaluating the {model} on {evalset.name}")
        for width, vectors in sorted(embed(evalset, encoders[model]).items(), reverse=True):
            add(model, width, evalset, vectors)
            if model == TEACHER:
                for floor, reduces in (floors or {}).items():
                    for narrow, reduce in reduces.items():
                        add(floor, narrow, evalset, {group: reduce(v) for group, v in vectors.items()})
    return [
        {"model": model, "width": width, **({"precision": p} if p != "float32" else {}), "scores": found}
        for (model, width, p), found in scores.items()
    ]


def describe_sets(evalsets: Sequence[EvalSet]) -> dict[str, Any]:
    """Make the ``primary`` and ``sets`` fields of results.json; the first set's first metric is the primary one."""
    return {
        "primary": {"set": evalsets[0].name, "metric": evalsets[0].metrics[0]},
        "sets": [{"name": s.name, "kind": s.kind, "metric": s.metrics[0], **_remarks(s)} for s in evalsets],
    }


def _remarks(evalset: EvalSet) -> dict[str, str]:
    remarks = evalset.remarks() if isinstance(evalset, RetrievalSet) else ""
    return {"remarks": remarks} if remarks else {}


def remark_lines(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Make a line for each set of results.json that has remarks, such as judgements of absent documents."""
    return [f"{s['name']}: {s['remarks']}" for s in sets if s.get("remarks")]


def evaluate_run(
    config: Config,
    evalsets: Sequence[EvalSet],
    before: EncodeWidths | list[Row],
    student: EncodeWidths,
    train_vectors: np.ndarray | None,
    ranges: Mapping[int, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The scores of results.json: teacher, its floors, the student before and after.

    Args:
        config: the run's; its teachers encode the sets (kept in ``data.cache`` for the next run).
        evalsets: from ``load_evals(config.evaluate)``.
        before: the undistilled student, or its rows from ``score_rows`` where they were kept.
        student: the trained one, all its widths.
        train_vectors: (n, D) float32 teacher vectors of (some) training texts, for the floors; None: no floors.
        ranges: of the student's int8 codes, by width.

    Returns:
        ``primary``, ``sets``, ``rows`` and ``codes`` (the student's rows as int8 and as bits) of results.json; teacher
        rows are absent where a teacher is a file of vectors. An empty dict where there is nothing to evaluate on.
    """
    if not evalsets:
        return {}
    rows: list[Row] = []
    teacher: EncodeWidths | None = teacher_encoder(config.teachers, config.data.cache, config.precision)
    if teacher is not None:
        floors = teacher_floors(train_vectors[:PCA_ROWS], config.student.heads) if train_vectors is not None else {}
        rows += score_rows(evalsets, {TEACHER: teacher}, floors)
    rows += before if isinstance(before, list) else score_rows(evalsets, {BEFORE: before})
    after = score_rows(evalsets, {STUDENT: student}, None, PRECISIONS, ranges)
    rows += [row for row in after if "precision" not in row]
    return describe_sets(evalsets) | {"rows": rows, "codes": [row for row in after if "precision" in row]}


def scores_table(rows: Sequence[Row]) -> str:
    """Rows as a table for the terminal: per cent, and beside each model what share of the teacher it kept."""
    columns = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    teacher: dict[str, float] = next(
        (row["scores"] for row in rows if row["model"] == TEACHER and "precision" not in row), {}
    )
    table = [["model", "width", *columns]]
    for row in rows:
        cells = []
        for column in columns:
            score = row["scores"].get(column)
            kept = kept_share(score, teacher.get(column)) if row["model"] != TEACHER else None
            cells.append("" if score is None else f"{100 * score:.2f}" + (f" ({kept:.1f} %)" if kept else ""))
        table.append([f"{row['model']} {row.get('precision', '')}".strip(), str(row["width"]), *cells])
    spans = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(c.ljust(s) if i == 0 else c.rjust(s) for i, (c, s) in enumerate(zip(line, spans, strict=True)))
        for line in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    note = "per cent" + ("; in brackets the share of the teacher's score that was kept" if teacher else "")
    return "\n".join([*lines, note])


def kept_share(score: float | None, teacher: float | None) -> float | None:
    """Per cent of the teacher's score; None where either is missing or the teacher's is not positive."""
    return None if score is None or teacher is None or teacher <= 0 else 100 * score / teacher


def main(argv: list[str]) -> int:
    """Evaluate a model on sets from the command line."""
    parser = argparse.ArgumentParser(prog="python -m jasper_fast.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="run folder, path, name, or package:import_name/folder")
    parser.add_argument("data", nargs="*", help="BEIR folder, similarity TSV, classification folder, or: docstrings")
    parser.add_argument("--teacher", help="the model to compare with, in the same forms")
    parser.add_argument("--widths", metavar="N,N", type=_widths, help="e.g. 384,128; default: every head of the model")
    parser.add_argument("--json", metavar="FILE", help="write the scores there as well")
    parser.add_argument(
        "--max-length", type=whole_number, metavar="N", help="tokens per text; default: each model's own"
    )
    parser.add_argument("--limit", type=whole_number, metavar="N", help="at most N queries or pairs per set")
    parser.add_argument("--precision", default="float32", help=f"of {', '.join(PRECISIONS)}, with commas between")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that a model brings, where you trust its authors"
    )
    given = parser.parse_args(argv)
    for model in filter(None, (given.model, given.teacher)):
        check_model_argument(model, "evaluate")
    if not given.data:
        raise JasperError("evaluate: no evaluation set is given. Fix: name one after the model, e.g. docstrings")
    precisions = known_precisions(given.precision)
    if given.json is not None:
        check_file(given.json)
    evalsets = load_evals([EvalConfig(path=path, limit=given.limit) for path in given.data])
    trusted = given.trust_remote_code
    student = model_encoder(load_model(given.model, given.max_length, trust_remote_code=trusted), given.widths)
    if given.teacher:
        teacher = load_model(given.teacher, given.max_length, trust_remote_code=trusted)
        _, heads = routes(teacher)
        encoders = {TEACHER: model_encoder(teacher, [max(heads)] if heads else None), STUDENT: student}
    else:
        encoders = {"model": student}
    rows = score_rows(evalsets, encoders, None, precisions, read_ranges(given.model))
    sets = describe_sets(evalsets)
    print("\n".join([scores_table(rows), *remark_lines(sets["sets"])]))
    if given.json:
        content = {"model": given.model, "teacher": given.teacher, "max_length": given.max_length, "limit": given.limit}
        write_atomic(Path(given.json), json.dumps(content | sets | {"rows": rows}, indent=1) + "\n")
    return 0


def _widths(text: str) -> list[int]:
    try:
        return [whole_number(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise JasperError(f"--widths takes numbers with commas between, e.g. 384,128; got {text!r}") from None


if __name__ == "__main__":
    run_cli(main)
