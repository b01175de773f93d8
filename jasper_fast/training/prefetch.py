"""Batches prepared ahead of training on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from jasper_fast.training.data import Batch

PREFETCHED_BATCHES = 2  # batches prepared while one trains


def batches_of(
    prepare: Callable[[int], Batch], first_step: int, steps: int, device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, ``prepare(step)``) from ``first_step`` to before ``steps``.

    A thread prepares the next batches while a GPU computes. On a CPU the step itself uses all cores. A second
    thread would start its own team of OpenMP threads, which made short steps take 1.4 times as long.
    """
    if device.type == "cpu":
        for step in range(first_step, steps):
            started = time.perf_counter()
            batch = prepare(step)
            yield step, replace(batch, wait=time.perf_counter() - started)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as worker:
        ahead: list[Future[Batch]] = []
        try:
            for step in range(first_step, steps):
                while len(ahead) < PREFETCHED_BATCHES and step + len(ahead) < steps:
                    ahead.append(worker.submit(prepare, step + len(ahead)))
                started = time.perf_counter()
                batch = ahead.pop(0).result()
                yield step, replace(batch, wait=time.perf_counter() - started)
        finally:
            for future in ahead:
                future.cancel()
