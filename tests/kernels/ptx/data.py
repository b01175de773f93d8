"""Loads, stores, atomics and asynchronous copies of single elements."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.floats import FLOATS, integer
from tests.kernels.ptx.machine import Action, Machine, Mask, instruction
from tests.kernels.ptx.memory import spread
from tests.kernels.ptx.parse import Instruction, UnsupportedError, vector
from tests.kernels.ptx.tma import copy_box


def is_shared(one: Instruction) -> bool:
    """Return True for an access of shared memory."""
    return any(part.startswith("shared") for part in one.parts)


def picked(values: np.ndarray, mask: Mask) -> np.ndarray:
    """Return the values of the threads of a mask."""
    return values if mask is None else values[mask]


def scattered(machine: Machine, values: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """Return values over all threads from those of some."""
    out = np.zeros(machine.threads, values.dtype)
    out[threads] = values
    return out


@instruction("ld")
def _load(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]
    dtype = FLOATS.get(kind) or integer(kind)
    size = np.dtype(dtype).itemsize
    writes = [machine.target(text) for text in vector(one.args[0])]
    if "param" in one.parts:
        match = re.match(r"\[\s*(\w+)\s*(?:\+\s*(\d+))?\s*\]", one.args[1])
        assert match is not None, one
        first = int(match[2] or 0)
        value = np.frombuffer(machine.parameters[match[1]][first : first + size], dtype)
        constant = np.repeat(value, machine.threads)
        return lambda mask: writes[0](constant, mask)
    address, shared = machine.address(one.args[1]), is_shared(one)

    def load(mask: Mask) -> None:
        threads = machine.chosen(mask)
        data = machine.load(shared, picked(address(), mask), len(writes) * size, threads, one)
        columns = data.reshape(len(threads), len(writes), size)
        for n, write in enumerate(writes):
            values = np.ascontiguousarray(columns[:, n]).view(dtype)[:, 0]
            write(values if mask is None else scattered(machine, values, threads), mask)

    return load


@instruction("st")
def _store(machine: Machine, one: Instruction) -> Action:
    bits = int(re.sub(r"\D", "", one.parts[-1]))
    values = [machine.values(text, f"b{bits}") for text in vector(one.args[1])]
    address, shared = machine.address(one.args[0]), is_shared(one)

    def store(mask: Mask) -> None:
        columns = [picked(value(), mask) for value in values]
        data = np.stack(columns, 1).view(np.uint8)
        machine.store(shared, picked(address(), mask), data, machine.chosen(mask), one)

    return store


COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or,
    "exch": lambda old, new: new,
}  # fmt: skip


@instruction("atom", "red")
def _atomic(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]
    how = next((part for part in one.parts if part in COMBINE), None)
    if how is None:
        raise UnsupportedError(one.op)
    dtype: Any = FLOATS.get(kind) or integer(kind)
    size = np.dtype(dtype).itemsize
    returns = one.parts[0] == "atom"
    write = machine.target(one.args[0]) if returns else None
    address, value = machine.address(one.args[returns]), machine.values(one.args[1 + returns], kind)
    shared = is_shared(one)

    def atomic(mask: Mask) -> None:
        threads = machine.chosen(mask)
        places, operands = picked(address(), mask), picked(value(), mask)
        old = np.empty(len(threads), dtype)
        if shared:
            accesses = [(machine.shared, np.arange(len(threads)), machine.shared_offset(places, size, one))]
        else:
            accesses = []
            for region, chosen, offsets in machine.memory.find(places, size, one, size):
                machine.note(region.shadow, spread(offsets, size), threads[chosen], True, one, atomic=True)
                accesses.append((region.data, chosen, offsets))
        for data, chosen, offsets in accesses:
            for n, offset in zip(chosen, offsets, strict=True):  # one after the other, as equal addresses need
                cell = data[offset : offset + size].view(dtype)
                old[n] = cell[0]
                cell[0] = COMBINE[how](cell[0], operands[n])
        if write:
            write(scattered(machine, old, threads), mask)

    return atomic


@instruction("cp")
def _copy(machine: Machine, one: Instruction) -> Action:
    if "bulk" in one.parts:
        return copy_box(machine, one)
    if one.parts[2] == "commit_group":
        return lambda mask: machine.copies.commit()
    if one.parts[2] == "wait_group":
        return lambda mask: machine.copies.wait(int(one.args[0]))
    if one.parts[2] == "wait_all":

        def wait_all(mask: Mask) -> None:
            machine.copies.commit()
            machine.copies.wait(0)

        return wait_all
    to, source, size = machine.address(one.args[0]), machine.address(one.args[1]), int(one.args[2], 0)
    given = machine.values(one.args[3], "u32") if len(one.args) > 3 else None

    def copy(mask: Mask) -> None:
        threads, places, sources = machine.chosen(mask), picked(to(), mask), picked(source(), mask)
        count = np.full(len(threads), size) if given is None else picked(given(), mask)
        if not np.isin(count, (0, size)).all():
            raise UnsupportedError("cp.async of a part")

        def work() -> None:
            data, real = np.zeros((len(threads), size), np.uint8), count > 0
            data[real] = machine.load(False, sources[real], size, threads[real], one)
            machine.store(True, places, data, threads, one)

        if machine.behaviour.late:
            machine.copies.started.append(work)
        else:
            work()

    return copy
