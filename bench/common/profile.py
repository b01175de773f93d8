"""Device time of one call by GPU kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LONGEST, LISTED = 12, 4  # kernels that are stored, and that a page lists
NAME = 120  # stored characters of a kernel's name


def kernels(call: Callable[[], object]) -> dict[str, Any]:
    """Return the device seconds of one call, the number of its launches, and its longest kernels.

    Without CUDA or the profiler's library, the result has only an error.
    """
    if not torch.cuda.is_available():
        return {"error": "no CUDA device"}
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
    except Exception as problem:  # a failed profiler does not discard the timing
        return {"error": repr(problem)}
    return summary(
        (event.name, event.device_time * 1e-6)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def summary(launches: Any) -> dict[str, Any]:
    """Summarise launches by kernel.

    Args:
        launches: (name, seconds) of each launch.
    """
    by_name: dict[str, list[float]] = {}
    for name, seconds in launches:
        by_name.setdefault(name[:NAME], []).append(seconds)
    totals = sorted(((sum(own), len(own), name) for name, own in by_name.items()), reverse=True)
    return {
        "device_s": sum(seconds for seconds, _, _ in totals),
        "launches": sum(count for _, count, _ in totals),
        "longest": [{"name": n, "count": c, "seconds": s} for s, c, n in totals[:LONGEST]],
    }


def kernel_section(cases: dict[str, tuple[dict[str, Any], float]]) -> str:
    """Return a Markdown section on the kernels of each case, empty if none was profiled.

    Args:
        cases: by case, the result of `kernels` and the seconds of the whole call.
    """
    lines = []
    for name, (own, seconds) in cases.items():
        if "error" in own:
            continue
        longest = "; ".join(f"{k['name']} {k['seconds'] * 1e3:,.3g} ms ({k['count']})" for k in own["longest"][:LISTED])
        busy = f"{own['device_s'] * 1e3:,.3g} of {seconds * 1e3:,.3g} ms on the device"
        lines.append(f"- {name}: {busy} in {own['launches']} launches: {longest}")
    return "\n".join(["### Where ours spends its time", "", *lines]) if lines else ""
