"""The ranks of a run: their rows of a batch, their collectives, and a common end when one of them is lost.

``torchrun`` starts the processes, and each takes its rows of every batch. Host objects (stop flags, errors, barriers)
use a separate gloo group. Embeddings and gradients use the default group, which is nccl on GPUs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from jasper_fast.config.diff import config_difference
from jasper_fast.distributed.gather import split_rows
from jasper_fast.distributed.liveness import Liveness
from jasper_fast.utils.errors import JasperError

RESUME = "Fix: run the same command to resume from the last checkpoint"
LIVENESS_WAIT = 5.0  # seconds in which ranks detect a failure
BUCKET = 32 * 2**20  # gradient elements per message
COLLECTIVE_ERROR = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)
LONG = timedelta(days=2)  # how long ranks wait for work that one does alone, such as preparing texts
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. With one process, the collectives do nothing.

    Args:
        rank: the rank of this process.
        world: the number of ranks.
        timeout: seconds after which a missing rank ends the run.
        group: the process group of embeddings and gradients. None: one process.
        control: the process group of host objects, whose collectives may wait long.
        liveness: the heartbeats of all ranks. None: one process.
    """

    rank: int = 0
    world: int = 1
    timeout: float = 600.0
    group: Any = None
    control: Any = None
    liveness: Liveness | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def counts(self, total: int) -> list[int]:
        """Return the number of a batch's rows on each rank."""
        return split_rows(total, self.world)

    def rows(self, total: int) -> slice:
        """Return this rank's rows of a batch."""
        counts = self.counts(total)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def on_main(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 and return its result on every rank.

        Args:
            action: a function whose result can be pickled.

        Raises:
            JasperError: the action raised one, on every rank.
        """
        if self.world == 1:
            return action()
        outcome: list[Any] = [None]
        error: JasperError | None = None
        if self.is_main:
            try:
                outcome = [(action(), None)]
            except JasperError as caught:
                outcome, error = [(None, str(caught))], caught
        with _lost("waiting for the first rank"):
            distributed.broadcast_object_list(outcome, src=0, group=self.control)
        if error is not None:
            raise error
        result, problem = outcome[0]
        if problem is not None:
            raise JasperError(problem)
        return result

    def main_first(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0, then on the others, which find in a cache what rank 0 computed."""
        result = action() if self.is_main else None
        self.wait_for_all()
        if not self.is_main:
            result = action()
        self.wait_for_all()
        return result  # type: ignore[return-value]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _lost("an exchange"):
            distributed.all_gather_object(values, value, group=self.control)
        return values

    def wait_for_all(self) -> None:
        """Wait for all ranks, also while one does long work alone."""
        self.all_gather_object(None)

    def check_consistent(self, facts: dict[str, Any]) -> None:
        """Reject a start in which a rank's facts differ from those of rank 0.

        Raises:
            JasperError: they differ. Every rank raises it, with the differences.
        """
        every = self.all_gather_object(facts)
        differences = [
            f"rank {rank}: {line}" for rank, other in enumerate(every) for line in config_difference(every[0], other)
        ]
        if differences:
            raise JasperError(
                "the ranks do not run the same thing (rank 0 -> the other):\n  - "
                + "\n  - ".join(differences)
                + "\nFix: give every process the same command, configuration, code and data"
            )

    def barrier(self, where: str) -> None:
        """Wait for all ranks, at most ``timeout`` seconds.

        Raises:
            JasperError: a rank ended or did not arrive in time. The message names it.
        """
        if self.liveness is None:
            return
        self.liveness.beat()
        try:
            distributed.monitored_barrier(group=self.control, timeout=timedelta(seconds=self.timeout))
        except RuntimeError as error:
            lost = self._lost_ranks(self.liveness) or "all ranks are there, but they did not meet in time"
            raise JasperError(f"{where}: {lost}. {RESUME}") from error

    @contextmanager
    def name_lost_ranks(self, where: str) -> Iterator[None]:
        """Replace the error of a failed collective in the block by one that names the lost ranks.

        Raises:
            JasperError: a collective failed. Any other error passes unchanged.
        """
        try:
            yield
        except RuntimeError as error:
            if self.liveness is None or not _is_collective_error(error):
                raise
            lost = self._lost_ranks(self.liveness) or "all ranks are there, but an exchange failed"
            raise JasperError(f"{where}: {lost} ({error}). {RESUME}") from error

    def _lost_ranks(self, liveness: Liveness) -> str | None:
        try:
            lost = liveness.lost(min(self.timeout, LIVENESS_WAIT))
        except RuntimeError:
            return "rank 0, which holds the store of all ranks, ended"
        names = ", ".join(map(str, lost))
        return f"rank {names} ended or did not arrive within {self.timeout:g} s" if lost else None

    def all_reduce_sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums over ranks, in float64.

        They use the group of the gradients, so a lost rank ends this call as soon as it would end theirs.
        """
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(total, group=self.group)
        return total.tolist()

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients of trained parameters over ranks, in few large messages.

        Sharded parameters are left out: their backward pass averages them.
        """
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in parameters:
            if not parameter.requires_grad or isinstance(parameter, _dtensor()):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (size + parameter.numel() > BUCKET or bucket[0].dtype != parameter.dtype):
                self._average(bucket)
                bucket, size = [], 0
            bucket.append(parameter.grad)
            size += parameter.numel()
        if bucket:
            self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat, group=self.group)
        flat.div_(self.world)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


@contextmanager
def join_ranks(timeout: float) -> Iterator[Ranks]:
    """Join the other processes that ``torchrun`` started, if there are any, and leave them at the end.

    Args:
        timeout: seconds after which a missing rank ends the run.

    Raises:
        JasperError: the ranks do not find each other, or there are more ranks than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if gpus and local >= gpus:
        raise JasperError(f"process {local} of this machine has no GPU: there are {gpus}. Fix: start {gpus} processes")
    if gpus:
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
        control = distributed.new_group(backend="gloo", timeout=LONG)
    except (RuntimeError, ValueError) as error:
        raise JasperError(f"the ranks did not find each other: {error}") from error
    rank, world = distributed.get_rank(), distributed.get_world_size()
    liveness = Liveness(distributed.distributed_c10d._get_default_store(), rank, world)
    yield Ranks(rank, world, timeout, distributed.group.WORLD, control, liveness)
    distributed.destroy_process_group()  # not after an error: it would wait for ranks that are gone


@contextmanager
def _lost(where: str) -> Iterator[None]:
    """Report a failed collective as a lost rank: it has ended or hangs."""
    try:
        yield
    except RuntimeError as error:
        raise JasperError(f"{where}: another rank ended or did not answer ({error}). {RESUME}") from error


def _is_collective_error(error: RuntimeError) -> bool:
    """Return whether a collective failed, and not the computation of one rank."""
    return isinstance(error, distributed.DistError) or COLLECTIVE_ERROR.search(str(error)) is not None


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor
