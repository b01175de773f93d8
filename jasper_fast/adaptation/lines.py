"""Lines that an adaptation prints: its inputs before the work, and its scores at the end. They fit in 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from jasper_fast.adaptation.choose import ASYMMETRIC, FORMS, SYMMETRIC, points
from jasper_fast.adaptation.plan import plan_text
from jasper_fast.adaptation.plots import query_times
from jasper_fast.adaptation.scores import BY_TEACHER, BYTES, CERTAIN, UNTRAINED, difference
from jasper_fast.evaluation.score import BEFORE, PCA, STUDENT, TEACHER

COLUMNS, LABEL = 100, 16  # characters of a line, and of the label before it
NAME, CELL = 38, 8  # characters of the table's first column, and of the others
MOST_WIDTHS = (COLUMNS - NAME) // CELL - 1


def opening_lines(results: Mapping[str, Any]) -> list[str]:
    """Return lines on documents, held-out documents, teacher and student. Missing keys are left out.

    Args:
        results: results so far, see :mod:`jasper_fast.adaptation.report`.
    """
    lines = []
    if documents := results.get("documents"):
        first = documents["sources"][0].rsplit("/", 1)[-1]
        lines += _labelled(first if len(documents["sources"]) == 1 else "documents", documents_text(documents))
    if held_out := results.get("held_out"):
        lines += _labelled("held out", held_out_text(held_out))
    if teacher := results.get("teacher"):
        lines += _labelled("teacher", model_text(teacher) + _speed_text(results, TEACHER))
    if student := results.get("student"):
        lines += _labelled("student", model_text(student) + _speed_text(results, STUDENT))
    if planned := results.get("planned"):
        lines += _labelled("planned time", plan_text(planned))
    return lines


def closing_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the table of scores, the choices, what adapting gained, the recommendation and the next commands.

    Args:
        results: content of results.json.
    """
    label_free = results["label_free"]
    lines = _table(results) if "rows" in label_free else []
    lines += _wrapped(f"map: {maps_text(results['maps'])}")
    for text in (*gain_sentences(results), results["recommendation"]):
        lines += _wrapped(text)
    lines.append(f"{results['name']}/report.md has all figures. Next:")
    return lines + [f"  {command}" for command in results["next"]]


def documents_text(documents: Mapping[str, Any]) -> str:
    """Describe what became of the documents.

    Args:
        documents: ``documents`` of results.json.
    """
    left_out = [
        f"{documents[key]:,} {name}" for key, name in (("duplicates", "repeated"), ("empty", "empty")) if documents[key]
    ]
    parts = [f"{documents['used']:,} documents"]
    if left_out:
        parts[0] += f" of {documents['read']:,} ({', '.join(left_out)})"
    if documents.get("columns"):
        parts.append(f"{documents['columns']} joined")
    if documents.get("short"):
        parts.append(f"{documents['short']:,} of one word")
    parts.append(f"half have {documents['median_tokens']:,} tokens or fewer")
    if documents["max_length"] and documents["longer"]:
        parts.append(
            f"{100 * documents['longer']:.0f} % have more than {documents['max_length']:,} (the rest is not read)"
        )
    if documents.get("earlier"):
        parts.append(f"{documents['earlier']:,} more were counted by earlier calls")
    return "; ".join(parts)


def held_out_text(held_out: Mapping[str, Any]) -> str:
    """Describe the held-out documents and their questions.

    Args:
        held_out: ``held_out`` of results.json.
    """
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in held_out["kinds"].items() if count)
    questions = f"{held_out['questions']:,} questions ({kinds})" if held_out["questions"] else "they are the questions"
    return f"{held_out['documents']:,} documents, never fitted on; {questions}"


def model_text(model: Mapping[str, Any]) -> str:
    """Describe a student or teacher: name, layers, width, size, length and space.

    Args:
        model: ``student`` or ``teacher`` of results.json.
    """
    parts = [model["name"]]
    if model.get("layers"):
        parts.append(f"{model['layers']} layers")
    parts.append(f"{model['width']:,} wide")
    if model.get("parameters"):
        parts.append(f"{model['parameters'] / 1e6:.1f} M parameters")
    if model.get("max_length"):
        parts.append(f"at most {model['max_length']:,} tokens")
    if model.get("vectors"):
        parts.append("precomputed")
    if "same_space" in model:
        parts.append("trained in the teacher's space" if model["same_space"] else "trained in another space")
    return ", ".join(parts)


