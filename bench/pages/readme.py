"""Write the tables of README and pages in docs/ from committed results: ``python -m bench readme``.

``--check`` only compares. The README gets six rows of the run on public text and the figure. docs/results.md gets all
tables. The reports of both runs, the default recipe and the recipe on public text, are in ``docs/runs``. ``--from RUN``
copies them there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.adapt import table as adapted_table
from bench.migrate import table as migrated_table
from jasper_fast.evaluation.score import BEFORE, PCA, STUDENT, TEACHER, TRUNCATED
from jasper_fast.utils.atomic import write_atomic

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "docs" / "runs"
DEFAULT, PUBLIC = "minilm-docstrings", "minilm-public"
FIGURE = "docs/quality-by-width.png"
COPIED = ("results.json", "report.md", "config.yaml", "plots")
FLOORS = {STUDENT: "**student**", PCA: "PCA of the teacher", TRUNCATED: "first coordinates of the teacher"}


def main(argv: list[str]) -> int:
    """Write the tables. With ``--check``, compare them instead, and return 1 if a page differs from the results."""
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="run", metavar="RUN", help="first copy this run's report into docs/")
    parser.add_argument("--check", action="store_true", help="only compare the pages with the results")
    options = parser.parse_args(argv)
    if options.run:
        copy_report(Path(options.run))
    default, public = read_results(DEFAULT), read_results(PUBLIC)
    names = ("losses-cpu", "adapt", "adapt-public", "migrate")
    losses, adapted, better, migrated = map(read_benchmark, names)
    tables = {
        "README.md": {"results": summary_section(public)},
        "docs/results.md": {
            "docstrings": section(default),
            "public": public_section(public),
            "losses": losses_section(losses),
        },
        "docs/adapt.md": {
            "adapted": adapted_table(adapted["summary"]),
            "adapted-public": adapted_table(better["summary"]),
        },
        "docs/migrate.md": {"migrated": migrated_table(migrated["summary"])},
    }
    outdated = []
    for name, sections in tables.items():
        text = wanted = (ROOT / name).read_text(encoding="utf-8")
        for key, content in sections.items():
            wanted = with_section(wanted, key, content)
        if wanted != text:
            outdated.append(name)
            if not options.check:
                write_atomic(ROOT / name, wanted)
    if options.check:
        print(f"{' and '.join(outdated)}: run python -m bench readme" if outdated else "the tables are up to date")
        return int(bool(outdated))
    draw_figure(default, public, ROOT / FIGURE)
    return 0


def copy_report(run: Path) -> None:
    """Copy a run's report, scores, configuration and plots to docs/."""
    folder = RUNS / json.loads((run / "results.json").read_text(encoding="utf-8"))["recipe"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = run / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)


def read_results(recipe: str) -> dict[str, Any]:
    """Read the scores of a recipe's committed run."""
    return json.loads((RUNS / recipe / "results.json").read_text(encoding="utf-8"))


def read_benchmark(name: str) -> dict[str, Any]:
    """Read the committed results of a benchmark."""
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def with_section(readme: str, name: str, text: str) -> str:
    """Replace the text of a page between the comments ``name:start`` and ``name:end``."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    head, rest = readme.split(start)
    _, tail = rest.split(end)
    return head + start + "\n" + text + "\n" + end + tail


def summary_section(results: dict[str, Any]) -> str:
    """Format six rows for the README: teacher, student before training, and student at four widths."""
    keys, rows = _public(results)
    teacher_width = results["facts"]["teacher_width"]
    teacher = rows[TEACHER, teacher_width]
    widths = sorted({width for model, width in rows if model == STUDENT}, reverse=True)
    models = [("teacher", (TEACHER, teacher_width)), ("student before training", (BEFORE, widths[0]))]
    models += [(f"**student**, {width} wide", (STUDENT, width)) for width in widths]
    lines = [
        "| | bytes per text | " + " | ".join(one["name"] for one in results["sets"]) + " | kept (mean) |",
        "| --- |" + " ---: |" * (len(keys) + 2),
    ]
    for name, row in models:
        scores = [f"{100 * rows[row][key]:.1f}" for key in keys]
        lines.append(
            f"| {name} | {4 * row[1]:,} | {' | '.join(scores)} | {100 * kept(rows[row], teacher, keys):.1f} % |"
        )
    remarks = ["", "PCA of the teacher is the cheap alternative.", _against_pca(rows, keys, widths[1:])]
    return "\n".join(lines + remarks)


def kept(scores: Mapping[str, float], teacher: Mapping[str, float], keys: Sequence[str]) -> float:
    """Return the mean fraction of the teacher's score over the sets."""
    return mean(scores[key] / teacher[key] for key in keys)


