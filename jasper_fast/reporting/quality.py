"""The quality of a run in words and tables: scores of the evaluation sets, and scores without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jasper_fast.evaluation.score import (
    BEFORE,
    DOCUMENTS_BY_TEACHER,
    PCA,
    STUDENT,
    STUDENT_PCA,
    TEACHER,
    TRUNCATED,
    note_lines,
    percent_of_teacher,
)
from jasper_fast.models.quantization import CANDIDATES, PRECISIONS
from jasper_fast.reporting.tables import images_line

LINE = 100  # characters of a line in the terminal
ASYMMETRIC_TITLE = "student, documents by teacher"
FLOOR_TITLES = {STUDENT_PCA: "student, PCA", PCA: "teacher, PCA", TRUNCATED: "teacher, first coordinates"}


def quality_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the last lines of a run: one for each evaluation set, images, held-out documents, and the advice.

    Lines of sets have at most 100 characters.

    Args:
        results: content of results.json.
    """
    lines = [_set_line(results, evalset) for evalset in results.get("sets", [])]
    if results.get("pictures"):
        lines.append(images_line(results["pictures"]))
    lines += filter(None, [label_free_line(results), retrieval_line(results)])
    return [
        *(lines or ["no scores: no evaluation sets and no held-out documents"]),
        *filter(None, [results.get("advice")]),
    ]


def headline(results: Mapping[str, Any]) -> list[str]:
    """Return the first paragraphs of a report: the main score, the score without labels, and the advice.

    Args:
        results: content of results.json.
    """
    lines = [final_line(results)]
    for line in (label_free_line(results), retrieval_line(results)):
        if line and line not in lines:
            lines.append(line)
    return [f"**{line}**" for line in lines] + [text for text in [results.get("advice", "")] if text]


def quality_sections(results: Mapping[str, Any], images: Mapping[str, str]) -> list[str]:
    """Return the sections of a report on scores, empty where there are none.

    Args:
        results: content of results.json.
        images: Markdown of the plots by name.
    """
    return [
        _transductive(results),
        _notes(results),
        _label_free(results),
        images.get("label_free", ""),
        _refit(results),
        _scores(results),
        images.get("sets", ""),
        _widths(results),
        images.get("widths", ""),
        _codes(results),
    ]


def final_line(results: Mapping[str, Any]) -> str:
    """Return one line with the primary score before and after training, and the teacher's.

    Missing scores are left out. A run without text evaluation sets is summarised by its image retrieval, or by its
    held-out documents.

    Args:
        results: content of results.json.
    """
    if results.get("rows"):
        return _score_line(results, results["primary"]["set"], results["primary"]["metric"])
    if results.get("pictures"):
        return images_line(results["pictures"])
    return label_free_line(results) or "no scores: no evaluation sets and no held-out documents"


def label_free_line(results: Mapping[str, Any]) -> str:
    """Return one line with the neighbours that each width shares with the teacher. Empty without held-out documents.

    Args:
        results: content of results.json.
    """
    label_free = results.get("label_free")
    if not label_free:
        return ""
    if "missing" in label_free:
        return f"no score without labels: {label_free['missing']}"
    heads = [row for row in label_free["rows"] if row["model"] == STUDENT and "precision" not in row]
    before = [row for row in label_free["rows"] if row["model"] == BEFORE]
    shared = ", ".join(f"{row['width']}: {100 * row['overlap']:.0f} %" for row in heads)
    error = max(row["overlap_error"] for row in heads)  # standard error, in points
    start = f"; before training {100 * before[0]['overlap']:.0f} %" if before else ""
    documents = f"{label_free['documents']:,} held-out documents"
    return f"neighbours kept of the teacher's ({documents}): {shared} (± {100 * error:.1f}){start}"


def retrieval_line(results: Mapping[str, Any]) -> str:
    """Return one line with the fraction of the teacher's nDCG@10 that each width keeps on held-out documents.

    A document's title or first sentence is the query. The line is empty without queries, or without a teacher that
    encodes them.

    Args:
        results: content of results.json.
    """
    rows = [row for row in results.get("label_free", {}).get("rows", []) if row.get("ndcg") and "precision" not in row]
    teacher = next((row["ndcg"] for row in rows if row["model"] == TEACHER), 0.0)
    heads = [row for row in rows if row["model"] == STUDENT]
    if not teacher or not heads:
        return ""
    before = [row["ndcg"] for row in rows if row["model"] == BEFORE]
    kept = ", ".join(f"{row['width']}: {100 * row['ndcg'] / teacher:.0f} %" for row in heads)
    start = f"; before training {100 * before[0] / teacher:.0f} %" if before else ""
    queries = f"{results['label_free']['queries']:,} held-out queries"
    return f"nDCG@10 kept of the teacher's ({queries}): {kept}{start}"


