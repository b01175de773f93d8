"""``python -m bench fit``: time and memory of maps and projections, once the embeddings are there.

    python -m bench fit                            synthetic embeddings around 500 centres, 384 wide
    python -m bench fit --vectors DOCUMENTS.npy    learned axes of other embeddings, (n, d) float32 unit rows

The student's embeddings are the teacher's with noise. Learned axes are compared with principal axes by the fraction of
the ten nearest documents that held-out documents keep. Peak memory is that of a new process. ``load`` is the load
average before the measurement: on a busy machine, times are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.environment import environment
from bench.common.measure import in_new_process, peak_mib
from bench.common.targets import Target, judged, print_judged
from bench.mips.cpu import clustered
from jasper_fast.fitting import (
    PairStatistics,
    learned_axes,
    low_rank_map,
    mined_groups,
    principal_axes,
    ridge_map,
    start_map,
)
from jasper_fast.mips import topk
from jasper_fast.utils.atomic import write_atomic

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
WIDTHS = (32, 64, 128)
NEIGHBOURS = 10
HELD_OUT = 500  # documents that ask for their neighbours
CHUNK = 10_000  # rows of a synthetic part of the stream
FIT = [
    Target("s to fit 10,000 documents", lambda case: case["statistics_s"] + case["candidates_s"], 10.0, at_most=True)
]
LEARN = [Target("s per width", lambda case: case["seconds"] + case["mining_s"], 30.0, at_most=True)]
STREAM = [Target("MiB at the peak", lambda case: case["peak_mib"], 1024.0, at_most=True)]


def main(argv: list[str]) -> int:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=384, help="width of both sides (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="pairs (default: 10000 100000)")
    parser.add_argument("--streamed", type=int, default=1_000_000, help="pairs of the stream (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="learned (default: 32 64 128)")
    parser.add_argument("--seconds", type=float, default=20.0, help="training per width (default: %(default)s)")
    parser.add_argument("--vectors", type=Path, metavar="FILE.npy", help="(n, d) float32 unit rows for learned axes")
    parser.add_argument("--out", type=Path, default=Path("bench/results/fit-cpu.json"), help="JSON to write")
    options = parser.parse_args(argv)
    documents = np.load(options.vectors) if options.vectors else clustered(options.rows[0], options.width, 0).numpy()
    results = {
        "environment": environment() | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "fits": [fit(rows, options.width) for rows in options.rows],
        "stream": stream(options.streamed, options.width),
        "vectors": options.vectors.stem if options.vectors else "clustered",
        "learned": learn(documents, options.widths, options.seconds),
    }
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


def fit(rows: int, width: int) -> dict[str, Any]:
    """Time the statistics of some pairs, and every candidate map. Both are compared with least squares first."""
    _check_against_least_squares()
    source, target = _pairs(rows, width, 0)
    begin = time.perf_counter()
    statistics = PairStatistics(width, width)
    statistics.add(source, target)
    summed = time.perf_counter()
    starts = [start_map(statistics, same_space=True), start_map(statistics, same_space=False)]
    for start in starts:
        for strength in STRENGTHS:
            ridge_map(statistics, strength, start)
    ridges = time.perf_counter()
    low_rank_map(statistics, 1.0, max(1, width // 4), starts[0])
    low_rank = time.perf_counter()
    principal_axes(statistics.target, max(1, width // 4))
    case = {
        "rows": rows,
        "width": width,
        "candidates": len(starts) * len(STRENGTHS),
        "statistics_s": summed - begin,
        "candidates_s": ridges - summed,
        "low_rank_s": low_rank - ridges,
        "principal_axes_s": time.perf_counter() - low_rank,
    }
    print(
        f"{rows:,} pairs, {width} wide: statistics {case['statistics_s']:.2f} s, {case['candidates']} ridge maps "
        f"{case['candidates_s']:.2f} s, a low-rank map {case['low_rank_s']:.2f} s, principal axes "
        f"{case['principal_axes_s']:.2f} s"
    )
    return _with_targets(case, FIT if (rows, width) == (10_000, 384) else [])


def stream(rows: int, width: int) -> dict[str, Any]:
    """Measure seconds and peak memory of streaming pairs in a new process."""
    case = {"rows": rows, "width": width, **in_new_process(_stream, rows, width)}
    print(
        f"{rows:,} streamed pairs: {case['seconds']:.1f} s of sums, peak {case['peak_mib']:.0f} MiB "
        f"({case['before_mib']:.0f} MiB before)"
    )
    return _with_targets(case, STREAM if (rows, width) == (1_000_000, 384) else [])


def learn(documents: np.ndarray, widths: list[int], seconds: float) -> list[dict[str, Any]]:
    """Time mining and learned axes, and compare them with principal axes on held-out documents.

    Args:
        documents: (n, d) float32 unit rows. The last 500, or a tenth of fewer, are held out.
        widths: widths of the projections.
        seconds: time of the training per width.
    """
    held_out = min(HELD_OUT, max(1, len(documents) // 10))
    corpus, questions = documents[:-held_out], documents[-held_out:]
    statistics = PairStatistics(documents.shape[1], documents.shape[1])
    statistics.add(corpus, corpus)
    begin = time.perf_counter()
    groups = mined_groups(corpus)
    mining = time.perf_counter() - begin
    cases = []
    for width in widths:
        fractions: list[float] = []
        start = principal_axes(statistics.target, width)
        begin = time.perf_counter()
        axes = learned_axes(corpus, start, seconds=seconds, groups=groups, progress=fractions.append)
        case = {
            "rows": len(corpus),
            "groups": len(groups),
            "width": width,
            "mining_s": mining,
            "seconds": time.perf_counter() - begin,
            "steps": max(0, len(fractions) - 1),
            "overlap_principal": _overlap(questions, corpus, start),
            "overlap_learned": _overlap(questions, corpus, axes),
        }
        print(
            f"{len(corpus):,} documents, width {width}: mining {mining:.1f} s, {case['steps']} steps in "
            f"{case['seconds']:.1f} s, overlap@10 {case['overlap_principal']:.1%} → {case['overlap_learned']:.1%}"
        )
        cases.append(_with_targets(case, LEARN))
    return cases


def _with_targets(case: dict[str, Any], targets: list[Target]) -> dict[str, Any]:
    if not targets:
        return case
    verdicts = judged(targets, case)
    print_judged(verdicts)
    return case | {"targets": verdicts}


def _pairs(rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    target = clustered(rows, width, seed)
    noise = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    source = torch.nn.functional.normalize(target + 0.5 * torch.nn.functional.normalize(noise, dim=1), dim=1)
    return source.numpy(), target.numpy()


def _check_against_least_squares() -> None:
    source, target = _pairs(200, 16, 1)
    statistics = PairStatistics(16, 16)
    statistics.add(source, target)
    rows = np.concatenate([source.astype(np.float64), np.eye(16)])
    wanted = np.linalg.lstsq(rows, np.concatenate([target.astype(np.float64), np.eye(16)]), rcond=None)[0]
    error = float(np.abs(ridge_map(statistics, 1.0, np.eye(16)) - wanted).max())
    if not error < 1e-10:
        raise AssertionError(f"far from least squares in float64: {error:.1e}, allowed 1e-10")


def _stream(rows: int, width: int) -> dict[str, float]:
    draw = np.random.default_rng(0)
    statistics = PairStatistics(width, width)
    before, seconds = peak_mib(), 0.0
    for start in range(0, rows, CHUNK):
        target = draw.standard_normal((min(CHUNK, rows - start), width), dtype=np.float32)
        target /= np.linalg.norm(target, axis=1, keepdims=True)
        begin = time.perf_counter()
        statistics.add(target[:, ::-1], target)
        seconds += time.perf_counter() - begin
    assert statistics.count == rows
    return {"seconds": seconds, "peak_mib": peak_mib(), "before_mib": before}


def _overlap(questions: np.ndarray, corpus: np.ndarray, axes: np.ndarray) -> float:
    """Return the fraction of each question's ten nearest documents that the projection keeps."""
    k = min(NEIGHBOURS, len(corpus))
    _, wanted = topk(questions, corpus, k)
    narrow = [rows @ axes.astype(np.float32) for rows in (questions, corpus)]
    _, found = topk(*(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in narrow), k)
    return float((wanted[:, :, None] == found[:, None, :]).any(axis=2).mean())
