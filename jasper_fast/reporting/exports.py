"""Table of the measured files of an export, for the terminal and the model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

QUALITY_FILE = "quality.json"


def quality_table(content: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of the table, with the head first. Columns of retrieval are left out if it was not measured.

    Args:
        content: content of ``quality.json``, as from ``measure_quality``.
    """
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "form": lambda row: content["form"],
        "width": lambda row: str(row["width"]),
        "runtime": lambda row: row["runtime"],
        "MB": lambda row: f"{row['mb']:.1f}",
        "one question": lambda row: f"{row['question_ms']:.1f} ms",
        "texts/s in a batch": lambda row: f"{row['batch_per_s']:.0f}",
        "cosine": lambda row: f"{row['cosine_mean']:.5f}",
        "lowest": lambda row: f"{row['cosine_min']:.5f}",
    }
    if content["sets"]:
        columns |= {
            "neighbours kept": lambda row: f"{100 * row['neighbours']:.1f} %",
            "nDCG@10": lambda row: f"{100 * row['ndcg']:.2f}",
            "retrieval lost": lambda row: f"{100 * row['lost']:.2f} ± {100 * row['lost_error']:.2f} %",
        }
    return [[*columns], *([cell(row) for cell in columns.values()] for row in content["rows"])]


def quality_sources(content: Mapping[str, Any]) -> str:
    """Return two sentences: the texts and sets that the files were compared on, and what the speed was measured with.

    Args:
        content: content of ``quality.json``.
    """
    sets = [
        f"{one['name']} ({one['queries']} questions, {one['documents']} of {one['of']} documents, {one['kind']})"
        for one in content["sets"]
    ]
    retrieval = f" and retrieval on {', '.join(sets)}" if sets else ""
    return (
        f"Cosines on {content['texts']} texts{retrieval}. Speed with {content['threads']} threads of {content['cpu']}."
    )


def loss_line(content: Mapping[str, Any]) -> str:
    """Return a line on what is beyond the limits, or "" if nothing is.

    Args:
        content: content of ``quality.json``.
    """
    if not content["beyond"]:
        return ""
    state = "Accepted by --allow-loss" if content.get("allowed") else "Beyond the limits"
    return f"{state}: {'; '.join(content['beyond'])}"
