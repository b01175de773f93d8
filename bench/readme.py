"""Write the README's tables from committed results: ``python -m bench readme`` (``--check`` only compares).

The runs shown are those whose reports lie in ``docs/runs``, copied there with ``--from RUN``: the embedded default, and
the recipe on public text.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from jasper_fast.evaluate import BEFORE, PCA, STUDENT, TEACHER, TRUNCATED
from jasper_fast.files import write_atomic

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "docs" / "runs"
DEFAULT, PUBLIC = "minilm-docstrings", "minilm-public"
COPIED = ("results.json", "report.md", "config.yaml", "plots")
FLOORS = {STUDENT: "**student**", PCA: "PCA of the teacher", TRUNCATED: "first coordinates of the teacher"}


def main(argv: list[str]) -> int:
    """Write, or with --check compare; returns 1 where the README is not what the results give."""
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="run", metavar="RUN", help="first copy this run's report into docs/")
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    options = parser.parse_args(argv)
    if options.run:
        copy_report(Path(options.run))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    sections = [section(read_results(DEFAULT)), public_section(read_results(PUBLIC))]
    losses = json.loads((ROOT / "bench" / "results" / "losses-cpu.json").read_text(encoding="utf-8"))
    wanted = with_section(text, "results", "\n\n".join(sections))
    wanted = with_section(wanted, "losses", losses_section(losses))
    if options.check:
        print("README.md is up to date" if wanted == text else "README.md differs: run python -m bench readme")
        return int(wanted != text)
    write_atomic(readme, wanted)
    return 0


def copy_report(run: Path) -> None:
    """Put a run's report, scores, configuration and pictures under docs/."""
    shown = RUNS / json.loads((run / "results.json").read_text(encoding="utf-8"))["recipe"]
    shown.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = run / name, shown / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)


def read_results(recipe: str) -> dict[str, Any]:
    """What a recipe's committed run scored."""
    return json.loads((RUNS / recipe / "results.json").read_text(encoding="utf-8"))


def with_section(readme: str, name: str, text: str) -> str:
    """The README with what stands between two comments, ``name:start`` and ``name:end``, made anew."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    head, rest = readme.split(start)
    _, tail = rest.split(end)
    return head + start + "\n" + text + "\n" + end + tail


def section(results: dict[str, Any]) -> str:
    """Two tables and a picture of one run: the student beside its teacher, and every width beside its floors."""
    key = f"{results['primary']['set']}/{results['primary']['metric']}"
    rows = {(row["model"], row["width"]): row["scores"][key] for row in results["rows"]}
    widths = sorted({width for model, width in rows if model == STUDENT}, reverse=True)
    facts = results["facts"]
    teacher_width = facts["teacher_width"]
    teacher = rows[TEACHER, teacher_width]
    parameters = facts["student_parameters"] / 1e6
    unseen = "were among the training texts" if results["transductive"] else "were never trained on"
    if held := facts.get("held_out_docstrings"):
        unseen += f" as a whole ({held['with a trained piece']} of {held['all']:,} share a sentence or more with those)"
    lines = [
        f"`make train` on {facts['threads']} CPU cores{_took(facts, ', {} after set-up')} ({facts['texts']:,} texts; "
        f"{parameters:.1f} M parameters; "
        f"{results['primary']['metric']} of finding a docstring's body by its summary, on docstrings that {unseen}; "
        "[report](docs/runs/minilm-docstrings/report.md)):",
        "",
        "| | " + " | ".join(f"{w} wide" for w in widths) + " |",
        "|---" * (len(widths) + 1) + "|",
        "| teacher | " + " | ".join(f"{100 * teacher:.1f}" if w == teacher_width else "" for w in widths) + " |",
    ]
    before = [f"{100 * rows[BEFORE, w]:.1f}" if (BEFORE, w) in rows else "" for w in widths]
    lines.append("| student before | " + " | ".join(before) + " |")
    for model, name in FLOORS.items():
        cells = [f"{100 * rows[model, w]:.1f}" if (model, w) in rows else "" for w in widths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    share = [f"{100 * rows[STUDENT, w] / teacher:.1f} %" for w in widths]
    lines.append("| student's share of the teacher | " + " | ".join(share) + " |")
    lines += ["", "![quality against width](docs/runs/minilm-docstrings/plots/widths.png)"]
    return "\n".join(lines)


def public_section(results: dict[str, Any]) -> str:
    """A table of one run on several sets: the student at every width beside its teacher and the teacher's PCA."""
    keys = [f"{one['name']}/{one['metric']}" for one in results["sets"]]
    rows = {(row["model"], row["width"]): row["scores"] for row in results["rows"]}
    facts = results["facts"]
    teacher = rows[TEACHER, facts["teacher_width"]]
    widest, *narrow = sorted({width for model, width in rows if model == STUDENT}, reverse=True)

    def line(name: str, values: list[str]) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    def scores(name: str, row: tuple[str, int]) -> str:
        return line(name, [f"{100 * rows[row][key]:.1f}" for key in keys])

    seen = results["transductive"]
    unseen = f"texts of {', '.join(seen)} were trained on" if seen else "none of their texts was trained on"
    lines = [
        f"On public text{_took(facts, ', {}, evaluation included')} (`bench/recipes/{results['recipe']}.yaml`: "
        f"{facts['texts']:,} texts; "
        f"{unseen}; [report](docs/runs/{results['recipe']}/report.md)):",
        "",
        line("", [f"{one['name']} {one['metric']}" for one in results["sets"]]),
        "|---" * (len(keys) + 1) + "|",
        scores("teacher", (TEACHER, facts["teacher_width"])),
        scores("student before", (BEFORE, widest)),
        scores(f"**student**, {widest} wide", (STUDENT, widest)),
        line("its share of the teacher", [f"{100 * rows[STUDENT, widest][k] / teacher[k]:.1f} %" for k in keys]),
    ]
    for width in narrow:
        lines += [
            scores(f"**student**, {width} wide", (STUDENT, width)),
            scores(f"PCA of the teacher, {width} wide", (PCA, width)),
        ]
    return "\n".join(lines)


