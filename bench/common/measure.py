"""Time and peak memory of a function, alternatives interleaved."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

TURN_S = 0.05  # shortest duration of a turn in seconds


def medians(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median seconds of each function, measured alternately after one run without timing.

    Args:
        functions: functions to time.
        repeats: number of turns. Functions shorter than `TURN_S` are repeated within a turn.
    """
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, own in zip(functions, times, strict=True):
            turn: list[float] = []
            while not turn or sum(turn) < TURN_S:
                begin = time.perf_counter()
                function()
                turn.append(time.perf_counter() - begin)
            own.append(statistics.median(turn))
    return [statistics.median(own) for own in times]


def in_new_process(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_mib() -> float:
    """Return the peak resident memory of this process from /proc, because getrusage includes the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    raise OSError("/proc/self/status: no peak memory (VmHWM) here. Fix: run this benchmark on Linux")
