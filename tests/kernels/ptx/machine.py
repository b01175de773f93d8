"""Execution of a parsed kernel: threads in step, divergence, barriers, and operands as numpy arrays over threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.kernels.ptx.floats import FLOATS, UNSIGNED, integer
from tests.kernels.ptx.memory import Fault, Memory, Shadow, spread
from tests.kernels.ptx.parse import Instruction, Kernel, UnsupportedError

SHARED_START = 1024  # address of dynamic shared memory, as on sm_90
PARAMETER_START, PARAMETER_STEP = 1 << 40, 256  # addresses of parameters, for tensor maps
POISON = {1: False, 16: 0x7FE1, 32: 0x7FC12345, 64: 0x7FF8DEADBEEF0001}  # registers at first: NaN
MAX_SPINS = 10_000  # tries of an mbarrier before it counts as never completed

Mask = np.ndarray | None  # threads that take part, (threads,) bool; None: all
Action = Callable[[Mask], object]
Maker = Callable[["Machine", Instruction], Action]
MAKERS: dict[str, Maker] = {}


def instruction(*names: str) -> Callable[[Maker], Maker]:
    """Register the function that makes the actions of opcodes."""

    def register(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(names, maker))
        return maker

    return register


@dataclass(frozen=True)
class TensorMap:
    """A tensor descriptor: a matrix in global memory, and the box that a copy takes from it."""

    start: int
    shape: tuple[int, ...]
    stride: int  # elements between rows
    box: tuple[int, ...]
    size: int  # bytes of an element
    swizzle: int  # bytes, 0 for none


@dataclass(frozen=True)
class Behaviour:
    """Where the hardware has a choice.

    Args:
        late: asynchronous copies and products happen when they are waited for, instead of at once.
        cut_operands: tensor cores ignore the low 13 bits of float32 operands. False rounds them, which no GPU does.
        cut_sums: tensor cores round their partial sums towards zero. False rounds them to nearest.
    """

    late: bool = True
    cut_operands: bool = True
    cut_sums: bool = True


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes of a phase that are still to come."""

    count: int
    pending: int
    bytes_left: int = 0
    phase: int = 0

    def update(self) -> None:
        """Begin the next phase if this one is complete."""
        if self.pending == 0 and self.bytes_left == 0:
            self.phase ^= 1
            self.pending = self.count


@dataclass
class Pending:
    """Asynchronous work in the order of its start: not yet committed, and committed groups."""

    started: list[Callable[[], None]] = field(default_factory=list)
    groups: list[list[Callable[[], None]]] = field(default_factory=list)

    def commit(self) -> None:
        """Close the group of what was started."""
        self.groups.append(self.started)
        self.started = []

    def wait(self, left: int) -> None:
        """Do all groups but the last ``left``."""
        while len(self.groups) > left:
            for work in self.groups.pop(0):
                work()


