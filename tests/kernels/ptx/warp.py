"""Instructions in which the lanes of a warp exchange values."""

from __future__ import annotations

import numpy as np

from tests.kernels.ptx.machine import Action, Machine, Mask, instruction
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.parse import Instruction


def whole_warps(machine: Machine, mask: Mask, what: str) -> np.ndarray:
    """Return the threads of a mask, which must be whole warps."""
    threads = machine.chosen(mask)
    if mask is not None and (mask.reshape(-1, 32).sum(1) % 32).any():
        raise Fault(f"{what} of a part of a warp")
    return threads


@instruction("shfl")
def _shuffle(machine: Machine, one: Instruction) -> Action:
    mode = one.parts[2]
    targets = [machine.target(text) for text in one.args[0].split("|")]
    value, other, limits = (machine.values(text, "u32") for text in one.args[1:4])

    def shuffle(mask: Mask) -> None:
        lane, step, packed = machine.lane, other().astype(np.int64), limits().astype(np.int64)
        clamp, segment = packed & 31, (packed >> 8) & 31
        source = {
            "up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": (lane & segment) | (step & ~segment)
        }[mode]  # fmt: skip
        limit = (lane & segment) | (clamp & ~segment)
        valid = source >= limit if mode == "up" else source <= limit
        thread = machine.warp * 32 + np.where(valid, source, lane)
        if mask is not None and not mask[thread][mask].all():
            raise Fault("a shuffle reads a lane that does not take part")
        targets[0](value()[thread], mask)
        for target in targets[1:]:
            target(valid, mask)

    return shuffle


REDUCTIONS = {"add": np.add, "max": np.maximum, "min": np.minimum}
REDUCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction("redux")
def _reduce(machine: Machine, one: Instruction) -> Action:
    write, value = machine.target(one.args[0]), machine.values(one.args[1], one.parts[-1])
    reduction = REDUCTIONS[one.parts[2]]

    def reduce(mask: Mask) -> None:
        whole_warps(machine, mask, "redux")
        rows = value().reshape(-1, 32)
        write(np.repeat(reduction.reduce(rows, axis=1, dtype=rows.dtype), 32), mask)

    return reduce


@instruction("vote")
def _vote(machine: Machine, one: Instruction) -> Action:
    how = one.parts[2]
    write, value = machine.target(one.args[0]), machine.values(one.args[1], "pred")

    def vote(mask: Mask) -> None:
        votes = value() if mask is None else np.where(mask, value(), how == "all")
        rows = votes.reshape(-1, 32)
        if how == "ballot":
            result = (rows.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        else:
            result = rows.any(1) if how == "any" else rows.all(1)
        write(np.repeat(result, 32), mask)

    return vote


@instruction("elect")
def _elect(machine: Machine, one: Instruction) -> Action:
    lane, chosen = (machine.target(text) for text in one.args[0].split("|"))

    def elect(mask: Mask) -> None:
        rows = (np.ones(machine.threads, bool) if mask is None else mask).reshape(-1, 32)
        first = rows & (rows.cumsum(1) == 1)
        lane(np.repeat(rows.argmax(1).astype(np.uint32), 32), mask)
        chosen(first.reshape(-1), mask)

    return elect


@instruction("activemask")
def _active(machine: Machine, one: Instruction) -> Action:
    write = machine.target(one.args[0])
    return lambda mask: write(np.full(machine.threads, 0xFFFFFFFF, np.uint32), mask)


@instruction("fence", "membar", "prefetch", "setmaxnreg", "griddepcontrol")
def _nothing(machine: Machine, one: Instruction) -> Action:
    return lambda mask: None
