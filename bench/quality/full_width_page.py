"""Generator of ``docs/full-width.md`` from the results of ``python -m bench ablation --full-width``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from bench.common.arms import spread
from bench.quality.ablation_scores import SURE, collect, kinds_of, markdown, verdict
from bench.quality.full_width_arms import BASE, FULL_WIDTH_ARMS
from jasper_fast.utils.atomic import write_atomic


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Write the page."""
    ((unit, amount),) = results["budgets"].items()
    environment, sets = results["environment"], ", ".join(one["name"] for one in results["sets"])
    seeds = results["seeds"]
    parts = [
        "# What helps at full width",
        "Written by `python -m bench ablation --full-width` from [full-width.json](../bench/results/full-width.json). "
        f"Every arm trains the encoder for {amount:g} {unit} and differs from the base in one thing. The sets that "
        f"choose are {sets}. Figures are in per cent, mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}. A difference counts if Student's t test finds it at {100 * SURE:.0f} %.",
        f"Machine: {environment['cpu']['model']}, threads of an arm: {environment['threads']}, commit "
        f"{environment.get('commit')}.",
        table(results),
        "## Every set",
        by_set(results),
    ]
    write_atomic(path, "\n\n".join(parts) + "\n")


def table(results: Mapping[str, Any]) -> str:
    """Return a table with a row per arm: its cost, its means, and the difference from the base in points."""
    scores, kinds, (width, *_) = collect(results), kinds_of(results), results["widths"]
    rows = []
    for arm in FULL_WIDTH_ARMS:
        runs = [run for run in results["runs"] if run["arm"] == arm.name]
        if not runs:
            continue
        cells = [arm.question, f"*{arm.name}*", f"{mean(run['seconds'] for run in runs):.0f}"]
        cells.append(f"{mean(run['steps'] for run in runs):.0f}")
        for kind in kinds:
            own = scores.get((arm.name, "equal", width, "float32", kind))
            base = scores.get((BASE, "equal", width, "float32", kind))
            cells.append(spread(own) if own else "")
            cells.append(verdict(own, base) if own and base and arm.name != BASE else "")
        rows.append(cells)
    heads = ["question", "arm", "seconds", "steps"]
    return markdown([*heads, *(head for kind in kinds for head in (kind, "against the base"))], rows)


def by_set(results: Mapping[str, Any]) -> str:
    """Return a table of every arm on every set, with the teacher."""
    keys = [f"{one['name']}/{one['metric']}" for one in results["sets"]]
    rows = []
    for arm in FULL_WIDTH_ARMS:
        found = [row["scores"] for run in results["runs"] if run["arm"] == arm.name for row in run["rows"]]
        if found:
            rows.append([f"*{arm.name}*", *(spread([scores[key] for scores in found]) for key in keys)])
    teacher = next((run["teacher"] for run in results["runs"] if run.get("teacher")), {})
    if teacher:
        rows.append(["teacher", *(spread([teacher[key]]) if key in teacher else "" for key in keys)])
    return markdown(["arm", *keys], rows)