def _set_line(results: Mapping[str, Any], evalset: Mapping[str, Any]) -> str:
    """Return the line of a set with its size if both fit. A long name is shortened."""
    sizes = ", ".join(f"{count:,} {what}" for what, count in evalset.get("sizes", {}).items())
    end = f" · {sizes}" if sizes else ""
    line = _score_line(results, evalset["name"], evalset["metric"])
    end = end if len(line) + len(end) <= LINE else ""
    excess = len(line) - LINE
    if excess > 0:
        shown = evalset["name"][: max(1, len(evalset["name"]) - excess - 1)] + "…"
        line = shown + line.removeprefix(evalset["name"])
    return line + end


def _score_line(results: Mapping[str, Any], name: str, metric: str) -> str:
    before, after, teacher = (_widest(results, model, f"{name}/{metric}") for model in (BEFORE, STUDENT, TEACHER))
    start = "" if before is None else f"before {100 * before:.1f} → "
    end = "" if teacher is None else f" · teacher {100 * teacher:.1f}"
    percent = percent_of_teacher(after, teacher)
    fraction = "" if percent is None else f" ({percent:.1f} % kept)"
    return f"{name} {metric}: {start}after {_cell(after, 1)}{end}{fraction}"


def _label_free(results: Mapping[str, Any]) -> str:
    """Return the table of held-out documents: overlap, Spearman and nDCG by model, width and precision."""
    label_free = results.get("label_free")
    if not label_free or "missing" in label_free:
        return ""
    with_ndcg = any("ndcg" in row for row in label_free["rows"])
    table = [["model", "width", "precision", "neighbours", "±", "Spearman", *(["nDCG@10"] if with_ndcg else [])]]
    for row in label_free["rows"]:
        cells = [_cell(row.get(key), 1) for key in ("overlap", "overlap_error", "spearman")]
        title = {**FLOOR_TITLES, DOCUMENTS_BY_TEACHER: ASYMMETRIC_TITLE}.get(row["model"], row["model"])
        ndcg = [_cell(row.get("ndcg"), 1)] if with_ndcg else []
        table.append([title, str(row["width"]), row.get("precision", "float32"), *cells, *ndcg])
    teacher = any(row["model"] == TEACHER for row in label_free["rows"])
    text = (
        f"{label_free['documents']:,} held-out documents, in per cent. *neighbours* is the fraction of the "
        f"teacher's {label_free['neighbours']} nearest documents that a model shares, ± its standard error. A random "
        f"order has {100 * label_free['chance']:.1f}. *Spearman* is the rank correlation of all cosines with the "
        "teacher's. PCA was fitted on training texts."
    )
    if any(row["model"] == DOCUMENTS_BY_TEACHER for row in label_free["rows"]):
        text += f" *{ASYMMETRIC_TITLE}*: the student's embeddings are compared with the teacher's of the documents."
    if "unlabelled" in label_free:
        text += f" {label_free['unlabelled']}, and are left out."
    if with_ndcg:
        text += (
            f" *nDCG@10* is for {label_free['queries']:,} queries (a document's title or first sentence), each with "
            "the rest of its document as the only right answer."
        )
        text += "" if teacher else " The teacher cannot encode queries, so it has no nDCG."
    return f"## Held-out documents, without labels\n\n{text}\n\n" + markdown(table, 1)


def _refit(results: Mapping[str, Any]) -> str:
    """Return the table of the closed-form refit: held-out figures of each trained head and of its best refit."""
    refit = results.get("refit")
    if not refit:
        return ""
    table = [["width", "figure", "trained", "best refit", "±", "λ", "chosen"]]
    for head in refit["heads"]:
        for name, trained in head["trained"].items():
            cells = [_cell(trained, 1), _cell(head["refitted"][name], 1), _cell(head["error"].get(name), 1)]
            chosen = "trained" if head["strength"] is None else "refit"
            table.append([str(head["width"]), name, *cells, f"{head['best']:g}", chosen])
    text = (
        f"After training, ridge regressions on {refit['texts']:,} training texts correct each head towards the "
        f"teacher's embeddings. A refit replaces the trained head if the neighbours of {refit['documents']:,} held-out "
        f"documents or of their {refit['questions']:,} questions rise by two standard errors, and no figure falls. "
        "Figures are in per cent, and ± is the standard error of the difference. λ is chosen by nDCG@10, or by the "
        "neighbours if there are no questions. The exported model and all other scores include this."
    )
    return f"## Closed-form refit of the heads\n\n{text}\n\n" + markdown(table, 2)


