"""The fraction of rows that a bound from sign codes leaves, if the k-th best score is known beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KS = (10, 100)
QUERIES = 50


def measure(corpus: Tensor, queries: Tensor) -> list[dict[str, Any]]:
    """Measure the rows left by one bit per element, with the bound that codes of 4 bits have (docs/mips.md).

    A row x has the codes x̃ = s · sign(x), where s makes the rounding r = x − x̃ orthogonal to x̃.

    Args:
        corpus: (N, D) float32 rows.
        queries: (Q, D) float32 queries, of which the first 50 are used.
    """
    signs = torch.where(corpus >= 0, 1.0, -1.0)
    scales = (corpus * signs).mean(dim=1)
    errors = (corpus - scales[:, None] * signs).norm(dim=1)
    left: dict[int, list[float]] = {k: [] for k in KS}
    for query in queries[:QUERIES]:
        products, exact = signs @ query, corpus @ query
        along = products / corpus.shape[1] ** 0.5
        orthogonal = (query.norm() ** 2 - along**2).clamp(min=0).sqrt()
        highest = scales * products + orthogonal * errors
        for k in KS:
            left[k].append(float((highest >= exact.topk(k).values[-1]).double().mean()))
    entries = [{"rows": len(corpus), "k": k, "left": sum(own) / len(own)} for k, own in left.items()]
    for entry in entries:
        print(f"k {entry['k']}: sign codes leave {100 * entry['left']:.1f} % of {len(corpus):,} rows")
    return entries
