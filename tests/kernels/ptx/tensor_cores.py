"""Matrix loads and products: ldmatrix, stmatrix, mma.sync and wgmma."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.data import picked, scattered
from tests.kernels.ptx.floats import cut_to_tf32, from_bf16, round_to_tf32, towards_zero
from tests.kernels.ptx.machine import SHARED_START, Action, Behaviour, Machine, Mask, instruction
from tests.kernels.ptx.memory import SEVERAL_WARPS, Fault, spread, user
from tests.kernels.ptx.parse import Instruction, UnsupportedError, vector
from tests.kernels.ptx.tma import swizzled
from tests.kernels.ptx.warp import whole_warps

SIZES = {"bf16": 2, "f16": 2, "tf32": 4, "s8": 1, "u8": 1}  # bytes of an element
LANE = np.arange(32)
GROUP = np.arange(128)  # threads of a warp group
SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes, by the mode of a descriptor


def elements(raw: np.ndarray, kind: str, behaviour: Behaviour) -> np.ndarray:
    """Return the numbers that tensor cores multiply, from bytes (..., n * size): float64 or int64 (..., n)."""
    raw = np.ascontiguousarray(raw)
    if kind == "tf32":
        convert = cut_to_tf32 if behaviour.cut_operands else round_to_tf32
        return convert(raw.view(np.float32)).astype(np.float64)
    if kind == "bf16":
        return from_bf16(raw.view(np.uint16)).astype(np.float64)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    return raw.view(np.int8 if kind == "s8" else np.uint8).astype(np.int64)


def added(old: np.ndarray, product: np.ndarray, behaviour: Behaviour) -> np.ndarray:
    """Return the 32 bits of old + product. Integers wrap around."""
    if product.dtype == np.int64:
        return (old.view(np.int32) + product).astype(np.int32).view(np.uint32)
    total = old.view(np.float32).astype(np.float64) + product
    return (towards_zero(total) if behaviour.cut_sums else total.astype(np.float32)).view(np.uint32)


# 8 x 8 matrices of 16 bits. Each lane has the address of a row, and two elements of each matrix.


@instruction("ldmatrix")
def _load_matrices(machine: Machine, one: Instruction) -> Action:
    writes = [machine.target(text) for text in vector(one.args[0])]
    address, count = machine.address(one.args[1]), len(writes)

    def load(mask: Mask) -> None:
        threads = whole_warps(machine, mask, "ldmatrix")
        rows = picked(address(), mask).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        readers = threads.reshape(-1, 32)[:, : 8 * count].reshape(-1)
        data = machine.load(True, rows, 16, readers, one).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in one.parts:
            data = data.transpose(0, 1, 3, 2)
        low, high = (data[:, :, LANE // 4, 2 * (LANE % 4) + n].astype(np.uint32) for n in (0, 1))
        both = low | high << np.uint32(16)  # (warps, count, 32)
        for n, write in enumerate(writes):
            write(scattered(machine, both[:, n].reshape(-1), threads), mask)

    return load


@instruction("stmatrix")
def _store_matrices(machine: Machine, one: Instruction) -> Action:
    values = [machine.values(text, "b32") for text in vector(one.args[1])]
    address, count = machine.address(one.args[0]), len(values)

    def store(mask: Mask) -> None:
        threads = whole_warps(machine, mask, "stmatrix").reshape(-1, 32)
        data = np.zeros((len(threads), count, 8, 8), np.uint16)
        for n, value in enumerate(values):
            both = picked(value(), mask).reshape(-1, 32)
            for half, part in enumerate((both & np.uint32(0xFFFF), both >> np.uint32(16))):
                data[:, n, LANE // 4, 2 * (LANE % 4) + half] = part.astype(np.uint16)
        if "trans" in one.parts:
            data = data.transpose(0, 1, 3, 2)
        rows = picked(address(), mask).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        payload = np.ascontiguousarray(data).view(np.uint8).reshape(-1, 16)
        machine.store(True, rows, payload, threads[:, : 8 * count].reshape(-1), one)

    return store


def _shape(one: Instruction) -> tuple[int, int, int, str, str]:
    """Return M, N, K and the types of the two factors."""
    match = re.search(r"m(\d+)n(\d+)k(\d+)", one.op)
    assert match is not None, one
    kinds = [part for part in one.parts if part in (*SIZES, "s32", "f32")]
    m, n, k = (int(size) for size in match.groups())
    return m, n, k, *kinds[1:3]


@instruction("mma")
def _warp_product(machine: Machine, one: Instruction) -> Action:
    m, n, k, kind_a, kind_b = _shape(one)
    writes = [machine.target(text) for text in vector(one.args[0])]
    a, b, c = ([machine.values(text, "b32") for text in vector(arg)] for arg in one.args[1:4])
    per = 4 // SIZES[kind_a]  # elements in a register
    column = (LANE % 4)[:, None] * per + np.arange(per)

    def numbers(register: Callable[[], np.ndarray], mask: Mask, kind: str) -> np.ndarray:
        raw = picked(register(), mask).reshape(-1, 32, 1).view(np.uint8)
        return elements(raw, kind, machine.behaviour)  # (warps, 32, per)

    def multiply(mask: Mask) -> None:
        threads = whole_warps(machine, mask, "mma")
        dtype = np.int64 if kind_a in ("s8", "u8") else np.float64
        left, right = (np.zeros((len(threads) // 32, *shape), dtype) for shape in ((m, k), (k, n)))
        for j, register in enumerate(a):
            rows = (LANE // 4 + 8 * (j % 2))[:, None]
            left[:, rows, column + j // 2 * 4 * per] = numbers(register, mask, kind_a)
        for j, register in enumerate(b):
            right[:, column + j * 4 * per, (LANE // 4)[:, None]] = numbers(register, mask, kind_b)
        product = left @ right
        for j, (register, write) in enumerate(zip(c, writes, strict=True)):
            old = picked(register(), mask).reshape(-1, 32)
            part = product[:, LANE // 4 + 8 * (j // 2), 2 * (LANE % 4) + j % 2]
            new = added(np.ascontiguousarray(old), part, machine.behaviour)
            write(scattered(machine, new.reshape(-1), threads), mask)

    return multiply


# Products of a warp group, whose factors are matrices in shared memory.


def _descriptor_matrix(
    machine: Machine, descriptor: int, rows: int, k: int, kind: str, transposed: bool, group: int, one: Instruction
) -> np.ndarray:
    """Return the (rows, k) numbers that a matrix descriptor names, and check who wrote them."""
    size = SIZES[kind]
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = SWIZZLES[(descriptor >> 62) & 3]
    if (descriptor >> 49) & 7:
        raise UnsupportedError("a base offset in a matrix descriptor")
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if swizzle:
        wide = swizzle // size
        if transposed:
            offset = (r % wide) * size + (r // wide) * leading + (c % 8) * swizzle + (c // 8) * stride
        else:
            offset = (r % 8) * swizzle + (r // 8) * stride + c * size
    else:
        wide = 16 // size
        if transposed:
            offset = (r % wide) * size + (r // wide) * stride + (c % 8) * 16 + (c // 8) * leading
        else:
            offset = (r % 8) * 16 + (r // 8) * stride + (c % wide) * size + (c // wide) * leading
    index = spread((swizzled(start + offset, swizzle) - SHARED_START).reshape(-1), size)
    if index.min() < 0 or index.max() >= machine.shared_size:
        raise Fault("a matrix descriptor reaches out of shared memory")
    if machine.memory.races:
        _check_group_reads(machine, index.reshape(-1), group, one)
    return elements(machine.shared[index].reshape(rows, k * size), kind, machine.behaviour)


def _check_group_reads(machine: Machine, index: np.ndarray, group: int, one: Instruction) -> None:
    """Check that no other warp group has written these bytes since the last barrier. A fence orders a group's own."""
    writer, now = machine.shadow.written[index], user(machine.program, machine.epoch, 0)
    bad = (writer >> 8 == now >> 8) & ((writer & 255) // 4 != group)
    if bad.any():
        warp = int(writer[bad][0]) & 255
        raise Fault(f"race: a product reads shared memory that warp {warp} wrote since the last barrier: {one}")
    machine.shadow.read[index] = now | SEVERAL_WARPS


@instruction("wgmma")
def _group_product(machine: Machine, one: Instruction) -> Action:
    if "fence" in one.parts:
        return lambda mask: None
    if "commit_group" in one.parts:
        return lambda mask: machine.products.commit()
    if "wait_group" in one.parts:
        return lambda mask: machine.products.wait(int(one.args[0]))
    _, n, k, kind_a, kind_b = _shape(one)
    outputs = [machine.kernel.register(text)[0] for text in vector(one.args[0])]
    in_registers = one.args[1].startswith("{")
    left = [machine.values(text, "b32" if in_registers else "u64") for text in vector(one.args[1])]
    right, adds = machine.values(one.args[2], "u64"), machine.values(one.args[3], "pred")
    # For floats: the signs of both factors. For 16-bit ones then the transpositions, of a only if it is in memory.
    flags = [int(text) for text in one.args[4:]]
    sign = flags[0] * flags[1] if len(flags) >= 2 else 1
    transposed = [bool(flag) for flag in ([0, 0] + flags[2:])[-2:]] if flags[2:] else [False, False]
    per = 4 // SIZES[kind_a]
    row = (GROUP // 32 * 16 + GROUP % 32 // 4)[:, None]
    column = (GROUP % 4)[:, None] * per + np.arange(per)

    def start(mask: Mask) -> None:
        active = np.ones(machine.threads, bool) if mask is None else mask
        for group in range(machine.threads // 128):
            chosen = slice(group * 128, group * 128 + 128)
            if not active[chosen].any():
                continue
            if not active[chosen].all():
                raise Fault("wgmma of a part of a warp group")
            # Register operands and descriptors are read now, matrices in memory when the work is done.
            values = [value()[chosen].copy() for value in left]
            b, add = int(right()[chosen][0]), bool(adds()[chosen][0])

            def work(
                group: int = group, chosen: slice = chosen, values: list[np.ndarray] = values, b: int = b,
                add: bool = add,
            ) -> None:  # fmt: skip
                second = _descriptor_matrix(machine, b, n, k, kind_b, transposed[1], group, one)
                if in_registers:
                    first = np.zeros((64, k), second.dtype)
                    for j, value in enumerate(values):
                        raw = value.reshape(128, 1).view(np.uint8)
                        numbers = elements(raw, kind_a, machine.behaviour)
                        first[row + 8 * (j % 2), column + j // 2 * 4 * per] = numbers
                else:
                    first = _descriptor_matrix(machine, int(values[0][0]), 64, k, kind_a, transposed[0], group, one)
                _accumulate(machine, outputs, chosen, sign * (first @ second.T), add)

            if machine.behaviour.late:
                machine.products.started.append(work)
            else:
                work()

    return start


def _accumulate(machine: Machine, outputs: list[int], chosen: slice, product: np.ndarray, add: bool) -> None:
    for j, index in enumerate(outputs):
        rows = GROUP // 32 * 16 + GROUP % 32 // 4 + 8 * (j // 2 % 2)
        columns = 8 * (j // 4) + 2 * (GROUP % 4) + j % 2
        register = machine.registers[index].copy()
        old = register[chosen] if add else np.zeros(128, np.uint32)
        register[chosen] = added(old, product[rows, columns], machine.behaviour)
        machine.registers[index] = register
