"""``report.md`` of an adaptation, from a plain mapping of results.

Keys of the results. Fractions are from 0 to 1, and what was not measured is absent:

- ``name``: the folder as typed.
- ``documents``: ``sources`` is a list, ``columns`` is "title + text" or None. The numbers of documents are ``read``,
  ``used``, ``duplicates``, ``empty``, ``short`` (of one word) and ``earlier`` (counted by earlier calls). Lengths are
  ``median_tokens``, ``max_length`` (the student's), and ``longer``, the fraction of documents above it.
- ``held_out``: ``documents``, ``questions``, ``kinds`` (their number by kind), and ``question_in_document``. The last
  says whether a searched document contains its question.
- ``teacher`` and ``student``: ``name``, ``width``, ``parameters``, ``max_length`` and ``vectors`` (precomputed). The
  student also has ``layers`` ("3 of 6") and ``same_space``.
- ``training``, if the student was trained: ``minutes``, ``texts``, and ``label_free`` of the run's results. ``earlier``
  is True if an earlier call did it, on the documents that it had.
- ``maps``: {form: ``Choice.record()``}.
- ``projections``: a list of ``Choice.record()`` with ``width``.
- ``length``: ``LengthChoice.record()``.
- ``label_free``: result of ``label_free_table``.
- ``recommendation``: a sentence.
- ``speed``: ``student`` and ``teacher`` have ``documents_per_s`` and ``queries_per_s``. The teacher is None for
  vectors. ``texts`` is the number of measured documents, and ``mean_tokens`` their length.
- ``notes``: lines on what was decided for the user.
- ``seconds`` and ``planned``: {step: seconds}.
- ``next``: commands.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jasper_fast.adaptation.choose import BOTH
from jasper_fast.adaptation.lines import (
    closing_lines,
    documents_text,
    gain_sentences,
    held_out_text,
    model_text,
    opening_lines,
)
from jasper_fast.adaptation.plots import plot_bytes, plot_query_time, query_times
from jasper_fast.adaptation.scores import BYTES, UNTRAINED
from jasper_fast.evaluation.score import BEFORE, PCA, STUDENT, STUDENT_PCA, TEACHER
from jasper_fast.reporting.quality import markdown
from jasper_fast.reporting.report import NO_PLOTS
from jasper_fast.utils.atomic import write_atomic

__all__ = ["closing_lines", "opening_lines", "write_adapt_report"]

TITLES = {
    TEACHER: "teacher",
    PCA: "teacher, PCA on both sides",
    UNTRAINED: "student before training",
    BEFORE: "student, not adapted",
    STUDENT_PCA: "student, not adapted, PCA",
    STUDENT: "student, adapted",
}


def write_adapt_report(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Write ``report.md`` and ``plots/*.png``.

    Args:
        folder: folder of the adaptation.
        results: the results, with the keys of this module's docstring.

    Returns:
        Path of report.md.
    """
    folder = Path(folder)
    sections = [
        f"# Report of the adaptation {results['name']}",
        f"**{results['recommendation']}**",
        " ".join(gain_sentences(results)),
        _list(results.get("notes", [])),
        _scores(results),
        *_plots(folder / "plots", results),
        _maps(results),
        _length(results),
        _projections(results),
        _facts(results),
        _next(results),
    ]
    path = folder / "report.md"
    write_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _scores(results: Mapping[str, Any]) -> str:
    label_free = results["label_free"]
    if "missing" in label_free:
        return f"## Scores without labels\n\nNo scores: {label_free['missing']}."
    figures = {"overlap": "neighbours", "ndcg": "ranking", "answer_ndcg": "nDCG@10", "kept": "kept"}
    present = {key: title for key, title in figures.items() if any(key in row for row in label_free["rows"])}
    measured = [cell for title in present.values() for cell in (title, "±")]
    table = [["model", "form", "width", "bytes", *measured, "expected"]]
    for row in label_free["rows"]:
        form = "–" if row["model"] in (TEACHER, PCA) else row["form"]
        numbers = [_cell(row.get(name)) for key in present for name in (key, f"{key}_error")]
        table.append(
            [TITLES[row["model"]], form, str(row["width"]), f"{row['bytes']:,}", *numbers, _cell(row.get("expected"))]
        )
    return f"## Scores without labels\n\n{_explanation(results)}\n\n{markdown(table, 2)}"


def _explanation(results: Mapping[str, Any]) -> str:
    label_free, held_out = results["label_free"], results.get("held_out", {})
    lines = [
        f"{label_free['questions']:,} held-out questions search {label_free['documents']:,} documents. Figures are in "
        "per cent, ± standard error. No map was fitted on these questions or their documents. The maps, lengths and "
        "projections were chosen by them, so the adapted student's figures are slightly optimistic.\n",
        "- *symmetric*: the student encodes questions and documents. *asymmetric*: the student encodes questions, the "
        "teacher encodes documents.",
        f"- *neighbours*: the fraction of the teacher's {label_free['depth']} nearest documents that a model finds. A "
        f"random order has {100 * label_free['chance']:.1f}.",
        "- *ranking*: nDCG@10 where the teacher's nearest document has gain 10, and its tenth has gain 1.",
    ]
    if label_free["answers"]:
        contained = " The document contains its question." if held_out.get("question_in_document") else ""
        lines.append(
            f"- *nDCG@10*: the score of finding the question's own document, as in reports of training.{contained}"
        )
        lines.append(
            "- *kept*: the fraction of the teacher's *nDCG@10* at full width. Questions that repeat "
            "words of their document make it high for every model."
        )
    lines.append(
        "- *expected*: an estimate of the fraction of the teacher's nDCG@10 by relevance judgements. It combines a "
        "tenth of the neighbours lost at full width with what the projection costs the teacher. On three open "
        "sets, it is within 5 points at full width. It is too low at narrow widths: by up to 8 points at 128, 12 at 64 "
        "and 18 at 32. It is left out for students that find less than 40 % of the neighbours."
    )
    return "\n".join(lines)


