"""Where a GPU's time goes: the kernels of one call, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LONGEST, TOLD = 12, 4  # kernels written down, and told of on a page
NAME = 120  # characters of a name


def kernels(call: Callable[[], object]) -> dict[str, Any]:
    """Device seconds of one call, how many kernels and copies it launches, and the longest of them.

    On a machine without CUDA, or without the profiler's own library, only why there is nothing.
    """
    if not torch.cuda.is_available():
        return {"error": "no CUDA device"}
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            torch.cuda.synchronize()
    except Exception as problem:  # a profiler that fails takes no figure with it
        return {"error": repr(problem)}
    return summary(
        (event.name, event.device_time * 1e-6)
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def summary(launches: Any) -> dict[str, Any]:
    """Of (name, seconds) of each launch."""
    by_name: dict[str, list[float]] = {}
    for name, seconds in launches:
        by_name.setdefault(name[:NAME], []).append(seconds)
    totals = sorted(((sum(own), len(own), name) for name, own in by_name.items()), reverse=True)
    return {
        "device_s": sum(seconds for seconds, _, _ in totals),
        "launches": sum(count for _, count, _ in totals),
        "longest": [{"name": n, "count": c, "seconds": s} for s, c, n in totals[:LONGEST]],
    }


def told(found: dict[str, tuple[dict[str, Any], float]]) -> str:
    """A paragraph for a page: of each case by name, what `kernels` gave and the seconds that the whole call took."""
    lines = []
    for name, (own, seconds) in found.items():
        if "error" in own:
            continue
        longest = "; ".join(f"{k['name']} {k['seconds'] * 1e3:,.3g} ms ({k['count']})" for k in own["longest"][:TOLD])
        busy = f"{own['device_s'] * 1e3:,.3g} of {seconds * 1e3:,.3g} ms on the device"
        lines.append(f"- {name}: {busy} in {own['launches']} launches: {longest}")
    return "\n".join(["### Where ours spends its time", "", *lines]) if lines else ""
