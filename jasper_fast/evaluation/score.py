"""Score models on evaluation sets: student, teacher and the floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jasper_fast.config.run import Config
from jasper_fast.data.eval_sets import EvalSet, RetrievalSet
from jasper_fast.evaluation.metrics import score_codes, score_embeddings
from jasper_fast.models.embedder import EncodeWidths, normalise
from jasper_fast.models.quantization import PRECISIONS
from jasper_fast.teachers.encoder import teacher_encoder

TEACHER, BEFORE, STUDENT, PCA, TRUNCATED = "teacher", "student before", "student", "teacher PCA", "teacher truncated"
STUDENT_PCA = "student PCA"
DOCUMENTS_BY_TEACHER = "documents by teacher"  # the student encodes queries, and the teacher documents
SOURCES = {PCA: TEACHER, TRUNCATED: TEACHER, STUDENT_PCA: STUDENT}  # the model whose embeddings a floor reduces
PCA_ROWS = 20_000  # teacher embeddings of training texts that fit the PCA
STUDENT_PCA_ROWS = 2048  # student embeddings of training texts that fit the student's PCA

Reduce = Callable[[np.ndarray], np.ndarray]
Row = dict[str, Any]  # {"model": str, "width": int, "scores": {"set/metric": float}}


def embed(evalset: EvalSet, encode: EncodeWidths) -> dict[int, dict[str, np.ndarray]]:
    """Embed every group of an evaluation set at every width. Repeated texts are encoded once.

    Args:
        evalset: evaluation set.
        encode: function from texts and a role to {width: (n, width) float32}.

    Returns:
        {width: {group: (n, width) float32}}

    Raises:
        ValueError: ``encode`` returns a wrong shape.
    """
    groups = evalset.groups()
    embeddings: dict[int, dict[str, np.ndarray]] = {}
    for role in sorted({role for _, role in groups.values()}):
        members = {name: texts for name, (texts, r) in groups.items() if r == role}
        distinct = {text: at for at, text in enumerate(dict.fromkeys(t for texts in members.values() for t in texts))}
        for width, vectors in encode(list(distinct), role).items():
            if vectors.shape != (len(distinct), width):
                raise ValueError(
                    f"encode: wrong shape (got {vectors.shape}, expected {(len(distinct), width)} for {len(distinct)} "
                    f"texts at width {width}). Fix: return one row per text"
                )
            for name, texts in members.items():
                embeddings.setdefault(width, {})[name] = vectors[[distinct[text] for text in texts]]
    return embeddings


def by_role(queries: EncodeWidths, documents: EncodeWidths) -> EncodeWidths:
    """Return an encode function that uses one model for queries and another one for documents, in the same space.

    Args:
        queries: encode function of the texts with the role "query".
        documents: encode function of the texts with the role "document", of the same widths.
    """
    return lambda texts, role: (queries if role == "query" else documents)(texts, role)


def evaluate_widths(evalset: EvalSet, encode: EncodeWidths) -> dict[int, dict[str, float]]:
    """Score one evaluation set at every width that ``encode`` returns. Each text is encoded once.

    Args:
        evalset: evaluation set from ``load_eval``.
        encode: function from n texts and a role ("query" or "document") to {width: (n, width) float32 unit rows}.

    Returns:
        {width: {metric: score}}

    Raises:
        ValueError: ``encode`` returns a wrong shape.
        JasperError: An embedding contains NaN or infinity.
    """
    return {width: score_embeddings(evalset, vectors) for width, vectors in embed(evalset, encode).items()}


def evaluate_embeddings(evalset: EvalSet, encode: Callable[[list[str], str], np.ndarray]) -> dict[str, float]:
    """Score one evaluation set with embeddings of one width.

    Args:
        evalset: evaluation set from ``load_eval``.
        encode: function from n texts and a role ("query" or "document") to (n, D) float32 unit rows.

    Returns:
        {metric: score}

    Raises:
        ValueError: ``encode`` returns a wrong shape.
        JasperError: An embedding contains NaN or infinity.
    """

    def encode_widths(texts: list[str], role: str) -> dict[int, np.ndarray]:
        vectors = encode(texts, role)
        return {vectors.shape[1]: vectors}

    ((_, scores),) = evaluate_widths(evalset, encode_widths).items()
    return scores


def teacher_floors(train_vectors: np.ndarray, widths: Sequence[int]) -> dict[str, dict[int, Reduce]]:
    """Fit the floors, which reduce the teacher's embeddings without training: PCA, and the first coordinates.

    Args:
        train_vectors: (n, D) teacher embeddings of training texts, which fit a centred PCA.
        widths: target widths. Widths of D and more are ignored. PCA also ignores widths above n.

    Returns:
        {"teacher PCA": {width: reduce}, "teacher truncated": {width: reduce}}, where ``reduce`` maps (m, D) to
        (m, width) float32 unit rows.
    """
    narrow = sorted({w for w in widths if w < train_vectors.shape[1]}, reverse=True)
    floors: dict[str, dict[int, Reduce]] = {TRUNCATED: {w: _first(w) for w in narrow}}
    if reduces := fit_pca(train_vectors, widths):
        floors[PCA] = reduces
    return floors


def fit_pca(train_vectors: np.ndarray, widths: Sequence[int]) -> dict[int, Reduce]:
    """Fit a centred PCA of embeddings.

    Args:
        train_vectors: (n, D) embeddings of training texts.
        widths: target widths. Widths of D and more, and above n, are ignored.

    Returns:
        {width: reduce}, widest first, where ``reduce`` maps (m, D) to (m, width) float32 unit rows.
    """
    from sklearn.decomposition import PCA as Projection

    n, dimension = train_vectors.shape
    fitted = sorted({w for w in widths if w < dimension and w <= n}, reverse=True)
    if not fitted:
        return {}
    projection = Projection(n_components=fitted[0], random_state=0).fit(train_vectors)
    mean, axes = projection.mean_.astype(np.float32), projection.components_.astype(np.float32)
    return {w: _project(mean, axes[:w]) for w in fitted}


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
    """Score models on evaluation sets, with one row per model, width and precision, widest first.

    Args:
        evalsets: evaluation sets.
        encoders: encode functions by model name. Each encodes every text once.
        floors: result of ``teacher_floors``, applied to the embeddings of the model "teacher". A floor "student PCA"
            is applied to the widest embeddings of the model "student". None means no floors.
        precisions: precisions to score, from ``PRECISIONS``. Rows other than float32 have a field ``precision``.
        ranges: (2, width) ranges of int8 codes by width. Without them, each set's own embeddings give the ranges.

    Returns:
        Rows {"model": name, "width": width, "scores": {"set/metric": score}}.

    Raises:
        ValueError: An encode function returns a wrong shape.
        JasperError: An embedding contains NaN or infinity.
    """
    scores: dict[tuple[str, int, str], dict[str, float]] = {}

    def add(
        model: str, width: int, evalset: EvalSet, vectors: Mapping[str, np.ndarray], forms: Sequence[str] = ("float32",)
    ) -> None:
        for precision in forms:
            metrics = score_codes(evalset, vectors, precision, (ranges or {}).get(width))
            row_scores = {f"{evalset.name}/{metric}": value for metric, value in metrics.items()}
            scores.setdefault((model, width, precision), {}).update(row_scores)

    from tqdm import tqdm

    pairs = [(model, evalset) for model in encoders for evalset in evalsets]
    progress = tqdm(pairs, leave=False, disable=None, bar_format="{desc} {n_fmt}/{total_fmt}")  # the run has the clock
    for model, evalset in progress:
        progress.set_description(f"evaluating the {model} on {evalset.name}")
        by_width = dict(sorted(embed(evalset, encoders[model]).items(), reverse=True))
        for width, vectors in by_width.items():
            add(model, width, evalset, vectors, precisions)
        widest = by_width[max(by_width)]
        for floor, reduces in (floors or {}).items():
            for narrow, reduce in reduces.items() if SOURCES.get(floor, TEACHER) == model else ():
                add(floor, narrow, evalset, {group: reduce(v) for group, v in widest.items()})
    return [
        {"model": model, "width": width, **({"precision": p} if p != "float32" else {}), "scores": row_scores}
        for (model, width, p), row_scores in scores.items()
    ]


def describe_sets(evalsets: Sequence[EvalSet]) -> dict[str, Any]:
    """Build the ``primary`` and ``sets`` fields of results.json. The first set's first metric is the primary one."""
    return {
        "primary": {"set": evalsets[0].name, "metric": evalsets[0].metrics[0]},
        "sets": [
            {"name": s.name, "kind": s.kind, "metric": s.metrics[0], "sizes": s.sizes(), **_notes(s)} for s in evalsets
        ],
    }