def _scores(results: Mapping[str, Any]) -> str:
    """Return a table of teacher, student before and student after training at full width, by metric."""
    rows = results.get("rows")
    if not rows:
        return ""
    sizes = {s["name"]: ", ".join(f"{n:,} {what}" for what, n in s.get("sizes", {}).items()) for s in results["sets"]}
    table = [["set", "metric", "teacher", "student before", "student after", "kept"]]
    for key in dict.fromkeys(key for row in rows for key in row["scores"]):
        name, metric = key.rsplit("/", 1)
        teacher, before, after = (_widest(results, model, key) for model in (TEACHER, BEFORE, STUDENT))
        table.append([name, metric, _cell(teacher), _cell(before), _cell(after), _fraction(after, teacher)])
    listed = "".join(f" {name}: {size}." for name, size in sizes.items() if size)
    return f"## Student and teacher at full width\n\nScores are in per cent.{listed}\n\n" + markdown(table, 2)


def _widths(results: Mapping[str, Any]) -> str:
    """Return a table of the student at every width, with the floors that were computed: PCA and truncation."""
    if not results.get("rows"):
        return ""
    floors = [model for model in FLOOR_TITLES if any(row["model"] == model for row in results["rows"])]
    table = [["set", "width", "student", "kept", *(FLOOR_TITLES[model] for model in floors)]]
    for evalset in results["sets"]:
        key = f"{evalset['name']}/{evalset['metric']}"
        by_model = {model: _by_width(results, model, key) for model in (STUDENT, *floors)}
        teacher = _widest(results, TEACHER, key)
        for width in sorted(set().union(*by_model.values()), reverse=True):
            student, *others = (scores.get(width) for scores in by_model.values())
            label = f"{evalset['name']} {evalset['metric']}"
            table.append([label, str(width), _cell(student), _fraction(student, teacher), *map(_cell, others)])
    text = "Scores are in per cent. *kept* is the fraction of the teacher's score at full width."
    if {PCA, STUDENT_PCA} & set(floors):
        text += " PCA was fitted on the training texts."
    return f"## Every width\n\n{text}\n\n" + markdown(table, 1)


def _notes(results: Mapping[str, Any]) -> str:
    """List the problems of the evaluation files, one line per set."""
    return "\n".join(f"- {line}" for line in note_lines(results.get("sets", [])))


def _transductive(results: Mapping[str, Any]) -> str:
    names = results.get("transductive", [])
    if not names:
        return ""
    return (
        f"*Transductive*: texts of {', '.join(names)} were among the training texts, without labels. These scores say "
        "less about new texts."
    )


def _codes(results: Mapping[str, Any]) -> str:
    """Return a table of the student's scores as float32, int8 codes and bits, by width."""
    if not results.get("codes"):
        return ""
    forms = [form for form in PRECISIONS if form != "float32"]
    coded = {(row["width"], row["precision"]): row["scores"] for row in results["codes"]}
    table = [["set", "width", "float32", *forms, *(f"{form} keeps" for form in forms)]]
    for evalset in results["sets"]:
        key = f"{evalset['name']}/{evalset['metric']}"
        for width, plain in sorted(_by_width(results, STUDENT, key).items(), reverse=True):
            scores = [coded.get((width, form), {}).get(key) for form in forms]
            label = f"{evalset['name']} {evalset['metric']}"
            table.append([label, str(width), *map(_cell, [plain, *scores]), *(_fraction(s, plain) for s in scores)])
    text = (
        "Scores are in per cent. The student's embeddings are quantised by sentence-transformers to `int8` codes, with "
        "the ranges in `model/`, or to `ubinary` bits. Queries and documents are both quantised. With *rescore*, bits "
        f"select {CANDIDATES} documents, which are then ranked by their int8 codes and the float32 query."
    )
    return f"## Every width, quantised\n\n{text}\n\n" + markdown(table, 1)


def _by_width(results: Mapping[str, Any], model: str, key: str) -> dict[int, float]:
    return {r["width"]: r["scores"][key] for r in results["rows"] if r["model"] == model and key in r["scores"]}


def _widest(results: Mapping[str, Any], model: str, key: str) -> float | None:
    scores = _by_width(results, model, key)
    return scores[max(scores)] if scores else None


def _cell(score: float | None, digits: int = 2) -> str:
    return "–" if score is None else f"{100 * score:.{digits}f}"


def _fraction(score: float | None, teacher: float | None) -> str:
    percent = percent_of_teacher(score, teacher)
    return "–" if percent is None else f"{percent:.1f} %"


def markdown(table: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table. The first ``left`` columns are text, the others are numbers.

    Args:
        table: rows of cells, the head first.
        left: number of text columns.
    """
    head, *body = table
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [head, rule, *body])
