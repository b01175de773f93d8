"""Report of the hardware and libraries in use: ``python -m jasper_fast.env`` (``--json`` for programs)."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import jasper_fast.ops.native as native
from jasper_fast._renamed import old_names
from jasper_fast._version import __version__
from jasper_fast.ops.dispatch import why_no_triton
from jasper_fast.utils.errors import run_cli
from jasper_fast.utils.hardware import ISA, cpu_bf16_is_fast, cpu_features, cpu_name

__getattr__ = old_names(__name__)

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "sentence-transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
)
TRACKERS = ("tensorboard", "wandb", "trackio")
ONNX = ("onnx", "onnxscript", "onnxruntime")


def environment() -> dict[str, Any]:
    """Collect versions, CPU, extension, GPUs and optional tools as plain JSON values."""
    return {
        "jasper_fast": {"version": __version__, "path": str(Path(__file__).parent)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": _cpu(),
        "extension": _extension(),
        "gpus": (gpus := _gpus()),
        "kernels": _kernels(gpus),
        "trackers": {name: _version(name) for name in TRACKERS},
        "onnx": {name: _version(name) for name in ONNX},
    }


def describe(facts: Mapping[str, Any]) -> str:
    """Format the result of :func:`environment` as lines of text."""
    cpu, extension = facts["cpu"], facts["extension"]
    isa = " ".join(cpu["isa"]) or "no known vector extension"
    lines = [
        ("jasper_fast", f"{facts['jasper_fast']['version']} in {facts['jasper_fast']['path']}"),
        ("python", f"{facts['python']} on {facts['platform']}"),
        *((name, version or _missing_reason(name)) for name, version in facts["libraries"].items()),
        ("cpu", f"{cpu['model']}: {cpu['threads']} threads on {cpu['logical_cpus']} logical CPUs, {isa}"),
        ("cpu precision", f"{cpu['precision']}: {cpu['precision_reason']}"),
        ("extension", f"{extension['path']}" if extension["loaded"] else f"not in use: {extension['reason']}"),
        *((f"gpu {index}", _gpu_line(gpu)) for index, gpu in enumerate(facts["gpus"]["devices"])),
    ]
    if not facts["gpus"]["devices"]:
        lines.append(("gpu", f"none in use: {facts['gpus']['reason']}"))
    kernels = facts["kernels"]
    lines += [
        (f"triton kernels {index}", f"not in use, PyTorch instead: {gpu['no_kernels']}")
        for index, gpu in enumerate(facts["gpus"]["devices"])
        if gpu["no_kernels"] and kernels["in_use"]
    ]
    lines.append(("triton kernels", "in use on the GPUs" if kernels["in_use"] else f"not in use: {kernels['reason']}"))
    lines += [
        (name, version or _missing_reason(name)) for name, version in {**facts["trackers"], **facts["onnx"]}.items()
    ]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in lines)


def main(argv: list[str]) -> None:
    """Print the report. ``--json`` prints the same facts as one JSON object."""
    parser = argparse.ArgumentParser(prog="jasper-fast env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    facts = environment()
    print(json.dumps(facts, indent=2) if parser.parse_args(argv).json else describe(facts))


def _version(distribution: str) -> str | None:
    # Read the metadata only: importing all optional libraries would take half a minute.
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _kernels(gpus: Mapping[str, Any]) -> dict[str, Any]:
    """Report if losses and searches on a GPU use the Triton kernels, with the reason if none does."""
    reasons = [gpu["no_kernels"] for gpu in gpus["devices"]]
    reason = "no GPU is in use" if not reasons else None if None in reasons else reasons[0]
    if _version("triton") is None:
        reason = "Triton is not installed"
    return {"in_use": reason is None, "reason": reason}


def _missing_reason(name: str) -> str:
    if name == "triton":
        return (
            "not installed, so no Triton kernels (included in CUDA builds of torch; without a GPU: requirements-ci.txt)"
        )
    return f"not installed. Fix: pip install {' '.join(ONNX) if name in ONNX else name}"


def _cpu() -> dict[str, Any]:
    fast = cpu_bf16_is_fast()
    return {
        "model": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": [feature for feature in ISA if feature in cpu_features()],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "precision": "bf16" if fast else "fp32",
        "precision_reason": (
            "the CPU multiplies bf16 matrices faster than fp32 ones"
            if fast
            else "bf16 is slower than fp32 without AMX (Intel) or AVX-512 BF16 (AMD), so the CPU trains in fp32"
        ),
    }


def _extension() -> dict[str, Any]:
    path, reason = native.extension_path(), native.extension_error()
    return {
        "loaded": path is not None and reason is None,
        "path": None if path is None else str(path),
        "reason": None if reason is None else str(reason),
    }


def _gpus() -> dict[str, Any]:
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        return {"devices": [], "reason": f"torch {torch.__version__} is built for {built} and sees no CUDA device"}
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices = [
        {
            "name": p.name,
            "capability": f"sm_{p.major}{p.minor}",
            "memory_gb": round(p.total_memory / 1e9, 1),
            "no_kernels": why_no_triton(index),
        }
        for index, p in enumerate(properties)
    ]
    return {"devices": devices, "reason": None, "precision": "bf16" if torch.cuda.is_bf16_supported() else "fp32"}


def _gpu_line(gpu: Mapping[str, Any]) -> str:
    return f"{gpu['name']}, {gpu['capability']}, {gpu['memory_gb']} GB"


if __name__ == "__main__":
    run_cli(main)
