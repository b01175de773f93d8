"""Activations of the autograd graph in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from jasper_fast.distributed.fsdp import local_part
from jasper_fast.models.student import Student


def offload_activations(on: bool, student: Student, device: torch.device) -> AbstractContextManager[Any]:
    """Keep the activations of a graph built in the block in the host's memory, if ``on`` and the device is a GPU."""
    if not on or device.type == "cpu":
        return nullcontext()
    offload = Offload(student.parameters())
    return torch.autograd.graph.saved_tensors_hooks(offload.pack, Offload.unpack)


class Offload:
    """Hooks that copy each tensor a graph saves to the host's memory once, except the weights.

    The whole tensors that a sharded layer gathers for its pass are no weights, and are copied.

    Args:
        weights: tensors that stay on the device.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._stay = {local_part(weight).untyped_storage().data_ptr() for weight in weights}
        # An entry lives as long as a graph needs it, and an address belongs to one storage as long as its entry lives.
        self._copies: WeakValueDictionary[tuple[int, int], _Copy] = WeakValueDictionary()

    @torch.no_grad()
    def pack(self, tensor: Tensor) -> Tensor | tuple[Any, ...]:
        """Return the replacement of the tensor in the graph."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._stay:
            return tensor
        if storage.nbytes() > tensor.nbytes:  # a part of a larger storage, whose rest may not be needed
            tensor = tensor.clone()
            storage = tensor.untyped_storage()
        source = StorageWeakRef(storage)
        key = (source.cdata, tensor._version)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = _Copy(storage, source)
        return copy, tensor.device, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        """Return the tensor on its device again."""
        if isinstance(packed, Tensor):
            return packed
        copy, device, dtype, *layout = packed
        storage = copy.content.to(device, non_blocking=True).untyped_storage()
        size, stride, offset = layout
        return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, size, stride)


class _Copy:
    """A copy of a storage in the host's memory, and a weak reference that keeps the storage's address from reuse."""

    def __init__(self, storage: torch.UntypedStorage, source: StorageWeakRef) -> None:
        self.source = source
        content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # (bytes,)
        self.content = torch.empty(content.shape, dtype=torch.uint8, pin_memory=content.is_cuda)
        self.content.copy_(content, non_blocking=content.is_cuda)
