"""Fused losses on a CUDA device, for ``python -m bench losses --device cuda``.

It uses random vectors and no network, and takes two or three minutes. Every method's loss and gradient are compared
with float64 before they are timed. Errors, such as a lack of memory, are stored in the results.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.common import energy
from bench.common.budget import Budget
from bench.common.check import Heads, Known, Method, check, known, value_and_gradients
from bench.common.profile import kernels
from bench.common.targets import Target, judged, print_judged
from bench.losses import published as _published
from bench.mips.cuda import bandwidth
from jasper_fast.losses import JasperLoss, reference, relative_similarity_loss

Shape = tuple[str, int, list[int], int, torch.dtype]
TEMPERATURE = 0.05
# By loss: name, B, student widths, teacher width, dtype
SHAPES: dict[str, list[Shape]] = {
    "similarity": [
        ("wide", 8192, [12288], 12288, torch.bfloat16),
        ("four heads", 8192, [12288, 1024, 512, 256], 12288, torch.bfloat16),
        ("long", 65536, [1024], 1024, torch.bfloat16),
        ("float32", 8192, [1024], 1024, torch.float32),
    ],
    "relative_similarity": [
        ("published size", 256, [1024], 1024, torch.float32),
        ("exact", 4096, [1024], 1024, torch.float32),
        ("exact, large", 8192, [1024], 1024, torch.float32),
        ("binned", 32768, [1024], 1024, torch.float32),
    ],
    "neighbourhood": [
        ("usual", 4096, [1024], 1024, torch.bfloat16),
        ("two heads", 16384, [1024, 256], 1024, torch.bfloat16),
    ],
    "jasper_loss": [("all heads", 4096, [12288, 1024, 512, 256], 12288, torch.bfloat16)],
}
PUBLISHED_ROWS = 256  # largest batch of the published formulation of relative similarity
COMPILED = (("similarity", "wide"), ("neighbourhood", "usual"))  # torch.compile takes 10 to 30 s for each
METHOD_S = 5.0  # time limit of a method in seconds; slower methods get fewer repeats, but at least two
OURS, THEIRS = 2e-2, 0.25  # accepted relative errors against float64; eager bfloat16 is coarse
PRODUCT = 8192  # size of the square bfloat16 product that measures the machine's speed
PARAMETERS, LENGTH = 1.5e9, 512  # student and tokens per text of the training step that the loss is compared with


def faster_than(method: str) -> Callable[[dict[str, Any]], float]:
    """Return a function that computes our speed relative to a method."""
    return lambda case: case["methods"][method]["both_s"] / case["methods"]["jasper_fast"]["both_s"]


def milliseconds(method: str) -> Callable[[dict[str, Any]], float]:
    """Return a function that computes a method's milliseconds, forward and backward."""
    return lambda case: case["methods"][method]["both_s"] * 1e3


def gigabytes(method: str) -> Callable[[dict[str, Any]], float]:
    """Return a function that computes a method's memory in GB, in addition to inputs and gradient."""
    return lambda case: case["methods"][method]["extra_bytes"] / 1e9


def share_of_memory(case: dict[str, Any]) -> float:
    """Return our memory as a fraction of the eager form's, both in addition to inputs and gradient."""
    return case["methods"]["jasper_fast"]["extra_bytes"] / case["methods"]["eager"]["extra_bytes"]


TARGETS: dict[tuple[str, str], list[Target]] = {
    ("similarity", "wide"): [
        Target("x the speed of eager", faster_than("eager"), 1.8),
        Target("of eager's extra memory", share_of_memory, 1 / 8, at_most=True),
    ],
    ("similarity", "four heads"): [Target("x the speed of eager", faster_than("eager"), 1.5)],
    ("similarity", "long"): [
        Target("GB extra", gigabytes("jasper_fast"), 0.5, at_most=True),
        Target("x the speed of eager", faster_than("eager"), 10.0),
    ],
    ("relative_similarity", "published size"): [
        Target("x the speed of the published formulation", faster_than("published"), 200.0)
    ],
    ("relative_similarity", "exact"): [Target("ms", milliseconds("jasper_fast"), 9.0, at_most=True)],
    ("relative_similarity", "exact, large"): [Target("ms", milliseconds("jasper_fast"), 32.0, at_most=True)],
    ("relative_similarity", "binned"): [
        Target("ms, binned", milliseconds("binned"), 60.0, at_most=True),
        Target("GB extra, binned", gigabytes("binned"), 1.0, at_most=True),
    ],
    ("jasper_loss", "all heads"): [
        Target("% of the shortest possible step", lambda case: case["percent_of_step"], 0.2, at_most=True)
    ],
}