def losses_section(results: dict[str, Any]) -> str:
    """A table of ``python -m bench losses``: forward and backward, ours beside the published code and plain PyTorch."""
    cpu = results["environment"]["cpu"]
    pairs, gram = results["pairs_per_second"], results["gram_products"]
    rate = pairs["rows"] * (pairs["rows"] - 1) / 2 / pairs["all_threads_s"] / 1e6
    lines = [
        f"Forward and backward on {cpu['threads']} CPU cores ({', '.join(cpu['isa'])}), each row in one run "
        "(`python -m bench losses`):",
        "",
        "| | rows | ours is | ours | the other |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for one in results["published"]:
        lines.append(
            f"| exact relative similarity, beside the published code | {one['rows']:,} | "
            f"{one['ratio']:,.0f} × as fast | {one['ours_s'] * 1e3:.1f} ms | {one['published_s'] * 1e3:,.0f} ms |"
        )
    for one in results["similarity"]:
        ours, other = one["methods"]["auto"], one["methods"]["reference"]
        widths = f"{one['width']} wide, teacher {one['teacher_width']}"
        lines.append(
            f"| similarity, {widths}, beside plain PyTorch | {one['rows']:,} | "
            f"{other['seconds'] / ours['seconds']:.1f} × as fast | {ours['seconds'] * 1e3:,.0f} ms, "
            f"{ours['peak_mib']:,.0f} MiB | {other['seconds'] * 1e3:,.0f} ms, {other['peak_mib']:,.0f} MiB |"
        )
    lines += [
        "",
        f"Exact relative similarity of {gram['rows']:,} rows takes the time of {gram['products']:.0f} products of the "
        f"batch with itself; of {pairs['rows']:,} rows, {rate:.1f} million pairs a second, "
        f"{pairs['speed_up']:.1f} × those of one core. MiB are above inputs.",
    ]
    return "\n".join(lines)


def _took(facts: dict[str, Any], words: str) -> str:
    """The minutes of a run put into words; nothing where the run did not note them."""
    seconds = facts.get("seconds")
    return words.format(f"{seconds['in all'] / 60:.0f} minutes") if seconds else ""
