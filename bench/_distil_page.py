"""``docs/peers.md``: the whole table of the peers' comparison, and what it comes to, from its committed results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from bench._arms import spread
from jasper_fast.files import write_atomic

OURS = "jasper_fast"
TEACHERS = ("teacher", "teacher PCA", "teacher truncated")  # a model twice as deep, made narrow: no peer, but a mark
START = "student before"
CHOSEN = (
    "How the settings were chosen, which flatters us: those of our narrow heads are one of some 25 that were tried on "
    "seed 0's encoder and scored on these same sets, after a first setting had lost to PCA at 128. Our 300 steps "
    "became 250 when they took longer than the peers' seconds. The peers have our learning rate and batch, "
    "which were found for us; no rate was searched for them. "
    "Read the narrow widths as tuned on these sets against not tuned."
)

Scores = dict[tuple[str, int], list[dict[str, float]]]  # (model, width) -> scores by seed


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Write the page."""
    environment = results["environment"]
    texts = [
        "# Beside sentence-transformers' own distillation",
        "Written by `python -m bench distil` from [distil.json](../bench/results/distil.json). Every arm starts from "
        "the same student, trains on the same texts and teacher vectors in fp32 on the same machine "
        f"(threads: {environment['threads']}), and no peer gets fewer seconds than ours took; mean ± standard "
        f"deviation over seeds {', '.join(map(str, environment['seeds']))}. The peers are "
        "`EmbedDistillLoss` with the distances that it offers, alone and inside `MatryoshkaLoss`, under "
        "`SentenceTransformerTrainer`; their warm-up and decay follow the clock. Those without narrow heads are made "
        "narrow by PCA (axes of the teacher's vectors) and by truncation.",
        f"Machine: {environment['cpu']['model']}, {environment['cpu']['logical_cpus']} logical CPUs; commit "
        f"{environment['commit']}.",
        CHOSEN,
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


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """A line per width: ours against the best peer on the mean, and on each figure against the best peer there."""
    scores = collect(results)
    lines = []
    for width in sorted({width for model, width in scores if model == OURS}, reverse=True):
        ours = scores[OURS, width]
        peers = {m: s for (m, w), s in scores.items() if w == width and m not in (OURS, START, *TEACHERS)}
        if not peers:
            continue
        best = max(peers, key=lambda model: mean(map(_mean, peers[model])))
        parts = []
        for key in ours[0]:
            first = max(peers, key=lambda model: mean([s[key] for s in peers[model]]))
            gap = 100 * (mean([s[key] for s in ours]) - mean([s[key] for s in peers[first]]))
            parts.append(f"{key} {gap:+.2f} ({first})")
        gap = 100 * (mean(map(_mean, ours)) - mean(map(_mean, peers[best])))
        above = scores.get(("teacher PCA", width))
        mark = f" PCA of the teacher itself: {spread([*map(_mean, above)])}." if above else ""
        lines.append(
            f"- **{width} wide: {gap:+.2f} points on the mean**, {spread([*map(_mean, ours)])} against "
            f"{spread([*map(_mean, peers[best])])} of the best peer, {best}. Against the best peer on each figure: "
            f"{'; '.join(parts)}.{mark}"
        )
    return lines


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
    """Per model and width: the mean over seeds of every score with its spread, and the mean over sets."""
    scores = collect(results)
    keys = list(next(iter(scores.values()))[0])
    lines = ["| arm | width | mean | " + " | ".join(keys) + " |", "|---" * (len(keys) + 3) + "|"]
    for (model, width), found in sorted(scores.items(), key=lambda item: (-item[0][1], item[0][0])):
        cells = [spread([s[k] for s in found]) for k in keys]
        lines.append(f"| {model} | {width} | {spread([*map(_mean, found)])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(scores: Mapping[str, float]) -> float:
    return mean(scores.values())


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
