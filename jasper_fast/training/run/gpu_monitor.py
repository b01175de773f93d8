"""Readings of a GPU through NVML: utilization, memory, power and energy."""

from __future__ import annotations

from typing import Any

import torch


class GpuMonitor:
    """Readings of one GPU. Without a GPU or ``nvidia-ml-py`` they are empty.

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
            # by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, but not NVML's
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        self._energy = self._joules() or 0.0

    def read(self, texts: int) -> dict[str, float]:
        """Return the present readings. Energy is per 1,000 texts since the last call.

        Args:
            texts: texts of this GPU's rank since the last call.
        """
        if self._nvml is None:
            return {}
        nvml, handle = self._nvml, self._handle
        readings: dict[str, float] = {}
        try:
            readings["gpu_utilisation"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0
            readings["gpu_memory_gb"] = nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9
            readings["gpu_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        except nvml.NVMLError:  # this GPU does not offer the reading
            pass
        joules = self._joules()
        if joules is not None:
            readings["joules_per_1000_texts"] = (joules - self._energy) / max(1, texts) * 1000.0
            self._energy = joules
        return readings

    def _joules(self) -> float | None:
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError:  # older than Volta
            return None
