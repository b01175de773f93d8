"""Plots of an adaptation: quality against bytes per document, and against query time. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from jasper_fast.adaptation.choose import ASYMMETRIC, SYMMETRIC
from jasper_fast.adaptation.scores import BY_TEACHER
from jasper_fast.evaluation.score import BEFORE, PCA, STUDENT, STUDENT_PCA, TEACHER
from jasper_fast.reporting.plots import COLOURS, new_figure, save_figure, shared_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# (model, form): style, colour, label. Unadapted models are drawn in the colours of other reports.
SERIES = {
    (PCA, BY_TEACHER): ("s--", COLOURS[PCA], "teacher, PCA"),
    (STUDENT, ASYMMETRIC): ("o-", COLOURS[STUDENT], "adapted, asymmetric"),
    (STUDENT, SYMMETRIC): ("o-", "#D55E00", "adapted, symmetric"),
    (STUDENT_PCA, SYMMETRIC): ("v-.", COLOURS[STUDENT_PCA], "not adapted, PCA"),
    (BEFORE, ASYMMETRIC): ("D", COLOURS[STUDENT], "not adapted, asymmetric"),
    (BEFORE, SYMMETRIC): ("D", "#D55E00", "not adapted, symmetric"),
}
HOLLOW = (BEFORE,)  # models with hollow markers


def plot_bytes(results: Mapping[str, Any], file: IO[bytes]) -> None:
    """Plot quality against bytes per document, by model and form, with standard errors.

    Args:
        results: content of results.json, with rows in ``label_free``.
        file: binary file for the PNG.
    """
    figure, (axis,) = new_figure(1, 1, (6.5, 4))
    rows = results["label_free"]["rows"]
    for series in SERIES:
        points = [row for row in rows if (row["model"], row["form"]) == series]
        _draw(axis, series, [row["bytes"] for row in points], points)
    axis.axhline(100, color=COLOURS[TEACHER], linewidth=1, label="teacher, full width")
    sizes = sorted({row["bytes"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("bytes per document, float32")
    _finish(axis, results)
    shared_legend(figure, [axis])
    save_figure(figure, file)


def plot_query_time(results: Mapping[str, Any], file: IO[bytes]) -> None:
    """Plot quality against the time to encode queries, by model and form. The numbers at the points are widths.

    Args:
        results: content of results.json, with rows in ``label_free`` and the ``speed`` of student and teacher.
        file: binary file for the PNG.
    """
    figure, (axis,) = new_figure(1, 1, (6.5, 4))
    times = query_times(results)
    for side, series in enumerate(((STUDENT, SYMMETRIC), (STUDENT, ASYMMETRIC), (PCA, BY_TEACHER))):
        model = TEACHER if series[0] == PCA else STUDENT
        points = [row for row in results["label_free"]["rows"] if (row["model"], row["form"]) == series]
        _draw(axis, series, [times[model]] * len(points), points)
        left = side == 0  # the forms of the student have the same time
        for row in points:
            axis.annotate(
                str(row["width"]),
                (times[model], 100 * row["overlap"]),
                xytext=(-9 if left else 9, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=8,
            )
    axis.plot([times[TEACHER]], [100], "*", color=COLOURS[TEACHER], markersize=11, label="teacher, full width")
    axis.set_xlim(0, 1.2 * max(times.values()))
    axis.set_xlabel("seconds to encode 1,000 queries, one at a time")
    _finish(axis, results)
    shared_legend(figure, [axis])
    save_figure(figure, file)


def query_times(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds in which student and teacher encode 1,000 queries, for the models that were measured.

    Args:
        results: content of results.json.
    """
    speed = results.get("speed") or {}
    return {model: 1000 / speed[model]["queries_per_s"] for model in (STUDENT, TEACHER) if speed.get(model)}


def _draw(axis: Axes, series: tuple[str, str], places: list[float], points: list[Mapping[str, Any]]) -> None:
    style, colour, label = SERIES[series]
    values, errors = [100 * row["overlap"] for row in points], [100 * row["overlap_error"] for row in points]
    if points:
        face = "white" if series[0] in HOLLOW else colour
        axis.errorbar(
            places, values, errors, fmt=style, color=colour, mfc=face, label=label, markersize=6, elinewidth=0.8
        )


def _finish(axis: Axes, results: Mapping[str, Any]) -> None:
    axis.set_ylabel("neighbours, %")
    axis.set_title(f"{results['label_free']['questions']:,} held-out questions", loc="left", fontsize=11)
