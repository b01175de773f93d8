"""The fused losses on a CUDA device, for ``python -m bench losses --device cuda``.

Random vectors, no network, a few minutes. What cannot be run, out of memory for one, is written down as such.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jasper_fast import reference
from jasper_fast.losses import JasperLoss, relative_similarity_loss

Heads = list[Tensor]
Method = Callable[[Heads, Tensor], Tensor]
TEMPERATURE = 0.05
# name, B, student widths, teacher width, dtype
SIMILARITY = [
    ("wide", 8192, [12288], 12288, torch.bfloat16),
    ("four heads", 8192, [12288, 1024, 512, 256], 12288, torch.bfloat16),
    ("long", 65536, [1024], 1024, torch.bfloat16),
    ("float32", 8192, [1024], 1024, torch.float32),
]
NEIGHBOURHOOD = [
    ("usual", 4096, [1024], 1024, torch.bfloat16),
    ("two heads", 16384, [1024, 256], 1024, torch.bfloat16),
]
RELATIVE = [
    ("published size", 256, [1024], 1024, torch.float32),
    ("exact", 4096, [1024], 1024, torch.float32),
    ("exact, large", 8192, [1024], 1024, torch.float32),
    ("binned", 32768, [1024], 1024, torch.float32),
]
PUBLISHED_ROWS = 256  # what the published formulation of relative similarity can hold


def measure(device: str, repeats: int, quick: bool = False) -> dict[str, Any]:
    """Every shape by every method: seconds of forward, backward and both, peak memory, energy."""
    shrink = 16 if quick else 1
    found: dict[str, Any] = {}
    losses = (("similarity", SIMILARITY), ("relative_similarity", RELATIVE), ("neighbourhood", NEIGHBOURHOOD))
    for loss, shapes in losses:
        found[loss] = []
        for name, rows, widths, teacher_width, dtype in shapes:
            rows, widths, teacher_width = rows // shrink, [w // shrink for w in widths], teacher_width // shrink
            generator = torch.Generator(device).manual_seed(0)
            heads = [torch.randn(rows, w, device=device, dtype=dtype, generator=generator) for w in widths]
            teacher = torch.randn(rows, teacher_width, device=device, dtype=dtype, generator=generator)
            figures = {
                method: _one(function, heads, teacher, repeats)
                for method, function in _methods(loss, device, rows).items()
            }
            found[loss].append(
                {"name": name, "rows": rows, "widths": widths, "teacher_width": teacher_width, "dtype": str(dtype)[6:]}
                | {"methods": figures}
            )
            _print(f"{loss}, {name}, B = {rows}, D = {'/'.join(map(str, widths))} on {teacher_width}", figures)
    return found


def _relative_methods(rows: int) -> dict[str, Method]:
    def by(method: str) -> Method:
        return lambda heads, teacher: relative_similarity_loss(heads[0], teacher, method=method)

    chosen = ["exact", "binned", *(["reference"] if rows <= PUBLISHED_ROWS else [])]
    return {"jasper_fast" if method == "exact" else method: by(method) for method in chosen}


def _methods(loss: str, device: str, rows: int) -> dict[str, Method]:
    if loss == "relative_similarity":
        return _relative_methods(rows)
    if loss == "similarity":
        plain, chunk, ours = _similarity, _similarity_chunk, JasperLoss((0.0, 1.0, 0.0))
        published = reference.similarity_loss
    else:
        plain, chunk = _neighbourhood, _neighbourhood_chunk
        ours = JasperLoss((0.0, 0.0, 0.0), neighbourhood=1.0, temperature=TEMPERATURE)
        published = reference.neighbourhood_loss
    methods: dict[str, Method] = {
        "jasper_fast": lambda heads, teacher: ours(dict(zip((h.shape[1] for h in heads), heads, strict=True)), teacher)[
            0
        ],
        "published": lambda heads, teacher: sum(published(h, teacher) for h in heads),  # type: ignore[misc]
        "eager": plain,
        "chunked": lambda heads, teacher: _chunked(chunk, heads, teacher),
    }
    if device == "cuda":
        methods["torch.compile"] = torch.compile(plain)
    return methods


def _similarity(heads: Heads, teacher: Tensor) -> Tensor:
    """Plain PyTorch, the teacher's matrix shared."""
    with torch.no_grad():
        target = F.normalize(teacher, dim=1)
        target = target @ target.T
    units = [F.normalize(head, dim=1) for head in heads]
    return torch.stack([F.mse_loss((u @ u.T).float(), target.float()) for u in units]).sum()


