"""L2 normalization of rows and its backward pass, without copies of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.ops.native import extension_path, native

CHUNK = 1024  # rows of a temporary


def l2_normalize(embeddings: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale rows to unit length, and return the reciprocals of their lengths too.

    Args:
        embeddings: rows (B, D).
        dtype: the dtype to compute in.

    Returns:
        (B, D) in dtype: a zero row stays zero, and a row with a number that is not finite becomes NaN. (B, 1) in dtype:
        0 for a zero row.
    """
    if dtype == torch.float32 and native(converted := embeddings.to(dtype)):
        return torch.ops.jasper_fast_native.unit_rows(converted.contiguous())
    # Scaling by the largest entry first keeps squares from overflowing or vanishing.
    largest = torch.linalg.vector_norm(embeddings.to(dtype), ord=torch.inf, dim=1, keepdim=True)  # (B, 1)
    largest = torch.where(largest == 0, 1.0, largest)
    unit = embeddings.to(dtype) / largest
    length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)  # 0, or between 1 and sqrt(D)
    zero = length == 0
    unit.div_(torch.where(zero, 1.0, length))
    inverse = (1.0 / length / largest).clamp(max=torch.finfo(dtype).max)
    return unit, torch.where(zero, 0.0, inverse)


def l2_normalize_backward(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient with respect to the rows before normalization. (B, D) -> (B, D).

    Args:
        gradient: the gradient with respect to the unit rows, (B, D).
        unit: the unit rows, (B, D).
        inverse: the reciprocals of the lengths, (B, 1).
    """
    if native(gradient):
        return torch.ops.jasper_fast_native.tangent(gradient.contiguous(), unit, inverse)
    return (gradient - unit * (gradient * unit).sum(dim=1, keepdim=True)) * inverse


def l2_normalize_backward_(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Do the work of `l2_normalize_backward` in place."""
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