def _against_pca(
    rows: Mapping[tuple[str, int], Mapping[str, float]], keys: Sequence[str], widths: Sequence[int]
) -> str:
    """Count the sets on which the student beats the teacher's PCA, by width."""
    wins = {width: sum(rows[STUDENT, width][key] > rows[PCA, width][key] for key in keys) for width in widths}
    counts = [f"{count} of {len(keys)} sets at {width}" for width, count in wins.items()]
    listed = " and ".join(filter(None, [", ".join(counts[:-1]), counts[-1]]))
    return f"The student beats it on {listed} dimensions."


def _public(results: dict[str, Any]) -> tuple[list[str], dict[tuple[str, int], dict[str, float]]]:
    """Return the keys of the main metrics of a run's sets, and the scores by model and width."""
    keys = [f"{one['name']}/{one['metric']}" for one in results["sets"]]
    return keys, {(row["model"], row["width"]): row["scores"] for row in results["rows"]}


def draw_figure(default: dict[str, Any], public: dict[str, Any], path: Path) -> None:
    """Draw the quality kept against width: the student compared with PCA of its teacher, on both runs."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
    titles = ("five public sets, 20 minutes", "docstrings, `make train`, 11 minutes")
    for axis, results, title in zip(axes, (public, default), titles, strict=True):
        keys, rows = _public(results)
        teacher_width = results["facts"]["teacher_width"]
        teacher = rows[TEACHER, teacher_width]
        marks: dict[str, dict[str, Any]] = {
            STUDENT: {"label": "student (3 layers)", "color": "#0072B2", "marker": "o"},
            PCA: {"label": "PCA of the teacher (6 layers)", "color": "#E69F00", "marker": "s", "linestyle": "--"},
        }
        for model, style in marks.items():
            fractions = {w: 100 * kept(scores, teacher, keys) for (m, w), scores in rows.items() if m == model}
            if model == PCA:
                fractions[teacher_width] = 100.0
            widths = sorted(fractions)
            axis.plot(widths, [fractions[width] for width in widths], **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.set_xlabel("numbers per embedding")
        axis.set_title(title.replace("`", ""), loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the teacher kept")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    write_atomic(path, content.getvalue())


def section(results: dict[str, Any]) -> str:
    """Format the table and figure of a run: student, teacher, PCA and truncation at all widths."""
    key = f"{results['primary']['set']}/{results['primary']['metric']}"
    rows = {(row["model"], row["width"]): row["scores"][key] for row in results["rows"]}
    widths = sorted({width for model, width in rows if model == STUDENT}, reverse=True)
    facts = results["facts"]
    teacher_width = facts["teacher_width"]
    teacher = rows[TEACHER, teacher_width]
    parameters = facts["student_parameters"] / 1e6
    seen = "These are among the training texts." if results["transductive"] else "These were not trained on."
    if held := facts.get("held_out_docstrings"):
        seen = "These docstrings were never trained on as a whole. "
        seen += f"Of {held['all']:,}, {held['with a trained piece']} contain a sentence that was trained on."
    lines = [
        f"`make train` on {facts['threads']} CPU cores{_took(facts, ' takes {} after set-up')}.",
        f"The student has {parameters:.1f} M parameters and learns from {facts['texts']:,} texts.",
        f"The score is the {results['primary']['metric']} of finding a held-out docstring's body by its summary.",
        seen,
        f"The [report](runs/{DEFAULT}/report.md) has everything else.",
        "",
        "| | " + " | ".join(f"{w} wide" for w in widths) + " |",
        "| --- |" + " ---: |" * len(widths),
        "| teacher | " + " | ".join(f"{100 * teacher:.1f}" if w == teacher_width else "" for w in widths) + " |",
    ]
    before = [f"{100 * rows[BEFORE, w]:.1f}" if (BEFORE, w) in rows else "" for w in widths]
    lines.append("| student before training | " + " | ".join(before) + " |")
    for model, name in FLOORS.items():
        cells = [f"{100 * rows[model, w]:.1f}" if (model, w) in rows else "" for w in widths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    fraction = [f"{100 * rows[STUDENT, w] / teacher:.1f} %" for w in widths]
    lines.append("| kept of the teacher | " + " | ".join(fraction) + " |")
    lines += ["", f"![Quality against width](runs/{DEFAULT}/plots/widths.png)"]
    return "\n".join(lines)


def public_section(results: dict[str, Any]) -> str:
    """Format the table of a run on several sets: all widths of the student, the teacher and its PCA."""
    keys, rows = _public(results)
    facts = results["facts"]
    teacher = rows[TEACHER, facts["teacher_width"]]
    widest, *narrow = sorted({width for model, width in rows if model == STUDENT}, reverse=True)

    def line(name: str, values: list[str]) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    def scores(name: str, row: tuple[str, int]) -> str:
        return line(name, [f"{100 * rows[row][key]:.1f}" for key in keys])

    seen = results["transductive"]
    unseen = f"Texts of {', '.join(seen)} were trained on." if seen else "None of the sets' texts was trained on."
    lines = [
        f"The recipe `bench/recipes/{results['recipe']}.yaml` trains on {facts['texts']:,} public texts.",
        f"{_took(facts, 'It takes {}, evaluation included. ')}{unseen}",
        f"The [report](runs/{results['recipe']}/report.md) has everything else.",
        "",
        line("", [f"{one['name']} {one['metric']}" for one in results["sets"]]),
        "| --- |" + " ---: |" * len(keys),
        scores("teacher", (TEACHER, facts["teacher_width"])),
        scores("student before training", (BEFORE, widest)),
        scores(f"**student**, {widest} wide", (STUDENT, widest)),
        line("kept of the teacher", [f"{100 * rows[STUDENT, widest][k] / teacher[k]:.1f} %" for k in keys]),
    ]
    for width in narrow:
        lines += [
            scores(f"**student**, {width} wide", (STUDENT, width)),
            scores(f"PCA of the teacher, {width} wide", (PCA, width)),
        ]
    return "\n".join(lines)


def losses_section(results: dict[str, Any]) -> str:
    """Format the table of ``python -m bench losses``, compared with the published code and plain PyTorch."""
    cpu = results["environment"]["cpu"]
    pairs, gram = results["pairs_per_second"], results["gram_products"]
    rate = pairs["rows"] * (pairs["rows"] - 1) / 2 / pairs["all_threads_s"] / 1e6
    lines = [
        f"Forward and backward on {cpu['threads']} CPU cores ({', '.join(cpu['isa'])}), each row in one run of",
        "`python -m bench losses`. MiB are above the inputs.",
        "",
        "| | rows | speed-up | ours | the other |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for one in results["published"]:
        lines.append(
            f"| exact relative similarity, compared with the published code | {one['rows']:,} | "
            f"{one['ratio']:,.0f} × | {one['ours_s'] * 1e3:.1f} ms | {one['published_s'] * 1e3:,.0f} ms |"
        )
    for one in results["similarity"]:
        ours, other = one["methods"]["auto"], one["methods"]["reference"]
        widths = f"{one['width']} wide, teacher {one['teacher_width']}"
        lines.append(
            f"| similarity, {widths}, compared with plain PyTorch | {one['rows']:,} | "
            f"{other['seconds'] / ours['seconds']:.1f} × | {ours['seconds'] * 1e3:,.0f} ms, "
            f"{ours['peak_mib']:,.0f} MiB | {other['seconds'] * 1e3:,.0f} ms, {other['peak_mib']:,.0f} MiB |"
        )
    lines += [
        "",
        f"Exact relative similarity of {gram['rows']:,} rows takes the time of {gram['products']:.0f} products of the "
        "batch with itself.",
        f"With {pairs['rows']:,} rows it processes {rate:.1f} million pairs per second, {pairs['speed_up']:.1f} × the "
        "rate of one core.",
    ]
    return "\n".join(lines)


def _took(facts: dict[str, Any], words: str) -> str:
    """Format the minutes of a run, or return an empty string if the run did not record them."""
    seconds = facts.get("seconds")
    return words.format(f"{seconds['in all'] / 60:.0f} minutes") if seconds else ""
