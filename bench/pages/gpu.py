"""``python -m bench gpu``: write docs/gpu.md and its roofline plots from committed results.

``python -m bench gpu --accept`` runs all tests and benchmarks that need a GPU, and writes the results. Without it, this
command reads bench/results/{kernels,losses,mips,train}-cuda.json and needs no GPU. The page says which files are
missing, and has the predictions of bench/gpu/model.py in any case.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.common.profile import kernel_section
from bench.common.roofline import Point, Roof, known_bandwidth, loss_point, plot, search_point, train_point
from bench.gpu import accept, report
from bench.gpu.report import milliseconds, searched
from jasper_fast.utils.atomic import write_atomic

RESULTS, PAGE = Path("bench/results"), Path("docs/gpu.md")
LOSSES = ("similarity", "relative_similarity", "neighbourhood", "jasper_loss")
Results = dict[str, Any]
HEAD = """# On a GPU

Written by `python -m bench gpu`. On a machine with a GPU, from a checkout:

```
python -m bench gpu --accept     # all of this in ten minutes: tests, kernels, losses, search, training, this page
pytest -m gpu -n 12              # only the kernels against float64 (-n: pytest-xdist)
python -m bench --device cuda    # only losses, search and training: bench/results/*-cuda.json
python -m bench gpu              # only this page, from those files
```

`--accept` writes results as it goes, and may be cut off at any moment. `--budget SECONDS` sets its length, and
`--dry-run` prints the plan. Results are in `bench/results/accept/` and `bench/results/*-cuda.json`.

Every method's result is compared with float64 before it is timed. Ratios above 1 mean that ours is faster. Memory is in
addition to inputs and gradient. *binned* is our form of relative similarity for large batches.
`bench/common/roofline.py` defines useful FLOP and least bytes."""


def main(argv: list[str]) -> int:
    """Write the page and the plots."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write (default: %(default)s)")
    parser.add_argument("--accept", action="store_true", help="run everything that needs a GPU first")
    parser.add_argument(
        "--budget", type=float, default=accept.BUDGET_S, metavar="SECONDS", help="of --accept (default: %(default)s)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan of --accept with minutes, and run nothing"
    )
    options = parser.parse_args(argv)
    if options.accept or options.dry_run:
        sections = accept.plan(options.results, options.page)
        print(accept.describe(sections, options.budget))
        if options.dry_run:
            return 0
        accept.check_device()
        return accept.accept(sections, options.results, options.budget)
    write_page(options.results, options.page)
    print(f"written to {options.page}")
    return 0


def write_page(folder: Path, page: Path) -> None:
    """Write the page, and its plots in a folder next to it."""
    parts: list[str] = []
    slower: list[str] = []
    measured: report.Verdicts = {}
    for name, (title, section) in SECTIONS.items():
        file = folder / f"{name}-cuda.json"
        parts.append(f"## {title}")
        if not file.is_file():
            parts.append(f"No GPU has run this: there is no `{file.name}`.")
            continue
        results = json.loads(file.read_text())
        parts.append(f"`{file.name}`: {about(results['environment'])}.")
        text, points, roof, lost = section(results)
        parts.append(text)
        measured |= {(where, target["what"]): target for where, target in targets(name, results)}
        slower += lost
        if points and roof is not None:
            plot(points, roof, title, page.with_suffix("") / f"{name}.png")
            parts.append(f"![{title}: roofline]({page.stem}/{name}.png)")
    if measured:
        lost_lines = "\n".join(f"- {line}" for line in slower) or "In no case that was measured."
        parts = ["**Where ours is slower or takes more memory:**\n\n" + lost_lines, *parts]
    times = ["## Predicted and measured", *report.times(folder)]
    text = "\n\n".join([HEAD, *report.verdict(measured), *report.acceptance(folder), *parts, *times])
    write_atomic(page, text + "\n")


def about(environment: Results) -> str:
    """Describe the GPU, library versions and code version of one result file."""
    gpus, libraries = environment["gpus"]["devices"], environment["libraries"]
    device = ", ".join(f"{gpu['name']} ({gpu['capability']}, {gpu['memory_gb']} GB)" for gpu in gpus)
    versions = ", ".join(
        f"{name} {libraries[name]}" for name in ("torch", "triton", "transformers") if libraries.get(name)
    )
    code = f"commit {environment['commit']}" if environment["commit"] else "commit not recorded"
    return f"{device or 'no GPU'}; Python {environment['python']}, {versions}; {code}, code {environment['digest']}"


