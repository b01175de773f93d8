"""Exact search on a CUDA device, for ``python -m bench mips --device cuda``: random unit vectors, no network.

Beside each search stand what bounds it, the bare bf16 product of all queries and rows and the bytes that must be read,
and the obvious way, bf16 products and ``topk`` chunk by chunk, which is not exact.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
TARGETS = {
    (4096, 1_000_000, 1024, 100): "at most 1.6 x the bare product's time, at least 2.5 x as fast as matmul + topk",
    (8192, 65_536, 256, 16): "at most 1.5 ms certified, 1.0 ms fast",
    (1, 1_000_000, 1024, 10): "at least 80 % of the read bandwidth",
}


def measure(device: str, repeats: int, quick: bool = False) -> dict[str, Any]:
    """Seconds of every shape by every method, and the ratios that the targets are about."""
    shrink = 16 if quick else 1
    found: dict[str, Any] = {"device": device, "cases": []}
    found["read_gb_s"] = bandwidth(device, (1 << 30) // shrink**2, repeats)
    print(f"read bandwidth {found['read_gb_s']:,.0f} GB/s")
    for size, rows, width, k, dtypes in SHAPES:
        target = TARGETS.get((size, rows, width, k)) if not quick else None
        size, rows, width = max(1, size // shrink**2), rows // shrink, width // shrink
        try:
            figures = case(device, size, rows, width, k, dtypes, repeats, found["read_gb_s"])
        except torch.OutOfMemoryError:
            figures = {"out_of_memory": True}
        entry = {"queries": size, "rows": rows, "width": width, "k": k, "target": target, **figures}
        found["cases"].append(entry)
        _print(entry)
    return found


def case(
    device: str, size: int, rows: int, width: int, k: int, dtypes: tuple[str, ...], repeats: int, gb_s: float
) -> dict[str, Any]:
    """One shape: medians in seconds, each index checked against fp64 first."""
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

    seconds = {"bare bf16 product": timed(bare, device, repeats), "bf16 matmul + topk": timed(chunked, device, repeats)}
    shares: dict[str, float] = {}
    for dtype in dtypes:
        index = FlatIPIndex(width, dtype=dtype, device=device, scratch=SCRATCH)  # type: ignore[arg-type]
        index.add(corpus)
        verify(index, queries, k)
        for precision in ("certified", "fast"):
            name = f"{precision}, {dtype}"
            seconds[name] = timed(partial(index.search, queries, k, precision=precision), device, repeats)
            each = {"bfloat16": 2, "float32": 2, "int8": 1}[dtype]  # a float32 index is scanned in bfloat16
            shares[name] = rows * width * each / seconds[name] / (gb_s * 1e9)
        del index
    ours = seconds[f"certified, {dtypes[0]}"]
    return {
        "seconds": seconds,
        "times_bare_product": ours / seconds["bare bf16 product"],
        "times_faster_than_matmul_topk": seconds["bf16 matmul + topk"] / ours,
        "share_of_bandwidth": shares,
        "teraflops": 2e-12 * size * rows * width / ours,
    }


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
    if "out_of_memory" in entry:
        print("  out of memory")
        return
    for name, seconds in entry["seconds"].items():
        share = entry["share_of_bandwidth"].get(name)
        print(f"  {name}: {seconds * 1e3:,.3f} ms" + (f", {100 * share:.0f} % of bandwidth" if share else ""))
    print(
        f"  certified: {entry['times_bare_product']:.2f} x the bare product's time, "
        f"{entry['times_faster_than_matmul_topk']:.2f} x as fast as matmul + topk, {entry['teraflops']:.0f} TFLOP/s"
    )
    if entry["target"]:
        print(f"  target: {entry['target']}")
