"""Name and instruction sets of the CPU."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

ISA = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
AMX_BF16 = "amx_bf16"
AVX512_BF16 = "avx512_bf16"
AMD = "AuthenticAMD"


def cpu_bf16_is_fast() -> bool:
    """Return True if this CPU multiplies bf16 matrices faster than fp32 ones: with AMX, and with AVX-512 on AMD.

    oneDNN does the multiplication. It does not use an instruction set beyond that of ONEDNN_MAX_CPU_ISA.

    On an EPYC of the Zen 4 generation, products are 2.3 times as fast in bf16, and a training step 1.5 times. On a
    Sapphire Rapids without AMX, bf16 is slower. Two cores reach 174 GFLOP/s in bf16 and 298 in fp32, and a training
    step takes twice as long. Other CPUs emulate bf16, up to 300 times slower.
    """
    on_amd = cpu_vendor() == AMD and AVX512_BF16 in cpu_features() and _onednn_uses("BF16", "FP16", "AVX10", "AMX")
    return on_amd or (AMX_BF16 in cpu_features() and _onednn_uses("AMX"))


def _onednn_uses(*sets: str) -> bool:
    """Return True if ONEDNN_MAX_CPU_ISA sets no limit, or one whose name has one of these parts."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return allowed in ("DEFAULT", "ALL") or any(part in allowed for part in sets)


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Return the CPU's instruction sets from /proc/cpuinfo. The set is empty on systems without that file."""
    return frozenset(_cpuinfo("flags").split())


@lru_cache(maxsize=1)
def cpu_vendor() -> str:
    """Return the vendor's identifier in /proc/cpuinfo, such as ``GenuineIntel``. It is empty on other systems."""
    return _cpuinfo("vendor_id")


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
