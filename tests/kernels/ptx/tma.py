"""Copies of boxes by tensor maps (TMA), and the mbarriers that they complete."""

from __future__ import annotations

import re
import struct

import numpy as np

from tests.kernels.ptx.machine import SHARED_START, Action, Barrier, Machine, Mask, instruction
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.parse import Instruction, UnsupportedError, split

SWIZZLE_BITS = {0: 0, 32: 1, 64: 2, 128: 3}  # by the bytes of a swizzle


def swizzled(address: np.ndarray, swizzle: int) -> np.ndarray:
    """Return addresses in shared memory, permuted within ``swizzle`` bytes by 16."""
    return address ^ (((address >> 7) & ((1 << SWIZZLE_BITS[swizzle]) - 1)) << 4)


def copy_box(machine: Machine, one: Instruction) -> Action:
    """Return the action of cp.async.bulk.tensor from global to shared memory."""
    target = next((n for n, part in enumerate(one.parts) if part.startswith("shared")), None)
    if "tensor" not in one.parts or target is None or target > one.parts.index("global"):
        raise UnsupportedError(one.op)
    source = re.match(r"\[\s*([%\w#]+)\s*,\s*\{(.*)\}\s*\]", one.args[1])
    assert source is not None, one
    descriptor = machine.values(source[1], "u64")
    coordinates = [machine.values(text, "s32") for text in split(source[2])]
    to, barrier = machine.address(one.args[0]), machine.address(one.args[2])

    def copy(mask: Mask) -> None:
        for thread in machine.chosen(mask):
            number = _map_number(machine, int(descriptor()[thread]))
            corner = [int(value()[thread]) for value in coordinates]
            place, of = int(to()[thread]), int(barrier()[thread])

            def work(number: int = number, corner: list[int] = corner, place: int = place, of: int = of) -> None:
                _fill_box(machine, number, corner, place, one)
                machine.barriers[of].bytes_left -= int(np.prod(machine.maps[number].box)) * machine.maps[number].size
                machine.barriers[of].update()

            if machine.behaviour.late:
                machine.boxes.setdefault(of, []).append(work)
            else:
                work()

    return copy


def _map_number(machine: Machine, address: int) -> int:
    for name, place in machine.addresses.items():
        if place == address:
            return int(struct.unpack("<q", machine.parameters[name][:8])[0])
    raise UnsupportedError("a tensor map that is not a parameter")


def _fill_box(machine: Machine, number: int, corner: list[int], place: int, one: Instruction) -> None:
    """Copy a box to shared memory, with zeros for what is outside of the tensor. The corner is (column, row)."""
    tensor = machine.maps[number]
    (rows, columns), (height, width), size = tensor.box, tensor.shape, tensor.size
    data = np.zeros((rows, columns * size), np.uint8)
    first_row, last_row = max(corner[1], 0), min(corner[1] + rows, height)
    first, last = max(corner[0], 0), min(corner[0] + columns, width)
    if first_row < last_row and first < last:
        count = (last - first) * size
        row = np.arange(first_row, last_row, dtype=np.int64)
        address = (tensor.start + (row * tensor.stride + first) * size).astype(np.uint64)
        for region, chosen, offset in machine.memory.find(address, count, one, 1):
            index = offset[:, None] + np.arange(count)
            begin = (first - corner[0]) * size
            data[row[chosen] - corner[1], begin : begin + count] = region.data[index]
            machine.note(region.shadow, index, np.zeros(len(chosen), np.int64), False, one)
    if place % 128:
        raise Fault(f"a box is copied to an address that is not a multiple of 128: {one}")
    bytes_of_row = columns * size
    if tensor.swizzle and bytes_of_row > tensor.swizzle:
        raise Fault(f"a box of {bytes_of_row} bytes is wider than its swizzle of {tensor.swizzle}: {one}")
    address = place + np.arange(rows)[:, None] * bytes_of_row + np.arange(bytes_of_row)
    offsets = swizzled(address, tensor.swizzle) - SHARED_START
    if offsets.min() < 0 or offsets.max() >= machine.shared_size:
        raise Fault(f"a box is copied out of shared memory: {one}")
    machine.shared[offsets] = data
    machine.shadow.forget(offsets.reshape(-1))  # the mbarrier orders these


@instruction("mbarrier")
def _barrier(machine: Machine, one: Instruction) -> Action:
    for name, make in {"init": _init, "inval": _invalidate, "try_wait": _wait, "arrive": _arrive}.items():
        if name in one.parts:
            return make(machine, one)
    raise UnsupportedError(one.op)


def _init(machine: Machine, one: Instruction) -> Action:
    address, count = machine.address(one.args[0]), machine.values(one.args[1], "u32")

    def init(mask: Mask) -> None:
        for thread in machine.chosen(mask):
            arrivals = int(count()[thread])
            machine.barriers[int(address()[thread])] = Barrier(arrivals, arrivals)

    return init


def _invalidate(machine: Machine, one: Instruction) -> Action:
    address = machine.address(one.args[0])

    def invalidate(mask: Mask) -> None:
        for thread in machine.chosen(mask):
            place = int(address()[thread])
            if machine.boxes.get(place) or machine.barriers[place].bytes_left:
                raise Fault("an mbarrier is given up before its copies have arrived")
            del machine.barriers[place]

    return invalidate


def _arrive(machine: Machine, one: Instruction) -> Action:
    address = machine.address(one.args[1])
    expected = machine.values(one.args[2], "u32") if "expect_tx" in one.parts else None

    def arrive(mask: Mask) -> None:
        for thread in machine.chosen(mask):
            barrier = machine.barriers[int(address()[thread])]
            barrier.bytes_left += int(expected()[thread]) if expected else 0
            barrier.pending -= 1
            if barrier.pending < 0:
                raise Fault("more arrivals than an mbarrier expects")
            barrier.update()

    return arrive


def _wait(machine: Machine, one: Instruction) -> Action:
    write = machine.target(one.args[0])
    address, parity = machine.address(one.args[1]), machine.values(one.args[2], "u32")

    def wait(mask: Mask) -> bool:
        places, wanted = address(), parity()
        complete = np.zeros(machine.threads, bool)
        for place in np.unique(places[machine.chosen(mask)]):
            for work in machine.boxes.pop(int(place), []):
                work()
            here = places == place
            complete[here] = wanted[here] != machine.barriers[int(place)].phase
        write(complete, mask)
        return bool(complete[machine.chosen(mask)].all())

    return wait
