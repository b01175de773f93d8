"""Tables of image retrieval scores, and Markdown tables as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from jasper_fast.evaluation.images import DEPTHS, FLOOR, REFERENCE, STUDENT

GAP = "  "  # between the columns of a table in the terminal
OLD_NAMES = {"ceiling: its other captions": REFERENCE}  # in results of earlier versions


def aligned(lines: Sequence[str]) -> list[str]:
    """Return lines for the terminal: Markdown tables among them become columns, the first one left-aligned.

    Args:
        lines: lines of text. Consecutive ones that begin with ``|`` are a table, and cells hold no ``|``.

    Example:
        >>> aligned(["scores", "| map | overlap |", "| --- | ---: |", "| **ridge** | 98.0 % |"])
        ['scores', 'map    overlap', 'ridge   98.0 %']
    """
    shown: list[str] = []
    for is_table, group in groupby(lines, lambda line: line.startswith("|")):
        if not is_table:
            shown += group
            continue
        rows = [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in group]
        rows = [row for row in rows if not all(set(cell) <= set("-:") and cell for cell in row)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            cells = [first.ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(others, widths[1:], strict=True))]
            shown.append(GAP.join(cells).rstrip())
    return shown


def scores_markdown(results: Mapping[str, Any]) -> str:
    """Return the Markdown table of report and model card, with a row per model and width.

    Args:
        results: scores from :func:`evaluate_images`.
    """
    ways = ("text → image", "image → text")
    names = [*(f"R@{k}" for k in DEPTHS), "median rank"]
    lines = [
        "| | width | " + " | ".join(f"{way} {name}" for way in ways for name in names) + " |",
        "| --- | ---: |" + " ---: |" * (len(ways) * len(names)),
    ]
    for row in results["rows"]:
        cells = []
        for way in ways if row["scores"] else []:
            cells += [f"{100 * row['scores'][f'{way} R@{k}']:.1f}" for k in DEPTHS]
            cells.append(f"{row['scores'][f'{way} median rank']:g}")
        cells = cells or ["–"] * (len(ways) * len(names))
        name = OLD_NAMES.get(row["model"], row["model"])
        lines.append(f"| {name} | {row['width']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def images_line(results: Mapping[str, Any]) -> str:
    """Return one line with R@10 and R@1 in both directions at the widest head, compared with the floor.

    Args:
        results: scores from :func:`evaluate_images`.
    """
    student, floor = (
        next((row["scores"] for row in results["rows"] if row["model"] == model), None) for model in (STUDENT, FLOOR)
    )
    parts = []
    for way in ("text → image", "image → text"):
        name = f"{way} R@10"
        compared = "" if floor is None else f" (floor {100 * floor[name]:.1f})"
        assert student is not None
        parts.append(f"{name} {100 * student[name]:.1f}{compared}, R@1 {100 * student[f'{way} R@1']:.1f}")
    return f"{results['pictures']} held-out images: " + "; ".join(parts)
