"""The phases of a run, and where its time went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

OTHER = "other"
STAGE_EVENTS = ("plan", "pooling", "step")  # lines of the log that have the seconds of a stage


class Phases:
    """A clock with the wall-clock seconds of each phase.

    Example:
        >>> phases = Phases()
        >>> with phases.measure("export"):
        ...     pass
        >>> list(phases.seconds)
        ['export']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # by phase, in the order of their ends
        self._began = time.perf_counter()

    @property
    def in_all(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._began

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a phase. Blocks must not be nested."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def call(self, name: str, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call a function, add its seconds to a phase, and return its result."""
        with self.measure(name):
            return function(*args, **options)


def phase_seconds(log: Path, ending: Phases) -> dict[str, float]:
    """Return the seconds of each phase over all resumes, in the order of a run.

    Args:
        log: the ``log.jsonl`` of the run, with the phases before the first step and the stages.
        ending: the phases after the last step.

    Returns:
        {phase: seconds}. The phase "other" is the time before the first step and after the last one that no phase has.
    """
    before: dict[str, float] = {}
    stages: dict[str, float] = {}
    other = max(0.0, ending.in_all - sum(ending.seconds.values()))
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "preparation":
            phases = record.get("phases", {})
            _add(before, phases)
            other += max(0.0, record["seconds"] - sum(phases.values()))
        elif record["event"] in STAGE_EVENTS and "stage" in record:
            _add(stages, {record["stage"]: record.get("seconds", 0.0)})
    merged: dict[str, float] = {}
    for part in (before, stages, ending.seconds, {OTHER: other}):
        _add(merged, part)
    return merged


def phase_lines(seconds: Mapping[str, float]) -> list[str]:
    """Return a table for the terminal: a line for each phase of at least half a second, with its part of the time.

    Args:
        seconds: result of :func:`phase_seconds`.
    """
    total = sum(seconds.values())
    shown = {name: spent for name, spent in seconds.items() if spent >= 0.5}
    width = max((len(name) for name in shown), default=0)
    return [f"  {name:{width}} {spent:7.0f} s {100 * spent / total:4.0f} %" for name, spent in shown.items()]


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value
