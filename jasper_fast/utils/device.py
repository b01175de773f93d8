"""Pick the device and the precision."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from jasper_fast.utils.hardware import cpu_bf16_is_fast


def pick_device() -> torch.device:
    """Return this process's GPU (``LOCAL_RANK`` under torchrun, else the first GPU), or the CPU without a GPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> AbstractContextManager[object]:
    """Return a bf16 autocast context if the precision resolves to bf16 on the device, else a null context."""
    bf16 = used_precision(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def used_precision(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
    """Resolve ``auto`` to bf16 on a device with fast bf16, and to fp32 elsewhere."""
    if precision == "auto":
        return "bf16" if _bf16_is_fast(device) else "fp32"
    return precision


def compiles_each_shape(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> bool:
    """Return True if products of a new shape are compiled first, which oneDNN does in bf16 on a CPU.

    That takes about 5 ms for each of nine shapes of a layer, longer than the products of 500 tokens. oneDNN keeps the
    last 1,024.
    """
    return device.type == "cpu" and used_precision(device, precision) == "bf16"


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_bf16_is_fast()
