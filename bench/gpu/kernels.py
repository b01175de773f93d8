"""Kernels next to their alternatives: ``python -m bench gpu-kernels``, a section of the acceptance run, about a minute.

A kernel is compared with float64, and then timed next to eager PyTorch, ``torch.compile`` and, where it multiplies, the
bare products of cuBLAS. Each time is next to that of `bench.gpu.model`. The constants of the model are measured first.
Kernels that are only parts of a loss or a search are timed in these: `bench.common.profile` lists them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import energy
from bench.common.budget import Budget
from bench.common.environment import environment
from bench.gpu import model
from bench.losses import ranking
from bench.mips.cuda import timed
from jasper_fast.utils.atomic import write_atomic

OUT = Path("bench/results/kernels-cuda.json")
ALLOWED = 2e-2  # relative error of any method against float64; eager bfloat16 is coarse
LAUNCHED = 1000
SHRINK = 64  # of the sizes, for a quick run
ENERGY_S = 0.2  # duration of repeated calls whose energy is counted
Call = Callable[[], Any]


class Case(NamedTuple):
    """A kernel with its alternatives.

    Args:
        predicted_s: seconds of ours by the model.
        methods: calls by name. ``jasper_fast`` is ours, and ``cuBLAS`` has only the products.
        truth: call in float64, or None for a case without a result to compare.
        compiled: name of the method that ``torch.compile`` takes, or None.
    """

    predicted_s: float
    methods: dict[str, Call]
    truth: Call | None = None
    compiled: str | None = None


def main(argv: list[str]) -> int:
    """Measure the constants and all cases, and write JSON after each."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu-kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to write (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="median of this many on a CPU (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="leave out cases that would start later")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is in use (python -m jasper_fast.env gives the reason). Fix: --device cpu")
    budget, results = Budget(options.budget), {"environment": environment(), "constants": {}, "cases": {}}
    shrink = SHRINK if options.quick else 1
    for part, cases in (("constants", constants), ("cases", kernels)):
        for name, make in cases(options.device, shrink):
            begin = time.perf_counter()
            try:
                left_out = budget.spent()
                found = {"error": left_out} if left_out else _case(make(), options.device, options.repeats)
            except Exception as error:  # the other cases are still measured
                found = {"error": repr(error)}
            results[part][name] = found | {"took_s": time.perf_counter() - begin}
            write_atomic(options.out, json.dumps(results, indent=1) + "\n")
            _print(name, found)
    print(f"written to {options.out}")
    return 0


def _case(case: Case, device: str, repeats: int) -> dict[str, Any]:
    wanted = None if case.truth is None else _flat(case.truth()).double()
    methods = dict(case.methods)
    if case.compiled and device == "cuda":
        methods["torch.compile"] = torch.compile(methods[case.compiled])
    return {
        "predicted_s": case.predicted_s,
        "methods": {name: _method(name, call, wanted, device, repeats) for name, call in methods.items()},
    }


def _method(name: str, call: Call, wanted: Tensor | None, device: str, repeats: int) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = {}
        if wanted is not None and name != "cuBLAS":
            figures["error_to_float64"] = float((_flat(call()).double() - wanted).norm() / wanted.norm())
            if not figures["error_to_float64"] <= ALLOWED:
                raise AssertionError(f"relative error {figures['error_to_float64']:.1e}, allowed {ALLOWED:.0e}")
        if device == "cpu":
            return figures | {"seconds": timed(call, device, repeats)}
        from triton.testing import do_bench

        call()
        figures["seconds"] = do_bench(call, warmup=25, rep=100, return_mode="median") / 1e3
        if counter := energy.of_current_device():
            count = math.ceil(ENERGY_S / figures["seconds"])
            torch.cuda.synchronize()
            before = counter()
            for _ in range(count):
                call()
            torch.cuda.synchronize()
            figures["energy_j"] = (counter() - before) / count
        return figures
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # the other methods are still measured
        return {"error": repr(error)}


def _flat(result: Any) -> Tensor:
    """Return all numbers of a result, (n,)."""
    return result.flatten() if isinstance(result, Tensor) else torch.cat([part.flatten().double() for part in result])


Named = Iterator[tuple[str, Callable[[], Case]]]


