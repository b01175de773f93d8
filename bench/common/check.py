"""Check of a loss and its gradients against float64, before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Heads = list[Tensor]
Method = Callable[[Heads, Tensor], Tensor]


class Known(NamedTuple):
    """Loss and its gradients with respect to the students, in float64."""

    loss: float
    gradients: list[Tensor]


def known(method: Method, heads: Heads, teacher: Tensor) -> Known:
    """Compute loss and gradients in float64, where the losses are plain torch without kernels."""
    loss, gradients = value_and_gradients(method, [head.double() for head in heads], teacher.double())
    return Known(float(loss), gradients)


def check(method: Method, heads: Heads, teacher: Tensor, wanted: Known | None, allowed: float) -> dict[str, float]:
    """Return the relative errors of loss and gradients.

    Args:
        method: loss to check.
        heads: student embeddings, (B, D) each.
        teacher: (B, E) teacher embeddings.
        wanted: expected values in float64. None: only check that the values are finite.
        allowed: largest accepted relative error.

    Raises:
        AssertionError: the values are not finite, or their error is larger than ``allowed``.
    """
    loss, gradients = value_and_gradients(method, heads, teacher)
    if not all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients)):
        raise AssertionError("the loss or its gradient is not finite")
    if wanted is None:
        return {}
    off = sum(float((own - true).square().sum()) for own, true in zip(gradients, wanted.gradients, strict=True))
    size = sum(float(true.square().sum()) for true in wanted.gradients)
    errors = {
        "loss_error": abs(float(loss) - wanted.loss) / abs(wanted.loss),
        "gradient_error": math.sqrt(off / size),
    }
    if max(errors.values()) > allowed:
        listed = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
        raise AssertionError(f"far from the values in float64: {listed}, allowed {allowed:.1e}")
    return errors


def value_and_gradients(method: Method, heads: Heads, teacher: Tensor) -> tuple[Tensor, Heads]:
    """Return the loss and its gradients with respect to the heads."""
    leaves = [head.detach().requires_grad_() for head in heads]
    loss = method(leaves, teacher)
    gradients = torch.autograd.grad(loss, leaves)
    return loss.detach(), list(gradients)