def targets(name: str, results: Results) -> Iterator[tuple[str, Results]]:
    """Yield every target of a result file with the name of its case."""
    if name == "losses":
        cases = [
            (f"{loss.replace('_', ' ')}, {case['name']}", case) for loss in LOSSES for case in results.get(loss, [])
        ]
    elif name == "kernels":
        cases = []
    elif name == "mips":
        cases = [(f"search, {searched(case)}", case) for case in results["search"]["cases"]]
    else:
        cases = [(f"training, {name}", own) for name, own in results["configurations"].items()]
    for where, case in cases:
        for target in case["targets"]:
            yield where, target


Section = tuple[str, list[Point], Roof | None, list[str]]  # text, points, roof, cases in which ours is slower


def losses(results: Results) -> Section:
    """Return the section on losses: a table for each loss, with ours compared with every other method."""
    roof = Roof(results["product_tflops"], results["read_gb_s"])
    parts = [
        f"Forward and backward, medians. A bfloat16 product runs at {roof.tflops:,.3g} TFLOP/s, a sum at "
        f"{roof.gb_s:,.0f} GB/s. *roof* is ours as a fraction of what these two allow."
    ]
    points: list[Point] = []
    lost: list[str] = []
    for loss in LOSSES:
        lines = [
            f"### {loss.replace('_', ' ')}",
            "",
            "| case | compared with | ours is | of its memory | ours | the other | roof |",
        ]
        lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for case in results.get(loss, []):
            rows, case_points, case_lost = _loss_rows(loss, case, roof)
            lines += rows
            points += case_points
            lost += case_lost
        parts.append("\n".join(lines))
    spent = {
        f"{loss.replace('_', ' ')}, {case['name']}, {method}": (own["kernels"], own["both_s"])
        for loss in LOSSES
        for case in results.get(loss, [])
        for method, own in case["methods"].items()
        if "kernels" in own
    }
    return "\n\n".join(filter(None, [*parts, kernel_section(spent)])), points, roof, lost


def _loss_rows(loss: str, case: Results, roof: Roof) -> tuple[list[str], list[Point], list[str]]:
    """Return the table rows of one case, its point if ours was measured, and the methods that beat ours."""
    widths = "/".join(map(str, case["widths"]))
    label = f"{case['name']}: {case['rows']:,} x {widths} on {case['teacher_width']}, {case['dtype']}"
    ours = case["methods"].get("jasper_fast", {"error": case.get("error", "not measured")})
    points, lost = [], []
    if "error" in case or "error" in ours:
        lines = [f"| {label} | | | | {case.get('error') or ours['error']} | | |"]
        ours = {}
    else:
        points.append(loss_point(loss, case, "jasper_fast"))
        lines = [f"| {label} | | | | {figures(ours)} | | {100 * points[0].share(roof):.0f} % |"]
    for method, other in case["methods"].items():
        if method == "jasper_fast":
            continue
        if "error" in other or not ours:
            lines.append(f"| | {method} | | | | {other.get('error') or figures(other)} | |")
            continue
        ratio = other["both_s"] / ours["both_s"]
        lines.append(f"| | {method} | {times(ratio)} | {memory_ratio(ours, other)} | | {figures(other)} | |")
        if method == "binned":  # also ours
            continue
        where = f"{loss.replace('_', ' ')}, {case['name']}"
        if ratio < 1:
            lost.append(f"{where}: {1 / ratio:.2f} × the time of {method}")
        if ours.get("extra_bytes", 0) > other.get("extra_bytes", float("inf")):
            lost.append(f"{where}: {mib(ours)} against {mib(other)} of {method}")
    return lines, points, lost


