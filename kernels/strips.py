"""Products by cuBLAS, in strips of rows: cosines of raw rows, and gradients from strips of weights.

cuBLAS multiplies 16-bit rows with float32 sums at 600 to 700 TFLOP/s on an H200. A fused Triton tile reached 470 by
model. An elementwise kernel turns a strip of products into weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from jasper_fast.kernels.rows import l2_normalize_backward, reciprocal_norms
from jasper_fast.ops.dispatch import gradient_dtype
from jasper_fast.ops.products import multiply

WORKSPACE = 160 * 2**20  # bytes of the strips of a student, its teacher and the weights
ELEMENT = 10  # bytes of these for each pair: float32 products twice, 16-bit weights or float32 ones in place
STEP = 128  # rows of a strip are a multiple of this
FLOAT16_WEIGHTS = 2.0**14  # scale of weights of at most 2, so that small ones keep their bits


def empty_strip(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (height, width) with rows at addresses that suit cuBLAS."""
    return torch.empty(height, -(-width // 16) * 16, dtype=dtype, device=device)[:, :width]


def strip_height(rows: int, columns: int) -> int:
    """Return the rows of a strip of a matrix: as many as `WORKSPACE` holds, at least `STEP`."""
    return min(max(WORKSPACE // (ELEMENT * columns) // STEP, 1) * STEP, rows)


@dataclass(frozen=True)
class Rows:
    """Embeddings, and what products of their unit rows need.

    Args:
        raw: (B, D) rows, of which products are computed. Those of 16-bit rows are exact in float32.
        reciprocals: (B,) fp32 reciprocal norms, factors of a strip's columns.
    """

    raw: Tensor
    reciprocals: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        """Compute the norms. Copy rows of which neither dimension is contiguous."""
        rows = rows if 1 in rows.stride() else rows.contiguous()
        return cls(rows, reciprocal_norms(rows))

    @cached_property
    def powers(self) -> Tensor:
        """Powers of two for a strip's rows, so that no product leaves float32's range: (B, 1) float32."""
        # Norms near 2^8 keep small elements of float16. The others have small norms, as the columns' are not scaled.
        norm = 8 if self.raw.dtype == torch.float16 else -8
        exponents = torch.frexp(self.reciprocals).exponent.clamp(-118, 110) + norm
        return ((exponents + 127) << 23).view(torch.float32)[:, None]  # exactly 2^exponent

    @cached_property
    def row_factors(self) -> Tensor:
        """Factors of a strip's rows, reciprocals / powers: (B,) float32."""
        return self.reciprocals / self.powers[:, 0]

    def unit(self, dtype: torch.dtype) -> Tensor:
        """Return unit rows, rounded to a dtype."""
        out = torch.empty(self.raw.shape, dtype=dtype, device=self.raw.device)
        return torch.mul(self.raw, self.reciprocals[:, None], out=out)

    def products(self, others: Rows, begin: int, end: int, first: int, out: Tensor) -> Tensor:
        """Write products of scaled rows begin..end with the others' raw rows first..: (end - begin, M - first)."""
        left = torch.empty(end - begin, self.raw.shape[1], dtype=self.raw.dtype, device=out.device)
        torch.mul(self.raw[begin:end], self.powers[begin:end], out=left)
        return multiply(left, others.raw[first:].T, out[: end - begin, : len(others.raw) - first])

    def backward(self, unit_gradient: Tensor | None, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """Return the scaled gradient with respect to rows from that with respect to unit rows.

        Args:
            unit_gradient: (B, D) float32, overwritten. None returns an empty tensor.
            scale: factor of the result.
            out: (B, D) memory for the result, used if it has its dtype.
        """
        dtype = gradient_dtype(self.raw)
        if unit_gradient is None:
            return self.raw.new_empty(0, dtype=dtype)
        if dtype == torch.float32:
            out = unit_gradient
        elif out is None or out.dtype != dtype:
            out = torch.empty_like(unit_gradient, dtype=dtype)
        l2_normalize_backward(unit_gradient, self.raw, self.reciprocals, scale, out)
        return out
