"""Students that do not fit one device: weights, gradients and optimiser state sharded over the ranks (FSDP2).

A sharded parameter is a DTensor. What is written to a checkpoint is always whole, so a run may go on with any number of
ranks, sharded or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from jasper_fast.model import Student


def shard(student: Student, device: torch.device, ranks: int) -> None:
    """Shard each encoder layer, what is around them, and each head; they come together only while they work.

    The whole student is never on the device: each part goes there to be cut up at once. What stays whole follows.

    Args:
        student: on the CPU.
        device: this rank's.
        ranks: how many share it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    # Also after a pass without gradients, which no backward pass follows: digests are of what lies here.
    for part in [*student.layers(), student.encoder, *student.heads.values()]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    if student.vision is not None:
        student.vision.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def own_part(tensor: Tensor) -> Tensor:
    """What of a parameter lies here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together, where it is. All ranks must call it alike."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collect(tree: Any, first: bool) -> Any:
    """A copy in the host's memory of nested dicts and lists of tensors, on the first rank alone.

    Sharded tensors are put together one after the other, so that no device ever holds more than one of them. All ranks
    must call it alike; the others get the same tree with None for tensors.
    """
    if isinstance(tree, Tensor):
        full = whole(tree.detach())
        return full.to("cpu", copy=True).contiguous() if first else None
    if isinstance(tree, dict):
        return {key: collect(value, first) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(collect(value, first) for value in tree)
    return tree


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put whole weights into a model, sharded or not."""
    model.load_state_dict({name: _like(weights[name], here) for name, here in model.state_dict().items()}, strict=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put an optimiser's whole state into one whose parameters are sharded or not.

    Args:
        state: may be mapped from a file, of which nothing is kept.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        **state,
        "state": {
            index: {key: _own(value, parameters[index]) for key, value in entry.items()}
            for index, entry in state["state"].items()
        },
    }
    optimizer.load_state_dict(state)


@torch.no_grad()
def set_whole(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter, sharded or not, the whole ``value``. All ranks of a sharded one must call it alike."""
    parameter.copy_(_like(value, parameter))


def _own(value: Any, here: Tensor) -> Any:
    """As ``_like``, with memory of its own; what changes device on its way into the optimiser gets that there."""
    value = _like(value, here)
    return value.clone() if isinstance(value, Tensor) and value.device == here.device else value


def _like(value: Any, here: Tensor) -> Any:
    """A whole tensor, sharded as ``here`` is; what has another shape (a step count) stays whole."""
    if not isinstance(here, DTensor) or not isinstance(value, Tensor) or value.shape != here.shape:
        return value
    return distribute_tensor(value.to(here.device), here.device_mesh, here.placements, src_data_rank=None)
