"""Weights, gradients and optimizer state sharded over the ranks (FSDP2), for students that do not fit one device.

A sharded parameter is a DTensor. Checkpoints always hold full tensors, so a run can resume with any number of ranks,
sharded or not.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Shardable(Protocol):
    """Parts of a student that :func:`shard` cuts or moves."""

    @property
    def encoder(self) -> Any:
        """Text encoder."""

    @property
    def heads(self) -> nn.ModuleDict:
        """Linear heads by width."""

    @property
    def vision(self) -> nn.Module | None:
        """Vision tower, or None."""

    def layers(self) -> list[nn.Module]:
        """Return the encoder's layers, first to last."""


def shard(student: Shardable, device: torch.device, ranks: int) -> None:
    """Shard each encoder layer, the rest of the encoder, and each head.

    Each part is gathered only for its own forward and backward pass. The full student is never on the device: each part
    moves there to be sharded at once. The vision tower is not sharded and moves last.

    Args:
        student: the student, on the CPU.
        device: this rank's device.
        ranks: number of ranks that share the student.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    # Also reshard after a pass without gradients, which no backward pass follows: digests read the local shard.
    for part in [*student.layers(), student.encoder, *student.heads.values()]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    if student.vision is not None:
        student.vision.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Return True if any parameter of a model is sharded over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a parameter, or the parameter itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor on its own device.

    This is a collective: every rank must call it for the same tensor.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collect(tree: Any, first: bool) -> Any:
    """Copy nested dicts and lists of tensors to the CPU, on the main rank alone.

    Sharded tensors are gathered one at a time, so a device holds at most one full tensor. This is a collective: every
    rank must call it for the same tree.

    Args:
        tree: nested dicts, lists and tuples with tensors and other values as leaves.
        first: True on the main rank.

    Returns:
        The same tree with full, contiguous CPU tensors. On other ranks each tensor is None.
    """
    if isinstance(tree, Tensor):
        full = full_tensor(tree.detach())
        return full.to("cpu", copy=True).contiguous() if first else None
    if isinstance(tree, dict):
        return {key: collect(value, first) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(collect(value, first) for value in tree)
    return tree


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load full weights into a model, sharded or not.

    Args:
        model: the model.
        weights: full tensor of every entry of its state dict, by name.

    Raises:
        KeyError: A weight is missing.
        RuntimeError: A weight has a wrong shape.
    """
    sharded_weights = {name: _shard_like(weights[name], current) for name, current in model.state_dict().items()}
    model.load_state_dict(sharded_weights, strict=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load full optimizer state into an optimizer whose parameters may be sharded.

    Args:
        optimizer: the optimizer.
        state: state dict with full tensors. They may be memory-mapped, because they are copied.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        **state,
        "state": {
            index: {key: _copy_sharded(value, parameters[index]) for key, value in entry.items()}
            for index, entry in state["state"].items()
        },
    }
    optimizer.load_state_dict(state)


@torch.no_grad()
def copy_full_tensor(parameter: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a parameter, sharded or not. Every rank must pass the same ``value``."""
    parameter.copy_(_shard_like(value, parameter))


def _copy_sharded(value: Any, parameter: Tensor) -> Any:
    """Shard ``value`` like ``parameter`` and copy it. A value on another device is copied later, by the optimizer."""
    value = _shard_like(value, parameter)
    return value.clone() if isinstance(value, Tensor) and value.device == parameter.device else value


def _shard_like(value: Any, parameter: Tensor) -> Any:
    """Shard a full tensor like ``parameter``. A tensor of another shape, such as a step count, stays full."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
