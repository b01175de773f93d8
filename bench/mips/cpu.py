"""``python -m bench mips``: exact search on a CPU compared with FAISS, PyTorch, NumPy and USearch in one run.

``--device cuda`` measures the GPU kernels, compared with the bare product and chunked products with ``topk``.

Figures are medians of measurements taken in turn, so a busy machine slows all sides alike. A single query is one of 16
that take turns. Every result is first compared with the fp64 order. FAISS is measured twice: its flat index, and
`IndexFlatIPPanorama` after a rotation to principal axes.

The default embeddings are unit vectors in clusters with the spread of real sentence embeddings, and one corpus of
near-ties. ``--vectors FILE.npy`` measures on other embeddings. ``--rows N`` extends them with mixtures of two of them.
``OMP_NUM_THREADS=1 python -m bench mips`` measures all sides with one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common.budget import Budget
from bench.common.environment import environment
from bench.common.measure import in_new_process, medians, peak_mib
from jasper_fast.mips import FlatIPIndex
from jasper_fast.mips.cpu import TILE_ROWS, multiply_in_bf16
from jasper_fast.utils.atomic import write_atomic

# rows, width, queries, ks, dtypes of our index
SHAPES: list[tuple[int, int, int, tuple[int, ...], tuple[str, ...]]] = [
    (200_000, 384, 1, (1, 10, 100, 1000), ("float32", "bfloat16", "int8")),
    (200_000, 384, 16, (1, 10, 100, 1000), ("float32", "bfloat16")),
    (200_000, 384, 256, (1, 10, 100, 1000), ("float32", "bfloat16")),
    (200_000, 384, 1024, (1, 10, 100, 1000), ("float32",)),
    (200_000, 64, 1, (10,), ("float32",)),
    (200_000, 64, 256, (10,), ("float32",)),
    (50_000, 1024, 1, (1, 10, 100, 1000), ("float32",)),
    (50_000, 1024, 16, (1, 10, 100, 1000), ("float32",)),
    (50_000, 1024, 256, (1, 10, 100, 1000), ("float32",)),
    (50_000, 1024, 1024, (1, 10, 100, 1000), ("float32",)),
    (20_000, 384, 4096, (10, 1000), ("float32",)),
]
TURNS = 16  # single queries that take turns
MAX_PANORAMA_QUERIES = 16  # With more, it takes several times as long as the other peers.
IDENTITY = ("vectors", "rows", "width", "queries", "k", "threads")
QUICK = [(20_000, 64, 1, (1, 10), ("float32", "bfloat16", "int8")), (20_000, 64, 64, (10,), ("float32",))]


def main(argv: list[str]) -> int:
    """Measure, print ratios first, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench mips", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON to write (default: bench/results/mips-DEVICE.json)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the GPU kernels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions per median (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="measure small shapes only")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="on a GPU: skip cases that would start later")
    parser.add_argument("--queries", type=int, nargs="+", metavar="N", help="numbers of queries to measure")
    parser.add_argument(
        "--memory", action="store_true", help="measure only the extra memory of a search of 1,000,000 x 1024 bf16"
    )
    parser.add_argument(
        "--filters", action="store_true", help="measure only searches of few rows, of --vectors or others"
    )
    parser.add_argument(
        "--signs", action="store_true", help="measure only the rows that a bound from sign codes leaves"
    )
    parser.add_argument("--rows", type=int, help="number of rows with --vectors (default: those of the file)")
    parser.add_argument("--ks", type=int, nargs="+", metavar="K", help="values of k to measure")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="dtypes of our index to measure")
    parser.add_argument(
        "--vectors", type=Path, metavar="FILE.npy", help="(N, D) float32 embeddings; the last 1024 are the queries"
    )
    options = parser.parse_args(argv)
    if options.out is None:
        options.out = Path(f"bench/results/mips-{options.device.partition(':')[0]}.json")
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    results |= {"environment": environment(), "threads": torch.get_num_threads()}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        write_atomic(options.out, json.dumps(results, indent=1) + "\n")

    if options.device != "cpu":
        from bench.mips import cuda as _mips_cuda

        def keep_search(measured: dict[str, Any]) -> None:
            results["search"] = measured
            keep()

        _mips_cuda.measure(options.device, options.repeats, options.quick, keep_search, Budget(options.budget))
        print(f"wrote {options.out}")
        return 0
    if options.memory:
        results["memory"] = memory(20_000 if options.quick else 1_000_000, 1024, 64)
        keep()
        return 0
    if options.filters or options.signs:
        from bench.mips import filters as _filters
        from bench.mips import signs as _signs

        given = torch.from_numpy(np.load(options.vectors)) if options.vectors else clustered(101_024, 384, 0)
        rows, queries = extended(given[:-1024].contiguous(), options.rows), given[-1024:].contiguous()
        if options.filters:
            results["filters"] = _filters.measure(rows, queries, options.repeats)
        if options.signs:
            results["signs"] = _signs.measure(rows, queries)
        keep()
        return 0
    bandwidth = results["read_gb_s"] = read_bandwidth()
    print(f"read bandwidth {bandwidth:.1f} GB/s on {results['threads']} threads")
    for entry in _cases(options, bandwidth):
        older = [old for old in results.get("search", []) if any(old.get(key) != entry[key] for key in IDENTITY)]
        results["search"] = sorted([*older, entry], key=lambda case: [case.get(key, 0) for key in IDENTITY])
        keep()  # after each case, because all of them take minutes
    if not options.vectors:
        results["near_ties"] = near_ties(2_000 if options.quick else 20_000, 384, 64)
        keep()
    print(f"wrote {options.out}")
    return 0


def _cases(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    corpus = torch.empty(0, 0)
    given = torch.from_numpy(np.load(options.vectors)) if options.vectors else None
    sides: Sides | None = None
    for rows, width, size, ks, dtypes in QUICK if options.quick else SHAPES:
        if options.queries and size not in options.queries:
            continue
        dtypes = tuple(dtype for dtype in dtypes if not options.dtypes or dtype in options.dtypes)
        if given is not None:
            if width != given.shape[1]:
                continue
            if not len(corpus):
                corpus = extended(given[:-1024].contiguous(), options.rows)
            queries = given[-1024:]
        else:
            if tuple(corpus.shape) != (rows, width):
                corpus = clustered(rows, width, 0)
            queries = clustered(max(size, TURNS), width, 1)
        queries = queries[: TURNS if size == 1 else size].contiguous()
        if sides is None or sides.corpus is not corpus or not set(dtypes) <= set(sides.indexes):
            sides = Sides(corpus, dtypes)
        for k in ks:
            if options.ks and k not in options.ks:
                continue
            entry = case(sides, queries, size, k, dtypes, options.repeats, bandwidth)
            name = options.vectors.stem if options.vectors else "clustered"
            yield {"vectors": name, "threads": torch.get_num_threads(), **entry}


Search = Callable[[Tensor, int], Any]


class Sides:
    """Our indexes and the peers over one corpus, built once, with the seconds that building took.

    Args:
        corpus: (N, D) float32 rows.
        dtypes: dtypes of our indexes.
    """

    def __init__(self, corpus: Tensor, dtypes: tuple[str, ...]) -> None:
        self.corpus = corpus
        self.build_s: dict[str, float] = {}
        self.indexes: dict[str, FlatIPIndex] = {}
        self.peers: dict[str, Search] = {}
        for dtype in dtypes:
            self.indexes[dtype] = self._timed(f"ours, {dtype}", lambda dtype=dtype: self._ours(dtype))  # type: ignore[misc]
        self._add_peers()
        print("build: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.build_s.items()))

    def bytes_per_row(self, dtype: str) -> float:
        """Return the bytes of our index per row, codes and bounds included."""
        return sum(segment.nbytes() for _, segment in self.indexes[dtype].segments()) / len(self.corpus)

    def _ours(self, dtype: str) -> FlatIPIndex:
        index = FlatIPIndex(self.corpus.shape[1], dtype=dtype)  # type: ignore[arg-type]
        index.add(self.corpus)
        return index

    def _timed(self, name: str, build: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        built = build()
        self.build_s[name] = time.perf_counter() - begin
        return built

    def _add_peers(self) -> None:
        corpus, rows = self.corpus, self.corpus.numpy()
        self.peers["torch"] = lambda queries, k: (queries @ corpus.T).topk(k, dim=1)
        self.peers["NumPy"] = lambda queries, k: with_numpy(queries.numpy(), rows, k)
        if find_spec("usearch"):
            from usearch.index import search as usearch

            options = {"metric": "ip", "exact": True, "threads": torch.get_num_threads()}
            self.peers["USearch"] = lambda queries, k: usearch(rows, queries.numpy(), k, **options)
        if find_spec("faiss"):
            import faiss

            faiss.omp_set_num_threads(torch.get_num_threads())
            flat = self._timed("FAISS", lambda: _filled(faiss.IndexFlatIP(corpus.shape[1]), rows))
            self.peers["FAISS"] = lambda queries, k: flat.search(queries.numpy(), k)
            if hasattr(faiss, "IndexFlatIPPanorama"):
                panorama = self._timed("FAISS Panorama", lambda: _panorama(faiss, rows))
                self.peers["FAISS Panorama"] = lambda queries, k: panorama.search(queries.numpy(), k)

    def of(self, size: int) -> dict[str, Search]:
        """Return the searches to time for a number of queries. With more, some peers take seconds."""
        left_out = {"NumPy", "USearch", "FAISS Panorama"} if size > MAX_PANORAMA_QUERIES else set()
        return {name: search for name, search in self.peers.items() if name not in left_out}


def _filled(index: Any, rows: np.ndarray) -> Any:
    index.add(rows)
    return index


def _panorama(faiss: Any, rows: np.ndarray) -> Any:
    """Return Panorama with 8 levels over rows rotated to their principal axes, which concentrates their energy.

    The mean is not subtracted, as that would change inner products.
    """
    width = rows.shape[1]
    rotation, index = faiss.PCAMatrix(width, width), faiss.IndexFlatIPPanorama(width, 8)
    sample = rows[: 50 * width]
    rotation.train(np.concatenate((sample, -sample)))  # with a mean of 0
    rotated = faiss.IndexPreTransform(rotation, index)
    rotated.add(rows)
    parts = (rotation, index, rotated)  # the first two must live as long as the last
    return SimpleNamespace(search=lambda queries, k: parts[2].search(queries, k))


def with_numpy(queries: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Return the ids of the k best rows by a product and a partial sort."""
    scores = queries @ rows.T
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), 1), 1)


def case(
    sides: Sides, queries: Tensor, size: int, k: int, dtypes: tuple[str, ...], repeats: int, bandwidth: float
) -> dict[str, Any]:
    """Measure the seconds that each side takes for ``size`` queries.

    Args:
        sides: indexes and peers.
        queries: (Q, D) queries. With ``size`` 1 they are asked one by one, and the seconds are means.
        size: number of queries of one search.
        k: number of rows to find.
        dtypes: dtypes of our indexes to measure.
        repeats: turns of each side.
        bandwidth: GB/s that the machine reads.
    """
    corpus = sides.corpus
    rows, width = corpus.shape
    groups = queries.split(size)
    searches: dict[str, Search] = {}
    for dtype in dtypes:
        _verify(sides.indexes[dtype], queries, k)
        searches[f"ours, {dtype}"] = sides.indexes[dtype].search
    searches |= sides.of(size)
    functions: dict[str, Callable[[], Any]] = {
        name: lambda search=search: [search(group, k) for group in groups]  # type: ignore[misc]
        for name, search in searches.items()
    }
    buffer, first = torch.empty(TILE_ROWS, size), groups[0]
    functions["bare fp32 product"] = lambda: [
        torch.mm(block, first.T, out=buffer[: len(block)]) for block in corpus.split(TILE_ROWS)
    ]
    if multiply_in_bf16():  # as searches of other rows do in this case
        low, low_queries, low_buffer = corpus.bfloat16(), first.bfloat16().T, buffer.bfloat16()
        functions["bare bf16 product"] = lambda: [
            torch.mm(block, low_queries, out=low_buffer[: len(block)]) for block in low.split(TILE_ROWS)
        ]
    seconds = dict(zip(functions, medians(list(functions.values()), repeats), strict=True))
    bare, bare_bf16 = seconds.pop("bare fp32 product"), seconds.pop("bare bf16 product", None)
    seconds = {name: value / len(groups) for name, value in seconds.items()}
    fastest = min((name for name in seconds if not name.startswith("ours")), key=seconds.__getitem__)
    print(f"N {rows:,}, D {width}, Q {size}, k {k}: fastest peer {fastest} {seconds[fastest] * 1e3:,.2f} ms")
    ratios, fractions = {}, {}
    for dtype in dtypes:
        ours = seconds[f"ours, {dtype}"]
        ratios[dtype] = seconds[fastest] / ours
        each = {"float32": 0.5, "bfloat16": 2, "int8": 1}[dtype]  # a float32 index scans 4-bit codes
        fractions[dtype] = rows * width * each / ours / (bandwidth * 1e9) if size == 1 else bare / ours
        limit = "the read bandwidth" if size == 1 else "the bare fp32 product's speed"
        lost = "" if ratios[dtype] >= 1 else "  SLOWER than the peer"
        print(
            f"  {ratios[dtype]:.2f} x with {dtype}: {ours * 1e3:,.2f} ms, "
            f"{100 * fractions[dtype]:.0f} % of {limit}{lost}"
        )
        if bare_bf16 is not None:
            print(f"  {ours / bare_bf16:.2f} x the time of the bare bf16 product, {bare_bf16 * 1e3:,.1f} ms")
    return {
        "rows": rows, "width": width, "queries": size, "k": k, "fastest_peer": fastest, "ratios": ratios,
        "roofline": fractions, "seconds": seconds, "bare_product_s": bare, "bare_bf16_product_s": bare_bf16,
        "build_s": sides.build_s, "bytes_per_row": {dtype: sides.bytes_per_row(dtype) for dtype in dtypes},
    }  # fmt: skip


def extended(rows: Tensor, count: int | None) -> Tensor:
    """Return the first ``count`` of unit rows (N, D), or these and then unit mixtures of two random ones of them."""
    if count is None or count <= len(rows):
        return rows[:count]
    generator = torch.Generator().manual_seed(5)
    corpus = torch.empty(count, rows.shape[1])
    corpus[: len(rows)] = rows
    for start in range(len(rows), count, 1 << 16):
        part = corpus[start : start + (1 << 16)]
        one, other = torch.randint(0, len(rows), (2, len(part)), generator=generator)
        part.copy_(torch.nn.functional.normalize(rows[one] + 0.75 * rows[other], dim=1))
    return corpus


def near_ties(rows: int, width: int, size: int) -> dict[str, float]:
    """Compare our search with torch on rows a relative 1e-7 apart, which fp32 scores cannot distinguish."""
    generator = torch.Generator().manual_seed(3)
    base = clustered(1, width, 2)
    corpus = base * (1 + 1e-7 * torch.randint(0, 8, (rows, 1), generator=generator))
    queries = base + 0.01 * clustered(size, width, 4)
    index = FlatIPIndex(width, dtype="float32")
    index.add(corpus)
    _verify(index, queries, 10)
    ours, theirs = medians(
        [lambda: index.search(queries, 10), lambda: (queries @ corpus.T).topk(10, dim=1)],
        1,
    )
    print(
        f"near-ties, N {rows:,}, Q {size}: {theirs / ours:.2f} x torch (whose order is not exact), {ours * 1e3:,.0f} ms"
    )
    return {"rows": rows, "width": width, "queries": size, "ratio": theirs / ours, "ours_s": ours, "torch_s": theirs}


def memory(rows: int, width: int, size: int) -> dict[str, float]:
    """Measure the peak memory of a search in addition to the index, in MiB, in a separate process."""
    measured = in_new_process(_measure_memory, rows, width, size, torch.get_num_threads())
    print(
        f"N {rows:,}, D {width}, bfloat16: {measured['extra_mib']:,.0f} MiB above the index's "
        f"{measured['index_mib']:,.0f} during a search of {size} queries in {measured['seconds']:.2f} s"
    )
    return {"rows": rows, "width": width, "queries": size, **measured}


def _measure_memory(rows: int, width: int, size: int, threads: int) -> dict[str, float]:
    import time

    torch.set_num_threads(threads)
    index = FlatIPIndex(width)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, 1 << 14):
        # Random bits with one exponent are uniform numbers, generated ten times faster than normal ones.
        bits = torch.randint(
            0x3F80, 0x4000, (min(1 << 14, rows - start), width), generator=generator, dtype=torch.int16
        )
        index.add(bits.view(torch.bfloat16) - 1.5)
    queries = torch.randn(size, width, generator=generator)
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak, because building the index needed more.
    before = peak_mib()
    begin = time.perf_counter()
    index.search(queries, 100)
    index.search(queries[:1], 100)
    return {
        "extra_mib": peak_mib() - before,
        "index_mib": rows * width * 2 / 2**20,
        "seconds": time.perf_counter() - begin,
    }


def _verify(index: FlatIPIndex, queries: Tensor, k: int) -> None:
    """Raise unless the results of a few queries are in the fp64 order of the stored embeddings."""
    few = queries[:2]
    best, ids = index.search(few, k)
    true = torch.cat(
        [few.double() @ segment.values(0, len(segment), torch.float64).T for _, segment in index.segments()], 1
    )
    expected = true.topk(k, dim=1).values
    if not torch.allclose(true.gather(1, ids), expected, rtol=0, atol=1e-12):
        raise AssertionError("the search is not exact")


def clustered(rows: int, width: int, seed: int) -> Tensor:
    """Return unit vectors (rows, width) around 500 shared centres, with cosines within a cluster of about 0.5."""
    centres = torch.randn(500, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(100 + seed)
    centre = centres[torch.randint(0, 500, (rows,), generator=generator)]
    return torch.nn.functional.normalize(centre + torch.randn(rows, width, generator=generator), dim=1)


def read_bandwidth() -> float:
    """Measure the GB/s of summing 512 MB."""
    values = torch.ones(1 << 27)
    (seconds,) = medians([values.sum], 5)
    return values.numel() * 4 / seconds / 1e9
