"""Heartbeats of all ranks in the rendezvous store, which outlives broken connections."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

POLL = 0.05  # seconds
FAILED = 2**62  # the position of a rank that has detected a failure


class Liveness:
    """Position and process of every rank.

    Args:
        store: the store that all ranks use (``torch.distributed.Store``).
        rank: the rank of this process.
        world: the number of ranks.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world, self.position = store, rank, world, 0
        store.set(f"process/{rank}", json.dumps([_machine(), os.getpid(), _start_time(os.getpid())]))
        store.set(f"at/{rank}", "0")

    def beat(self) -> None:
        """Record that this rank has arrived at the next barrier."""
        self.position += 1
        self.store.set(f"at/{self.rank}", str(self.position))

    def lost(self, seconds: float) -> list[int]:
        """Return the ranks that most likely caused the failure. Empty if all of them detected it.

        Ranks whose process has ended come first. If there are none, the result is the ranks that did not reach this
        barrier. If all reached it, the result is the ranks that stay silent. A rank that calls this method has
        detected the failure, so it is not a cause, even if it has ended since. The end of a process on another machine
        cannot be seen.

        Args:
            seconds: time to wait until the others detect the failure.

        Raises:
            RuntimeError: the store is gone, and with it the process that holds it.
        """
        deadline = time.monotonic() + seconds
        self.store.set(f"at/{self.rank}", str(FAILED))
        late: list[int] = []
        while True:
            positions = [int(position) for position in self.store.multi_get([f"at/{r}" for r in range(self.world)])]
            silent = [rank for rank, position in enumerate(positions) if position < FAILED]
            ended = [rank for rank in silent if self._has_ended(rank)]
            late = [rank for rank in silent if positions[rank] < self.position] or late
            # Rank 0 may hold the store, so it stays until the others have looked. The others leave at once: ranks that
            # wait for them detect that.
            if silent == ended or (ended and self.rank) or time.monotonic() > deadline:
                return ended or late or silent
            time.sleep(POLL)

    def _has_ended(self, rank: int) -> bool:
        machine, process, started = json.loads(self.store.get(f"process/{rank}"))
        return started is not None and machine == _machine() and _start_time(process) != started


def _machine() -> list[str]:
    """Return the identity that is equal for processes which see each other's process ids."""
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # not Linux: the end of a process is not seen
        return []


def _start_time(process: int) -> str | None:
    """Return when a process of this machine started, in ticks. None if it has ended or the system does not say."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may contain anything
    return None if state in "ZX" else rest[18]
