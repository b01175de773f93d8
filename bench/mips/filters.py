"""Time of a search of few rows, as a part of the time of a search of all rows.

Times are those of the processor, on one thread, so that other programs change them little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips import FlatIPIndex

SHARES = (0.001, 0.01, 0.05)
SIZES = (1, 16, 256)


def measure(corpus: Tensor, queries: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Compare searches of some rows of a float32 index with searches of all, in turn.

    Args:
        corpus: (N, D) float32 rows.
        queries: (256, D) float32 queries or more.
        repeats: turns of each side.
    """
    torch.set_num_threads(1)
    index = FlatIPIndex(corpus.shape[1], dtype="float32")
    index.add(corpus)
    generator = np.random.default_rng(0)
    entries = []
    for share in SHARES:
        count = int(len(corpus) * share)
        mask = generator.permutation(len(corpus)) < count
        neighbours = np.arange(len(corpus)) - len(corpus) // 3
        forms = {
            "mask": mask,
            "ids": np.flatnonzero(mask),
            "mask of neighbours": (neighbours >= 0) & (neighbours < count),
        }
        for size in SIZES:
            groups = queries[: 16 if size == 1 else size].split(size)

            def searches(valid: Any, groups: Any = groups) -> Callable[[], Any]:
                return lambda: [index.search(group, 10, valid=valid) for group in groups]

            functions = [searches(valid) for valid in (None, *forms.values())]
            whole, *seconds = (value / len(groups) for value in _processor_seconds(functions, repeats))
            parts = {name: value / whole for name, value in zip(forms, seconds, strict=True)}
            print(
                f"Q {size}, {100 * share:g} % of {len(corpus):,} rows: {whole * 1e3:.2f} ms for all, "
                + ", ".join(f"{100 * part:.0f} % of it with {name}" for name, part in parts.items())
            )
            entries.append(
                {
                    "rows": len(corpus), "width": corpus.shape[1], "share": share, "queries": size, "k": 10,
                    "all_s": whole,
                    "seconds": dict(zip(forms, seconds, strict=True)), "parts": parts,
                }
            )  # fmt: skip
    return entries


def _processor_seconds(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the medians of the processor time of functions that take turns."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, own in zip(functions, seconds, strict=True):
            begin = time.process_time()
            function()
            if turn:  # The first turn warms up.
                own.append(time.process_time() - begin)
    return [float(np.median(own)) for own in seconds]
