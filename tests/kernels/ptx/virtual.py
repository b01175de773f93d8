"""Tensors of any size without memory, for the addresses of launches that no CPU could hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FIRST_ADDRESS = 1 << 44
GAP = 1 << 30  # bytes between two tensors, so that an address beyond one is outside of all


class VirtualTensor:
    """The properties of a tensor that a launch asks for.

    Args:
        shape: its shape.
        dtype: its dtype.
        strides: its strides in elements. None: contiguous.
    """

    _next_address = FIRST_ADDRESS

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device("cpu")
        contiguous = [math.prod(self.shape[n + 1 :]) for n in range(len(self.shape))]
        self._strides = tuple(contiguous if strides is None else strides)
        self._address = VirtualTensor._next_address
        extent = sum((n - 1) * stride for n, stride in zip(self.shape, self._strides, strict=True)) + 1
        VirtualTensor._next_address += (extent * dtype.itemsize + GAP) // 4096 * 4096

    def data_ptr(self) -> int:
        return self._address

    def stride(self, dim: int | None = None) -> tuple[int, ...] | int:
        return self._strides if dim is None else self._strides[dim]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]