def _plots(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """Draw the plots, and return their Markdown."""
    if "rows" not in results["label_free"]:
        return []
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return [NO_PLOTS]
    drawings = {"bytes": ("Quality against bytes per document", plot_bytes)}
    if len(query_times(results)) == 2:
        drawings["query_time"] = ("Quality against query time", plot_query_time)
    found = []
    for name, (title, draw) in drawings.items():
        content = io.BytesIO()
        draw(results, content)
        write_atomic(folder / f"{name}.png", content.getvalue())
        found.append(f"![{title}](plots/{name}.png)")
    return found


def _maps(results: Mapping[str, Any]) -> str:
    """Return the chosen map of each form, and the agreement of every candidate."""
    maps = results["maps"]
    chosen = [f"- {form}: **{choice['name']}**. Reason: {choice['reason']}." for form, choice in maps.items()]
    options = [row for choice in maps.values() for row in choice["table"]]
    text = (
        "The candidates are the unfitted map, and ridge regressions towards it. λ is the strength of the ridge. The "
        "unfitted map is kept unless another is better by more than a standard error."
    )
    if any(row["texts"] == BOTH for row in options):
        text += (
            f" *{BOTH}* is the mean of two maps: one is fitted on documents, the other on titles and sentences. "
            "Held-out questions are too few to tell which of the two is better."
        )
    parts = ["## Map from the student's space to the teacher's", text, "\n".join(chosen)]
    names = list(dict.fromkeys(row["name"] for row in options))
    table = [["candidate", *(cell for form in maps for cell in (f"{form}: neighbours", "against unfitted", "±"))]]
    for name in names:
        rows: list[Mapping[str, Any]] = [
            next((row for row in choice["table"] if row["name"] == name), {}) for choice in maps.values()
        ]
        table.append([name, *(cell for row in rows for cell in _measured(row))])
    return "\n\n".join([*parts, markdown(table, 1)])


def _length(results: Mapping[str, Any]) -> str:
    length = results.get("length")
    if not length or not length["length"]:
        return ""
    text = f"The adapted student reads at most **{length['length']:,} tokens** ({length['before']:,} before). "
    text += f"Reason: {length['reason']}."
    parts = ["## Length", text]
    if len(length["table"]) > 1:
        rows = [[str(row["length"]), *_measured(row)] for row in length["table"]]
        parts.append(markdown([["tokens", "neighbours", f"against {length['before']:,}", "±"], *rows], 0))
    return "\n\n".join(parts)


def _projections(results: Mapping[str, Any]) -> str:
    if not results.get("projections"):
        return ""
    table = [["option", "chosen", "width", "neighbours", "difference", "±"]]
    for choice in results["projections"]:
        for row in choice["table"]:
            mark = "yes" if row["chosen"] else ""
            table.append([row["name"], mark, str(choice["width"]), *_measured(row)])
    text = (
        "Principal axes of the documents, or axes learned from their neighbours where these are better by more "
        "than a standard error. Both "
        "forms have the same ones, so an index may mix their embeddings. *neighbours* is the mean of the forms."
    )
    return f"## Narrow projections\n\n{text}\n\n{markdown(table, 2)}"


def _facts(results: Mapping[str, Any]) -> str:
    documents = results["documents"]
    lines = [f"documents: {', '.join(f'`{source}`' for source in documents['sources'])}; {documents_text(documents)}"]
    lines += [f"held out: {held_out_text(results['held_out'])}"] if "held_out" in results else []
    lines += [f"{model}: {model_text(results[model])}" for model in (TEACHER, STUDENT)]
    if training := results.get("training"):
        earlier = ", by an earlier call" if training.get("earlier") else ""
        lines.append(f"training: {training['minutes']:g} minutes on {training['texts']:,} texts{earlier}")
    lines += _speed(results)
    widths = sorted({row["width"] for row in results["label_free"].get("rows", []) if row["model"] == STUDENT})
    if sizes := ", ".join(f"{width} wide {BYTES * width:,}" for width in reversed(widths)):
        lines.append(f"bytes per document (float32): {sizes}")
    spent = ", ".join(f"{step} {seconds:,.1f}" for step, seconds in results.get("seconds", {}).items())
    lines += [f"seconds: {spent}"] if spent else []
    return f"## Facts\n\n{_list(lines)}"


def _speed(results: Mapping[str, Any]) -> list[str]:
    speed = results.get("speed")
    if not speed:
        return []
    models = [model for model in (STUDENT, TEACHER) if speed.get(model)]
    documents = ", ".join(f"{model} {speed[model]['documents_per_s']:,.0f}" for model in models)
    queries = ", ".join(f"{model} {seconds:.1f}" for model, seconds in query_times(results).items())
    return [
        f"documents encoded per second on this machine: {documents} ({speed['texts']:,} documents of "
        f"{speed['mean_tokens']:.0f} tokens on average)",
        f"seconds to encode 1,000 queries, one at a time: {queries}",
    ]


def _next(results: Mapping[str, Any]) -> str:
    commands = "\n".join(results["next"])
    return f"## Next\n\n```bash\n{commands}\n```"


def _measured(row: Mapping[str, Any]) -> list[str]:
    """Return cells of an option: overlap, difference to the default and its error."""
    if "overlap" not in row:
        return ["–"] * 3
    return [_cell(row["overlap"]), f"{100 * row['difference']:+.1f}".replace("-", "−"), _cell(row["difference_error"])]


def _cell(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
