"""``python -m bench graph``: time of the graph of nearest neighbours compared with FAISS, and of a batch plan.

    python -m bench graph                         100,000 clustered embeddings, 384 wide
    python -m bench graph --vectors FILE.npy      other embeddings, (n, D) float32

In the same run and in turn with ours, FAISS searches the same embeddings for as many neighbours with its exact index.
The time of a batch plan is compared with the cheapest step: linear heads on states in memory, forward, loss and
backward.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.common.environment import environment
from bench.mips.cpu import clustered
from jasper_fast.config.stage import StageConfig
from jasper_fast.training.neighbours import SPARE, Graph, neighbour_graph
from jasper_fast.training.sampler import neighbour_batches
from jasper_fast.training.stages.losses import StageLoss
from jasper_fast.utils.atomic import write_atomic

WIDTHS = [384, 128, 64, 32]
PLANNED = 50  # steps


def main(argv: list[str]) -> int:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench graph", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="number of embeddings (default: %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="width of the embeddings (default: %(default)s)")
    parser.add_argument(
        "--neighbours", type=int, default=8, help="texts of a neighbourhood, itself included (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="repetitions per median (default: %(default)s)")
    parser.add_argument("--vectors", type=Path, metavar="FILE.npy", help="(n, D) float32 unit vectors")
    parser.add_argument("--out", type=Path, default=Path("bench/results/graph.json"), help="JSON to write")
    options = parser.parse_args(argv)
    given = np.load(options.vectors) if options.vectors else clustered(options.rows, options.width, 0).numpy()
    results = {
        "environment": environment() | {"threads": torch.get_num_threads()},
        "vectors": options.vectors.stem if options.vectors else "clustered",
        **measure(given, options.neighbours, options.repeats),
    }
    ratio = results["faiss_seconds"] / results["seconds"]
    print(
        f"{results['rows']:,} × {results['width']}, {results['neighbours']} to a neighbourhood: "
        f"{results['seconds']:.1f} s, FAISS {results['faiss_seconds']:.1f} s ({ratio:.2f} × as long). "
        f"A batch plan takes {100 * results['plan_share']:.2f} % of a step of {1e3 * results['step_seconds']:.1f} ms"
    )
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")
    return 0


def measure(vectors: np.ndarray, k: int, repeats: int = 1) -> dict[str, Any]:
    """Measure the seconds of our graph, of FAISS, and of a plan and a step, and the agreement of both graphs.

    Args:
        vectors: (n, D) float32 unit rows.
        k: number of rows in a neighbourhood.
        repeats: number of repetitions per median.
    """
    import faiss

    n, width = vectors.shape
    faiss.omp_set_num_threads(torch.get_num_threads())
    ours, peers, agree = [], [], 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        graph = neighbour_graph(lambda rows: vectors[rows[0] : rows[-1] + 1], n, k, duplicate=0.0)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        index = faiss.IndexFlatIP(width)
        index.add(vectors)
        _, matches = index.search(vectors, min(n, k + SPARE))
        peers.append(time.perf_counter() - started)
        agree = float((graph.nearest[:, 1:, None] == matches[:, None, :]).any(axis=2).mean())
    plan, step = _step_seconds(vectors, graph, 512 if n >= 512 else n // k * k)
    return {
        "rows": n,
        "width": width,
        "neighbours": k,
        "seconds": median(ours),
        "faiss_seconds": median(peers),
        "found_by_faiss_too": agree,
        "plan_seconds": plan,
        "step_seconds": step,
        "plan_share": plan / step,
    }


def _step_seconds(vectors: np.ndarray, graph: Graph, batch: int) -> tuple[float, float]:
    """Return median seconds of a batch's plan, and of a step on it."""
    stage = StageConfig(
        name="heads",
        train=["heads.*"],
        heads=WIDTHS,
        steps=1,
        lr=1e-3,
        batch_size=batch,
        narrow_weights={"cosine": 0, "similarity": 0, "relative_similarity": 0, "neighbourhood": 1},  # type: ignore[arg-type]
    )
    states = torch.from_numpy(vectors)
    heads = {w: torch.nn.Linear(states.shape[1], w) for w in WIDTHS}
    loss_of, plan = StageLoss(stage, WIDTHS[0]), neighbour_batches(graph, batch, 0, 0)
    plan(0)  # An epoch is shuffled once.
    planned, stepped = [], []
    for number in range(PLANNED):
        started = time.perf_counter()
        rows = plan(number)
        planned.append(time.perf_counter() - started)
        started = time.perf_counter()
        loss_of({w: head(states[rows]) for w, head in heads.items()}, states[rows]).loss.backward()
        stepped.append(time.perf_counter() - started)
    return median(planned), median(stepped)