def maps_text(maps: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe the chosen map of each form.

    Args:
        maps: ``maps`` of results.json.
    """
    return "; ".join(f"{form}: {choice['name']} ({choice['reason']})" for form, choice in maps.items())


def gain_sentences(results: Mapping[str, Any]) -> list[str]:
    """Return sentences on what training and adapting gained at full width, with two standard errors as the limit.

    Args:
        results: content of results.json.
    """
    label_free = results["label_free"]
    sentences = []
    training = results.get("training") or {}
    trained = f"Training for {training.get('minutes', 0):g} minutes"
    trained += " by an earlier call" if training.get("earlier") else ""
    run = training.get("label_free") or {}
    sentences += [_gain(trained, d["difference"], d["error"]) for d in run.get("differences", []) if d["to"] == BEFORE]
    if "rows" not in label_free:
        return sentences
    full = next(row["width"] for row in label_free["rows"] if row["model"] == TEACHER)
    if both := difference(label_free, SYMMETRIC, full, UNTRAINED):
        sentences.append(_gain(f"{trained} and adapting (symmetric)", *both))
    measured = {form: difference(label_free, form, full, BEFORE) for form in FORMS}
    return sentences + [_gain(f"Adapting ({form})", *gain) for form, gain in measured.items() if gain is not None]


def _gain(subject: str, gain: float, error: float) -> str:
    sized = f"{points(gain, error)} of the teacher's neighbours"
    if abs(gain) <= CERTAIN * error:
        return f"{subject} gained nothing measurable ({sized})."
    return f"{subject} {'gained' if gain > 0 else 'lost'} {sized}."


def _table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of forms and widths. A narrow terminal leaves out the narrowest of many widths."""
    label_free = results["label_free"]
    rows = label_free["rows"]
    cells = {(row["model"], row["form"], row["width"]): row for row in rows}
    widths = sorted({row["width"] for row in rows if row["model"] == STUDENT}, reverse=True)[:MOST_WIDTHS]
    error = max(row["overlap_error"] for row in rows if row["model"] == STUDENT)
    lines = [_row(f"{label_free['questions']:,} questions, % (± {100 * error:.1f})", TEACHER, *map(str, widths))]
    for form in (ASYMMETRIC, SYMMETRIC):
        found = [cells.get((STUDENT, form, width)) for width in widths]
        if any(found):
            lines.append(_row(f"{form}: neighbours", "100", *(_percent(row, "overlap") for row in found)))
            if any("expected" in row for row in found if row):
                expected = [_percent(row, "expected") for row in found]
                lines.append(_row("  expected of the teacher's nDCG@10", "100", *expected))
    others = (("not adapted, symmetric", BEFORE, SYMMETRIC), ("teacher's PCA on both sides", PCA, BY_TEACHER))
    for name, model, form in others:
        found = [cells.get((model, form, width)) for width in widths]
        if any(found):
            lines.append(_row(name, "100", *(_percent(row, "overlap") for row in found)))
    lines.append(_row("bytes per document", f"{BYTES * widths[0]:,}", *(f"{BYTES * width:,}" for width in widths)))
    times = query_times(results)
    if STUDENT in times:
        teacher = f"{times[TEACHER]:.1f}" if TEACHER in times else "–"
        lines.append(_row("seconds per 1,000 queries", teacher, *[f"{times[STUDENT]:.1f}"] * len(widths)))
    return lines


def _row(name: str, *cells: str) -> str:
    return f"{name:<{NAME}}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def _percent(row: Mapping[str, Any] | None, key: str) -> str:
    return "–" if row is None or key not in row else f"{100 * row[key]:.1f}"


def _speed_text(results: Mapping[str, Any], model: str) -> str:
    speed = (results.get("speed") or {}).get(model)
    return f"; encodes {speed['documents_per_s']:,.0f} documents a second here" if speed else ""


def _labelled(label: str, text: str) -> list[str]:
    shown = label if len(label) < LABEL else label[: LABEL - 2] + "…"
    return textwrap.wrap(text, COLUMNS, initial_indent=f"{shown:<{LABEL}}", subsequent_indent=" " * LABEL)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, subsequent_indent="  ")
