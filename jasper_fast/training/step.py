"""The gradient of one training step, for a batch of any size in the memory of one micro-batch.

The graph is cut at the pooled states (gradient caching). The encoder computes them, and heads and loss compute their
gradient. The encoder then propagates that gradient, micro-batch by micro-batch. With ``gradient_caching`` the first
pass keeps no graph, and each micro-batch is encoded again, with a graph, just before its backward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import is_sharded
from jasper_fast.distributed.ranks import Ranks
from jasper_fast.losses import AnyOutput
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch, Precision
from jasper_fast.training.offload import offload_activations
from jasper_fast.training.rng import random_state, replay
from jasper_fast.utils.device import autocast
from jasper_fast.utils.errors import JasperError


class StepTimer:
    """Seconds of a step by the part that spent them.

    Args:
        device: the device of the step.
        synchronize: whether to wait for a GPU at every boundary, so that its seconds count for the part that queued
            the work.
    """

    def __init__(self, device: torch.device, synchronize: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._synchronize = synchronize and device.type == "cuda"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a part."""
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def fractions(self, seconds: float) -> dict[str, float]:
        """Return ``share_PART``, each part's fraction of ``seconds``.

        The result is empty on a GPU without synchronization, where the host's clock says nothing about the parts.
        """
        if self._device.type == "cuda" and not self._synchronize:
            return {}
        return {f"share_{part}": min(1.0, took / seconds) for part, took in self.seconds.items()}

    def _now(self) -> float:
        if self._synchronize:
            torch.cuda.synchronize()
        return time.perf_counter()


def take_gradients(
    student: Student,
    batch: Batch,
    stage: StageConfig,
    loss: Callable[..., AnyOutput],
    device: torch.device,
    precision: Precision,
    dropout: Tensor | None = None,
    timer: StepTimer | None = None,
) -> tuple[AnyOutput, dict[int, Tensor]]:
    """Add the gradient of a batch to the trained parameters.

    Args:
        student: the student, whose trained parameters require a gradient.
        batch: this rank's part of the batch.
        stage: heads, gradient caching and activation offload.
        loss: the stage's loss, of embeddings by width, the teacher's embeddings, and ``batch.inputs`` if it is set.
        device: the device of the student.
        precision: the precision of encoder passes.
        dropout: (B, H) factors of the pooled states. None: no dropout.
        timer: the timer of encoder and loss. None: nobody reads it.

    Returns:
        the losses of the whole batch, and the embeddings by width, (B, width).
    """
    timer = timer or StepTimer(device)
    passes: list[Any] = list(batch.texts.token_ids) if batch.texts is not None else []
    trains = bool(passes) and any(p.requires_grad for n, p in student.named_parameters() if not n.startswith("heads."))
    # A sharded layer takes one backward pass for each forward pass, one after the other.
    encode_twice = trains and (stage.gradient_caching or is_sharded(student)) and len(passes) > 1
    rng_states: list[list[Tensor]] = []

    with timer.part("encoder"):
        without_graph = encode_twice or not trains
        states = _first_pass(student, batch, device, precision, without_graph, stage.activation_offload, rng_states)
    leaf = states.detach().requires_grad_(trains)  # (B, H)
    with timer.part("loss"):
        embeddings = student.project(leaf, stage.heads, dropout)
        more = [] if batch.inputs is None else [batch.inputs.to(device)]
        output = loss(embeddings, batch.teacher.to(device), *more)
        output.loss.backward()
    if not trains:
        return output, embeddings
    assert batch.texts is not None and leaf.grad is not None
    with timer.part("encoder"):
        if not encode_twice:
            states.backward(leaf.grad)
            return output, embeddings
        parts = leaf.grad[batch.texts.order.to(device)].split([len(ids) for ids in passes])
        for ids, rng_state, part in zip(passes, rng_states, parts, strict=True):
            offload = offload_activations(stage.activation_offload, student, device)
            with replay(rng_state, device), autocast(device, precision), offload:
                pooled = student.pool(ids, device)
            pooled.backward(part)
    return output, embeddings


def _first_pass(
    student: Student,
    batch: Batch,
    device: torch.device,
    precision: Precision,
    without_graph: bool,
    offload: bool,
    rng_states: list[list[Tensor]],
) -> Tensor:
    """Return the batch's pooled states, (B, H), and append the random state before each micro-batch."""
    if batch.texts is None:
        assert batch.pooled is not None
        return batch.pooled.to(device)
    with torch.no_grad() if without_graph else offload_activations(offload, student, device):
        return batch.texts.pool(student, device, precision, lambda: rng_states.append(random_state(device)))