def measure(
    device: str,
    repeats: int,
    quick: bool = False,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Measure every shape with every method: time, peak memory and energy, and check the targets.

    Args:
        device: "cuda", or "cpu" for the same without kernels.
        repeats: number of measurements, of which the median is taken.
        quick: True for shapes of a sixteenth of the size, without targets. Default: False.
        keep: function that gets the results after each shape. Default: does nothing.
        budget: time budget. Shapes that would start after it are left out. None: no limit.

    Returns:
        Cases by loss, and the speed of a bfloat16 product and of a sum.
    """
    budget = budget or Budget()
    shrink = 16 if quick else 1
    results: dict[str, Any] = {"product_tflops": product_tflops(device, PRODUCT // shrink, repeats)}
    tflops = results["product_tflops"]
    results["read_gb_s"] = bandwidth(device, (1 << 28) // shrink**2, repeats)
    print(f"a bfloat16 product runs at {tflops:,.1f} TFLOP/s, a sum at {results['read_gb_s']:,.0f} GB/s")
    for loss, shapes in SHAPES.items():
        results[loss] = []
        for name, rows, widths, teacher_width, dtype in shapes:
            rows, widths, teacher_width = (
                max(rows // shrink, 64),
                [w // shrink for w in widths],
                teacher_width // shrink,
            )
            case: dict[str, Any] = {"name": name, "rows": rows, "widths": widths, "teacher_width": teacher_width}
            case |= {"dtype": str(dtype).removeprefix("torch."), "methods": {}}
            begin = time.perf_counter()
            try:
                if left_out := budget.spent():
                    case["error"] = left_out
                else:
                    _measure(case, loss, dtype, device, repeats)
                if loss == "jasper_loss":
                    case |= share_of_step(case, tflops)
            except Exception as error:  # a failed device: earlier results are kept
                case["error"] = repr(error)
            case["took_s"] = time.perf_counter() - begin
            case["targets"] = [] if quick else judged(TARGETS.get((loss, name), ()), case)
            results[loss].append(case)
            keep(results)
            _print(f"{loss}, {name}, B = {rows}, D = {'/'.join(map(str, widths))} on {teacher_width}", case)
    return results


def product_tflops(device: str, size: int, repeats: int) -> float:
    """Return the speed of a square bfloat16 product in TFLOP/s."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    clock, taken = _Clock(device == "cuda"), []
    for _ in range(repeats + 1):  # the first run loads the library
        begin = clock.now()
        a @ b
        taken.append(clock.now() - begin)
    return 2e-12 * size**3 / statistics.median(taken[1:])


def share_of_step(case: dict[str, Any], tflops: float) -> dict[str, float]:
    """Compare with a training step at the speed of a bare product, 6 FLOP per parameter and token."""
    step = 6e-12 * PARAMETERS * LENGTH * case["rows"] / tflops
    ours = case["methods"].get("jasper_fast", {})
    return {"step_s": step} | ({"percent_of_step": 100 * ours["both_s"] / step} if "both_s" in ours else {})


def _measure(case: dict[str, Any], loss: str, dtype: torch.dtype, device: str, repeats: int) -> None:
    """Fill in the figures or errors of all methods."""
    generator = torch.Generator(device).manual_seed(0)
    *heads, teacher = [
        torch.randn(case["rows"], width, device=device, dtype=dtype, generator=generator)
        for width in (*case["widths"], case["teacher_width"])
    ]
    methods = _methods(loss, device, case["rows"], case["name"])
    # Exact relative similarity in float64 takes 100 GB at B = 32768, so the binned form replaces it there.
    truth = _relative("auto") if loss == "relative_similarity" else methods["jasper_fast"]
    wanted = None
    try:
        wanted = known(truth, heads, teacher)
    except torch.OutOfMemoryError:
        case["unchecked"] = "out of memory in float64: values were only checked to be finite"
    for name, method in methods.items():
        allowed = OURS if name in ("jasper_fast", "binned") else THEIRS
        case["methods"][name] = _one(method, heads, teacher, repeats, wanted, allowed)


def _relative(method: str) -> Method:
    return lambda heads, teacher: relative_similarity_loss(heads[0], teacher, method=method)


def _module(module: JasperLoss) -> Method:
    return lambda heads, teacher: module(dict(zip((h.shape[1] for h in heads), heads, strict=True)), teacher).loss


def _methods(loss: str, device: str, rows: int, name: str) -> dict[str, Method]:
    if loss == "relative_similarity":
        methods: dict[str, Method] = {"jasper_fast": _relative("exact"), "binned": _relative("binned")}
        if rows <= PUBLISHED_ROWS:
            methods["published"] = lambda heads, teacher: _published.relative_similarity_loss(heads[0], teacher)
        return methods
    if loss == "jasper_loss":
        return {"jasper_fast": _module(JasperLoss())}
    if loss == "similarity":
        plain, chunk, ours = _similarity, _similarity_chunk, JasperLoss((0.0, 1.0, 0.0))
        published = reference.similarity_loss
    else:
        plain, chunk = _neighbourhood, _neighbourhood_chunk
        ours = JasperLoss((0.0, 0.0, 0.0), neighbourhood=1.0, temperature=TEMPERATURE)
        published = reference.neighbourhood_loss
    methods = {
        "jasper_fast": _module(ours),
        "published": lambda heads, teacher: sum(published(h, teacher) for h in heads),  # type: ignore[misc]
        "eager": plain,
        "chunked": lambda heads, teacher: _chunked(chunk, heads, teacher),
    }
    if device == "cuda" and (loss, name) in COMPILED:
        methods["torch.compile"] = torch.compile(plain)
    return methods


def _similarity(heads: Heads, teacher: Tensor) -> Tensor:
    """Compute similarity in plain PyTorch, with the teacher's matrix shared between heads."""
    with torch.no_grad():
        target = F.normalize(teacher, dim=1)
        target = target @ target.T
    units = [F.normalize(head, dim=1) for head in heads]
    return torch.stack([F.mse_loss((u @ u.T).float(), target.float()) for u in units]).sum()


def _neighbourhood(heads: Heads, teacher: Tensor) -> Tensor:
    """Compute the neighbourhood loss in plain PyTorch, with the teacher's distribution shared between heads."""
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
    """Sum a loss over row blocks with checkpointing, so one block is in memory at a time."""
    target = F.normalize(teacher, dim=1)
    total = teacher.new_zeros((), dtype=torch.float32)
    for head in heads:
        unit = F.normalize(head, dim=1)
        for begin in range(0, len(unit), rows):
            end = min(begin + rows, len(unit))
            total = total + checkpoint(chunk, unit, target, begin, end, use_reentrant=False)
    return total


def _one(
    method: Method, heads: Heads, teacher: Tensor, repeats: int, wanted: Known | None, allowed: float
) -> dict[str, Any]:
    """Return the figures of one method, or its error."""
    try:
        errors = check(method, heads, teacher, wanted, allowed)  # compiles, and fills the allocator
        figures = _timed(method, heads, teacher, repeats) | errors
        if allowed == OURS:  # only our methods are profiled
            figures["kernels"] = kernels(partial(value_and_gradients, method, heads, teacher))
        return figures
    except torch.OutOfMemoryError:
        error = "out of memory"
    except Exception as problem:  # the other methods are still measured
        error = repr(problem)
    with suppress(RuntimeError):
        torch.cuda.empty_cache()
    return {"error": error}


def _timed(method: Method, heads: Heads, teacher: Tensor, repeats: int) -> dict[str, Any]:
    leaves = [head.detach().requires_grad_() for head in heads]
    clock = _Clock(teacher.is_cuda)
    clock.reset_peak()
    forward, backward = [], []
    with clock.energy() as joules:
        started = time.perf_counter()
        for turn in range(repeats):
            if turn >= 2 and time.perf_counter() - started > METHOD_S:
                break
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
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    used = joules()
    result = {
        "forward_s": statistics.median(forward),
        "backward_s": statistics.median(backward),
        "both_s": statistics.median(both),
        "energy_j": None if used is None else used / len(both),
    }
    if teacher.is_cuda:
        # In addition to the inputs and the returned gradient.
        result["extra_bytes"] = clock.peak() - gradients
    return result


class _Clock:
    """Clock of synchronised wall time, peak memory, and the GPU's energy counter if NVML has one."""

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
        counter = energy.of_current_device() if self.cuda else None
        used: list[float] = []
        begin = counter() if counter else 0.0
        yield lambda: used[0] if used else None
        if counter:
            self.now()
            used.append(counter() - begin)


def _print(title: str, case: dict[str, Any]) -> None:
    if "error" in case:
        print(f"{title}: {case['error']}")
    ours = case["methods"].get("jasper_fast", {})
    for method, own in case["methods"].items():
        if "error" in own:
            print(f"{title}, {method}: {own['error']}")
            continue
        memory = f", {own['extra_bytes'] / 2**20:,.0f} MiB extra" if "extra_bytes" in own else ""
        ratio = f"; {own['both_s'] / ours['both_s']:.2f} x ours" if "both_s" in ours else ""
        print(f"{title}, {method}: {own['both_s'] * 1e3:,.2f} ms{memory}{ratio}")
    print_judged(case["targets"])