def _neighbourhood(heads: Heads, teacher: Tensor) -> Tensor:
    """Plain PyTorch, the teacher's distribution shared."""
    with torch.no_grad():
        target = F.normalize(teacher, dim=1)
        wanted = _log_softmax(target, target, 0)
    units = [F.normalize(head, dim=1) for head in heads]
    return torch.stack(
        [F.kl_div(_log_softmax(u, u, 0), wanted, log_target=True, reduction="sum") for u in units]
    ).sum() / (len(teacher))


def _log_softmax(rows: Tensor, unit: Tensor, begin: int) -> Tensor:
    logits = (rows @ unit.T).float() / TEMPERATURE
    own = torch.arange(len(rows), device=rows.device)
    return logits.index_put((own, own + begin), logits.new_tensor(-1e30)).log_softmax(dim=1)


def _similarity_chunk(unit: Tensor, target: Tensor, begin: int, end: int) -> Tensor:
    return (unit[begin:end] @ unit.T - target[begin:end] @ target.T).float().square().sum() / len(unit) ** 2


def _neighbourhood_chunk(unit: Tensor, target: Tensor, begin: int, end: int) -> Tensor:
    given, wanted = _log_softmax(unit[begin:end], unit, begin), _log_softmax(target[begin:end], target, begin)
    return F.kl_div(given, wanted, log_target=True, reduction="sum") / len(unit)


def _chunked(chunk: Callable[..., Tensor], heads: Heads, teacher: Tensor, rows: int = 2048) -> Tensor:
    """Row strips that the backward pass computes again, so that one strip is in memory."""
    target = F.normalize(teacher, dim=1)
    total = teacher.new_zeros((), dtype=torch.float32)
    for head in heads:
        unit = F.normalize(head, dim=1)
        for begin in range(0, len(unit), rows):
            end = min(begin + rows, len(unit))
            total = total + checkpoint(chunk, unit, target, begin, end, use_reentrant=False)
    return total


def _one(method: Method, heads: Heads, teacher: Tensor, repeats: int) -> dict[str, Any]:
    leaves = [head.detach().requires_grad_() for head in heads]
    clock = _Clock(teacher.is_cuda)
    try:
        method(leaves, teacher).backward()  # compiles, and fills the allocator
        for leaf in leaves:
            leaf.grad = None
        clock.reset_peak()
        forward, backward = [], []
        with clock.energy() as joules:
            for _ in range(repeats):
                begin = clock.now()
                loss = method(leaves, teacher)
                middle = clock.now()
                loss.backward()
                end = clock.now()
                forward.append(middle - begin)
                backward.append(end - middle)
                del loss
                for leaf in leaves:
                    leaf.grad = None
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    result = {
        "forward_s": statistics.median(forward),
        "backward_s": statistics.median(backward),
        "both_s": statistics.median(both),
        "energy_j": None if joules() is None else joules() / repeats,
    }
    if teacher.is_cuda:
        # Beyond the inputs and the gradient that is returned.
        result["extra_bytes"] = clock.peak() - gradients
    return result


class _Clock:
    """Wall time between synchronised points, peak memory, and the GPU's energy counter where NVML has one."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.before = 0

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before

    @contextmanager
    def energy(self) -> Iterator[Callable[[], float | None]]:
        counter = _energy_counter() if self.cuda else None
        used: list[float] = []
        begin = counter() if counter else 0.0
        yield lambda: used[0] if used else None
        if counter:
            self.now()
            used.append(counter() - begin)


def _energy_counter() -> Callable[[], float] | None:
    """Joules that the current device has used, or None: no NVML, or a device that does not count."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _print(title: str, figures: dict[str, dict[str, Any]]) -> None:
    ours = figures["jasper_fast"]
    for method, own in figures.items():
        if "error" in own or "error" in ours:
            print(f"{title}, {method}: {own.get('error', 'ran, but there is nothing to compare with')}")
            continue
        memory = f", {own['extra_bytes'] / 2**20:,.0f} MiB extra" if "extra_bytes" in own else ""
        print(f"{title}, {method}: {own['both_s'] * 1e3:,.2f} ms{memory}; {own['both_s'] / ours['both_s']:.2f} x ours")
