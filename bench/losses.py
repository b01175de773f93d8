"""``python -m bench losses``: the losses on a CPU against the published formulation and plain PyTorch, in one run.

Figures are medians; what is compared is measured alternately, so that a busy machine slows both sides alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench._environment import environment
from jasper_fast import reference
from jasper_fast.losses import relative_similarity_loss, similarity_loss

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main(argv: list[str]) -> int:
    """Measure, print ratios first, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench losses", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON to write (default: bench/results/losses-DEVICE.json)")
    parser.add_argument("--repeats", type=int, default=7, help="median of this many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="leave out what takes gigabytes or many seconds")
    options = parser.parse_args(argv)
    options.out = options.out or Path(f"bench/results/losses-{options.device}.json")
    if options.device == "cuda":
        return on_cuda(options.out, options.repeats, options.quick)
    threads = torch.get_num_threads()
    results: dict[str, object] = {"environment": environment()}
    results["published"] = [published(rows, options.repeats) for rows in ((64,) if options.quick else (64, 128))]
    results["gram_products"] = gram_products(1024, 384, options.repeats)
    results["pairs_per_second"] = pairs_per_second(512 if options.quick else 2048, 384, threads, options.repeats)
    shapes = [(512, 64, 64)] if options.quick else [(2048, 1024, 1024), (16384, 256, 384)]
    results["similarity"] = [similarity(*shape, threads, options.repeats) for shape in shapes]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.out}")
    return 0


def on_cuda(out: Path, repeats: int, quick: bool) -> int:
    """The GPU suite; needs nothing but torch, Triton and a device."""
    from bench import _losses_cuda

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is in use here; python -m jasper_fast.env says why. For a CPU: --device cpu")
    results = {"environment": environment(), **_losses_cuda.measure("cuda", repeats, quick)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {out}")
    return 0


def published(rows: int, repeats: int) -> dict[str, float]:
    """Relative similarity, forward and backward, against one term for each pair of pairs."""
    student, teacher = _batch(rows, 384, 384)
    ours, theirs = medians(
        [
            _step(relative_similarity_loss, student, teacher),
            _step(reference.relative_similarity_loss, student, teacher),
        ],
        min(repeats, 5),
    )
    print(f"relative similarity, B = {rows}: {theirs / ours:,.0f} x the published formulation's speed", end="")
    print(f" ({ours * 1e3:.2f} ms against {theirs * 1e3:,.0f} ms)")
    return {"rows": rows, "ratio": theirs / ours, "ours_s": ours, "published_s": theirs}


def gram_products(rows: int, width: int, repeats: int) -> dict[str, float]:
    """Relative similarity, forward and backward, in float32 Gram products S S' of the same batch."""
    student, teacher = _batch(rows, width, width)
    ours, gram = medians([_step(relative_similarity_loss, student, teacher), lambda: student @ student.T], repeats)
    print(
        f"relative similarity, B = {rows}: {ours / gram:.1f} Gram products ({ours * 1e3:.0f} ms, one {gram * 1e3:.1f})"
    )
    return {"rows": rows, "width": width, "products": ours / gram, "ours_s": ours, "gram_s": gram}


def pairs_per_second(rows: int, width: int, threads: int, repeats: int) -> dict[str, float]:
    """Relative similarity, forward and backward, on one thread and on all."""
    student, teacher = _batch(rows, width, width)
    step = _step(relative_similarity_loss, student, teacher)

    def on(count: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(count)
            step()

        return run

    one, every = medians([on(1), on(threads)], repeats)
    torch.set_num_threads(threads)
    pairs = rows * (rows - 1) / 2
    print(
        f"relative similarity, B = {rows}: {one / every:.2f} x from {threads} threads "
        f"({pairs / every / 1e6:.1f} M pairs/s; {pairs / one / 1e6:.1f} on one)"
    )
    return {"rows": rows, "width": width, "speed_up": one / every, "one_thread_s": one, "all_threads_s": every}


def similarity(rows: int, width: int, teacher_width: int, threads: int, repeats: int) -> dict[str, object]:
    """Both forms and plain PyTorch, forward and backward, each in a process of its own for its peak memory."""
    repeats = repeats if rows <= 4096 else 1
    figures = {
        method: _in_new_process(_measure_similarity, method, rows, width, teacher_width, threads, repeats)
        for method in ("reference", "tile", "feature", "auto")
    }
    plain = figures["reference"]
    for method, own in figures.items():
        if method != "reference":
            print(
                f"similarity, B = {rows}, D = {width} / {teacher_width}, {method}: "
                f"{plain['seconds'] / own['seconds']:.1f} x plain PyTorch ({own['seconds'] * 1e3:,.0f} ms against "
                f"{plain['seconds'] * 1e3:,.0f}; {own['peak_mib']:,.0f} MiB above the inputs against "
                f"{plain['peak_mib']:,.0f})"
            )
    return {"rows": rows, "width": width, "teacher_width": teacher_width, "methods": figures}


def _measure_similarity(
    method: str, rows: int, width: int, teacher_width: int, threads: int, repeats: int
) -> dict[str, float]:
    torch.set_num_threads(threads)
    _step(similarity_loss, *_batch(8, 8, 8))()  # what torch itself needs
    student, teacher = _batch(rows, width, teacher_width)
    before = _peak_mib()

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return similarity_loss(s, t, method=method)

    (seconds,) = medians([_step(loss, student, teacher)], repeats)
    return {"seconds": seconds, "peak_mib": _peak_mib() - before}


def medians(functions: list[Callable[[], object]], repeats: int, turn_s: float = 0.05) -> list[float]:
    """Median seconds of each, measured in turn after one unmeasured run; a turn repeats what is short for 50 ms."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, own in zip(functions, times, strict=True):
            turn: list[float] = []
            while not turn or sum(turn) < turn_s:
                begin = time.perf_counter()
                function()
                turn.append(time.perf_counter() - begin)
            own.append(statistics.median(turn))
    return [statistics.median(own) for own in times]


def _batch(rows: int, width: int, teacher_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A student that has learnt part of its teacher: both project the same hidden vectors, with noise."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 64, generator=generator)
    teacher = hidden @ torch.randn(64, teacher_width, generator=generator)
    student = hidden @ torch.randn(64, width, generator=generator)
    return student + 2.0 * torch.randn(rows, width, generator=generator), teacher


def _step(loss: Loss, student: torch.Tensor, teacher: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        leaf = student.detach().requires_grad_()
        loss(leaf, teacher).backward()

    return run


def _in_new_process(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _peak_mib() -> float:
    """Peak resident memory of this process. The kernel's own record, because getrusage's counts the parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    raise OSError("this benchmark reads peak memory from /proc/self/status, which this system lacks")
