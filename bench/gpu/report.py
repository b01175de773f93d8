"""Parts of docs/gpu.md: predicted and measured figures, kernels and their alternatives, and the acceptance run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common.targets import judged
from bench.gpu import accept, model, recorder

Results = dict[str, Any]
Verdicts = dict[tuple[str, str], Results]  # by case and figure, in the order of the page


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with three digits."""
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds * 1e3:,.0f} ms"


def searched(case: Results) -> str:
    """Format the shape of a search."""
    return f"{case['queries']:,} of {case['rows']:,} x {case['width']}, k {case['k']}"


def predictions() -> dict[str, tuple[Results, list[Results]]]:
    """Return every case of the benchmarks as the model predicts it, and its targets judged by that."""
    from bench.losses import cuda as losses
    from bench.mips import cuda as mips
    from bench.train import cuda as train

    found: dict[str, tuple[Results, list[Results]]] = {}
    for loss, shapes in losses.SHAPES.items():
        for name, rows, widths, teacher, dtype in shapes:
            case = model.loss_case(loss, rows, widths, teacher, str(dtype).removeprefix("torch."))
            if loss == "jasper_loss":
                tflops = 2e-12 * losses.PRODUCT**3 / model.bf16(*[losses.PRODUCT] * 3)
                case |= losses.share_of_step(case | {"rows": rows}, tflops)
            found[f"{loss.replace('_', ' ')}, {name}"] = case, judged(losses.TARGETS.get((loss, name), ()), case)
    for size, rows, width, k, _ in mips.SHAPES:
        case = model.search_case(size, rows, width, k)
        where = searched({"queries": size, "rows": rows, "width": width, "k": k})
        found[f"search, {where}"] = case, judged(mips.TARGETS.get((size, rows, width, k), ()), case)
    share = found["jasper loss, all heads"][0]["percent_of_step"] / 100
    for name in (*train.CONFIGURATIONS, train.STAGE_ONE):
        case = model.train_case(name, share if name == train.CACHED else 0.0)
        found[f"training, {name}"] = case, judged(train.TARGETS.get(name, ()), case)
    return found


def verdict(measured: Verdicts) -> list[str]:
    """Return the table of all targets, with what the model predicts and what was measured.

    Args:
        measured: judged targets of the result files.
    """
    predicted: Verdicts = {
        (where, target["what"]): target for where, (_, targets) in predictions().items() for target in targets
    }
    met = sum(target["met"] is True for target in measured.values())
    lines = [
        f"**{met} of {len(measured)} targets are met.**"
        if measured
        else "**No GPU has run the benchmarks yet**, so this page has no measured figures.",
        "",
        "| case | figure | target | predicted | measured | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for key in dict.fromkeys((*predicted, *measured)):
        guess, found = predicted.get(key), measured.get(key)
        target = found or guess
        assert target is not None
        bound = f"at most {target['at_most']:g}" if "at_most" in target else f"at least {target['at_least']:g}"
        word = {True: "met", False: "**not met**", None: "**not measured**"}[found["met"] if found else None]
        cells = [" | ".join(key), bound, _number(guess), _number(found), word]
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines)]


def _number(target: Results | None) -> str:
    return "" if target is None or target["value"] is None else f"{target['value']:,.3g}"


def times(folder: Path) -> list[str]:
    """Return the table of times that the model predicts, next to the measured ones of the result files."""
    measured = dict(_measured(folder))
    lines = ["| case | method | predicted | measured | measured / predicted |", "| --- | --- | ---: | ---: | ---: |"]
    for where, (case, _) in predictions().items():
        seconds = case.get("seconds") or {name: own["both_s"] for name, own in case.get("methods", {}).items()}
        for method, guess in seconds.items():
            found = measured.get((where, method))
            cells = ["", ""] if found is None else [milliseconds(found), f"{found / guess:.2f}"]
            lines.append(f"| {where} | {method} | {milliseconds(guess)} | {' | '.join(cells)} |")
    return [
        "`bench/gpu/model.py` predicts these times for one H200 from the rates of products, the speed of memory, and\n"
        "numbers of launches. It is a model of the algorithms. No prediction was fitted to a measurement of this code.",
        "\n".join(lines),
    ]


def _measured(folder: Path) -> Iterator[tuple[tuple[str, str], float]]:
    losses, mips = _read(folder / "losses-cuda.json"), _read(folder / "mips-cuda.json")
    for loss, cases in losses.items():
        for case in cases if isinstance(cases, list) else []:
            for method, own in case["methods"].items():
                if "both_s" in own:
                    yield (f"{loss.replace('_', ' ')}, {case['name']}", method), own["both_s"]
    for case in mips.get("search", {}).get("cases", []):
        for method, seconds in case["seconds"].items():
            yield (f"search, {searched(case)}", method), seconds


def _read(file: Path) -> Results:
    return json.loads(file.read_text()) if file.is_file() else {}


def kernels(results: Results) -> list[str]:
    """Return the tables of the kernels and their alternatives, and of the model's constants."""
    parts = []
    for part, title in (("cases", "kernel"), ("constants", "constant of the model")):
        lines = [f"| {title} | method | predicted | measured | energy |", "| --- | --- | ---: | ---: | ---: |"]
        for name, case in results[part].items():
            if "error" in case:
                lines.append(f"| {name} | | | {case['error']} | |")
                continue
            for method, own in case["methods"].items():
                ours = method == "jasper_fast" or part == "constants"
                cells = [milliseconds(case["predicted_s"]) if ours else ""]
                cells += [own.get("error") or milliseconds(own["seconds"])]
                cells += [f"{own['energy_j'] * 1e3:,.3g} mJ" if "energy_j" in own else ""]
                lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return parts


def acceptance(folder: Path) -> list[str]:
    """Return the section on the last acceptance run: its sections, and tests that failed or were cut off."""
    rows = accept.read(folder)
    if not rows:
        return []
    lines = ["| section | state | planned | took | energy |", "| --- | --- | ---: | ---: | ---: |"]
    unfinished = []
    for row in rows:
        name = row["name"]
        took = f"{row['seconds']:.0f} s" if "seconds" in row else ""
        energy = f"{row['energy_j'] / 1e3:,.1f} kJ" if "energy_j" in row else ""
        tests = recorder.read(folder / "accept" / f"{name}.jsonl")
        counts = {word: sum(test["outcome"] == word for test in tests.values()) for word in ("passed", "failed")}
        state = row["state"] if row["state"] in ("done", "running", "planned") else f"**{row['state']}**"
        if tests:
            state += f", {counts['passed']} of {len(tests)} tests passed"
        lines.append(f"| {row['title']} | {state} | {row['planned_s']:.0f} s | {took} | {energy} |")
        unfinished += [
            f"- `{test}`: {'failed' if own['outcome'] == 'failed' else 'cut off'}"
            for test, own in tests.items()
            if own["outcome"] in ("failed", "started")
        ]
    return ["## Acceptance run", "\n".join(lines), *(["\n".join(unfinished)] if unfinished else [])]
