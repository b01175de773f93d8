"""Exact search on a CUDA device, for ``python -m bench mips --device cuda``: random unit vectors, no network.

Beside each search stand what bounds it, the bare bf16 product of all queries and rows and the bytes that must be read,
and the obvious way, bf16 products and ``topk`` chunk by chunk, which is not exact. What is wrong or cannot be run, out
of memory for one, is written down as such.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench._budget import Budget
from bench._kernels import kernels
from bench._targets import Target, judged, print_judged
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
    """Of one kind of search."""
    return lambda case: case["seconds"][search] * 1e3


TARGETS = {
    (4096, 1_000_000, 1024, 100): [
        Target("x the bare product's time", lambda case: case["times_bare_product"], 1.6, at_most=True),
        Target("x the speed of matmul + topk", lambda case: case["times_faster_than_matmul_topk"], 2.5),
    ],
    (8192, 65_536, 256, 16): [
        Target("ms certified", milliseconds("certified, bfloat16"), 1.5, at_most=True),
        Target("ms fast", milliseconds("fast, bfloat16"), 1.0, at_most=True),
    ],
    (1, 1_000_000, 1024, 10): [
        Target("of the read bandwidth", lambda case: case["share_of_bandwidth"]["certified, bfloat16"], 0.8)
    ],
}


def measure(
    device: str,
    repeats: int,
    quick: bool = False,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Seconds of every shape by every method, the ratios that the targets are about, and whether they are met.

    Args:
        device: "cuda", or "cuda:1"; "cpu" runs the same, without kernels.
        repeats: of which the median is taken.
        quick: far smaller shapes, of which no target speaks.
        keep: called with all that was found so far, after each shape.
        budget: shapes that would begin after it are left out.
    """
    budget = budget or Budget()
    shrink = 16 if quick else 1
    found: dict[str, Any] = {"device": device, "cases": []}
    found["read_gb_s"] = bandwidth(device, (1 << 30) // shrink**2, repeats)
    print(f"read bandwidth {found['read_gb_s']:,.0f} GB/s")
    for size, rows, width, k, dtypes in SHAPES:
        targets = () if quick else TARGETS.get((size, rows, width, k), ())
        size, rows, width = max(1, size // shrink**2), rows // shrink, width // shrink
        entry: dict[str, Any] = {"queries": size, "rows": rows, "width": width, "k": k}
        begin = time.perf_counter()
        try:
            if left_out := budget.spent():
                entry |= {"seconds": {}, "errors": {"all": left_out}, "share_of_bandwidth": {}}
            else:
                entry |= case(device, size, rows, width, k, dtypes, repeats, found["read_gb_s"])
        except Exception as error:  # a device that failed: what was found before it is kept
            entry |= {"seconds": {}, "errors": {"all": _told(error)}, "share_of_bandwidth": {}}
        entry["took_s"] = time.perf_counter() - begin
        entry["targets"] = judged(targets, entry)
        found["cases"].append(entry)
        keep(found)
        _print(entry)
    return found


def case(
    device: str, size: int, rows: int, width: int, k: int, dtypes: tuple[str, ...], repeats: int, gb_s: float
) -> dict[str, Any]:
    """One shape: medians in seconds, each index checked against fp64 first; errors by method."""
    corpus, queries = unit(device, rows, width, 0), unit(device, size, width, 1)
    low, asked = corpus.bfloat16(), queries.bfloat16()
    scores = torch.empty(size, min(CHUNK, rows), dtype=torch.bfloat16, device=device)

    def bare() -> None:
        for chunk in low.split(CHUNK):
            torch.mm(asked, chunk.T, out=scores[:, : len(chunk)])

    def chunked() -> Tensor:
        parts = [(asked @ chunk.T).topk(min(k, len(chunk)), dim=1) for chunk in low.split(CHUNK)]
        ids = torch.cat([part.indices + n * CHUNK for n, part in enumerate(parts)], dim=1)
        return ids.gather(1, torch.cat([part.values for part in parts], dim=1).topk(k, dim=1).indices)

    seconds: dict[str, float] = {}
    shares: dict[str, float] = {}
    errors: dict[str, str] = {}
    launched: dict[str, dict[str, Any]] = {}
    for name, function in (("bare bf16 product", bare), ("bf16 matmul + topk", chunked)):
        try:
            seconds[name] = timed(function, device, repeats)
        except Exception as error:  # one method's failure takes nothing from the others
            errors[name] = _told(error)
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
                each = {"bfloat16": 2, "float32": 2, "int8": 1}[dtype]  # a float32 index is scanned in bfloat16
                shares[name] = rows * width * each / seconds[name] / (gb_s * 1e9)
        except Exception as error:
            errors[name] = _told(error)
        index = None
    found: dict[str, Any] = {"seconds": seconds, "errors": errors, "share_of_bandwidth": shares}
    found["kernels"] = launched
    ours = seconds.get(f"certified, {dtypes[0]}")
    if ours is not None:
        found["teraflops"] = 2e-12 * size * rows * width / ours
        if "bare bf16 product" in seconds:
            found["times_bare_product"] = ours / seconds["bare bf16 product"]
        if "bf16 matmul + topk" in seconds:
            found["times_faster_than_matmul_topk"] = seconds["bf16 matmul + topk"] / ours
    return found


def _told(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)


def timed(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds after two calls that compile and warm up."""
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
    """Raises where a few queries' results are not in the fp64 order of the stored vectors."""
    ids = index.search(queries, k)[1][:4]
    asked = queries[:4].double()
    blocks = [
        asked @ piece.values(start, start + CHUNK, torch.float64).T
        for _, piece in index.pieces()
        for start in range(0, len(piece), CHUNK)
    ]
    true = torch.cat(blocks, dim=1)
    if not torch.allclose(true.gather(1, ids), true.topk(k, dim=1).values, rtol=0, atol=1e-12):
        raise AssertionError("the search is not exact")


def bandwidth(device: str, size: int, repeats: int) -> float:
    """GB/s of summing ``size`` float32 numbers."""
    values = torch.ones(size, device=device)
    return size * 4 / timed(values.sum, device, repeats) / 1e9


def unit(device: str, rows: int, width: int, seed: int) -> Tensor:
    """Random unit vectors, (rows, width) float32."""
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
        share = entry["share_of_bandwidth"].get(name)
        print(f"  {name}: {seconds * 1e3:,.3f} ms" + (f", {100 * share:.0f} % of bandwidth" if share else ""))
    if {"times_bare_product", "times_faster_than_matmul_topk"} <= set(entry):
        print(
            f"  certified: {entry['times_bare_product']:.2f} x the bare product's time, "
            f"{entry['times_faster_than_matmul_topk']:.2f} x as fast as matmul + topk, "
            f"{entry['teraflops']:.0f} TFLOP/s"
        )
    print_judged(entry["targets"])
