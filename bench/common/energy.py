"""Energy counters of GPUs, read through NVML."""

from __future__ import annotations

from collections.abc import Callable


def counter(uuid: str | None = None) -> Callable[[], float] | None:
    """Return a function that reads the energy in joules since the driver was loaded, or None without such a counter.

    Args:
        uuid: GPU, as CUDA reports it. None adds up all GPUs, without a CUDA context.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        if uuid is None:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        else:
            handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return lambda: sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1e3


def of_current_device() -> Callable[[], float] | None:
    """Return the counter of torch's current GPU."""
    import torch

    return counter(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
