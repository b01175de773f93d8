"""Roofline of a GPU: useful FLOP/s of measured cases against useful FLOP per byte that must move.

FLOP and bytes are the least that a shape needs, so overhead shows as distance from the roof. B is the number of rows, D
a student width, E the teacher width, and n the bytes of a number.

- Loss by pairs: B^2 E + sum of 3 B^2 D FLOP. S S' and T T' are symmetric, so each takes half of 2 B^2 D. The gradient
  multiplies a B x B matrix with S.
- Loss by features, for similarity only: B E^2 + sum of B (3 D^2 + 4 D E) FLOP. These are half of S'S and T'T, and all
  of T'S, S (S'S) and T (T'S). Similarity counts as the cheaper of both forms. Sorting in relative similarity is not
  counted.
- Bytes of a loss: n B (E + sum of 2 D), as embeddings are read and gradients are written once.
- Search of Q queries among N rows of width D: 2 Q N D FLOP. Bytes are those of the scanned rows (2 per number, 1 in
  int8), of float32 queries, and 12 for each of Q k results.
- Training: 6 FLOP per parameter (without embeddings) and token. 28 bytes per parameter and step, as weights and two
  moments are read and written, and the gradient is written, all in float32.

The roofs are the speed of a matrix product, and the memory bandwidth times FLOP per byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

BYTES = {"bfloat16": 2, "float32": 4}
SCANNED = {"bfloat16": 2, "float32": 2, "int8": 1}  # a float32 index is scanned in bfloat16
KNOWN_GB_S = {"H200": 4800.0, "H100": 3350.0}  # from data sheets
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#333333")


class Roof(NamedTuple):
    """Limits of a GPU: TFLOP/s of a matrix product, and memory bandwidth in GB/s (None: unknown)."""

    tflops: float
    gb_s: float | None

    def at(self, intensity: float) -> float:
        """Return the attainable TFLOP/s at an intensity in FLOP per byte."""
        return self.tflops if self.gb_s is None else min(self.tflops, self.gb_s * intensity / 1e3)


class Point(NamedTuple):
    """Measured case with its useful FLOP and least bytes."""

    group: str
    label: str
    flop: float
    bytes: float
    seconds: float

    @property
    def tflops(self) -> float:
        """Useful TFLOP/s."""
        return self.flop / self.seconds / 1e12

    @property
    def intensity(self) -> float:
        """Useful FLOP per byte."""
        return self.flop / self.bytes

    def share(self, roof: Roof) -> float:
        """Return the speed as a fraction of the roof."""
        return self.tflops / roof.at(self.intensity)


def loss_point(loss: str, case: Mapping[str, Any], method: str) -> Point:
    """Return the point of one method in a case of the results on losses, forward and backward."""
    rows, widths, teacher = case["rows"], case["widths"], case["teacher_width"]
    flop = rows**2 * teacher + sum(3 * rows**2 * width for width in widths)
    if loss == "similarity":
        by_features = rows * teacher**2 + sum(rows * (3 * width**2 + 4 * width * teacher) for width in widths)
        flop = min(flop, by_features)
    moved = BYTES[case["dtype"]] * rows * (teacher + 2 * sum(widths))
    return Point(loss.replace("_", " "), case["name"], flop, moved, case["methods"][method]["both_s"])


def search_point(case: Mapping[str, Any], search: str) -> Point:
    """Return the point of one search, such as "certified, bfloat16", in a case of the results on search."""
    queries, rows, width, k = (case[key] for key in ("queries", "rows", "width", "k"))
    kind, _, dtype = search.partition(", ")
    moved = rows * width * SCANNED[dtype] + queries * (4 * width + 12 * k)
    label = f"{queries:,} of {rows:,} x {width}, k {k}, {dtype}"
    return Point(kind, label, 2 * queries * rows * width, moved, case["seconds"][search])


def train_point(name: str, figures: Mapping[str, Any], peak_tflops: float) -> Point:
    """Return the point of a configuration in the results on training."""
    flop = 6 * figures["parameters"] * figures["tokens"]
    return Point(
        "training",
        name,
        flop,
        28 * figures["parameters"] * figures["steps"],
        flop / figures["mfu"] / peak_tflops / 1e12,
    )


def known_bandwidth(gpu: str) -> float | None:
    """Return the memory bandwidth of a GPU in GB/s by its name, or None."""
    return next((speed for name, speed in KNOWN_GB_S.items() if name in gpu), None)


def plot(points: Iterable[Point], roof: Roof, title: str, file: Path) -> None:
    """Plot points under the roofs, with a colour per group and numbers in the legend."""
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
        f"{title}: roofs {roof.tflops:,.3g} TFLOP/s{bandwidth} (in brackets: fraction of the roof)", fontsize=10
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
