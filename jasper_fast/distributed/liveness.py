"""Who of several processes is still there: each notes where it is in the store, which outlives broken connections."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

POLL = 0.05  # seconds
NOTICED = 2**62  # the place of a rank that knows that something failed


class Roll:
    """Where every rank is.

    Args:
        store: that all ranks share (``torch.distributed.Store``).
        rank, world: of this process, and how many there are.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world, self.place = store, rank, world, 0
        store.set(f"process/{rank}", json.dumps([_machine(), os.getpid(), _birth(os.getpid())]))
        store.set(f"at/{rank}", "0")

    def arrive(self) -> None:
        """Note that this rank has come to the next place where all meet."""
        self.place += 1
        self.store.set(f"at/{self.rank}", str(self.place))

    def missing(self, seconds: float) -> list[int]:
        """The ranks to blame for what failed here; none where all of them noticed that it failed.

        Those whose process has ended; where none has, those that did not come to this place; where all came, those that
        stay silent. A rank that asks this too has noticed, and is not to blame even if it has ended since. What runs on
        another machine cannot be seen to end.

        Args:
            seconds: how long to wait for the others to notice.

        Raises:
            RuntimeError: the store is gone, and with it the process that holds it.
        """
        deadline = time.monotonic() + seconds
        self.store.set(f"at/{self.rank}", str(NOTICED))
        late: list[int] = []
        while True:
            places = [int(place) for place in self.store.multi_get([f"at/{rank}" for rank in range(self.world)])]
            silent = [rank for rank, place in enumerate(places) if place < NOTICED]
            ended = [rank for rank in silent if self._has_ended(rank)]
            late = [rank for rank in silent if places[rank] < self.place] or late
            # The first rank may hold the store: it stays until the others have looked. That the others leave is what a
            # rank notices that waits for them.
            if silent == ended or (ended and self.rank) or time.monotonic() > deadline:
                return ended or late or silent
            time.sleep(POLL)

    def _has_ended(self, rank: int) -> bool:
        machine, number, birth = json.loads(self.store.get(f"process/{rank}"))
        return birth is not None and machine == _machine() and _birth(number) != birth


def _machine() -> list[str]:
    """What processes have in common that see each other's numbers."""
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # not Linux: nobody's end is seen
        return []


def _birth(process: int) -> str | None:
    """When a process of this machine began, in ticks; None where it has ended, or this system does not tell."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # its name may hold anything
    return None if state in "ZX" else rest[18]
