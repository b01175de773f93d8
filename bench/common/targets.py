"""Targets for a benchmark's figures, and comparison of results with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A bound of one figure.

    Args:
        what: unit of the figure in words, e.g. "x the speed of eager" or "ms".
        of: function that reads the figure from a case's results. It raises KeyError if the figure was not measured.
        bound: required value of the figure.
        at_most: True if the bound is an upper limit. Default: a lower limit.
    """

    what: str
    of: Callable[[dict[str, Any]], float]
    bound: float
    at_most: bool = False


def judged(targets: Iterable[Target], case: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a case with its targets.

    Args:
        targets: targets of the case.
        case: results of the case.

    Returns:
        A dictionary for each target: ``what``, ``value``, the bound and ``met``. Value and ``met`` are None if the
        figure was not measured.
    """
    verdicts = []
    for target in targets:
        try:
            value = target.of(case)
        except KeyError:
            value = None
        met = None if value is None else bool(value <= target.bound if target.at_most else value >= target.bound)
        bound = {"at_most" if target.at_most else "at_least": target.bound}
        verdicts.append({"what": target.what, "value": value, **bound, "met": met})
    return verdicts


def print_judged(verdicts: Iterable[dict[str, Any]]) -> None:
    """Print one line for each target."""
    for verdict in verdicts:
        bound = f"at most {verdict['at_most']:g}" if "at_most" in verdict else f"at least {verdict['at_least']:g}"
        value = "not measured" if verdict["value"] is None else f"{verdict['value']:,.3g}"
        result = {None: "", True: ": met", False: ": NOT met"}[verdict["met"]]
        print(f"  target: {value} {verdict['what']}, {bound}{result}")