def mips(results: Results) -> Section:
    """Return the section on search: each form compared with bf16 matmul and topk, which is not exact."""
    cases, gb_s = results["search"]["cases"], results["search"]["read_gb_s"]
    bare = [2e-12 * c["queries"] * c["rows"] * c["width"] / c["seconds"]["bare bf16 product"]
            for c in cases if "bare bf16 product" in c["seconds"]]  # fmt: skip
    roof = Roof(max(bare, default=float("nan")), gb_s)
    lines = [
        f"Medians. The fastest bare bf16 product runs at {roof.tflops:,.3g} TFLOP/s, a sum at {gb_s:,.0f} GB/s. "
        "*certified* is the proven fp64 order. *fast*, like matmul + topk, is not.",
        "",
        "| case | search | ours is, against matmul + topk | ours | matmul + topk | x the bare product's time | roof |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    points, lost = [], []
    for case in cases:
        label = where = searched(case)
        seconds = case["seconds"]
        other, product = seconds.get("bf16 matmul + topk"), seconds.get("bare bf16 product")
        for search in (name for name in seconds if name.startswith(("certified", "fast"))):
            point = search_point(case, search)
            points += [point] if search.startswith("certified") and bare else []
            ratio = None if other is None else other / seconds[search]
            cells = [times(ratio) if ratio else "", milliseconds(seconds[search]), milliseconds(other) if other else ""]
            cells += [f"{seconds[search] / product:.2f}" if product else "", f"{100 * point.share(roof):.0f} %"]
            lines.append(f"| {label} | {search} | {' | '.join(cells)} |")
            if ratio is not None and ratio < 1:
                lost.append(f"search, {where}, {search}: {1 / ratio:.2f} × the time of bf16 matmul + topk")
            label = ""
        for method, error in case["errors"].items():
            lines.append(f"| {label} | {method} | {error} | | | | |")
            label = ""
    spent = {
        f"{searched(case)}, {search}": (own, case["seconds"][search])
        for case in cases
        for search, own in case.get("kernels", {}).items()
    }
    return "\n\n".join(filter(None, ["\n".join(lines), kernel_section(spent)])), points, roof, lost


def train(results: Results) -> Section:
    """Return the section on training: speed, memory and fractions of the time by configuration, then stage 1."""
    gpus = results["environment"]["gpus"]["devices"]
    roof = Roof(results["peak_tflops"], known_bandwidth(gpus[0]["name"]) if gpus else None)
    lines = [
        f"A student of 1.5 B parameters, random weights, bf16, texts of {results['length']} tokens. MFU refers to "
        f"{roof.tflops:,.0f} TFLOP/s. Work that caching and checkpointing do twice does not count.",
        "",
        "| configuration | MFU | peak memory | texts a step | texts/s | loss | encoder | optimiser |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    points, after = [], ""
    for name, own in results["configurations"].items():
        if "error" in own:
            lines.append(f"| {name} | {own['error']} | | | | | | |")
        elif "mfu" in own:
            points.append(train_point(name, own, roof.tflops))
            memory = f"{own['peak_gb']:.1f} GB" if "peak_gb" in own else ""
            cells = [f"{100 * own['mfu']:.1f} %", memory, f"{own['texts']:,}", f"{own['texts_per_s']:,.1f}"]
            cells += [f"{100 * own['shares'][part]:.2f} %" for part in ("loss", "encoder", "optimiser")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        else:
            after = (
                f"\n\nIn stage 1, a text takes {own['cached_s_per_text'] * 1e6:,.1f} µs on cached states, "
                f"{own['ratio']:,.0f} × faster than encoding it in each step "
                f"({own['plain_s_per_text'] * 1e6:,.0f} µs). Batches have {own['texts']:,} texts."
            )
    return "\n".join(lines) + after, points, roof, []


def kernels(results: Results) -> Section:
    """Return the section on single kernels and on the model's constants."""
    return "\n\n".join(report.kernels(results)), [], None, []


SECTIONS: dict[str, tuple[str, Callable[[Results], Section]]] = {
    "kernels": ("Kernels", kernels),
    "losses": ("Losses", losses),
    "mips": ("Search", mips),
    "train": ("Training", train),
}


def times(ratio: float) -> str:
    """Format a ratio of speeds, in bold if ours is slower."""
    return f"{ratio:,.2f} × as fast" if ratio >= 1 else f"**{ratio:,.2f} × as fast**"


def memory_ratio(ours: Results, other: Results) -> str:
    """Format our memory as a percentage of the other's, empty if unknown or if the other uses none."""
    if "extra_bytes" not in ours or not other.get("extra_bytes"):
        return ""
    return f"{100 * ours['extra_bytes'] / other['extra_bytes']:.1f} %"


def figures(own: Results) -> str:
    """Format time and memory."""
    return milliseconds(own["both_s"]) + (f", {mib(own)}" if "extra_bytes" in own else "")


def mib(own: Results) -> str:
    """Format the memory in addition to inputs and gradient."""
    return f"{own['extra_bytes'] / 2**20:,.0f} MiB"