def constants(device: str, shrink: int) -> Named:
    """Yield the cases that measure the constants of the model."""

    def product(m: int, n: int, k: int, dtype: torch.dtype, predicted: float) -> Case:
        m, n, k = m // shrink, n // shrink, max(16, k // shrink)
        a, b = _random(device, (m, k), dtype), _random(device, (n, k), dtype)
        out = torch.empty(m, n, dtype=dtype, device=device)
        return Case(predicted, {"cuBLAS": lambda: torch.mm(a, b.T, out=out)})

    def total(size: int, rate: float) -> Case:
        values = torch.ones(size // 4 // shrink, device=device)
        return Case(size / rate, {"torch": values.sum})

    def launch() -> Case:
        one = torch.ones(1, device=device)

        def many() -> None:
            for _ in range(LAUNCHED):
                one.add_(1)

        return Case(LAUNCHED * model.LAUNCH, {"torch": many})

    makers: dict[str, Callable[[], Case]] = {}
    for m, n, k in ((8192, 8192, 8192), (4096, 65536, 1024)):
        makers[f"bf16 product, {m} x {n} x {k}"] = lambda m=m, n=n, k=k: product(
            m, n, k, torch.bfloat16, model.bf16(m, n, k)
        )
    makers["float32 product, 8192 x 8192 x 1024"] = lambda: product(
        8192, 8192, 1024, torch.float32, model.float32(8192, 8192, 1024)
    )
    makers["sum of 4 GB"] = lambda: total(4 << 30, model.MEMORY)
    makers["sum of 16 MB"] = lambda: total(16 << 20, model.L2)
    makers[f"{LAUNCHED:,} launches"] = launch
    yield from makers.items()


def kernels(device: str, shrink: int) -> Named:
    """Yield the cases of kernels."""
    yield "row normalization, backward", lambda: _normalization(device, 8192 // shrink, 12288 // shrink)
    yield "scores of all pairs", lambda: _pairs(device, 8192 // shrink, max(16, 1024 // shrink))
    yield "fp64 products of pairs", lambda: _products(device, 4096 // shrink, 262144 // shrink, 1024 // shrink, 100)
    for loss in ("info_nce", "listwise"):
        shape = 4096 // shrink, 16384 // shrink, 1024 // shrink, 32
        yield f"{loss} loss", lambda loss=loss, shape=shape: _ranking(device, loss, shape)


def _normalization(device: str, rows: int, width: int) -> Case:
    from jasper_fast.kernels.rows import l2_normalize_backward, reciprocal_norms

    x, gradient = _random(device, (rows, width), torch.bfloat16), _random(device, (rows, width), torch.float32)
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=device)

    def ours() -> Tensor:
        l2_normalize_backward(gradient, x, reciprocal_norms(x), 1.0, out)
        return out

    def plain(x: Tensor = x) -> Tensor:
        x, g = (
            x.to(torch.promote_types(x.dtype, torch.float32)),
            gradient.to(torch.promote_types(x.dtype, torch.float32)),
        )
        norm = x.norm(dim=1, keepdim=True)
        unit = x / norm
        return (g - unit * (unit * g).sum(dim=1, keepdim=True)) / norm

    moved = rows * width * (2 + 2 + 4 + 2)
    return Case(moved / model.MEMORY, {"jasper_fast": ours, "eager": plain}, lambda: plain(x.double()), "eager")


def _pairs(device: str, rows: int, width: int) -> Case:
    from jasper_fast.kernels.pairs import pair_scores

    unit = _random(device, (rows, width), torch.float32)
    upper = torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1)
    methods = {
        "jasper_fast": lambda: pair_scores(unit),
        "eager": lambda: (unit @ unit.T)[upper],
        "cuBLAS": lambda: unit @ unit.T,
    }
    return Case(model.float32(rows, rows, width) / 2, methods, lambda: (unit.double() @ unit.double().T)[upper])


def _products(device: str, size: int, rows: int, width: int, each: int) -> Case:
    from jasper_fast.kernels.mips_rescore import rescore

    queries, corpus = _random(device, (size, width), torch.float64), _random(device, (rows, width), torch.bfloat16)
    query = torch.arange(size, device=device).repeat_interleave(each)
    row = torch.randint(rows, (len(query),), device=device)

    def plain() -> Tensor:
        parts = zip(query.split(1 << 16), row.split(1 << 16), strict=True)
        return torch.cat([(corpus[r].double() * queries[q]).sum(dim=1) for q, r in parts])

    moved = len(query) * width * 2
    methods = {"jasper_fast": lambda: rescore(queries, corpus, None, query, row), "eager": plain}
    return Case(moved / model.MEMORY, methods, plain)


def _ranking(device: str, loss: str, shape: tuple[int, int, int, int]) -> Case:
    size, documents, width, k = shape
    batch = ranking.Batch(*(part.to(device) for part in ranking.random_batch(shape)))
    low = ranking.Batch(*(part.bfloat16() if part.is_floating_point() else part for part in batch))
    low = low._replace(scores=batch.scores)
    double = ranking.Batch(*(part.double() if part.is_floating_point() else part for part in low))
    predicted = 3 * size * k * width * 2 / model.MEMORY + 20 * model.LAUNCH
    methods: dict[str, Call] = {
        "jasper_fast": lambda: ranking.step(ranking.OURS[loss], low),
        "eager": lambda: ranking.step(ranking.PLAIN[loss], low),
    }
    if loss == "info_nce":  # two passes over cosines of both, and two gradients
        predicted = 6 * model.bf16(size, documents, width)
        left, right = low.queries, low.documents

        def bare() -> None:
            for _ in range(6):
                left @ right.T

        methods["cuBLAS"] = bare
    return Case(predicted, methods, lambda: ranking.step(ranking.PLAIN[loss], double), "eager")


def _random(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def _print(name: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"{name}: {found['error']}")
        return
    for method, own in found["methods"].items():
        figure = own.get("error") or f"{own['seconds'] * 1e3:,.4g} ms"
        print(f"{name}, {method}: {figure} (ours predicted {found['predicted_s'] * 1e3:,.4g} ms)")
