"""The emulator of compiled kernels, on PTX written by hand: what it computes, and which faults it finds."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.kernels.ptx import arithmetic, data, floats, tensor_cores, tma, warp  # noqa: F401
from tests.kernels.ptx.machine import Behaviour, Machine
from tests.kernels.ptx.memory import Fault, Memory
from tests.kernels.ptx.parse import UnsupportedError, parse

HEAD = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    mov.u32 %r1, %tid.x;
    ld.param.b64 %rd1, [kernel_param_0];
    mad.wide.u32 %rd2, %r1, 4, %rd1;
"""


def run(body: str, out: np.ndarray, threads: int = 32, programs: int = 1, behaviour: Behaviour | None = None) -> None:
    """Run PTX on one array: %r1 is the thread, %rd1 the array's address, %rd2 that of the thread's element."""
    kernel = parse(HEAD.format(threads=threads) + body + "\n    ret;\n}\n", "kernel")
    memory, address = Memory(), out.ctypes.data
    memory.add(address, out.view(np.uint8), out.nbytes, "OUT")
    machine = Machine(kernel, [struct.pack("<Q", address)], memory, 4096, behaviour=behaviour or Behaviour())
    for n in range(programs):
        machine.run((n, 0, 0), (programs, 1, 1))


def test_branches_and_guards():
    out = np.zeros(32, np.int32)
    run(
        """
        mov.b32 %r2, 0;
        $again:
        add.s32 %r2, %r2, 3;
        setp.lt.s32 %p1, %r2, %r1;
        @%p1 bra $again;
        and.b32 %r3, %r1, 1;
        setp.eq.s32 %p2, %r3, 0;
        @!%p2 neg.s32 %r2, %r2;
        st.global.b32 [%rd2], %r2;
        """,
        out,
    )
    steps = np.maximum(-(-np.arange(32) // 3) * 3, 3)
    assert (out == np.where(np.arange(32) % 2, -steps, steps)).all()


def test_addresses_are_inside_of_a_tensor_and_aligned():
    store = "st.global.b32 [%rd2+{0}], %r1;"
    run(store.format(0), np.zeros(32, np.int32))
    with pytest.raises(Fault, match="outside of every tensor"):
        run(store.format(4), np.zeros(32, np.int32))
    with pytest.raises(Fault, match="misaligned"):
        run("st.global.v2.b32 [%rd2], {%r1, %r1};", np.zeros(64, np.int32))


SHARED = """
    shl.b32 %r2, %r1, 2;
    mov.b32 %r3, global_smem;
    add.s32 %r4, %r3, %r2;
    st.shared.b32 [%r4], %r1;
    {barrier}
    xor.b32 %r5, %r4, 128;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd2], %r6;
"""


def test_warps_that_share_memory_need_a_barrier():
    out = np.zeros(64, np.int32)
    run(SHARED.format(barrier="bar.sync 0;"), out, threads=64)
    assert (out == np.arange(64) ^ 32).all()
    with pytest.raises(Fault, match="race"):
        run(SHARED.format(barrier=""), out, threads=64)


def test_programs_do_not_share_memory_except_by_atomics():
    out = np.zeros(32, np.int32)
    run("red.global.add.s32 [%rd2], 5;", out, programs=3)
    assert (out == 15).all()
    with pytest.raises(Fault, match="race"):
        run("st.global.b32 [%rd2], %r1;", out, programs=2)
    with pytest.raises(Fault, match="race"):
        run("ld.global.b32 %r2, [%rd2]; add.s32 %r2, %r2, 1; red.global.add.s32 [%rd2], %r2;", out, programs=2)


def test_copies_that_nothing_waits_for_have_not_arrived():
    copy = """
        shl.b32 %r2, %r1, 2;
        mov.b32 %r3, global_smem;
        add.s32 %r4, %r3, %r2;
        cp.async.ca.shared.global [%r4], [%rd2], 4;
        cp.async.commit_group;
        {wait}
        ld.shared.b32 %r6, [%r4];
        add.s32 %r6, %r6, 1;
        st.global.b32 [%rd2], %r6;
    """
    for wait, expected in (("cp.async.wait_group 0;", 8), ("cp.async.wait_group 1;", 0)):
        out = np.full(32, 7, np.int32)
        run(copy.format(wait=wait), out)
        assert (out == expected).all(), wait  # shared memory begins as -1


def test_a_barrier_that_some_threads_never_reach():
    with pytest.raises(Fault, match="deadlock"):
        run("setp.lt.u32 %p1, %r1, 32;\n @%p1 bar.sync 1, 64;\n @!%p1 bar.sync 2, 64;", np.zeros(64, np.int32), 64)


def test_unknown_instructions_fail_only_where_they_are_reached():
    run("setp.lt.u32 %p1, %r1, 0;\n @%p1 tanh.approx.f32 %r2, %r2;", np.zeros(32, np.int32))
    with pytest.raises(UnsupportedError, match="tanh"):
        run("tanh.approx.f32 %r2, %r2;", np.zeros(32, np.int32))


def product(kind: str, shape: str, a: int, b: int, c: float, behaviour: Behaviour) -> float:
    """Return the first element of c + a b, where only a[0, 0] and b[0, 0] are not zero."""
    out = np.zeros(32, np.float32)
    operands = "{%r10, %r11, %r12, %r13}, {%r5, %r9, %r9, %r9}, {%r6, %r9}, {%r7, %r7, %r7, %r7}"
    run(
        f"""
        setp.eq.s32 %p1, %r1, 0;
        mov.b32 %r9, 0;
        selp.b32 %r5, {a}, 0, %p1;
        selp.b32 %r6, {b}, 0, %p1;
        mov.b32 %r7, {np.float32(c).view(np.uint32)};
        mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {operands};
        st.global.b32 [%rd2], %r10;
        """,
        out,
        behaviour=behaviour,
    )
    return float(out[0])


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def test_tensor_cores_cut_off_operands_and_sums():
    """A GPU ignores the low 13 bits of float32 operands. An emulator that rounded them would hide a bias."""
    long = bits(1 + 2**-10 - 2**-20)  # to nearest this is 1 + 2^-10
    assert product("tf32", "m16n8k8", long, bits(1.0), 0.0, Behaviour()) == 1.0
    assert product("tf32", "m16n8k8", long, bits(1.0), 0.0, Behaviour(cut_operands=False)) == 1 + 2**-10
    small = bits(1.5 * 2**-24) >> 16  # bfloat16
    one = bits(1.0) >> 16
    assert product("bf16", "m16n8k16", small, one, 1.0, Behaviour()) == 1.0
    assert product("bf16", "m16n8k16", small, one, 1.0, Behaviour(cut_sums=False)) == 1 + 2**-23


def test_roundings_are_those_of_torch():
    values = np.concatenate((np.random.default_rng(0).normal(size=999), [0.0, -0.0, np.inf, -np.inf, 1e-45, 3.4e38]))
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert (floats.to_bf16(values) == expected.view(torch.int16).numpy().view(np.uint16)).all()
    assert (floats.from_bf16(floats.to_bf16(values)) == expected.float().numpy()).all()
    assert np.isnan(floats.from_bf16(floats.to_bf16(np.float32([np.nan])))).all()
    assert (np.abs(floats.cut_to_tf32(values)) <= np.abs(values)).all()
    values = values[(np.abs(values) > 1e-30) & (np.abs(values) < 1e38)]
    assert (np.abs(floats.round_to_tf32(values) - values) <= 2.0**-11 * np.abs(values)).all()


def test_sums_of_products_are_rounded_once():
    a, b, c = np.random.default_rng(1).normal(size=(3, 500))
    c = -a * b + c * 1e-12  # most digits cancel
    expected = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert (floats.fma64(a, b, c) == expected).all()
    with np.errstate(invalid="ignore"):
        assert np.isinf(floats.fma64(np.array([np.inf]), np.array([1.0]), np.array([0.0]))).all()
    exact = np.array([1.0 + 2**-30, -1.0 - 2**-30, 2.0**-30])
    assert (floats.towards_zero(exact) == np.float32([1.0, -1.0, 2.0**-30])).all()
