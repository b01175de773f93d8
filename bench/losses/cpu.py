"""``python -m bench losses``: time the losses on a CPU against the published formulation and plain PyTorch.

Times are medians. Compared methods are measured alternately, so a busy machine slows both sides alike. Every loss and
its gradient are compared with float64 before they are timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common.budget import Budget
from bench.common.check import Method, check, known
from bench.common.environment import environment
from bench.common.measure import in_new_process, medians, peak_mib
from bench.common.targets import Target, judged, print_judged
from jasper_fast.losses import reference, relative_similarity_loss, similarity_loss
from jasper_fast.utils.atomic import write_atomic

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NEAR = 1e-3  # accepted relative error against float64


def similarity_targets(speed: float, memory: float) -> list[Target]:
    """Return targets for the automatically chosen form, against plain PyTorch."""

    def ratio(name: str, case: dict[str, Any]) -> float:
        return case["methods"]["auto"][name] / case["methods"]["reference"][name]

    return [
        Target("x the speed of plain PyTorch", lambda case: 1.0 / ratio("seconds", case), speed),
        Target("of plain PyTorch's extra memory", lambda case: ratio("peak_mib", case), memory, at_most=True),
    ]


TARGETS: dict[tuple[str | int, ...], list[Target]] = {
    ("published", 128): [Target("x the published formulation's speed", lambda case: case["ratio"], 1500.0)],
    ("gram_products", 1024, 384): [Target("Gram products", lambda case: case["products"], 25.0, at_most=True)],
    ("pairs_per_second", 2048, 384): [
        Target("M pairs/s", lambda case: case["rows"] * (case["rows"] - 1) / 2e6 / case["all_threads_s"], 8.0),
        Target("x from all threads", lambda case: case["speed_up"], 1.6),
    ],
    ("similarity", 2048, 1024, 1024): similarity_targets(1.5, 1 / 3),
    ("similarity", 16384, 256, 384): similarity_targets(20.0, 1 / 50),
}


def main(argv: list[str]) -> int:
    """Measure all cases, print ratios first, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench losses", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON to write (default: bench/results/losses-DEVICE.json)")
    parser.add_argument("--repeats", type=int, default=7, help="median of this many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="leave out cases that take gigabytes or many seconds")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="on a GPU: leave out cases that would start later"
    )
    options = parser.parse_args(argv)
    options.out = options.out or Path(f"bench/results/losses-{options.device}.json")
    if options.device == "cuda":
        return on_cuda(options.out, options.repeats, options.quick, options.budget)
    threads = torch.get_num_threads()
    results: dict[str, Any] = {"environment": environment(), "published": [], "similarity": []}
    for rows in (64,) if options.quick else (64, 128):
        results["published"].append(attempt(published, (rows,), options.repeats))
        _write(options.out, results)
    results["gram_products"] = attempt(gram_products, (1024, 384), options.repeats)
    _write(options.out, results)
    pairs = (512 if options.quick else 2048, 384)
    results["pairs_per_second"] = attempt(pairs_per_second, pairs, threads, options.repeats)
    _write(options.out, results)
    for shape in [(512, 64, 64)] if options.quick else [(2048, 1024, 1024), (16384, 256, 384)]:
        results["similarity"].append(attempt(similarity, shape, threads, options.repeats))
        _write(options.out, results)
    print(f"written to {options.out}")
    return 0


def attempt(measure: Callable[..., dict[str, Any]], shape: tuple[int, ...], *options: int) -> dict[str, Any]:
    """Measure one shape. Return its figures and targets, or the error."""
    try:
        figures = measure(*shape, *options)
    except Exception as error:  # the other shapes are still measured
        print(f"{measure.__name__}, {' x '.join(map(str, shape))}: {error!r}")
        return {"shape": shape, "error": repr(error)}
    targets = judged(TARGETS.get((measure.__name__, *shape), ()), figures)
    print_judged(targets)
    return {**figures, "targets": targets}


def _write(out: Path, results: dict[str, Any]) -> None:
    """Write the results. This is called after each shape, because all shapes take minutes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(results, indent=2) + "\n")


def on_cuda(out: Path, repeats: int, quick: bool, budget: float | None = None) -> int:
    """Run the GPU cases, which need torch, Triton and a device."""
    from bench.losses import cuda as _losses_cuda

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is in use (python -m jasper_fast.env gives the reason). Fix: --device cpu")
    about = {"environment": environment()}
    _losses_cuda.measure("cuda", repeats, quick, lambda cases: _write(out, about | cases), Budget(budget))
    print(f"written to {out}")
    return 0


def published(rows: int, repeats: int) -> dict[str, float]:
    """Time relative similarity, forward and backward, against the published sum over pairs of pairs."""
    student, teacher = _batch(rows, 384, 384)
    _check_all([relative_similarity_loss, reference.relative_similarity_loss], student, teacher)
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
    """Time relative similarity, forward and backward, in units of a float32 product S S' of the same batch."""
    student, teacher = _batch(rows, width, width)
    _check_all([relative_similarity_loss], student, teacher)
    ours, gram = medians([_step(relative_similarity_loss, student, teacher), lambda: student @ student.T], repeats)
    print(
        f"relative similarity, B = {rows}: {ours / gram:.1f} Gram products ({ours * 1e3:.0f} ms, one {gram * 1e3:.1f})"
    )
    return {"rows": rows, "width": width, "products": ours / gram, "ours_s": ours, "gram_s": gram}


def pairs_per_second(rows: int, width: int, threads: int, repeats: int) -> dict[str, float]:
    """Time relative similarity, forward and backward, on one thread and on all."""
    student, teacher = _batch(rows, width, width)
    _check_all([relative_similarity_loss], student, teacher)
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
    """Time both forms and plain PyTorch, forward and backward, in separate processes for their peak memory."""
    repeats = repeats if rows <= 4096 else 1
    # The feature form is first, as the reference: it is exact enough in float64, and by far the cheaper one.
    _check_all(
        [partial(similarity_loss, method=m) for m in ("feature", "tile", "auto")], *_batch(rows, width, teacher_width)
    )
    figures = {
        method: in_new_process(_measure_similarity, method, rows, width, teacher_width, threads, repeats)
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
    _step(similarity_loss, *_batch(8, 8, 8))()  # memory of torch itself
    student, teacher = _batch(rows, width, teacher_width)
    before = peak_mib()

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return similarity_loss(s, t, method=method)

    (seconds,) = medians([_step(loss, student, teacher)], repeats)
    return {"seconds": seconds, "peak_mib": peak_mib() - before}


def _batch(rows: int, width: int, teacher_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return student and teacher embeddings that project the same hidden vectors, the student with noise."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 64, generator=generator)
    teacher = hidden @ torch.randn(64, teacher_width, generator=generator)
    student = hidden @ torch.randn(64, width, generator=generator)
    return student + 2.0 * torch.randn(rows, width, generator=generator), teacher


def _check_all(losses: list[Loss], student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Check every loss against the first one in float64.

    Raises:
        AssertionError: a loss or a gradient differs.
    """

    def of_heads(loss: Loss) -> Method:
        return lambda heads, target: loss(heads[0], target)

    wanted = known(of_heads(losses[0]), [student], teacher)
    for loss in losses:
        check(of_heads(loss), [student], teacher, wanted, NEAR)


def _step(loss: Loss, student: torch.Tensor, teacher: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        leaf = student.detach().requires_grad_()
        loss(leaf, teacher).backward()

    return run
