"""Several processes as one run: who they are, what they agree on, and how they end together.

``torchrun`` starts them; each takes its rows of every batch. Small things on the host (stop flags, errors, who has
arrived) go through a gloo group of their own, vectors and gradients through the default group (nccl on GPUs).
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

from jasper_fast.config import config_difference
from jasper_fast.errors import JasperError
from jasper_fast.gather import split_rows
from jasper_fast.roll import Roll

AGAIN = "the same command goes on from the last checkpoint"
ROLL_CALL = 5.0  # seconds
BUCKET = 32 * 2**20  # elements of gradients sent at once
OF_EXCHANGES = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)
LONG = timedelta(days=2)  # other ranks wait so long for what one does alone, such as finding texts
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. Alone, everything here does nothing.

    Args:
        timeout: seconds after which a rank that does not arrive ends the run.
        group: for vectors and gradients; None: alone.
        control: for small things on the host that may take long.
        roll: where every rank is.
    """

    rank: int = 0
    world: int = 1
    timeout: float = 600.0
    group: Any = None
    control: Any = None
    roll: Roll | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def counts(self, total: int) -> list[int]:
        """How many of a batch's rows each rank has."""
        return split_rows(total, self.world)

    def rows(self, total: int) -> slice:
        """This rank's rows of a batch."""
        counts = self.counts(total)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def lead(self, action: Callable[[], T]) -> T:
        """Let the first rank do something; everyone gets its result, or its error.

        Args:
            action: gives something that can be pickled.
        """
        if self.world == 1:
            return action()
        told: list[Any] = [None]
        error: JasperError | None = None
        if self.first:
            try:
                told = [(action(), None)]
            except JasperError as caught:
                told, error = [(None, str(caught))], caught
        with _lost("waiting for the first rank"):
            distributed.broadcast_object_list(told, src=0, group=self.control)
        if error is not None:
            raise error
        result, problem = told[0]
        if problem is not None:
            raise JasperError(problem)
        return result

    def gather(self, thing: Any) -> list[Any]:
        """What every rank gives, in the ranks' order."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        with _lost("an exchange"):
            distributed.all_gather_object(things, thing, group=self.control)
        return things

    def agree(self, what: dict[str, Any]) -> None:
        """Refuse to start where a rank has something else than the first.

        Raises:
            JasperError: on every rank, with the differences.
        """
        every = self.gather(what)
        told = [
            f"rank {rank}: {line}" for rank, other in enumerate(every) for line in config_difference(every[0], other)
        ]
        if told:
            raise JasperError(
                "the ranks do not run the same thing (rank 0 -> the other):\n  - "
                + "\n  - ".join(told)
                + "\ngive every process the same command, configuration, code and data"
            )

    def meet(self, where: str) -> None:
        """Wait for all ranks.

        Raises:
            JasperError: some did not arrive in time, or ended; the first rank names them.
        """
        if self.roll is None:
            return
        self.roll.arrive()
        try:
            distributed.monitored_barrier(group=self.control, timeout=timedelta(seconds=self.timeout))
        except RuntimeError as error:
            missing = self._missing(self.roll) or "all ranks are there, but they did not meet in time"
            raise JasperError(f"{where}: {missing}; {AGAIN}") from error

    @contextmanager
    def watch(self, where: str) -> Iterator[None]:
        """Name the ranks that are gone where a collective in the block fails; any other error goes through.

        Raises:
            JasperError: in the place of the collective's own error.
        """
        try:
            yield
        except RuntimeError as error:
            if self.roll is None or not _of_an_exchange(error):
                raise
            missing = self._missing(self.roll) or "all ranks are there, but an exchange failed"
            raise JasperError(f"{where}: {missing}; {AGAIN} ({error})") from error

    def _missing(self, roll: Roll) -> str | None:
        try:
            missing = roll.missing(min(self.timeout, ROLL_CALL))
        except RuntimeError:
            return "rank 0, which holds the roll, ended"
        named = ", ".join(map(str, missing))
        return f"rank {named} ended or did not arrive within {self.timeout:g} s" if missing else None

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Sums over ranks, in float64. A rank that does not come ends it as soon as it would a gradient's message."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(total, group=self.group)
        return total.tolist()

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients of what trains, in few large messages. What is sharded was averaged already."""
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
    """Meet the other processes that ``torchrun`` started, if there are any; part from them at the end.

    Args:
        timeout: seconds after which a rank that does not arrive ends the run.

    Raises:
        JasperError: the others do not come, or there are more ranks than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if gpus and local >= gpus:
        raise JasperError(
            f"process {local} of this machine has no GPU of its own: there are {gpus}; start {gpus} of them"
        )
    if gpus:
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
        control = distributed.new_group(backend="gloo", timeout=LONG)
    except (RuntimeError, ValueError) as error:
        raise JasperError(f"the ranks did not find each other: {error}") from error
    rank, world = distributed.get_rank(), distributed.get_world_size()
    roll = Roll(distributed.distributed_c10d._get_default_store(), rank, world)
    yield Ranks(rank, world, timeout, distributed.group.WORLD, control, roll)
    distributed.destroy_process_group()  # not after an error: it would wait for ranks that are gone


@contextmanager
def _lost(where: str) -> Iterator[None]:
    """A collective that fails means that a rank is gone or hangs."""
    try:
        yield
    except RuntimeError as error:
        raise JasperError(f"{where}: another rank ended or did not answer ({error}); {AGAIN}") from error


def _of_an_exchange(error: RuntimeError) -> bool:
    """Whether an error is of a collective, and not of what one rank computes."""
    return isinstance(error, distributed.DistError) or OF_EXCHANGES.search(str(error)) is not None


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor
