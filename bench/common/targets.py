"""What a benchmark's figures are to reach, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A bound of one figure.

    Args:
        what: the figure's unit, in words: "x the speed of eager", "ms".
        of: the figure of a case's results; KeyError where it was not measured.
        bound: what it is to reach.
        at_most: whether it is to stay below the bound; else above.
    """

    what: str
    of: Callable[[dict[str, Any]], float]
    bound: float
    at_most: bool = False


def judged(targets: Iterable[Target], case: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every target: its words, the figure, its bound and whether it is met; None where nothing was measured."""
    found = []
    for target in targets:
        try:
            value = target.of(case)
        except KeyError:
            value = None
        met = None if value is None else bool(value <= target.bound if target.at_most else value >= target.bound)
        bound = {"at_most" if target.at_most else "at_least": target.bound}
        found.append({"what": target.what, "value": value, **bound, "met": met})
    return found


def print_judged(found: Iterable[dict[str, Any]]) -> None:
    """One line for each target."""
    for own in found:
        bound = f"at most {own['at_most']:g}" if "at_most" in own else f"at least {own['at_least']:g}"
        value = "not measured" if own["value"] is None else f"{own['value']:,.3g}"
        verdict = {None: "", True: ": met", False: ": NOT met"}[own["met"]]
        print(f"  target: {value} {own['what']}, {bound}{verdict}")
