"""Arms of a comparison. Each has a result file, which is reused while its settings are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def result_file(work: Path, arm: str, seed: int) -> Path:
    """Return the result file of an arm and a seed."""
    return work / f"{arm}-seed{seed}.json"


def known_settings(file: Path) -> dict[str, Any] | None:
    """Return the settings of a stored result, or None without a result."""
    return json.loads(file.read_text())["settings"] if file.exists() else None


def spread(values: Sequence[float]) -> str:
    """Format mean ± standard deviation, in per cent."""
    deviation = f" ± {100 * stdev(values):.2f}" if len(set(values)) > 1 else ""
    return f"{100 * mean(values):.2f}{deviation}"
