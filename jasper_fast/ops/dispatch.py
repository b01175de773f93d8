"""Choose the form of an operator, and describe its outputs to torch.compile."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None
OLDEST_GPU = (8, 0)  # compute capability. Older GPUs have no bfloat16 or TF32 tensor cores.


def uses_triton(embeddings: list[Tensor]) -> bool:
    """Return True if Triton kernels take these: on a GPU that runs them, and none is float64."""
    if not embeddings[-1].is_cuda or any(e.dtype == torch.float64 for e in embeddings):
        return False
    return why_no_triton(embeddings[-1].device.index) is None


@lru_cache
def why_no_triton(device: int) -> str | None:
    """Return why losses and searches on a GPU use plain PyTorch, or None if they use the Triton kernels.

    Args:
        device: index of the GPU.
    """
    if not _TRITON:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, and torch is built for ROCm {torch.version.hip}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        name, oldest = ("sm_{}{}".format(*found) for found in (capability, OLDEST_GPU))
        return f"the kernels need {oldest} or newer, and this GPU is {name}"
    return None


def gradient_dtype(embeddings: Tensor) -> torch.dtype:
    """Return the dtype of a mean's gradient until it is scaled: float32 for float16, which could not hold it."""
    return torch.float32 if embeddings.dtype == torch.float16 else embeddings.dtype


def fake_losses(students: list[Tensor], teacher: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    """Return empty losses (H,) and gradients in the dtypes of an operator that takes rows of any length."""
    return fake_loss([*students, teacher], len(students)), [fake_gradient(s, gradient) for s in students]


def fake_loss(embeddings: list[Tensor], count: int = 1) -> Tensor:
    """Return empty losses (count,): in float64 if any embeddings are, else in float32."""
    double = any(tensor.dtype == torch.float64 for tensor in embeddings)
    return embeddings[-1].new_empty(count, dtype=torch.float64 if double else torch.float32)


def fake_gradient(embeddings: Tensor, with_gradient: bool) -> Tensor:
    """Return an empty gradient in the dtype of `gradient_dtype`. An unwanted one has no elements."""
    return embeddings.new_empty(embeddings.shape if with_gradient else (0,), dtype=gradient_dtype(embeddings))


def fake_unit_gradients(students: list[Tensor], gradient: bool) -> list[Tensor]:
    """Return empty gradients of an operator that takes unit rows: in the students' dtypes."""
    return [torch.empty_like(s) if gradient else s.new_empty(0) for s in students]
