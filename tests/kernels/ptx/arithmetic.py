"""Instructions that compute one value for each thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.floats import (
    FLOATS,
    UNSIGNED,
    fma64,
    from_bf16,
    integer,
    round_to_tf32,
    to_bf16,
    towards_zero,
)
from tests.kernels.ptx.machine import Action, Machine, Mask, instruction
from tests.kernels.ptx.parse import Instruction, UnsupportedError, vector

Array = np.ndarray


def compute(machine: Machine, one: Instruction, kinds: list[str], function: Callable[..., Array]) -> Action:
    """Return the action that writes a function of the operands, read as these types."""
    write = machine.target(one.args[0])
    operands = [machine.values(text, kind) for text, kind in zip(one.args[1:], kinds, strict=False)]
    return lambda mask: write(function(*(operand() for operand in operands)), mask)


def _binary(integers: Callable[[Array, Array], Array]) -> Callable[[Machine, Instruction], Action]:
    def make(machine: Machine, one: Instruction) -> Action:
        kind = one.parts[-1]
        if kind in ("bf16", "bf16x2", "f16x2"):
            raise UnsupportedError(one.op)
        return compute(machine, one, [kind, kind], integers)

    return make


for _name, _function in {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}.items():
    instruction(_name)(_binary(_function))


@instruction("min", "max")
def _extreme(machine: Machine, one: Instruction) -> Action:
    ignoring, keeping = (np.fmin, np.minimum) if one.parts[0] == "min" else (np.fmax, np.maximum)
    return _binary(ignoring if one.parts[-1] in FLOATS and "NaN" not in one.parts else keeping)(machine, one)


@instruction("mul")
def _multiply(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]
    if kind in FLOATS or "lo" in one.parts:
        return compute(machine, one, [kind, kind], np.multiply)
    wide = integer(f"{kind[0]}{2 * int(kind[1:])}")
    if "wide" in one.parts:
        return compute(machine, one, [kind, kind], lambda a, b: a.astype(wide) * b.astype(wide))
    shift, narrow = wide(int(kind[1:])), integer(kind)
    return compute(machine, one, [kind, kind], lambda a, b: (a.astype(wide) * b.astype(wide) >> shift).astype(narrow))


@instruction("mad")
def _multiply_add(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]
    if "wide" not in one.parts:
        return compute(machine, one, [kind] * 3, lambda a, b, c: a * b + c)
    third = f"{kind[0]}{2 * int(kind[1:])}"
    wide = integer(third)
    return compute(machine, one, [kind, kind, third], lambda a, b, c: a.astype(wide) * b.astype(wide) + c)


@instruction("fma")
def _fused(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]
    if kind == "f32":  # the product of two float32 is exact in float64
        return compute(machine, one, [kind] * 3, lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32))
    if kind == "f64":
        return compute(machine, one, [kind] * 3, fma64)
    raise UnsupportedError(one.op)


@instruction("div", "rem")
def _divide(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]
    if kind == "f32":
        return compute(machine, one, [kind, kind], lambda a, b: (a.astype(np.float64) / b).astype(np.float32))
    if kind == "f64":
        return compute(machine, one, [kind, kind], np.divide)
    dtype = integer(kind)

    def integers(a: Array, b: Array) -> Array:
        a, b = a.astype(np.int64), np.where(b == 0, dtype(1), b).astype(np.int64)
        quotient = np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)  # towards zero
        return (quotient if one.parts[0] == "div" else a - quotient * b).astype(dtype)

    return compute(machine, one, [kind, kind], integers)


def _unary(machine: Machine, one: Instruction, function: Callable[[Array], Array]) -> Action:
    return compute(machine, one, [one.parts[-1]], function)


@instruction("neg")
def _negative(machine: Machine, one: Instruction) -> Action:
    return _unary(machine, one, lambda a: (-a).astype(a.dtype))


@instruction("not")
def _inverse(machine: Machine, one: Instruction) -> Action:
    return _unary(machine, one, np.invert)


@instruction("abs")
def _absolute(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]
    if kind in ("bf16", "f16"):
        return compute(machine, one, ["b16"], lambda a: a & np.uint16(0x7FFF))
    if kind in ("bf16x2", "f16x2"):
        return compute(machine, one, ["b32"], lambda a: a & np.uint32(0x7FFF7FFF))
    return _unary(machine, one, np.abs)


ROUNDED_ONCE = {"sqrt": np.sqrt, "rcp": np.reciprocal, "ex2": np.exp2, "lg2": np.log2}


@instruction(*ROUNDED_ONCE)
def _function(machine: Machine, one: Instruction) -> Action:
    """Functions that hardware approximates, rounded once from float64."""
    function, dtype = ROUNDED_ONCE[one.parts[0]], FLOATS[one.parts[-1]]

    def apply(a: Array) -> Array:
        out = function(a.astype(np.float64)).astype(dtype)
        return np.where(np.abs(out) < 2.0**-126, dtype(0), out) if "ftz" in one.parts else out

    return _unary(machine, one, apply)


@instruction("popc", "clz")
def _count_bits(machine: Machine, one: Instruction) -> Action:
    bits = int(one.parts[-1][1:])
    if one.parts[0] == "popc":
        return _unary(machine, one, lambda a: np.bitwise_count(a).astype(np.uint32))
    return _unary(machine, one, lambda a: np.array([bits - int(x).bit_length() for x in a], np.uint32))


@instruction("shl", "shr")
def _shift(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]
    bits, dtype = int(kind[1:]), integer(kind)

    def apply(a: Array, count: Array) -> Array:
        inside = np.minimum(count, bits - 1).astype(dtype)
        if one.parts[0] == "shl":
            return np.where(count >= bits, dtype(0), a << inside)
        return a >> inside if kind[0] == "s" else np.where(count >= bits, dtype(0), a >> inside)

    return compute(machine, one, [kind, "u32"], apply)


@instruction("shf")
def _funnel_shift(machine: Machine, one: Instruction) -> Action:
    def apply(low: Array, high: Array, count: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        count = (count & np.uint32(31)).astype(np.uint64)
        return ((both << count) >> np.uint64(32) if "l" in one.parts else both >> count).astype(np.uint32)

    return compute(machine, one, ["u32"] * 3, apply)


@instruction("bfe")
def _extract_bits(machine: Machine, one: Instruction) -> Action:
    kind = one.parts[-1]

    def apply(a: Array, position: Array, length: Array) -> Array:
        a, position, length = (x.astype(np.uint64) for x in (a, position, length))
        mask = (np.uint64(1) << length) - np.uint64(1)
        out = (a >> position) & mask
        if kind[0] == "s":
            negative = (out >> (length - np.uint64(1))) & np.uint64(1) == 1
            out = np.where(negative, out | ~mask, out)
        return out.astype(UNSIGNED[int(kind[1:])])

    return compute(machine, one, [f"u{kind[1:]}", "u32", "u32"], apply)


@instruction("lop3")
def _logic(machine: Machine, one: Instruction) -> Action:
    table = int(one.args[4], 0)

    def apply(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros_like(a)
        for k in range(8):
            if table >> k & 1:
                out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return out

    return compute(machine, one, ["u32"] * 3, apply)


@instruction("prmt")
def _permute_bytes(machine: Machine, one: Instruction) -> Action:
    def apply(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = np.zeros_like(a)
        for j in range(4):
            choice = (selector >> np.uint32(4 * j)) & np.uint32(15)
            byte = (both >> ((choice & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(
                255
            )
            byte = np.where(choice & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
            out |= byte << np.uint32(8 * j)
        return out

    return compute(machine, one, ["u32"] * 3, apply)


@instruction("selp")
def _select(machine: Machine, one: Instruction) -> Action:
    kind = "b" + one.parts[-1].lstrip("bfsu")
    return compute(machine, one, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    **{
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    },
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


@instruction("setp")
def _compare(machine: Machine, one: Instruction) -> Action:
    comparison, kind = one.parts[1], one.parts[-1]
    joined = next((part for part in one.parts[2:-1] if part in ("and", "or", "xor")), None)
    is_float = kind in FLOATS or kind == "bf16"

    def compare(a: Array, b: Array) -> Array:
        if not is_float:
            return COMPARISONS[comparison](a, b)
        if kind == "bf16":
            a, b = from_bf16(a), from_bf16(b)
        unordered = np.isnan(a) | np.isnan(b)
        if comparison in ("num", "nan"):
            return unordered ^ (comparison == "num")
        if comparison.endswith("u"):
            return COMPARISONS[comparison[:2]](a, b) | unordered
        return COMPARISONS[comparison](a, b) & ~unordered

    def apply(a: Array, b: Array, other: Array | None = None) -> Array:
        out = compare(a, b)
        if joined is None or other is None:
            return out
        other = other ^ one.args[3].startswith("!")
        return {"and": out & other, "or": out | other, "xor": out ^ other}[joined]

    read = "b16" if kind == "bf16" else kind
    write = machine.target(one.args[0].split("|")[0])
    a, b = (machine.values(text, read) for text in one.args[1:3])
    if joined is None:
        return lambda mask: write(apply(a(), b()), mask)
    other = machine.values(one.args[3].lstrip("!"), "pred")
    return lambda mask: write(apply(a(), b(), other()), mask)


ROUND_TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil
}  # fmt: skip


@instruction("cvt")
def _convert(machine: Machine, one: Instruction) -> Action:
    if "tf32" in one.parts:
        return compute(machine, one, ["f32"], lambda a: round_to_tf32(a).view(np.uint32))
    if "bf16x2" in one.parts or "f16x2" in one.parts:
        half = to_bf16 if "bf16x2" in one.parts else lambda x: x.astype(np.float16).view(np.uint16)
        return compute(
            machine, one, ["f32", "f32"], lambda high, low: half(high).astype(np.uint32) << np.uint32(16) | half(low)
        )
    target, source = one.parts[-2:]
    rounding = next((part for part in one.parts[1:-2] if part.startswith("r") and part != "relu"), "")
    convert = _conversion(target, rounding, "sat" in one.parts)
    if source == "bf16":
        return compute(machine, one, ["b16"], lambda a: convert(from_bf16(a)))
    return compute(machine, one, [source], convert)


def _conversion(target: str, rounding: str, saturate: bool) -> Callable[[Array], Array]:
    if target == "bf16":
        return lambda a: to_bf16(a.astype(np.float32))
    if target in FLOATS:
        to_integer = ROUND_TO_INTEGER.get(rounding)
        if to_integer is not None:
            return lambda a: to_integer(a).astype(FLOATS[target])
        if rounding == "rz" and target == "f32":
            return towards_zero
        return lambda a: a.astype(FLOATS[target])
    dtype = integer(target)
    limits = np.iinfo(dtype)

    def to_integers(a: Array) -> Array:
        if a.dtype.kind == "f":
            whole = np.nan_to_num(
                ROUND_TO_INTEGER[rounding](a.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf
            )
            inside = np.where((whole >= limits.min) & (whole < float(limits.max)), whole, 0.0).astype(dtype)
            above, below = whole >= float(limits.max), whole < limits.min
            return np.where(above, dtype(limits.max), np.where(below, dtype(limits.min), inside))
        return (np.clip(a, limits.min, limits.max) if saturate else a).astype(dtype)

    return to_integers


@instruction("mov", "cvta")
def _move(machine: Machine, one: Instruction) -> Action:
    kind, (to, source) = one.parts[-1], one.args
    if kind == "pred":
        return compute(machine, one, ["pred"], lambda a: a)
    bits = int(kind[1:])
    if to.startswith("{"):
        parts = [machine.target(text) for text in vector(to)]
        width = bits // len(parts)
        whole = machine.values(source, f"b{bits}")

        def unpack(mask: Mask) -> None:
            value = whole()
            for n, write in enumerate(parts):
                write((value >> UNSIGNED[bits](n * width)).astype(UNSIGNED[width]), mask)

        return unpack
    if source.startswith("{"):
        texts = vector(source)
        pieces = [machine.values(text, f"b{bits // len(texts)}") for text in texts]
        write = machine.target(to)

        def pack(mask: Mask) -> None:
            value = np.zeros(machine.threads, UNSIGNED[bits])
            for n, piece in enumerate(pieces):
                value |= piece().astype(UNSIGNED[bits]) << UNSIGNED[bits](n * bits // len(pieces))
            write(value, mask)

        return pack
    return compute(machine, one, [f"b{bits}"], lambda a: a)
