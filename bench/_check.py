"""What a loss gives, compared with the same in float64, before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Heads = list[Tensor]
Method = Callable[[Heads, Tensor], Tensor]


class Known(NamedTuple):
    """A loss and its gradients with respect to the students, in float64."""

    loss: float
    gradients: list[Tensor]


def known(method: Method, heads: Heads, teacher: Tensor) -> Known:
    """The values of a method in float64, where the losses are plain torch and no kernel that is to be checked."""
    loss, gradients = value_and_gradients(method, [head.double() for head in heads], teacher.double())
    return Known(float(loss), gradients)


def check(method: Method, heads: Heads, teacher: Tensor, wanted: Known | None, allowed: float) -> dict[str, float]:
    """How far loss and gradients are from what is wanted, relative to its size; nothing where that is not known.

    Raises:
        AssertionError: they are not finite, or further away than allowed.
    """
    loss, gradients = value_and_gradients(method, heads, teacher)
    if not all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients)):
        raise AssertionError("the loss or its gradient is not finite")
    if wanted is None:
        return {}
    off = sum(float((own - true).square().sum()) for own, true in zip(gradients, wanted.gradients, strict=True))
    size = sum(float(true.square().sum()) for true in wanted.gradients)
    found = {
        "loss_error": abs(float(loss) - wanted.loss) / abs(wanted.loss),
        "gradient_error": math.sqrt(off / size),
    }
    if max(found.values()) > allowed:
        errors = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        raise AssertionError(f"far from the values in float64: {errors}, allowed {allowed:.1e}")
    return found


def value_and_gradients(method: Method, heads: Heads, teacher: Tensor) -> tuple[Tensor, Heads]:
    leaves = [head.detach().requires_grad_() for head in heads]
    loss = method(leaves, teacher)
    gradients = torch.autograd.grad(loss, leaves)
    return loss.detach(), list(gradients)