class Machine:
    """One launch of a kernel.

    Args:
        kernel: the kernel.
        parameters: bytes of each parameter.
        memory: tensors of the launch.
        shared: bytes of dynamic shared memory.
        maps: tensor maps. The parameter of a map holds its number.
        behaviour: choices of the hardware.
    """

    def __init__(
        self, kernel: Kernel, parameters: Sequence[bytes], memory: Memory, shared: int,
        maps: Sequence[TensorMap] = (), behaviour: Behaviour = Behaviour(),
    ) -> None:  # fmt: skip
        self.kernel, self.memory, self.maps, self.behaviour = kernel, memory, maps, behaviour
        self.threads = kernel.threads
        self.parameters = {name: data for (name, _), data in zip(kernel.parameters, parameters, strict=True)}
        names = [name for name, _ in kernel.parameters]
        self.addresses = {name: PARAMETER_START + n * PARAMETER_STEP for n, name in enumerate(names)}
        self.shared_size = max(shared, 16)
        self.thread = np.arange(self.threads, dtype=np.uint32)
        self.lane, self.warp = (self.thread % 32).astype(np.int64), (self.thread // 32).astype(np.int64)
        self.registers: list[np.ndarray] = []
        self.program_index, self.grid, self.program = (0, 0, 0), (1, 1, 1), 0
        self.actions = [[self._action(one) for one in block] for block in kernel.blocks]

    # A program.

    def run(self, program: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Run one program of a grid, from its first instruction to its last."""
        self.program_index, self.grid = program, grid
        self.program = program[0] + grid[0] * (program[1] + grid[1] * program[2])
        widths = [bits for _, bits in self.kernel.registers.values()]
        self.registers = [np.full(self.threads, POISON[b], bool if b == 1 else UNSIGNED[b]) for b in widths]
        self.shared = np.full(self.shared_size, 0xFF, np.uint8)
        self.shadow = Shadow(self.shared_size)
        self.epoch = 0  # barriers passed
        self.copies, self.products = Pending(), Pending()
        self.barriers: dict[int, Barrier] = {}
        self.boxes: dict[int, list[Callable[[], None]]] = {}  # copies of tensor maps by barrier
        self.counter = np.zeros(self.threads, np.int64)  # number of each thread's block
        self.waiting = np.full(self.threads, -1, np.int64)  # number of the barrier that a thread waits at
        self.needed: dict[int, int] = {}  # threads that a barrier waits for
        self.alive = np.ones(self.threads, bool)
        self.spins = 0
        with np.errstate(all="ignore"):
            while self.alive.any():
                ready = self.alive & (self.waiting < 0)
                if ready.any():
                    block = int(self.counter[ready].min())
                    self._run_block(block, ready & (self.counter == block))
                else:
                    self._release()
        if self.products.started or any(self.products.groups):
            raise Fault("the program ends with products that nothing waited for")

    def _release(self) -> None:
        """Let the threads of complete barriers go on."""
        released = False
        for number in np.unique(self.waiting[self.alive]):
            here = self.alive & (self.waiting == number)
            wanted = self.needed[int(number)]
            if here.sum() >= wanted or (wanted == self.threads and here.sum() == self.alive.sum()):
                self.waiting[here] = -1
                self.epoch += 1
                released = True
        if not released:
            raise Fault("deadlock: not all threads reach a barrier")

    def _run_block(self, number: int, active: np.ndarray) -> None:
        mask = None if active.all() else active
        self.counter[active] = number + 1
        for action, one in zip(self.actions[number], self.kernel.blocks[number], strict=True):
            try:
                done = action(mask)
            except (Fault, UnsupportedError) as error:
                place = f"program {self.program_index} of {self.kernel.name}, {one}"
                raise type(error)(f"{error} | {place}") from None
            if one.op.startswith("mbarrier.try_wait"):
                self.spins = 0 if done else self.spins + 1
                if self.spins > MAX_SPINS:
                    raise Fault(f"an mbarrier is never completed: {one}")

    def _action(self, one: Instruction) -> Action:
        """Return what an instruction does with its guard. Unknown instructions fail only if they are reached."""
        head = one.parts[0]
        try:
            inner = (CONTROL.get(head) or MAKERS[head])(self, one)
        except (UnsupportedError, KeyError) as error:
            inner = _failing(f"unknown: {error!r}")
        if one.predicate is None:
            return inner
        guard = self.values(one.predicate, "pred")

        def guarded(mask: Mask) -> object:
            wanted = guard() ^ one.negated
            if mask is not None:
                wanted = wanted & mask
            return inner(None if wanted.all() else wanted) if wanted.any() else None

        return guarded

    # Operands.

    def values(self, text: str, kind: str) -> Callable[[], np.ndarray]:
        """Return a function that reads an operand over all threads, as a type such as b32, s64, f16 or pred."""
        if text in _SPECIAL:
            return lambda: _SPECIAL[text](self).astype(integer(kind))
        bits = 1 if kind == "pred" else int(re.sub(r"\D", "", kind))
        view = FLOATS.get(kind) or (None if kind == "pred" else integer(kind))
        if text.startswith("%") or text in self.kernel.registers:
            index, own = self.kernel.register(text)
            if own == 1:
                return lambda: self.registers[index]
            if own == bits:
                return lambda: self.registers[index].view(view)
            return lambda: self.registers[index].astype(UNSIGNED[bits]).view(view)  # a part of a wider register
        constant = np.full(self.threads, self._constant(text, bits))
        if kind == "pred":
            constant = constant != 0
        elif view is not None:
            constant = constant.astype(UNSIGNED[bits]).view(view)
        return lambda: constant

    def _constant(self, text: str, bits: int) -> np.uint64:
        if text == "global_smem":
            return np.uint64(SHARED_START)
        if text in self.addresses:
            return np.uint64(self.addresses[text])
        if re.match(r"^0[fFdD][0-9A-Fa-f]+$", text):
            return np.uint64(int(text[2:], 16))
        number = re.match(r"^(-?)(0[xX][0-9A-Fa-f]+|\d+)U?$", text)
        if number is None:
            raise UnsupportedError(f"operand {text}")
        return np.uint64(int(number[2], 0) * (-1 if number[1] else 1) & ((1 << bits) - 1))

    def target(self, text: str) -> Callable[[np.ndarray, Mask], None]:
        """Return a function that writes an array over all threads into a register, where the mask has threads."""
        if text == "_":
            return lambda values, mask: None
        index, bits = self.kernel.register(text)
        dtype: Any = bool if bits == 1 else UNSIGNED[bits]

        def write(values: np.ndarray, mask: Mask) -> None:
            if values.dtype.itemsize * 8 == bits:
                values = values.view(dtype)
            elif values.dtype != dtype:  # extended by the value's own sign
                values = values.astype(dtype)
            self.registers[index] = values if mask is None else np.where(mask, values, self.registers[index])

        return write

    def address(self, text: str) -> Callable[[], np.ndarray]:
        """Return a function that reads an address such as [%rd1+16], (threads,) uint64."""
        match = re.match(r"^\[\s*([%\w$#.]+)\s*(?:\+\s*(-?(?:0x)?[0-9A-Fa-f]+))?\s*\]$", text.strip())
        if match is None:
            raise UnsupportedError(f"address {text}")
        is_register = match[1].startswith("%") or match[1] in self.kernel.registers
        bits = self.kernel.register(match[1])[1] if is_register else 64
        base = self.values(match[1], f"u{bits}")
        offset = UNSIGNED[bits](int(match[2] or "0", 0) & ((1 << bits) - 1))
        return lambda: (base() + offset).astype(np.uint64)

    def chosen(self, mask: Mask) -> np.ndarray:
        """Return the numbers of the threads of a mask."""
        return np.arange(self.threads) if mask is None else mask.nonzero()[0]

    # Memory.

    def load(self, shared: bool, address: np.ndarray, size: int, threads: np.ndarray, what: object) -> np.ndarray:
        """Read ``size`` bytes for each thread: (n, size)."""
        if shared:
            index = spread(self.shared_offset(address, size, what), size)
            self.note(self.shadow, index, threads, False, what)
            return self.shared[index]
        out = np.empty((len(address), size), np.uint8)
        for region, chosen, offset in self.memory.find(address, size, what, size):
            index = spread(offset, size)
            out[chosen] = region.data[index]
            self.note(region.shadow, index, threads[chosen], False, what)
        return out

    def store(self, shared: bool, address: np.ndarray, data: np.ndarray, threads: np.ndarray, what: object) -> None:
        """Write the bytes of each thread, (n, size)."""
        size = data.shape[1]
        if shared:
            index = spread(self.shared_offset(address, size, what), size)
            self.note(self.shadow, index, threads, True, what)
            self.shared[index] = data
            return
        for region, chosen, offset in self.memory.find(address, size, what, size):
            index = spread(offset, size)
            self.note(region.shadow, index, threads[chosen], True, what)
            region.data[index] = data[chosen]

    def shared_offset(self, address: np.ndarray, size: int, what: object) -> np.ndarray:
        """Return offsets in shared memory, aligned and inside."""
        offset = address.astype(np.int64) - SHARED_START
        if len(offset) and (offset.min() < 0 or offset.max() + size > self.shared_size):
            raise Fault(f"shared memory out of bounds: offset {offset.min()} to {offset.max() + size}: {what}")
        if (offset % size).any():
            raise Fault(f"misaligned access of shared memory: {what}")
        return offset

    def note(
        self, shadow: Shadow | None, index: np.ndarray, threads: np.ndarray, write: bool, what: object,
        atomic: bool = False,
    ) -> None:  # fmt: skip
        """Check an access of bytes (n, size) for races."""
        if shadow is not None and self.memory.races:
            warp = np.repeat(self.warp[threads], index.shape[1])
            shadow.note(index.reshape(-1), self.program, warp, self.epoch, write, atomic, what)


# Instructions that decide what runs next.


def _branch(machine: Machine, one: Instruction) -> Action:
    def branch(mask: Mask) -> None:
        machine.counter[machine.chosen(mask)] = machine.kernel.labels[one.args[0]]

    return branch


def _exit(machine: Machine, one: Instruction) -> Action:
    def leave(mask: Mask) -> None:
        machine.alive[machine.chosen(mask)] = False

    return leave


def _barrier(machine: Machine, one: Instruction) -> Action:
    if "sync" not in one.parts:
        raise UnsupportedError(one.op)
    number = machine.values(one.args[0], "u32")

    def wait(mask: Mask) -> None:
        threads = machine.chosen(mask)
        which = int(number()[threads[0]])
        machine.needed[which] = int(one.args[1], 0) if len(one.args) > 1 else machine.threads
        machine.waiting[threads] = which

    return wait


def _failing(text: str) -> Action:
    def fail(mask: Mask) -> None:
        raise UnsupportedError(text)

    return fail


def _trap(machine: Machine, one: Instruction) -> Action:
    def trap(mask: Mask) -> None:
        raise Fault("trap")

    return trap


CONTROL: dict[str, Maker] = {"bra": _branch, "ret": _exit, "exit": _exit, "trap": _trap}
CONTROL |= {"bar": _barrier, "barrier": _barrier}


def _axis(name: str, axis: int) -> Callable[[Machine], np.ndarray]:
    def value(machine: Machine) -> np.ndarray:
        sizes = {"ctaid": machine.program_index, "nctaid": machine.grid, "ntid": (machine.threads, 1, 1)}
        return np.full(machine.threads, sizes[name][axis] if name in sizes else 0)

    return value


_SPECIAL: dict[str, Callable[[Machine], np.ndarray]] = {
    f"%{name}.{letter}": _axis(name, axis)
    for name in ("ctaid", "nctaid", "ntid", "tid")
    for axis, letter in enumerate("xyz")
}
_SPECIAL |= {"%tid.x": lambda m: m.thread, "%laneid": lambda m: m.lane, "%warpid": lambda m: m.warp}
