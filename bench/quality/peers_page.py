"""Generator of ``docs/peers.md``: summary and tables of the comparison with peers, from its committed results."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.common.arms import spread
from bench.quality.peer_arms import PEERS
from jasper_fast.utils.atomic import write_atomic

OURS = "jasper_fast"
TEACHERS = ("teacher", "teacher PCA", "teacher truncated")  # twice as deep as the student: for reference, not a peer
START = "student before"
WHAT_DIFFERS = (
    "These differences were not measured one by one. At full width ours learns by the cosine alone, as st-cosine does. "
    "It takes more than twice the steps in the time, since its micro-batches are cut by length and its token "
    "embeddings are frozen. The trainer of sentence-transformers trains all parameters. Our narrow heads start at the "
    "principal axes of the student's embeddings, and learn by the similarity and neighbourhood losses. Half of their "
    "batches are neighbours."
)

Scores = dict[tuple[str, int], list[dict[str, float]]]  # (model, width) -> scores by seed


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Write the page from the content of distil.json."""
    environment = results["environment"]
    texts = [
        "# Compared with other ways to distil",
        "Written by `python -m bench distil` from [distil.json](../bench/results/distil.json). Every arm starts from "
        "the same student, and trains on the same texts and teacher embeddings in fp32 on the same machine. The "
        f"threads of an arm are {environment['threads']}, and the arms at the same time "
        f"{environment.get('together', 1)}. No peer gets fewer seconds than ours took. Figures are mean ± standard "
        f"deviation over seeds {', '.join(map(str, environment['seeds']))}.",
        "The peers:",
        "\n".join(f"- *{arm}*: {peer.text}." for arm, peer in PEERS.items() if arm in results["arms"]),
        "The learning rates of peers follow the clock. Peers without narrow heads are made narrow by PCA (axes of "
        "their embeddings of training texts) and by truncation.",
        f"Machine: {environment['cpu']['model']}, {environment['cpu']['logical_cpus']} logical CPUs. Commit: "
        f"{environment['commit']}.{other_code(results)}",
        "## Summary",
        "Gains of ours over the best peer, in points, on the mean of the sets. *Kept aside* are sets that took no part "
        "in any choice.",
        summary(results),
        "Gains over the best peer on each figure, in points, with that peer:",
        by_figure(results),
        "## Where ours is not ahead",
        not_ahead(results),
        "## How the settings were chosen",
        chosen(results),
        "## What differs",
        WHAT_DIFFERS,
        "## Training",
        training(results),
        "## Every figure",
        table(results),
    ]
    write_atomic(path, "\n\n".join(texts) + "\n")


def other_code(results: Mapping[str, Any]) -> str:
    """List the code version of each arm, empty if all arms come from the same code."""
    arms: dict[str, list[str]] = {}  # by the digest of the code; commits may differ in other files alone
    named: dict[str, str] = {}
    for arm, runs in results["arms"].items():
        for run in runs:
            code = run.get("code")
            digest = code["digest"] if code else ""
            named[digest] = f"commit {code['commit']} (code {digest})" if code else "code not recorded"
            arms.setdefault(digest, []).append(f"{arm} seed {run['seed']}")
    if len(arms) < 2:
        return ""
    listed = "; ".join(f"{named[digest]}: {', '.join(runs)}" for digest, runs in arms.items())
    return f" The arms do not all come from the same code: {listed}."


def collect(results: Mapping[str, Any]) -> Scores:
    """Collect the scores by model and width, with one entry per seed and without recall."""
    collected: Scores = {}
    for runs in results["arms"].values():
        for run in runs:
            for row in run["rows"]:
                scores = {key: value for key, value in row["scores"].items() if not key.endswith("recall@100")}
                collected.setdefault((row["model"], row["width"]), []).append(scores)
    return collected


def chosen(results: Mapping[str, Any]) -> str:
    """Describe how the settings of all arms were chosen, and on which sets."""
    tuned, first = ", ".join(results["tuned_on"]), _first_seed(results)
    searches = results["search"] if isinstance(results["search"], list) else [results["search"]]
    lines = []
    for search in searches:
        arms = ", ".join(search.get("arms", [arm for arm in results["arms"] if arm != OURS]))
        line = f"- {arms}: {search['lr']:g}"
        if search["means"]:
            means = "; ".join(f"{lr}: {100 * score:.2f}" for lr, score in search["means"].items())
            line += f", searched with {search['arm']} and seed {first}. The means by rate are {means}"
        lines.append(f"{line}.")
    earlier = (
        "Earlier versions of our recipe were chosen on stsb, sick, cranfield and cisi, before these were kept aside. "
        if "kept_aside" in results
        else ""
    )
    return (
        f"Our settings were chosen on {tuned}. {earlier}The distil stage was chosen in runs of a few minutes, and the "
        "narrow heads' settings from some 25 on seed 0's encoder. The peers' learning rates were searched on the same "
        "sets:\n\n" + "\n".join(lines) + "\n\nTheir batch is ours. The other sets took no part in any choice of this "
        "comparison, so their mean is the one to judge by."
    )


def summary(results: Mapping[str, Any]) -> str:
    """Return a table of ours against the best peer on the mean, with a row per width and kind of sets."""
    scores, kinds = collect(results), set_kinds(results)
    lines = [
        "| width | sets | gain | ours | best peer | its mean | PCA of the teacher |",
        "|---|---|---|---|---|---|---|",
    ]
    for width, ours, peers in _widths(scores):
        for kind, sets in kinds.items():
            means = {m: [mean(of_sets(s, sets).values()) for s in by_seed] for m, by_seed in peers.items()}
            best = max(means, key=lambda model: mean(means[model]))
            own = [mean(of_sets(s, sets).values()) for s in ours]
            above = scores.get(("teacher PCA", width))
            mark = spread([mean(of_sets(s, sets).values()) for s in above]) if above else ""
            gain = f"**{100 * (mean(own) - mean(means[best])):+.2f}**"
            cells = (str(width), kind, gain, spread(own), best, spread(means[best]), mark)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_figure(results: Mapping[str, Any]) -> str:
    """Return a table of gains over the best peer, with a row per width and a column per set."""
    scores = collect(results)
    keys = list(next(iter(scores.values()))[0])
    lines = ["| " + " | ".join(["width", *keys]) + " |", "|---" * (len(keys) + 1) + "|"]
    for width, ours, peers in _widths(scores):
        cells = []
        for key in keys:
            first = max(peers, key=lambda model: mean([s[key] for s in peers[model]]))
            gap = 100 * (mean([s[key] for s in ours]) - mean([s[key] for s in peers[first]]))
            cells.append(f"{gap:+.2f} ({first})")
        lines.append("| " + " | ".join([str(width), *cells]) + " |")
    return "\n".join(lines)