def _notes(evalset: EvalSet) -> dict[str, str]:
    notes = evalset.notes() if isinstance(evalset, RetrievalSet) else ""
    return {"remarks": notes} if notes else {}


def note_lines(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each set of results.json with remarks, such as judgements of missing documents."""
    return [f"{s['name']}: {s['remarks']}" for s in sets if s.get("remarks")]


def evaluate_run(
    config: Config,
    evalsets: Sequence[EvalSet],
    before: EncodeWidths | list[Row],
    student: EncodeWidths,
    train_vectors: np.ndarray | None,
    ranges: Mapping[int, np.ndarray] | None = None,
    student_pca: Mapping[int, Reduce] | None = None,
) -> dict[str, Any]:
    """Compute the scores of results.json: the teacher, its floors, and the student before and after training.

    Args:
        config: the run's configuration. Its teachers encode the sets, and ``data.cache`` stores their embeddings.
        evalsets: evaluation sets from ``load_evals(config.evaluate)``.
        before: encode function of the untrained student, or its stored rows from ``score_rows``.
        student: encode function of the trained student, with all its widths.
        train_vectors: (n, D) float32 teacher embeddings of training texts, which fit the floors. None means no floors.
        ranges: (2, width) ranges of the student's int8 codes by width. Without them, each set's own embeddings give
            the ranges.
        student_pca: result of ``fit_pca`` for the student's widest embeddings. None means no such floor.

    Returns:
        ``primary``, ``sets``, ``rows`` and ``codes`` (quantized rows of the student) of results.json. A teacher without
        a model, such as a file of embeddings, has no rows. Without evaluation sets the dict is empty.

    Raises:
        JasperError: An embedding contains NaN or infinity, or a teacher cannot be loaded.
    """
    if not evalsets:
        return {}
    rows: list[Row] = []
    teacher: EncodeWidths | None = teacher_encoder(config.teachers, config.data.cache, config.precision)
    if teacher is not None:
        floors = teacher_floors(train_vectors[:PCA_ROWS], config.student.heads) if train_vectors is not None else {}
        rows += score_rows(evalsets, {TEACHER: teacher}, floors)
    rows += before if isinstance(before, list) else score_rows(evalsets, {BEFORE: before})
    reduced = {STUDENT_PCA: student_pca} if student_pca else {}
    after = score_rows(evalsets, {STUDENT: student}, reduced, PRECISIONS, ranges)
    rows += [row for row in after if "precision" not in row]
    return describe_sets(evalsets) | {"rows": rows, "codes": [row for row in after if "precision" in row]}


def scores_table(rows: Sequence[Row]) -> str:
    """Format rows as a text table of scores in per cent, with each score's fraction of the teacher's in brackets.

    Args:
        rows: rows from ``score_rows``.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    teacher: dict[str, float] = next(
        (row["scores"] for row in rows if row["model"] == TEACHER and "precision" not in row), {}
    )
    table = [["model", "width", *columns]]
    for row in rows:
        cells = []
        for column in columns:
            score = row["scores"].get(column)
            percent = percent_of_teacher(score, teacher.get(column)) if row["model"] != TEACHER else None
            cells.append("" if score is None else f"{100 * score:.2f}" + (f" ({percent:.1f} %)" if percent else ""))
        table.append([f"{row['model']} {row.get('precision', '')}".strip(), str(row["width"]), *cells])
    spans = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(c.ljust(s) if i == 0 else c.rjust(s) for i, (c, s) in enumerate(zip(line, spans, strict=True)))
        for line in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    note = "Scores in per cent." + (" In brackets: per cent of the teacher's score." if teacher else "")
    return "\n".join([*lines, note])


def percent_of_teacher(score: float | None, teacher: float | None) -> float | None:
    """Return the score in per cent of the teacher's, or None if either is missing or the teacher's is not positive."""
    return None if score is None or teacher is None or teacher <= 0 else 100 * score / teacher
