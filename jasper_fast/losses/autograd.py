"""Autograd functions of the losses: normalization, and gradients that the forward pass computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jasper_fast.ops.normalize import l2_normalize, l2_normalize_backward


def needs_gradient(tensors: list[Tensor]) -> bool:
    """Return True if autograd is on and any tensor requires a gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def attach_gradients(losses: Tensor, inputs: list[Tensor], gradients: list[Tensor], owners: list[int]) -> Tensor:
    """Attach gradients that are known already to losses (H,).

    Args:
        losses: the losses of H heads, without a graph.
        inputs: the tensors that the losses depend on.
        gradients: for each input, the derivative of its loss.
        owners: for each input, the index of its loss.
    """
    learning = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    if not learning or not torch.is_grad_enabled():
        return losses
    chosen = [owners[i] for i in learning]
    return _Attach.apply(losses, chosen, *[inputs[i] for i in learning], *[gradients[i] for i in learning])


class _Attach(torch.autograd.Function):
    """Backward only scales the gradients that forward was given."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, owners: list[int], *inputs_and_gradients: Tensor) -> Tensor:
        ctx.owners = owners
        ctx.dtypes = [tensor.dtype for tensor in inputs_and_gradients[: len(owners)]]
        ctx.save_for_backward(*inputs_and_gradients[len(owners) :])
        return losses.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        scaled = [
            (incoming[owner] * gradient).to(dtype)
            for owner, gradient, dtype in zip(ctx.owners, gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled, *[None] * len(scaled)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
        unit, inverse = l2_normalize(embeddings, dtype)
        ctx.save_for_backward(unit, inverse)
        ctx.input_dtype = embeddings.dtype
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        return l2_normalize_backward(incoming, *ctx.saved_tensors).to(ctx.input_dtype), None


def normalize(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale rows to unit length, with a gradient. (B, D) -> (B, D) in dtype."""
    return _Normalize.apply(embeddings, dtype)


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context that turns autocast off on the tensor's device."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def compute_dtype(students: list[Tensor], teacher: Tensor) -> torch.dtype:
    """Return float64 if any tensor has it, else float32."""
    double = any(tensor.dtype == torch.float64 for tensor in (*students, teacher))
    return torch.float64 if double else torch.float32