def not_ahead(results: Mapping[str, Any]) -> str:
    """List where ours does not lead each peer by more than the spread, on the means of the sets and on every set.

    Ours leads if its mean less its standard deviation over seeds exceeds the peer's mean plus its deviation.
    """
    scores, kinds = collect(results), set_kinds(results)
    if not any(model == OURS for model, _ in scores):
        return "Ours has no result, so nothing is compared."
    keys = list(next(iter(scores.values()))[0])
    lines = []
    for width, ours, peers in _widths(scores):
        parts = {
            f"the mean, {kind}": [key for key in keys if key.split("/")[0] in sets] for kind, sets in kinds.items()
        }
        for name, some in (parts | {key: [key] for key in keys}).items():
            own = [mean(seed[key] for key in some) for seed in ours]
            gaps = {}
            for model, by_seed in peers.items():
                theirs = [mean(seed[key] for key in some) for seed in by_seed]
                if mean(own) - _deviation(own) <= mean(theirs) + _deviation(theirs):
                    gaps[model] = 100 * (mean(own) - mean(theirs))
            if gaps:
                lines.append(f"- {width}, {name}: " + ", ".join(f"{model} ({gap:+.2f})" for model, gap in gaps.items()))
    rule = "Ours leads if its mean less its deviation exceeds the peer's mean plus the peer's deviation."
    if not lines:
        return f"{rule} It leads every peer at every width, on the means and on every set."
    return f"{rule} It does not lead these peers (difference in points):\n\n" + "\n".join(lines)


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _widths(scores: Scores) -> Iterator[tuple[int, list[dict[str, float]], dict[str, list[dict[str, float]]]]]:
    """Yield each width with peers, the scores of ours, and those of every peer."""
    for width in sorted({width for model, width in scores if model == OURS}, reverse=True):
        peers = {m: s for (m, w), s in scores.items() if w == width and m not in (OURS, START, *TEACHERS)}
        if peers:
            yield width, scores[OURS, width], peers


def set_kinds(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group the names of the evaluation sets by their role in choosing settings, without empty groups."""
    keys = next(iter(collect(results).values()))[0]
    names = list(dict.fromkeys(key.split("/")[0] for key in keys))
    tuned = results["tuned_on"]
    aside = results.get("kept_aside", [n for n in names if n not in tuned])
    kinds = {"kept aside": [n for n in names if n in aside], "tuned on": [n for n in names if n in tuned]}
    kinds["other"] = [n for n in names if n not in (*aside, *tuned)]
    return {kind: sets for kind, sets in kinds.items() if sets}


def of_sets(scores: Mapping[str, float], sets: Collection[str]) -> dict[str, float]:
    """Return the scores of these sets, without recall."""
    return {k: v for k, v in scores.items() if k.split("/")[0] in sets and not k.endswith("recall@100")}


def training(results: Mapping[str, Any]) -> str:
    """Return a table of seconds, steps, batch size and learning rate by arm."""
    lines = ["| arm | seconds | steps | batch | peak learning rate |", "|---|---|---|---|---|"]
    for arm, runs in results["arms"].items():
        settings = runs[0]["settings"]
        stages = settings["config"].get("stages", [])
        taken = [run["stage_steps"] for run in runs if "stage_steps" in run]
        if taken:
            steps = " + ".join(_range(list(stage)) for stage in zip(*taken, strict=True))
        else:
            steps = " + ".join(str(s["steps"]) for s in stages) or _range([run["steps"] for run in runs])
        batch = " / ".join(str(s["batch_size"]) for s in stages) or settings.get("batch", "")
        rate = " / ".join(f"{s['lr']:g}" for s in stages) or (f"{settings['lr']:g}" if "lr" in settings else "")
        lines.append(f"| {arm} | {_range([round(run['seconds']) for run in runs])} | {steps} | {batch} | {rate} |")
    return "\n".join(lines)


def table(results: Mapping[str, Any]) -> str:
    """Return a table of all scores by model and width, as mean and spread over seeds, with means over sets."""
    scores = collect(results)
    kinds = set_kinds(results)
    keys = list(next(iter(scores.values()))[0])
    lines = ["| " + " | ".join(["arm", "width", *(f"mean, {kind}" for kind in kinds), *keys]) + " |"]
    lines.append("|---" * (len(keys) + len(kinds) + 2) + "|")
    for (model, width), by_seed in sorted(scores.items(), key=lambda item: (-item[0][1], item[0][0])):
        cells = [spread([mean(of_sets(s, sets).values()) for s in by_seed]) for sets in kinds.values()]
        cells += [spread([s[k] for s in by_seed]) for k in keys]
        lines.append(f"| {model} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _first_seed(results: Mapping[str, Any]) -> int:
    return results["environment"]["seeds"][0]


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
