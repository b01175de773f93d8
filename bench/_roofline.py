"""Where a measured case stands under a GPU's roofs: useful FLOP for each byte that must move, against FLOP a second.

Counted from shapes alone, the least that is needed, so that waste shows as distance from the roof. B rows, student
widths D, teacher width E, bytes of a number n:

- Loss by pairs: S S' and T T' are symmetric, half of 2 B^2 D; the gradient multiplies a B x B matrix with S: in all
  B^2 E + sum of 3 B^2 D. By features, which only similarity can take: S'S and T'T halved, T'S, S (S'S) and T (T'S):
  B E^2 + sum of B (3 D^2 + 4 D E). For similarity the lesser one counts. The sorting of relative similarity is no FLOP.
- Bytes of a loss: vectors read and gradients written once, n B (E + sum of 2 D).
- Search of Q queries among N rows of width D: 2 Q N D FLOP; the rows as they are scanned (2 bytes a number, 1 in int8),
  float32 queries, 12 bytes for each of Q k results.
- Training: 6 FLOP for each parameter (without embeddings) and token; 28 bytes for each parameter and step: weights and
  two moments read and written, the gradient written, all float32.

The roofs are the product's speed and bytes a second times FLOP a byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

BYTES = {"bfloat16": 2, "float32": 4}
SCANNED = {"bfloat16": 2, "float32": 2, "int8": 1}  # a float32 index is scanned in bfloat16
KNOWN_GB_S = {"H200": 4800.0, "H100": 3350.0}  # by their data sheets
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#333333")


class Roof(NamedTuple):
    """A GPU's limits: TFLOP/s of a product, and GB/s (None: not known)."""

    tflops: float
    gb_s: float | None

    def at(self, intensity: float) -> float:
        """TFLOP/s that can be had with so many FLOP a byte."""
        return self.tflops if self.gb_s is None else min(self.tflops, self.gb_s * intensity / 1e3)


class Point(NamedTuple):
    """A measured case."""

    group: str
    label: str
    flop: float
    bytes: float
    seconds: float

    @property
    def tflops(self) -> float:
        """Useful TFLOP a second."""
        return self.flop / self.seconds / 1e12

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flop / self.bytes

    def share(self, roof: Roof) -> float:
        """Of what the roof lets it have."""
        return self.tflops / roof.at(self.intensity)


def loss_point(loss: str, case: Mapping[str, Any], method: str) -> Point:
    """Forward and backward of one method of a case of the losses' results."""
    rows, widths, teacher = case["rows"], case["widths"], case["teacher_width"]
    flop = rows**2 * teacher + sum(3 * rows**2 * width for width in widths)
    if loss == "similarity":
        by_features = rows * teacher**2 + sum(rows * (3 * width**2 + 4 * width * teacher) for width in widths)
        flop = min(flop, by_features)
    moved = BYTES[case["dtype"]] * rows * (teacher + 2 * sum(widths))
    return Point(loss.replace("_", " "), case["name"], flop, moved, case["methods"][method]["both_s"])


def search_point(case: Mapping[str, Any], search: str) -> Point:
    """One kind of search of the search's results: "certified, bfloat16"."""
    queries, rows, width, k = (case[key] for key in ("queries", "rows", "width", "k"))
    kind, _, dtype = search.partition(", ")
    moved = rows * width * SCANNED[dtype] + queries * (4 * width + 12 * k)
    label = f"{queries:,} of {rows:,} x {width}, k {k}, {dtype}"
    return Point(kind, label, 2 * queries * rows * width, moved, case["seconds"][search])


def train_point(name: str, found: Mapping[str, Any], peak_tflops: float) -> Point:
    """The measured steps of a configuration of the training's results."""
    flop = 6 * found["parameters"] * found["tokens"]
    return Point(
        "training", name, flop, 28 * found["parameters"] * found["steps"], flop / found["mfu"] / peak_tflops / 1e12
    )


def known_bandwidth(gpu: str) -> float | None:
    """GB/s of a GPU by its name, where it is known."""
    return next((speed for name, speed in KNOWN_GB_S.items() if name in gpu), None)


def plot(points: Iterable[Point], roof: Roof, title: str, file: Path) -> None:
    """Points under the roofs, one colour a group, numbered in the legend."""
    from matplotlib.figure import Figure

    points = list(points)
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.add_subplot()
    left, right = min(p.intensity for p in points) / 3, max(p.intensity for p in points) * 3
    ridge = left if roof.gb_s is None else roof.tflops / roof.gb_s * 1e3
    knots = [left, min(max(ridge, left), right), right]
    axes.plot(knots, [roof.at(x) for x in knots], color="black", linewidth=1.2)
    bandwidth = "" if roof.gb_s is None else f", {roof.gb_s:,.0f} GB/s"
    groups = list(dict.fromkeys(point.group for point in points))
    for number, point in enumerate(points, 1):
        colour = COLOURS[groups.index(point.group) % len(COLOURS)]
        label = f"{number}  {point.group}: {point.label} ({100 * point.share(roof):.0f} %)"
        axes.plot(point.intensity, point.tflops, "o", color=colour, label=label)
        axes.annotate(str(number), (point.intensity, point.tflops), (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP for each byte that must move", ylabel="useful TFLOP/s")
    axes.set_title(
        f"{title}: roofs {roof.tflops:,.3g} TFLOP/s{bandwidth} (in brackets: share of the roof)", fontsize=10
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
