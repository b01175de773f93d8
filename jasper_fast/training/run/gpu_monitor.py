"""What a GPU says of itself through NVML: utilisation, memory, power, energy. Nothing where there is none."""

from __future__ import annotations

from typing import Any

import torch


class Telemetry:
    """Readings of one GPU; without a GPU or without ``nvidia-ml-py`` they are empty.

    Args:
        device: the GPU that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._energy = 0.0
        if device.type != "cuda":
            return
        try:
            import pynvml  # type: ignore[import-untyped]
        except ModuleNotFoundError:
            return
        try:
            pynvml.nvmlInit()
            # by its identity: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        self._energy = self._joules() or 0.0

    def read(self, texts: int) -> dict[str, float]:
        """The present readings; energy is per 1,000 texts since the last reading.

        Args:
            texts: how many this GPU's rank took part in since then.
        """
        if self._nvml is None:
            return {}
        nvml, handle = self._nvml, self._handle
        found: dict[str, float] = {}
        try:
            found["gpu_utilisation"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0
            found["gpu_memory_gb"] = nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9
            found["gpu_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        except nvml.NVMLError:  # a reading this GPU does not offer
            pass
        joules = self._joules()
        if joules is not None:
            found["joules_per_1000_texts"] = (joules - self._energy) / max(1, texts) * 1000.0
            self._energy = joules
        return found

    def _joules(self) -> float | None:
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError:  # older than Volta
            return None
