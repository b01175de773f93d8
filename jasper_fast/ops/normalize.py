"""Rows of unit length and the way back through the normalisation, without copies of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.extension import extension_path, native

CHUNK = 1024  # rows of a temporary


def unit_rows(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of unit length, and the reciprocals of the lengths they had.

    Args:
        vectors: (B, D).
        dtype: to compute in.

    Returns:
        (B, D) in dtype, a zero row staying zero and one that is not finite becoming NaN; (B, 1) in dtype, 0 for a zero
        row.
    """
    if dtype == torch.float32 and native(converted := vectors.to(dtype)):
        return torch.ops.jasper_fast_native.unit_rows(converted.contiguous())
    # Scaling by the largest entry first keeps squares from overflowing or vanishing.
    largest = torch.linalg.vector_norm(vectors.to(dtype), ord=torch.inf, dim=1, keepdim=True)  # (B, 1)
    largest = torch.where(largest == 0, 1.0, largest)
    unit = vectors.to(dtype) / largest
    length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)  # 0, or between 1 and sqrt(D)
    zero = length == 0
    unit.div_(torch.where(zero, 1.0, length))
    inverse = (1.0 / length / largest).clamp(max=torch.finfo(dtype).max)
    return unit, torch.where(zero, 0.0, inverse)


def tangent(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """From a gradient with respect to unit rows to that of the rows before normalisation. (B, D) -> (B, D)."""
    if native(gradient):
        return torch.ops.jasper_fast_native.tangent(gradient.contiguous(), unit, inverse)
    return (gradient - unit * (gradient * unit).sum(dim=1, keepdim=True)) * inverse


def tangent_(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """A gradient with respect to unit rows turned, in place, into that of the rows before normalisation. (B, D)"""
    for begin in range(0, len(gradient), CHUNK):
        g, u = gradient[begin : begin + CHUNK], unit[begin : begin + CHUNK]
        g.addcmul_(u, (g * u).sum(dim=1, keepdim=True), value=-1.0).mul_(inverse[begin : begin + CHUNK])
    return gradient


if extension_path() is not None:

    @torch.library.register_fake("jasper_fast_native::unit_rows")
    def _(embeddings: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(embeddings), embeddings.new_empty(embeddings.shape[0], 1)

    @torch.library.register_fake("jasper_fast_native::tangent")
    def _(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
        return torch.empty_like(unit)