def dropout_mask(
    fraction: float,
    seed: tuple[int, int, int],
    rows: slice | np.ndarray,
    total: int,
    width: int,
    device: torch.device,
) -> Tensor | None:
    """Return the factors of pooled states under dropout: 0 for a fraction of them, 1 / (1 - fraction) for the rest.

    They depend only on the step and the position of a text in the batch. So they are the same after a resume, on any
    rank and in any micro-batch.

    Args:
        fraction: the dropout probability.
        seed: the run's seed, the stage's index and the stage's step.
        rows: the rows of the batch that are wanted.
        total: the number of rows of the whole batch.
        width: the width H of the pooled states.
        device: the device that draws.

    Returns:
        (rows, H) factors. None: no dropout.
    """
    if not fraction:
        return None
    generator = torch.Generator(device).manual_seed((seed[0] * 1000 + seed[1]) * 10_000_000 + seed[2])
    mask = torch.empty(total, width, dtype=torch.bool, device=device).bernoulli_(1.0 - fraction, generator=generator)
    chosen = mask[rows] if isinstance(rows, slice) else mask[torch.from_numpy(rows).to(device)]
    return chosen / (1.0 - fraction)


@dataclass(frozen=True)
class StepReport:
    """Numbers of a step that are equal on all ranks.

    Args:
        numbers: mean losses and the gradient norm. This rank's own if a number is not finite.
        tokens: tokens of the whole batch, without padding.
        padded: tokens with padding.
        stop: whether a rank received a signal to stop.
        finite: whether every rank's numbers are finite.
    """

    numbers: dict[str, float]
    tokens: float
    padded: float
    stop: bool
    finite: bool


def read_numbers(output: AnyOutput, norm: Tensor) -> dict[str, float]:
    """Copy losses and gradient norm to the host, in a single transfer."""
    scalars = {**output._asdict(), "grad_norm": norm}
    return dict(zip(scalars, torch.stack([v.detach().double() for v in scalars.values()]).tolist(), strict=True))


def reduce_report(ranks: Ranks, numbers: dict[str, float], batch: Batch, stop: bool) -> StepReport:
    """Reduce losses, token counts, stop flag and NaN flag over all ranks before the optimizer step."""
    finite = is_finite(numbers)
    sent = [not finite, stop, batch.tokens, batch.padded, *(numbers.values() if finite else [0.0] * len(numbers))]
    bad, stopping, tokens, padded, *sums = ranks.all_reduce_sum([float(value) for value in sent])
    if not bad:
        numbers = dict(zip(numbers, (total / ranks.world for total in sums), strict=True))
    return StepReport(numbers, tokens, padded, bool(stopping), not bad)


def is_finite(numbers: Mapping[str, float]) -> bool:
    """Return whether every loss, part and norm is finite."""
    return all(math.isfinite(value) for value in numbers.values())


def not_finite(
    stage: StageConfig,
    stage_step: int,
    step: int,
    numbers: Mapping[str, float],
    batch: Batch,
    bad: Tensor,
    ranks: Ranks,
) -> JasperError:
    """Return the error that ends a run before an update that would spoil the weights. All ranks must call it.

    Args:
        stage: the stage's settings.
        stage_step: steps of the stage, this one included.
        step: steps of the run, this one included.
        numbers: the losses of this rank, and ``grad_norm``.
        batch: this rank's part of the batch.
        bad: (b,) bool, this rank's texts with an embedding that is not finite.
        ranks: the ranks of the run.
    """
    parts = [k for k, v in numbers.items() if not math.isfinite(v) and k not in ("loss", "grad_norm")]
    if parts:
        what = f"loss part {', '.join(parts)}"
    else:
        what = "the gradient" if math.isfinite(numbers["loss"]) else "the loss"
    mine = (what if not is_finite(numbers) else "", batch.rows[np.flatnonzero(bad.cpu().numpy())].tolist())
    places = []
    for rank, (problem, rows) in enumerate(ranks.all_gather_object(mine)):
        if problem:
            what = problem
        if rows:
            listed = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
            places.append(f"rank {rank}: the embeddings of training texts {listed} are not finite")
    where = "; ".join(places) or "all embeddings of the batch are finite"
    return JasperError(
        f"stage {stage.name!r}, step {stage_step} (step {step} of the run): {what} is not finite ({where}); "
        "nothing was updated and the last checkpoint is sound. Fix: lower the stage's lr or set clip, and start the "
        "command again with another --out"
    )


def bad_rows(embeddings: Mapping[int, Tensor], teacher: Tensor) -> Tensor:
    """Return the rows of which the student's or the teacher's embedding is not finite, (b,) bool."""
    every = [*embeddings.values(), teacher]
    return torch.stack([~row.detach().isfinite().all(dim=1) for row in every]).any(dim=0)
