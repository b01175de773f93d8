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
    """Shard each encoder layer, what is around them, and each head; they come together only while they work."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    for layer in student.layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(student.encoder, mesh=mesh)
    for head in student.heads.values():
        fully_shard(head, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def own_part(tensor: Tensor) -> Tensor:
    """What of a parameter lies here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tree: Any) -> Any:
    """Nested dicts and lists with every sharded tensor put together. All ranks must call it alike."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put whole weights into a model, sharded or not."""
    model.load_state_dict({name: _like(weights[name], here) for name, here in model.state_dict().items()}, strict=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put an optimiser's whole state into one whose parameters are sharded or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        **state,
        "state": {
            index: {key: _like(value, parameters[index]) for key, value in entry.items()}
            for index, entry in state["state"].items()
        },
    }
    optimizer.load_state_dict(state)


def _like(value: Any, here: Tensor) -> Any:
    """A whole tensor, sharded as ``here`` is; what has another shape (a step count) stays whole."""
    if not isinstance(here, DTensor) or not isinstance(value, Tensor) or value.shape != here.shape:
        return value
    return distribute_tensor(value.to(here.device), here.device_mesh, here.placements, src_data_rank=None)
