"""Relative similarity as the published training code computes it (NLPJCL/RAG-Retrieval), in lines of our own.

Its masks are made as booleans here, which is faster than there. For ties="label" it equals
`reference.relative_similarity_loss`, whose index gathers are the faster of the two on a CPU and the slower on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_similarity_loss(student: Tensor, teacher: Tensor, margin: float = 0.015) -> Tensor:
    """One term for each pair of pairs, by the broadcast matrix of all differences. (B, D), (B, E) -> ()"""
    with torch.no_grad():
        label = torch.where(_differences(teacher) < 0, 1.0, -1.0).to(student.dtype)
    return F.relu(_differences(student) * label + margin).mean()


def _differences(vectors: Tensor) -> Tensor:
    """A later pair's cosine less an earlier one's, for all P (P - 1) / 2 of the P pairs."""
    unit = F.normalize(vectors, dim=1)
    scores = _upper(unit @ unit.T)  # (P,)
    return _upper(scores[None, :] - scores[:, None])


def _upper(square: Tensor) -> Tensor:
    """The strict upper triangle, row by row."""
    return square[torch.ones_like(square, dtype=torch.bool).triu(1)]
