"""Name and instruction sets of the CPU."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

ISA = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
FAST_BF16 = "amx_bf16"


def cpu_bf16_is_fast() -> bool:
    """Return True if this CPU multiplies bf16 matrices faster than fp32 ones, which needs AMX.

    oneDNN does the multiplication. It does not use AMX if ONEDNN_MAX_CPU_ISA is an instruction set without it.

    The bf16 instructions of AVX-512 are slower than fp32. On a Sapphire Rapids without AMX, products reach 174 GFLOP/s
    in bf16 and 298 in fp32, and a training step takes twice as long. Other CPUs emulate bf16, up to 300 times slower.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return FAST_BF16 in cpu_features() and (allowed in ("DEFAULT", "ALL") or "AMX" in allowed)


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Return the CPU's instruction sets from /proc/cpuinfo. The set is empty on systems without that file."""
    return frozenset(_cpuinfo("flags").split())


def cpu_name() -> str:
    """Return the name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """Return the first value of a key in /proc/cpuinfo, or an empty string if it is missing."""
    source = Path("/proc/cpuinfo")
    if not source.is_file():
        return ""
    for line in source.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
