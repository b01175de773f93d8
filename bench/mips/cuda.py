"""Exact search on a CUDA device, for ``python -m bench mips --device cuda``: random unit vectors, no network.

Each search is compared with its limits, the bare bf16 product of all queries and rows and the bytes to read. It is also
compared with the usual method, bf16 products and ``topk`` chunk by chunk, which is not exact. Wrong results and errors,
such as out of memory, are recorded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.common.budget import Budget
from bench.common.profile import kernels
from bench.common.targets import Target, judged, print_judged
from jasper_fast.mips import FlatIPIndex

# queries, rows, width, k, dtypes of the index
SHAPES: list[tuple[int, int, int, int, tuple[str, ...]]] = [
    (8192, 65_536, 256, 16, ("bfloat16", "float32", "int8")),
    (4096, 1_000_000, 1024, 100, ("bfloat16", "float32", "int8")),
    (256, 1_000_000, 1024, 10, ("bfloat16", "int8")),
    (16, 1_000_000, 1024, 10, ("bfloat16", "int8")),
    (1, 1_000_000, 1024, 10, ("bfloat16", "float32", "int8")),
    (1, 1_000_000, 1024, 100, ("bfloat16",)),
]
CHUNK = 65_536  # rows of one product of the peers
SCRATCH = 1 << 30


def milliseconds(search: str) -> Callable[[dict[str, Any]], float]:
    """Return a function that reads the milliseconds of one kind of search from a case."""
    return lambda case: case["seconds"][search] * 1e3


TARGETS = {
    (4096, 1_000_000, 1024, 100): [
        Target("x the bare product's time", lambda case: case["times_bare_product"], 1.4, at_most=True),
        Target("x the speed of matmul + topk", lambda case: case["times_faster_than_matmul_topk"], 2.5),
    ],
    (8192, 65_536, 256, 16): [
        Target("ms certified", milliseconds("certified, bfloat16"), 1.3, at_most=True),
    ],
    (1, 1_000_000, 1024, 10): [
        Target("of the read bandwidth", lambda case: case["share_of_bandwidth"]["certified, bfloat16"], 0.8)
    ],
}


def measure(
    device: str,
    repeats: int,
    quick: bool = False,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Measure the seconds of every shape by every method, the ratios of the targets, and compare with the targets.

    Args:
        device: "cuda" or "cuda:1". "cpu" runs the same code without kernels.
        repeats: number of repetitions per median.
        quick: measure far smaller shapes without targets.
        keep: function that is called with all results so far after each shape.
        budget: limit after which no shape starts. None sets no limit.
    """
    budget = budget or Budget()
    shrink = 16 if quick else 1
    results: dict[str, Any] = {"device": device, "cases": []}
    results["read_gb_s"] = bandwidth(device, (1 << 30) // shrink**2, repeats)
    print(f"read bandwidth {results['read_gb_s']:,.0f} GB/s")
    for size, rows, width, k, dtypes in SHAPES:
        targets = () if quick else TARGETS.get((size, rows, width, k), ())
        size, rows, width = max(1, size // shrink**2), rows // shrink, width // shrink
        entry: dict[str, Any] = {"queries": size, "rows": rows, "width": width, "k": k}
        begin = time.perf_counter()
        try:
            if left_out := budget.spent():
                entry |= {"seconds": {}, "errors": {"all": left_out}, "share_of_bandwidth": {}}
            else:
                entry |= case(device, size, rows, width, k, dtypes, repeats, results["read_gb_s"])
        except Exception as error:  # The device failed. Keep the earlier results.
            entry |= {"seconds": {}, "errors": {"all": _description(error)}, "share_of_bandwidth": {}}
        entry["took_s"] = time.perf_counter() - begin
        entry["targets"] = judged(targets, entry)
        results["cases"].append(entry)
        keep(results)
        _print(entry)
    return results


def case(
    device: str, size: int, rows: int, width: int, k: int, dtypes: tuple[str, ...], repeats: int, gb_s: float
) -> dict[str, Any]:
    """Measure one shape: medians in seconds after a check of each index against fp64, and errors by method."""
    corpus, queries = unit(device, rows, width, 0), unit(device, size, width, 1)
    low, low_queries = corpus.bfloat16(), queries.bfloat16()
    scores = torch.empty(size, min(CHUNK, rows), dtype=torch.bfloat16, device=device)

    def bare() -> None:
        for chunk in low.split(CHUNK):
            torch.mm(low_queries, chunk.T, out=scores[:, : len(chunk)])

    def chunked() -> Tensor:
        parts = [(low_queries @ chunk.T).topk(min(k, len(chunk)), dim=1) for chunk in low.split(CHUNK)]
        ids = torch.cat([part.indices + n * CHUNK for n, part in enumerate(parts)], dim=1)
        return ids.gather(1, torch.cat([part.values for part in parts], dim=1).topk(k, dim=1).indices)

    seconds: dict[str, float] = {}
    fractions: dict[str, float] = {}
    errors: dict[str, str] = {}
    launched: dict[str, dict[str, Any]] = {}
    for name, function in (("bare bf16 product", bare), ("bf16 matmul + topk", chunked)):
        try:
            seconds[name] = timed(function, device, repeats)
        except Exception as error:  # A failed method does not affect the others.
            errors[name] = _description(error)
    for dtype in dtypes:
        name = dtype
        try:
            index = FlatIPIndex(width, dtype=dtype, device=device, scratch=SCRATCH)  # type: ignore[arg-type]
            index.add(corpus)
            verify(index, queries, k)
            for precision in ("certified", "fast"):
                name = f"{precision}, {dtype}"
                search = partial(index.search, queries, k, precision=precision)
                seconds[name], launched[name] = timed(search, device, repeats), kernels(search)
                each = {"bfloat16": 2, "float32": 2, "int8": 1}[dtype]  # A float32 index is scanned in bfloat16.
                fractions[name] = rows * width * each / seconds[name] / (gb_s * 1e9)
        except Exception as error:
            errors[name] = _description(error)
        index = None
    entry: dict[str, Any] = {"seconds": seconds, "errors": errors, "share_of_bandwidth": fractions}
    entry["kernels"] = launched
    ours = seconds.get(f"certified, {dtypes[0]}")
    if ours is not None:
        entry["teraflops"] = 2e-12 * size * rows * width / ours
        if "bare bf16 product" in seconds:
            entry["times_bare_product"] = ours / seconds["bare bf16 product"]
        if "bf16 matmul + topk" in seconds:
            entry["times_faster_than_matmul_topk"] = seconds["bf16 matmul + topk"] / ours
    return entry


def _description(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)


def timed(function: Callable[[], object], device: str, repeats: int) -> float:
    """Return median seconds after two calls that compile and warm up."""
    for _ in range(2):
        function()
    taken = []
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        function()
        _wait(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def verify(index: FlatIPIndex, queries: Tensor, k: int) -> None:
    """Raise unless the results of a few queries are in the fp64 order of the stored embeddings."""
    ids = index.search(queries, k)[1][:4]
    few = queries[:4].double()
    blocks = [
        few @ segment.values(start, start + CHUNK, torch.float64).T
        for _, segment in index.segments()
        for start in range(0, len(segment), CHUNK)
    ]
    true = torch.cat(blocks, dim=1)
    if not torch.allclose(true.gather(1, ids), true.topk(k, dim=1).values, rtol=0, atol=1e-12):
        raise AssertionError("the search is not exact")


def bandwidth(device: str, size: int, repeats: int) -> float:
    """Measure the GB/s of summing ``size`` float32 numbers."""
    values = torch.ones(size, device=device)
    return size * 4 / timed(values.sum, device, repeats) / 1e9


def unit(device: str, rows: int, width: int, seed: int) -> Tensor:
    """Return random unit vectors, (rows, width) float32."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(rows, width, device=device)
    for part in out.split(CHUNK):
        part.copy_(torch.nn.functional.normalize(torch.randn(part.shape, device=device, generator=generator), dim=1))
    return out


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _print(entry: dict[str, Any]) -> None:
    print(f"Q {entry['queries']:,}, N {entry['rows']:,}, D {entry['width']}, k {entry['k']}")
    for name, error in entry["errors"].items():
        print(f"  {name}: {error}")
    for name, seconds in entry["seconds"].items():
        fraction = entry["share_of_bandwidth"].get(name)
        print(f"  {name}: {seconds * 1e3:,.3f} ms" + (f", {100 * fraction:.0f} % of bandwidth" if fraction else ""))
    if {"times_bare_product", "times_faster_than_matmul_topk"} <= set(entry):
        print(
            f"  certified: {entry['times_bare_product']:.2f} x the bare product's time, "
            f"{entry['times_faster_than_matmul_topk']:.2f} x as fast as matmul + topk, "
            f"{entry['teraflops']:.0f} TFLOP/s"
        )
    print_judged(entry["targets"])
