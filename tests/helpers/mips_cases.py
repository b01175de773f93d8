"""Corpora that are hard to search, their exact scores, and a check of results."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.cpu import MAX_FEW_QUERIES

KINDS = ("normal", "duplicated", "near-tied", "huge", "tiny", "mixed scales", "negative", "constant", "zeros", "grid")
NEVER = {}.fromkeys(MAX_FEW_QUERIES, 0)  # query limits of the single pass on a CPU, here never taken


def make(kind: str, rows: int, width: int, seed: int) -> Tensor:
    """Return (rows, width) float32 rows of one kind of difficulty."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    if kind == "duplicated":
        x = x[torch.randint(0, max(1, rows // 4), (rows,), generator=generator)]
    elif kind == "near-tied":
        x = x[:1] * (1 + 1e-7 * torch.randint(0, 4, (rows, 1), generator=generator))
    elif kind == "huge":
        x = x * 1e30
    elif kind == "tiny":
        x = x * 1e-30
    elif kind == "mixed scales":
        x = x * 10.0 ** torch.randint(-18, 18, (rows, 1), generator=generator)
    elif kind == "negative":
        x = -x.abs()
    elif kind == "constant":
        x = torch.full_like(x, 0.3)
    elif kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "grid":
        x = x.round()
    return x


def truth(queries: Tensor, rows: Tensor) -> np.ndarray:
    """Return correctly rounded inner products (Q, N). Products of float32 are exact in float64, fsum rounds once."""
    products = queries.double()[:, None, :] * rows.double()[None]
    return np.array([[math.fsum(pair) for pair in query] for query in products.tolist()])


def check(scores: Tensor, ids: Tensor, true: np.ndarray, rows: Tensor, scale: np.ndarray, valid: np.ndarray) -> None:
    """Check the fp64 order for gaps above 1e-12 of the scale, and equal rows by the lower index."""
    size, k = ids.shape
    _, group = np.unique(rows.double().numpy() + 0.0, axis=0, return_inverse=True)
    for q in range(size):
        allowed = np.flatnonzero(valid[q])
        order = allowed[np.argsort(-true[q][allowed], kind="stable")]
        found = min(k, len(order))
        got = ids[q].numpy()
        assert (got[found:] == -1).all() and (scores[q][found:] == -torch.inf).all()
        got, expected = got[:found], order[:found]
        assert len(set(got.tolist())) == found and set(got.tolist()) <= set(allowed.tolist())
        gap = 1e-12 * scale[q]
        assert (np.abs(true[q][got] - true[q][expected]) <= gap).all()
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(scores[q][:found].numpy(), true[q][got].astype(np.float32), rtol=2e-7, atol=gap)
        values = true[q][order]
        near = np.abs(np.diff(values, append=-np.inf)) <= gap
        free = ~(near | np.concatenate(([False], near[:-1])))[:found]
        assert (got[free] == expected[free]).all()
        for number in np.unique(group[got]):
            members = got[group[got] == number]
            assert (members == allowed[group[allowed] == number][: len(members)]).all()
