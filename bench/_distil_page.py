"""``docs/peers.md``: the whole table of the peers' comparison, and what it comes to, from its committed results."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from bench._arms import spread
from jasper_fast.files import write_atomic

OURS = "jasper_fast"
TEACHERS = ("teacher", "teacher PCA", "teacher truncated")  # a model twice as deep, made narrow: no peer, but a mark
START = "student before"
WHAT_DIFFERS = (
    "What differs, which was not taken apart arm by arm: at full width ours learns by the cosine alone, as st-cosine "
    "does; it makes more than twice the steps in the time, since its micro-batches are cut by length and its "
    "embeddings are frozen (the peers' trainer trains all). The narrow heads begin at the principal axes of the "
    "student's own vectors and learn by the similarity and neighbourhood losses, from batches that are half neighbours."
)

Scores = dict[tuple[str, int], list[dict[str, float]]]  # (model, width) -> scores by seed


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Write the page."""
    environment = results["environment"]
    texts = [
        "# Beside sentence-transformers' own distillation",
        "Written by `python -m bench distil` from [distil.json](../bench/results/distil.json). Every arm starts from "
        "the same student, trains on the same texts and teacher vectors in fp32 on the same machine "
        f"(threads of an arm: {environment['threads']}, arms side by side: {environment.get('together', 1)}), and no "
        "peer gets fewer seconds than ours took; mean ± "
        f"standard deviation over seeds {', '.join(map(str, environment['seeds']))}. The peers are "
        "`EmbedDistillLoss` as MSE and as cosine, alone and inside `MatryoshkaLoss`, under "
        "`SentenceTransformerTrainer`; their warm-up and decay follow the clock. Those without narrow heads are made "
        "narrow by PCA (axes of their own vectors) and by truncation.",
        f"Machine: {environment['cpu']['model']}, {environment['cpu']['logical_cpus']} logical CPUs; commit "
        f"{environment['commit']}.",
        chosen(results),
        WHAT_DIFFERS,
        "## What it comes to",
        "\n".join(verdicts(results)),
        "## Training",
        training(results),
        "## Every figure",
        table(results),
    ]
    write_atomic(path, "\n\n".join(texts) + "\n")


def collect(results: Mapping[str, Any]) -> Scores:
    """Every model's scores at every width, one entry per seed; recall is left out."""
    found: Scores = {}
    for runs in results["arms"].values():
        for run in runs:
            for row in run["rows"]:
                scores = {key: value for key, value in row["scores"].items() if not key.endswith("recall@100")}
                found.setdefault((row["model"], row["width"]), []).append(scores)
    return found


def chosen(results: Mapping[str, Any]) -> str:
    """How everybody's settings were chosen, and on what."""
    tuned = ", ".join(results["tuned_on"])
    search = results["search"]
    means = "; ".join(f"{lr}: {100 * score:.2f}" for lr, score in search["means"].items())
    found = f" (mean of seed {_first_seed(results)} by rate: {means})" if means else ""
    return (
        f"How the settings were chosen: ours on {tuned} (the distil stage in runs of a few minutes; the narrow heads' "
        f"as one of some 25 tried on seed 0's encoder). The peers' learning rate, {search['lr']:g}, was searched on "
        f"the same sets with {search['arm']} for all of them{found}; their batch is ours. The other sets took no part "
        "in any choice, so their mean is the one to judge by."
    )


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """A line per width: ours against the best peer on both means, and on each figure against the best peer there."""
    scores = collect(results)
    kinds = set_kinds(results)
    lines = []
    for width in sorted({width for model, width in scores if model == OURS}, reverse=True):
        ours = scores[OURS, width]
        peers = {m: s for (m, w), s in scores.items() if w == width and m not in (OURS, START, *TEACHERS)}
        if not peers:
            continue
        parts = []
        for kind, sets in kinds.items():
            means = {m: [mean(of_sets(s, sets).values()) for s in found] for m, found in peers.items()}
            best = max(means, key=lambda model: mean(means[model]))
            own = [mean(of_sets(s, sets).values()) for s in ours]
            above = scores.get(("teacher PCA", width))
            mark = (
                f"; PCA of the teacher itself {spread([mean(of_sets(s, sets).values()) for s in above])}"
                if above
                else ""
            )
            parts.append(
                f"**{100 * (mean(own) - mean(means[best])):+.2f} points on the mean of the sets {kind}**, "
                f"{spread(own)} against {spread(means[best])} of the best peer, {best}{mark}"
            )
        figures = []
        for key in ours[0]:
            first = max(peers, key=lambda model: mean([s[key] for s in peers[model]]))
            gap = 100 * (mean([s[key] for s in ours]) - mean([s[key] for s in peers[first]]))
            figures.append(f"{key} {gap:+.2f} ({first})")
        lines.append(
            f"- **{width} wide.** {'. '.join(parts)}. Against the best peer on each figure: {'; '.join(figures)}."
        )
    return lines


def set_kinds(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the evaluation sets by their part in the choice of settings; no empty kind."""
    keys = next(iter(collect(results).values()))[0]
    names = list(dict.fromkeys(key.split("/")[0] for key in keys))
    tuned = results["tuned_on"]
    kinds = {"kept aside": [n for n in names if n not in tuned], "tuned on": [n for n in names if n in tuned]}
    return {kind: sets for kind, sets in kinds.items() if sets}


def of_sets(scores: Mapping[str, float], sets: Collection[str]) -> dict[str, float]:
    """The scores of these sets, recall left out."""
    return {k: v for k, v in scores.items() if k.split("/")[0] in sets and not k.endswith("recall@100")}


def training(results: Mapping[str, Any]) -> str:
    """What each arm was given and did."""
    lines = ["| arm | seconds | steps | batch | peak learning rate |", "|---|---|---|---|---|"]
    for arm, runs in results["arms"].items():
        settings = runs[0]["settings"]
        stages = settings["config"].get("stages", [])
        steps = " + ".join(str(s["steps"]) for s in stages) or _range([run["steps"] for run in runs])
        batch = " / ".join(str(s["batch_size"]) for s in stages) or settings["batch"]
        rate = " / ".join(f"{s['lr']:g}" for s in stages) or f"{settings['lr']:g}"
        lines.append(f"| {arm} | {_range([round(run['seconds']) for run in runs])} | {steps} | {batch} | {rate} |")
    return "\n".join(lines)


def table(results: Mapping[str, Any]) -> str:
    """Per model and width: the mean over seeds of every score with its spread, and of the means over sets."""
    scores = collect(results)
    kinds = set_kinds(results)
    keys = list(next(iter(scores.values()))[0])
    lines = ["| " + " | ".join(["arm", "width", *(f"mean, {kind}" for kind in kinds), *keys]) + " |"]
    lines.append("|---" * (len(keys) + len(kinds) + 2) + "|")
    for (model, width), found in sorted(scores.items(), key=lambda item: (-item[0][1], item[0][0])):
        cells = [spread([mean(of_sets(s, sets).values()) for s in found]) for sets in kinds.values()]
        cells += [spread([s[k] for s in found]) for k in keys]
        lines.append(f"| {model} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _first_seed(results: Mapping[str, Any]) -> int:
    return results["environment"]["seeds"][0]


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
