"""Scores of the ablation, for its page and its targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

KINDS = {"beir": "retrieval", "docstrings": "retrieval", "sts": "similarity"}
SURE = 0.95  # required confidence of Student's t test for a difference

Key = tuple[str, str, int, str, str]  # arm, budget, width, precision, kind


def collect(results: Mapping[str, Any]) -> dict[Key, list[float]]:
    """Return the means of every arm over the sets of a kind, one per seed."""
    scores: dict[Key, list[float]] = {}
    for run in results["runs"]:
        for row in run["rows"]:
            for kind, value in kind_means(results, row["scores"]).items():
                scores.setdefault((run["arm"], run["budget"], row["width"], row["precision"], kind), []).append(value)
    return scores


def kind_means(results: Mapping[str, Any], scores: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of the first metric over the sets of each kind with scores."""
    by_kind: dict[str, list[float]] = {}
    for evalset in results["sets"]:
        value = scores.get(f"{evalset['name']}/{evalset['metric']}")
        if evalset["kind"] in KINDS and value is not None:
            by_kind.setdefault(KINDS[evalset["kind"]], []).append(value)
    return {kind: mean(values) for kind, values in by_kind.items()}


def kinds_of(results: Mapping[str, Any]) -> list[str]:
    """Return the kinds of score in the results."""
    present = {evalset["kind"] for evalset in results["sets"]}
    return list(dict.fromkeys(name for kind, name in KINDS.items() if kind in present))


def verdict(a: list[float], b: list[float]) -> str:
    """Describe the difference in points: better or worse if it is more than noise between seeds."""
    difference = 100 * (mean(a) - mean(b))
    if len(a) < 2 or len(b) < 2:
        return f"{difference:+.2f} (one seed: no spread known)"
    noise = 100 * (stdev(a) ** 2 / len(a) + stdev(b) ** 2 / len(b)) ** 0.5
    if abs(difference) <= t.ppf((1 + SURE) / 2, len(a) + len(b) - 2) * noise:
        return f"no difference beyond noise ({difference:+.2f})"
    return f"{'better' if difference > 0 else 'worse'} by {abs(difference):.2f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table of numbers after a first column of text."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
