"""Plots of a run: loss curves, quality against width, student against teacher. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jasper_fast.config.losses import LOGGED_LOSSES
from jasper_fast.evaluation.score import BEFORE, PCA, STUDENT, STUDENT_PCA, TEACHER, TRUNCATED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Palette of Okabe and Ito, safe for colour-blind readers. Markers and dashes differ as well.
COLOURS = {TEACHER: "#333333", STUDENT: "#0072B2", BEFORE: "#A6CEE8", PCA: "#E69F00", TRUNCATED: "#009E73"}
COLOURS[STUDENT_PCA] = "#56B4E9"
LABELS = {
    TEACHER: "teacher, full width",
    STUDENT: "student",
    BEFORE: "student before training",
    STUDENT_PCA: "student, PCA",
    PCA: "teacher, PCA",
    TRUNCATED: "teacher, first coordinates",
}
FLOOR_STYLES = ((STUDENT_PCA, "v-."), (PCA, "s--"), (TRUNCATED, "^:"))
# The losses' colours, in the order of their table.
PART_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#0072B2", "#000000")
DPI = 150
PANELS_PER_ROW = 3
LEGEND_ENTRY = 2.1  # width of the longest entry, in inches
MIN_TICKS, MAX_TICKS = 4, 12  # labels of a logarithmic axis
SMOOTH_FRACTION = 0.03  # window of the running mean, as a fraction of all steps


def plot_losses(steps: Sequence[Mapping[str, Any]], file: IO[bytes]) -> None:
    """Plot the loss and its unweighted parts against the step, with marks between stages.

    Args:
        steps: step lines of log.jsonl, in order.
        file: binary file for the PNG.
    """
    stages = _stages(steps)
    colours = {part: PART_COLOURS[place % len(PART_COLOURS)] for place, part in enumerate(LOGGED_LOSSES)}
    figure, axes = new_figure(1, 2, (10, 4))
    upper, lower = axes
    window = round(SMOOTH_FRACTION * len(steps)) | 1  # odd
    for _, lines in stages:
        _curve(upper, lines, "loss", COLOURS[STUDENT], None, window)
        for part, colour in colours.items():
            present = [line for line in lines if part.name in line]
            if present:
                _curve(lower, present, part.name, colour, part.title, window)
    for axis, title in ((upper, "loss, weighted as in each stage"), (lower, "parts of the loss, unweighted")):
        axis.set_title(title, loc="left", fontsize=11, pad=20)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        _plain_log_ticks(axis)
        _mark_stages(axis, stages)
    shared_legend(figure, [lower])
    save_figure(figure, file)


def plot_widths(results: Mapping[str, Any], file: IO[bytes]) -> None:
    """Plot quality against width for every set: the student's heads, the teacher, and the teacher reduced.

    Args:
        results: content of results.json, with evaluation sets.
        file: binary file for the PNG.
    """
    sets = results["sets"]
    figure, axes = _grid(len(sets))
    for axis, evalset in zip(axes, sets, strict=False):
        key = f"{evalset['name']}/{evalset['metric']}"
        for model, style in ((STUDENT, "o-"), *FLOOR_STYLES):
            points = _points(results, model, key)
            if points:
                axis.plot(*zip(*points, strict=True), style, color=COLOURS[model], label=LABELS[model], markersize=6)
        for width, score in _points(results, TEACHER, key):
            axis.axhline(score, color=COLOURS[TEACHER], linewidth=1, label=f"{LABELS[TEACHER]} ({width})")
        widths = sorted(
            {width for model in (STUDENT, *dict(FLOOR_STYLES)) for width, _ in _points(results, model, key)}
        )
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.minorticks_off()
        axis.set_xlabel("embedding width")
        axis.set_ylabel(f"{evalset['metric']}, %")
        axis.set_title(shown_name(evalset["name"]), loc="left", fontsize=11)
    shared_legend(figure, axes[: len(sets)])
    save_figure(figure, file)


def plot_label_free(label_free: Mapping[str, Any], file: IO[bytes]) -> None:
    """Plot the neighbours shared with the teacher against width: the student's heads, PCA, and before training.

    Args:
        label_free: field ``label_free`` of results.json, with rows.
        file: binary file for the PNG.
    """
    figure, (axis,) = new_figure(1, 1, (5.5, 3.6))
    rows = [row for row in label_free["rows"] if "overlap" in row and "precision" not in row]
    for model, style in ((STUDENT, "o-"), *FLOOR_STYLES, (BEFORE, "D")):
        if points := [row for row in rows if row["model"] == model]:
            widths, values, errors = (
                [row["width"] for row in points],
                [100 * row["overlap"] for row in points],
                [100 * row["overlap_error"] for row in points],
            )
            axis.errorbar(widths, values, errors, fmt=style, color=COLOURS[model], label=LABELS[model], markersize=6)
    widths = sorted({row["width"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.minorticks_off()
    axis.set_xlabel("embedding width")
    axis.set_ylabel("neighbours, %")
    axis.set_title(f"{label_free['documents']} held-out documents", loc="left", fontsize=11)
    shared_legend(figure, [axis])
    save_figure(figure, file)


def plot_sets(results: Mapping[str, Any], file: IO[bytes]) -> None:
    """Plot bars of teacher, student before and student after training at full width, for every set.

    Args:
        results: content of results.json, with evaluation sets.
        file: binary file for the PNG.
    """
    sets = results["sets"]
    figure, (axis,) = new_figure(1, 1, (max(5.5, 1.6 * len(sets) + 1.5), 4))
    models = [m for m in (BEFORE, STUDENT, TEACHER) if any(row["model"] == m for row in results["rows"])]
    thickness = 0.8 / len(models)
    for position, model in enumerate(models):
        heights = [_widest(results, model, f"{s['name']}/{s['metric']}") for s in sets]
        places = np.arange(len(sets)) + (position - (len(models) - 1) / 2) * thickness
        label = {TEACHER: "teacher", STUDENT: "student after training"}.get(model, LABELS[model])
        bars = axis.bar(places, heights, 0.94 * thickness, color=COLOURS[model], label=label)
        texts = ["" if math.isnan(height) else f"{height:.1f}" for height in heights]
        axis.bar_label(bars, texts, fontsize=8, padding=2)
    axis.set_xticks(range(len(sets)), [f"{shown_name(s['name'])}\n{s['metric']}" for s in sets], fontsize=9)
    axis.tick_params(axis="x", length=0)
    margin = max(0.5, 1.2 - 0.3 * len(sets))  # keeps the bars of a single set from filling the plot
    axis.set_xlim(-margin, len(sets) - 1 + margin)
    axis.set_ylabel("score, %")
    axis.set_title("full width", loc="left", fontsize=11)
    shared_legend(figure, [axis])
    save_figure(figure, file)


def shown_name(name: str) -> str:
    """Escape a user's name for matplotlib: no formulas, and no lone surrogates.

    Args:
        name: name of a set or model.
    """
    return name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def _stages(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    names = list(dict.fromkeys(line["stage"] for line in steps))
    return [(name, [line for line in steps if line["stage"] == name]) for name in names]


def _curve(
    axis: Axes, lines: Sequence[Mapping[str, Any]], key: str, colour: str, label: str | None, window: int
) -> None:
    """Draw the values faintly, and their running mean within one stage clearly."""
    x = np.array([line["step"] for line in lines])
    y = np.array([line[key] for line in lines], dtype=float)
    if window > 1:
        axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.7)
    ones = np.ones(window)
    mean = np.convolve(y, ones, "full") / np.convolve(np.ones_like(y), ones, "full")  # fewer values at the ends
    start = window // 2
    axis.plot(x, mean[start : start + len(y)], color=colour, linewidth=1.6, label=label)


def _plain_log_ticks(axis: Axes) -> None:
    """Label ticks as 0.1 instead of 10⁻¹: round numbers in a narrow range, else powers of ten and parts of them."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    axis.tick_params(axis="y", labelsize=9)


def log_ticks(low: float, high: float) -> list[float]:
    """Return 4 to 12 round numbers from ``low`` to ``high``, 0 < low < high, for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8)):
        ticks = [digit * 10.0**power for power in decades for digit in leading]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= MIN_TICKS:
            return ticks[:: math.ceil(len(ticks) / MAX_TICKS)]
    step = 10.0 ** math.floor(math.log10((high - low) / MIN_TICKS))  # narrower: equal steps of 1, 2 or 5 times a power
    step = max((step * times for times in (1, 2, 5) if step * times * MIN_TICKS <= high - low), default=step)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _mark_stages(axis: Axes, stages: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    for number, (name, lines) in enumerate(stages):
        first, last = lines[0]["step"], lines[-1]["step"]
        if number:
            axis.axvline(first, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        axis.text(
            (first + last) / 2, 1.01, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8
        )


def _points(results: Mapping[str, Any], model: str, key: str) -> list[tuple[int, float]]:
    return sorted(
        (r["width"], 100 * r["scores"][key]) for r in results["rows"] if r["model"] == model and key in r["scores"]
    )


def _widest(results: Mapping[str, Any], model: str, key: str) -> float:
    points = _points(results, model, key)
    return points[-1][1] if points else math.nan


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Create a figure without a window or global state, which pyplot would keep.

    Args:
        rows: rows of panels.
        columns: columns of panels.
        size: width and height in inches.

    Returns:
        The figure and its panels, row by row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _grid(panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(PANELS_PER_ROW, panels)
    rows = math.ceil(panels / columns)
    figure, axes = new_figure(rows, columns, (max(5.0, 3.6 * columns), 3.3 * rows + 0.6))
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes


def shared_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend below the panels, with each label once.

    Args:
        figure: figure from :func:`new_figure`.
        axes: its panels with labelled lines.
    """
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = max(1, min(len(entries), int(figure.get_figwidth() / LEGEND_ENTRY)))
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )


def save_figure(figure: Figure, file: IO[bytes]) -> None:
    """Write a figure as a PNG.

    Args:
        figure: the figure.
        file: binary file.
    """
    figure.savefig(file, format="png", dpi=DPI)
