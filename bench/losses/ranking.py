"""``python -m bench ranking``: time and memory of the ranking losses on a CPU, against plain PyTorch.

Both take forward and backward of queries and documents. Plain PyTorch stores the Q x M matrices, or the gathered
candidates. Each method runs in a new process, for its peak memory. Values and gradients are compared with float64
first, on a smaller batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.environment import environment
from bench.common.measure import in_new_process, medians, peak_mib
from jasper_fast.losses import info_nce_loss, listwise_loss, reference

OUT = Path("bench/results/ranking-cpu.json")
NEAR = 1e-4  # accepted relative error against float64
SHAPES = {"info_nce": (1024, 16384, 384, 16), "listwise": (1024, 16384, 384, 32)}  # Q, M, D, K
QUICK = (64, 256, 32, 8)


class Batch(NamedTuple):
    """Arguments of both losses."""

    queries: Tensor
    documents: Tensor
    candidates: Tensor
    scores: Tensor
    teacher_queries: Tensor
    teacher_documents: Tensor


def main(argv: list[str]) -> int:
    """Measure both losses, print the ratios, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench ranking", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to write (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="median of this many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only small batches")
    options = parser.parse_args(argv)
    results: dict[str, Any] = {"environment": environment(), "threads": torch.get_num_threads(), "losses": {}}
    for name, shape in SHAPES.items():
        results["losses"][name] = compare(name, QUICK if options.quick else shape, options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


def compare(name: str, shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    """Return seconds and MiB of our form and of plain PyTorch, and our errors."""
    errors = check(name)
    methods = {
        method: in_new_process(_measure, name, method, shape, repeats, torch.get_num_threads())
        for method in ("jasper_fast", "plain")
    }
    ours, plain = methods["jasper_fast"], methods["plain"]
    print(
        f"{name}, Q, M, D, K = {shape}: {plain['seconds'] / ours['seconds']:.2f} x plain PyTorch's speed "
        f"({ours['seconds'] * 1e3:,.0f} ms against {plain['seconds'] * 1e3:,.0f}; {ours['peak_mib']:,.0f} MiB above "
        f"the inputs against {plain['peak_mib']:,.0f})"
    )
    return {"shape": shape, "methods": methods, **errors}


def check(name: str) -> dict[str, float]:
    """Return the relative errors of loss and gradients against the reference in float64.

    Raises:
        AssertionError: an error is larger than `NEAR`.
    """
    batch = random_batch((50, 300, 24, 8))
    double = Batch(*(part.double() if part.is_floating_point() else part for part in batch))
    slow = {"info_nce": _contrast(reference.info_nce_loss), "listwise": _listwise(reference.listwise_loss)}[name]
    (loss, *gradients), (value, *wanted) = step(OURS[name], batch), step(slow, double)
    off = torch.cat([(own - true).flatten() for own, true in zip(gradients, wanted, strict=True)]).norm()
    size = torch.cat([true.flatten() for true in wanted]).norm()
    errors = {"loss_error": float(abs(loss - value) / value), "gradient_error": float(off / size)}
    assert max(errors.values()) <= NEAR, f"{name}: {errors}, allowed {NEAR}"
    return errors


def random_batch(shape: tuple[int, int, int, int]) -> Batch:
    """Return random embeddings. Each query is near its first candidate, also for the teacher."""
    count, documents, width, k = shape
    generator = torch.Generator().manual_seed(0)
    rows, of_teacher = torch.randn(2, documents, width, generator=generator)
    candidates = torch.randint(documents, (count, k), generator=generator)
    noise, teacher_noise = torch.randn(2, count, width, generator=generator)
    first = candidates[:, 0]
    scores = torch.rand(count, k, generator=generator)
    return Batch(rows[first] + 2 * noise, rows, candidates, scores, of_teacher[first] + teacher_noise, of_teacher)


def step(loss: Callable[[Batch], Tensor], batch: Batch) -> list[Tensor]:
    """Return the loss, and the gradients of queries and documents."""
    leaves = [side.detach().requires_grad_() for side in batch[:2]]
    value = loss(batch._replace(queries=leaves[0], documents=leaves[1]))
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _contrast(loss: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    return lambda b: loss(
        b.queries,
        b.documents,
        b.candidates[:, 0],
        teacher_queries=b.teacher_queries,
        teacher_documents=b.teacher_documents,
    )


def _listwise(loss: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    return lambda b: loss(b.queries, b.documents, b.candidates, b.scores)


def _plain_contrast(b: Batch) -> Tensor:
    positives = b.candidates[:, :1]
    logits = F.normalize(b.queries) @ F.normalize(b.documents).T / 0.05
    teacher = F.normalize(b.teacher_queries) @ F.normalize(b.teacher_documents).T
    return F.cross_entropy(logits.masked_fill(teacher > teacher.gather(1, positives), -torch.inf), positives[:, 0])


def _plain_listwise(b: Batch) -> Tensor:
    logits = torch.einsum("qd,qkd->qk", F.normalize(b.queries), F.normalize(b.documents)[b.candidates]) / 0.05
    return F.kl_div(
        logits.log_softmax(dim=1), (b.scores / 0.05).log_softmax(dim=1), log_target=True, reduction="batchmean"
    )


OURS = {"info_nce": _contrast(info_nce_loss), "listwise": _listwise(listwise_loss)}
PLAIN = {"info_nce": _plain_contrast, "listwise": _plain_listwise}


def _measure(name: str, method: str, shape: tuple[int, int, int, int], repeats: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    loss = (OURS if method == "jasper_fast" else PLAIN)[name]
    step(loss, random_batch((8, 16, 8, 4)))  # memory of torch itself
    batch = random_batch(shape)
    before = peak_mib()
    (seconds,) = medians([lambda: step(loss, batch)], repeats)
    return {"seconds": seconds, "peak_mib": peak_mib() - before}
