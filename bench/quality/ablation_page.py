"""Generator of ``docs/ablation.md``: tables and plots of the ablation's results, and a part written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.common.arms import spread
from bench.quality.ablation_arms import BEST, PAPERS, STATEMENTS
from bench.quality.ablation_scores import KINDS, SURE, Key, collect, kind_means, kinds_of, markdown, verdict
from bench.quality.ablation_targets import targets
from jasper_fast.models.quantization import PRECISIONS
from jasper_fast.utils.atomic import write_atomic

BY_HAND = ("<!-- by hand: start -->", "<!-- by hand: end -->")
QUESTIONS = {
    "losses": "Which losses, on which batches",
    "mining": "How batches are mined",
    "temperature": "Temperature of the neighbourhood loss",
    "batch": "Batch size",
    "target": "Own vector as target",
    "heads": "Prefix heads",
    "start": "Where narrow heads begin",
    "searched": "The documents that are searched, among the texts",
    "teachers": "Two teachers",
    "codes": "Trained for codes",
    "encoder": "Full width, where the encoder trains",
}


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Write the page, and its plots in a folder next to it. The part written by hand is kept."""
    scores = collect(results)
    images = _pictures(results, scores, path)
    sections = [
        "# What each choice is worth, for narrow embeddings",
        _intro(results),
        "## Summary\n\nDifferences in points, of arms with equal seconds (encoders: equal texts).\n\n"
        + statements(results, scores),
        "\n".join([BY_HAND[0], _by_hand(path), BY_HAND[1]]),
        targets(results, scores),
        *images,
        _floors(results, scores),
        *(_group(results, scores, group) for group in QUESTIONS),
        _codes(results, scores),
    ]
    write_atomic(path, "\n\n".join(section for section in sections if section) + "\n")


def statements(results: Mapping[str, Any], scores: Mapping[Key, list[float]]) -> str:
    """Return a table of differences between two arms, marked if within noise, with a row per question."""
    shown = [(width, kind) for width in results["widths"] for kind in kinds_of(results)]
    rows = []
    for question, first, second in STATEMENTS:
        encoder = first.startswith("encoder")
        cells = []
        for width, kind in shown:
            budget = "texts" if encoder else "seconds"
            a, b = (scores.get((arm, budget, width, "float32", kind)) for arm in (first, second))
            wanted = encoder or width in results["widths"][-2:]
            cells.append(verdict(a, b) if a and b and wanted else "")
        if any(cells):
            rows.append([question, f"*{first}*", f"*{second}*", *cells])
    used = [column for column in range(len(shown)) if any(row[3 + column] for row in rows)]
    heads = ["question", "arm", "against", *(f"{kind} {width}" for width, kind in (shown[column] for column in used))]
    return markdown(heads, [[*row[:3], *(row[3 + column] for column in used)] for row in rows])


def _intro(results: Mapping[str, Any]) -> str:
    facts, budgets = results["facts"], results["budgets"]
    named = {kind: [s["name"] for s in results["sets"] if KINDS.get(s["kind"]) == kind] for kind in KINDS.values()}
    sets = " and ".join(
        f"{kind} is the mean {'nDCG@10' if kind == 'retrieval' else 'Spearman'} of {', '.join(names)}"
        for kind, names in named.items()
        if names
    )
    environment = results["environment"]
    return (
        "Written by `python -m bench ablation` from [ablation.json](../bench/results/ablation.json). Every arm trains "
        f"linear heads on the states of one frozen, distilled encoder for {facts['texts']:,} texts. Arms with searched "
        f"texts also have the {facts['searched']:,} documents of the retrieval sets, without queries or judgements. "
        f"Each arm trains once for {budgets['seconds']:g} seconds and once on {budgets['texts']:,} texts, with seeds "
        f"{', '.join(map(str, results['seeds']))}. Finding the teacher's neighbours is not in the seconds.\n\n"
        "Figures are in per cent, mean ± standard deviation over seeds. A seed draws the start of the narrow heads and "
        "the order of batches, on the same encoder. In the encoder arms, a seed is a separate run. A difference counts "
        f"if Student's t test finds it at {100 * SURE:.0f} %. {sets[:1].upper() + sets[1:]}.\n\n"
        f"Machine: {environment['cpu']['model']}, threads of an arm: {environment['threads']}, commit "
        f"{environment.get('commit')}."
    )


def _by_hand(path: Path) -> str:
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if BY_HAND[0] in old and BY_HAND[1] in old:
        return old.split(BY_HAND[0], 1)[1].split(BY_HAND[1], 1)[0].strip("\n")
    return ""


def _group(results: Mapping[str, Any], scores: Mapping[Key, list[float]], group: str) -> str:
    """Return the tables of one question's arms and of the arms they are compared with, for both budgets."""
    arms = list(dict.fromkeys(run["arm"] for run in results["runs"] if run["group"] == group))
    if not arms:
        return ""
    ran = {run["arm"] for run in results["runs"]}
    if group not in ("losses", "encoder"):
        arms = [arm for arm in (BEST, PAPERS) if arm in ran] + arms
    parts = [f"## {QUESTIONS[group]}"]
    for budget in ("seconds", "texts"):
        rows = []
        for arm in arms:
            runs = [run for run in results["runs"] if run["arm"] == arm and run["budget"] == budget]
            if runs:
                steps = f"{mean(run['steps'] for run in runs):.0f}"
                rows.append(
                    [arm, steps, f"{mean(run['seconds'] for run in runs):.1f}", *_cells(results, scores, arm, budget)]
                )
        if rows:
            heads = ["arm", "steps", "seconds", *_heads(results)]
            parts += [f"Equal {budget}:", markdown(heads, rows)]
    return "\n\n".join(parts)


def _heads(results: Mapping[str, Any]) -> list[str]:
    return [f"{kind} {width}" for width in results["widths"] for kind in kinds_of(results)]


def _cells(results: Mapping[str, Any], scores: Mapping[Key, list[float]], arm: str, budget: str) -> list[str]:
    keys = [(arm, budget, width, "float32", kind) for width in results["widths"] for kind in kinds_of(results)]
    return [spread(scores[key]) if key in scores else "" for key in keys]


def _floors(results: Mapping[str, Any], scores: Mapping[Key, list[float]]) -> str:
    """Return a table of PCA and truncation, compared with the best arm and the paper's losses."""
    rows = []
    plain = [row for row in results["floors"] if "precision" not in row]
    for model in dict.fromkeys(row["model"] for row in plain):
        by_width = {row["width"]: kind_means(results, row["scores"]) for row in plain if row["model"] == model}
        cells = [by_width.get(width, {}).get(kind) for width in results["widths"] for kind in kinds_of(results)]
        rows.append([model, *("" if cell is None else f"{100 * cell:.2f}" for cell in cells)])
    ran = {run["arm"] for run in results["runs"]}
    rows += [[arm, *_cells(results, scores, arm, "seconds")] for arm in (PAPERS, BEST) if arm in ran]
    text = "The teacher and the student at full width, and both made narrow by PCA or by keeping the first coordinates."
    return f"## Compared with no training at all\n\n{text}\n\n" + markdown(["", *_heads(results)], rows)


def _codes(results: Mapping[str, Any], scores: Mapping[Key, list[float]]) -> str:
    """Return a table of scores by width and precision, with the change from the same arm's float32."""
    arms = dict.fromkeys(arm for arm, *_, precision, _ in scores if precision == "int8")
    rows = []
    for arm in arms:
        for width in results["widths"]:
            for kind in kinds_of(results):
                plain = scores.get((arm, "seconds", width, "float32", kind))
                if not plain:
                    continue
                cells = [spread(plain)]
                for precision in PRECISIONS[1:]:
                    values = scores.get((arm, "seconds", width, precision, kind))
                    lost = "" if not values else f" ({100 * (mean(values) / mean(plain) - 1):+.1f} %)"
                    cells.append(spread(values) + lost if values else "")
                rows.append([arm, str(width), kind, *cells])
    if not rows:
        return ""
    text = "Equal seconds. In brackets is the change from the same arm's float32."
    return f"## Width × precision\n\n{text}\n\n" + markdown(["arm", "width", "", *PRECISIONS], rows)


def _pictures(results: Mapping[str, Any], scores: Mapping[Key, list[float]], path: Path) -> Iterable[str]:
    """Plot all arms in the order of their scores at the two narrowest widths. Return the images' Markdown."""
    import io

    from jasper_fast.reporting.plots import new_figure, save_figure

    drawn = []
    kinds, widths = kinds_of(results), results["widths"][-2:]
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in results["runs"]) if not arm.startswith("encoder")]
    for width in widths:
        figure, axes = new_figure(1, len(kinds), (6 * len(kinds), 1.5 + 0.22 * len(arms)))
        for axis, kind in zip(axes, kinds, strict=True):
            by_arm = {arm: scores.get((arm, "seconds", width, "float32", kind)) for arm in arms}
            ordered = sorted(((mean(v), v, arm) for arm, v in by_arm.items() if v), key=lambda item: item[0])
            for place, (middle, values, arm) in enumerate(ordered):
                colour = {BEST: "#0072B2", PAPERS: "#D55E00"}.get(arm, "#777777")
                error = 100 * stdev(values) if len(values) > 1 else 0.0
                axis.errorbar(100 * middle, place, xerr=error, fmt="o", color=colour, markersize=4, capsize=2)
            for row in results["floors"]:
                value = kind_means(results, row["scores"]).get(kind)
                if row["width"] == width and value is not None and row["model"] == "teacher PCA":
                    axis.axvline(100 * value, color="#E69F00", linestyle="--", linewidth=1, label="teacher, PCA")
                    axis.legend(fontsize=8, frameon=False)
            axis.set_yticks(range(len(ordered)), [arm for *_, arm in ordered], fontsize=7)
            axis.set_title(f"{kind} at {width}, equal seconds, %", loc="left", fontsize=11)
        content = io.BytesIO()
        save_figure(figure, content)
        file = path.parent / path.stem / f"arms-{width}.png"
        write_atomic(file, content.getvalue())
        drawn.append(f"![All arms at {width} dimensions]({path.stem}/{file.name})")
    return drawn
