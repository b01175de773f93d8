"""Global and shared memory as numpy bytes, with every access checked: bounds, alignment and races."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

NOBODY = -1
SEVERAL_PROGRAMS, SEVERAL_WARPS = 2**31 - 1, 255  # in place of one


class Fault(Exception):  # noqa: N818
    """A defect of the program: what would be wrong on a GPU, or could be."""


def user(program: int, epoch: int, warp: Any) -> Any:
    """Return the number of a warp in the time between two barriers of its program."""
    return (program << 32) | (epoch << 8) | warp


class Shadow:
    """The last `user` that wrote, and that read, each byte.

    Two accesses of a byte, one of them a write, must belong to one warp, or to one program with a barrier between them.
    """

    def __init__(self, size: int) -> None:
        self.written = np.full(size, NOBODY, np.int64)
        self.read = np.full(size, NOBODY, np.int64)
        self.atomic = np.zeros(size, bool)

    def note(
        self, index: np.ndarray, program: int, warp: np.ndarray, epoch: int, write: bool, atomic: bool, what: object
    ) -> None:
        """Record an access of bytes by warps, or raise `Fault` if it races with an earlier one."""
        mine = user(program, epoch, warp)
        writer = self.written[index]
        if atomic:
            writer = np.where(self.atomic[index], NOBODY, writer)
        self._check(writer, mine, index, write, what)
        reader = self.read[index]
        if write:
            if not atomic:
                self._check(reader, mine, index, write, what)
            self.written[index] = mine
            self.atomic[index] = atomic
            return
        different = reader ^ mine
        others = (reader != NOBODY) & (different >> 32 != 0)
        now = np.where(others, user(SEVERAL_PROGRAMS, 0, 0), mine)
        self.read[index] = np.where((different >> 8 == 0) & (different != 0), now | SEVERAL_WARPS, now)

    @staticmethod
    def _check(last: np.ndarray, mine: np.ndarray, index: np.ndarray, write: bool, what: object) -> None:
        different = last ^ mine
        if not different.any():
            return
        bad = (last != NOBODY) & ((different >> 32 != 0) | ((different >> 8 == 0) & (different != 0)))
        if bad.any():
            n = int(bad.argmax())
            names = [f"program {code >> 32}, warp {code & 255}" for code in (int(mine[n]), int(last[n]))]
            raise Fault(
                f"race: {names[0]} {'writes' if write else 'reads'} byte {index[n]}, which {names[1]} used without a "
                f"barrier between them: {what}"
            )

    def forget(self, index: np.ndarray) -> None:
        """Forget accesses that something other than a barrier has ordered."""
        self.written[index] = NOBODY
        self.read[index] = NOBODY


class Zeros:
    """As many bytes as an index may name: they read 0 and forget what is written. For addresses at full size."""

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        return np.zeros(index.stop - index.start if isinstance(index, slice) else index.shape, np.uint8)

    def __setitem__(self, index: np.ndarray, value: np.ndarray) -> None:
        pass


@dataclass
class Region:
    """A tensor in global memory."""

    start: int
    end: int
    data: Any  # (bytes,) uint8 or Zeros
    label: str
    shadow: Shadow | None


class Memory:
    """The tensors of a launch.

    Args:
        races: keep track of accesses.
    """

    def __init__(self, races: bool = True) -> None:
        self.regions: list[Region] = []
        self.races = races

    def add(self, start: int, data: Any, size: int, label: str) -> None:
        """Add a tensor, once."""
        if size and all((r.start, r.end) != (start, start + size) for r in self.regions):
            shadow = Shadow(size) if self.races and not isinstance(data, Zeros) else None
            self.regions.append(Region(start, start + size, data, label, shadow))
            self.regions.sort(key=lambda region: region.end - region.start)  # prefer a view to what contains it

    def find(
        self, address: np.ndarray, size: int, what: object, align: int
    ) -> list[tuple[Region, np.ndarray, np.ndarray]]:
        """Return the regions of these accesses, the numbers of the accesses in each, and their offsets."""
        if (address % np.uint64(align)).any():
            raise Fault(f"misaligned access of {align} bytes: {what}")
        out, left = [], np.ones(len(address), bool)
        for region in self.regions:
            inside = left & (address >= np.uint64(region.start)) & (address + np.uint64(size) <= np.uint64(region.end))
            if inside.any():
                chosen = inside.nonzero()[0]
                out.append((region, chosen, (address[chosen] - np.uint64(region.start)).astype(np.int64)))
                left &= ~inside
                if not left.any():
                    return out
        if left.any():
            bad = int(address[left][0])
            near = min(self.regions, key=lambda r: min(abs(bad - r.start), abs(bad - r.end)))
            raise Fault(
                f"address outside of every tensor: byte {bad - near.start} of {near.label}, which has "
                f"{near.end - near.start}: {what}"
            )
        return out


def spread(offsets: np.ndarray, size: int) -> np.ndarray:
    """Return the indices (n, size) of the bytes of accesses."""
    return offsets[:, None] + np.arange(size)
