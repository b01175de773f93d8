"""Targets for narrow embeddings, compared with the ablation's results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any

from bench.quality.ablation_arms import (
    ENCODER_PAPERS,
    ENCODER_RECIPE,
    FULL_WIDTH_BITS,
    PAPERS,
    PAPERS_SEARCHED,
    RECIPE,
    RECIPE_OWN,
    RECIPE_SEARCHED,
)
from bench.quality.ablation_scores import Key, kind_means, kinds_of, markdown, verdict

# Width, kind, and required gain of the recipe over the paper's losses: retrieval in per cent of theirs, similarity in
# points.
ABOVE_PAPERS = ((32, "retrieval", 8.0), (64, "retrieval", 3.0), (32, "similarity", 1.5), (64, "similarity", 0.5))
KEPT, AIM = 88.0, 92.0  # required per cent of full width's retrieval at 64 dimensions
COSTS = {"int8": 0.5, "ubinary": 8.0, "ubinary+rescore": 2.0}  # largest accepted loss, per cent of retrieval
FLOORS = ("teacher PCA", "teacher truncated")

Scores = Mapping[Key, list[float]]
Row = tuple[str, str, str, bool]  # target, required, measured, whether it is reached


def targets(results: Mapping[str, Any], scores: Scores) -> str:
    """Return a table of every target with results, as means over seeds of arms with equal seconds."""
    rows = [
        *_of(results, scores, RECIPE, PAPERS),
        *_at_full_width(results, scores),
        *_costs(results, scores),
    ]
    if not rows:
        return ""
    others = {
        "taught by the own vector": (RECIPE_OWN, PAPERS),
        "with the searched texts": (RECIPE_SEARCHED, PAPERS_SEARCHED),
    }
    text = (
        f"The recipe is *{RECIPE}*, and the paper's losses are *{PAPERS}*. Figures are means over seeds at equal "
        "seconds. The arm *taught by the own vector* differs only in its target. In the last columns, both arms had "
        "the searched documents among their texts, without queries or judgements."
    )
    heads, table = ["target", "required", "measured", "reached"], [[*row[:3], _yes(row[3])] for row in rows]
    for name, (recipe, papers) in others.items():
        cells = {row[0]: [row[2], _yes(row[3])] for row in _of(results, scores, recipe, papers)}
        heads += [name, "reached"]
        table = [row + cells.get(row[0], ["", ""]) for row in table]
    return f"## Targets\n\n{text}\n\n" + markdown(heads, table)


def _of(results: Mapping[str, Any], scores: Scores, recipe: str, papers: str) -> Iterator[Row]:
    """Yield the targets of a recipe for narrow heads."""
    yield from _above_papers(scores, recipe, papers)
    yield from _above_floors(results, scores, recipe)
    yield from _kept(results, scores, recipe)


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def _above_papers(scores: Scores, recipe: str, papers: str) -> Iterator[Row]:
    for width, kind, required in ABOVE_PAPERS:
        ours, theirs = (_arm(scores, arm, width, kind) for arm in (recipe, papers))
        if ours is not None and theirs is not None:
            relative = kind == "retrieval"
            gain, unit = (100 * (ours / theirs - 1), "%") if relative else (100 * (ours - theirs), "points")
            what = f"{kind} at {width} above the paper's losses"
            yield what, f"≥ {required:g} {unit}", f"{gain:+.2f} {unit}", gain >= required


def _above_floors(results: Mapping[str, Any], scores: Scores, recipe: str) -> Iterator[Row]:
    margins = []
    for width in results["widths"][1:]:
        for kind in kinds_of(results):
            ours = _arm(scores, recipe, width, kind)
            floors = [floor for model in FLOORS if (floor := _floor(results, model, width, kind)) is not None]
            if ours is not None and floors:
                margins.append((100 * (ours - max(floors)), f"{kind} at {width}"))
    if margins:
        least, where = min(margins)
        what = "above PCA and truncation of the teacher at every width"
        yield what, "> 0 points", f"{least:+.2f} points ({where})", least > 0


def _at_full_width(results: Mapping[str, Any], scores: Scores) -> Iterator[Row]:
    for kind in kinds_of(results):
        keys = [(arm, "texts", results["widths"][0], "float32", kind) for arm in (ENCODER_RECIPE, ENCODER_PAPERS)]
        if all(key in scores for key in keys):
            ours, theirs = (scores[key] for key in keys)
            result = verdict(ours, theirs)
            reached = mean(ours) >= mean(theirs) or result.startswith("no difference")
            yield f"{kind} at full width, {ENCODER_RECIPE} against {ENCODER_PAPERS}", "not behind", result, reached


def _kept(results: Mapping[str, Any], scores: Scores, recipe: str) -> Iterator[Row]:
    narrow, full = _arm(scores, recipe, 64, "retrieval"), _floor(results, "student", results["widths"][0], "retrieval")
    if narrow is not None and full:
        percent = 100 * narrow / full
        what = "retrieval of full width that 64 keep"
        yield what, f"≥ {KEPT:g} % (aim {AIM:g} %)", f"{percent:.1f} %", percent >= KEPT


def _costs(results: Mapping[str, Any], scores: Scores) -> Iterator[Row]:
    """Yield the costs of codes: int8 at the width where it costs most, bits at full width."""
    widest = results["widths"][0]
    full = _floor(results, "student", widest, "retrieval")
    pairs: list[tuple[float | None, float | None, int]] = [
        (_floor(results, "student", widest, "retrieval", "int8"), full, widest)
    ]
    for width in results["widths"][1:]:
        code, plain = (_arm(scores, RECIPE, width, "retrieval", precision) for precision in ("int8", "float32"))
        pairs.append((code, plain, width))
    costs = [(100 * (1 - code / plain), width) for code, plain, width in pairs if code is not None and plain]
    if costs:
        most, width = max(costs)
        yield (
            "cost of int8, of retrieval",
            f"≤ {COSTS['int8']:g} %",
            f"{most:.2f} % (at {width})",
            most <= COSTS["int8"],
        )
    for precision in ("ubinary", "ubinary+rescore"):
        code = _arm(scores, FULL_WIDTH_BITS, widest, "retrieval", precision)
        if code is not None and full:
            cost = 100 * (1 - code / full)
            what = f"cost of {precision} at {widest}, of retrieval"
            yield what, f"≤ {COSTS[precision]:g} %", f"{cost:.2f} %", cost <= COSTS[precision]


def _arm(scores: Scores, arm: str, width: int, kind: str, precision: str = "float32") -> float | None:
    values = scores.get((arm, "seconds", width, precision, kind))
    return mean(values) if values else None


def _floor(results: Mapping[str, Any], model: str, width: int, kind: str, precision: str = "float32") -> float | None:
    for row in results["floors"]:
        if (row["model"], row["width"], row.get("precision", "float32")) == (model, width, precision):
            return kind_means(results, row["scores"]).get(kind)
    return None
