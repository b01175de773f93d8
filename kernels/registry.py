"""Every Triton kernel in every form it is launched in: the list that is compiled and checked without a GPU.

A kernel's module ends with ``forms()``, which gives its kernels' `Form`s; `MODULES` names the modules. A form's types
carry what a launch would find out: ``"*fp32:16"`` is an aligned pointer, ``"i32:16"`` an integer divisible by 16. An
argument that is 1 at launch, such as a unit stride, belongs to the constants.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MODULES = (
    *("rows", "product", "pair_tile", "deal", "pairs", "ties", "relative_similarity_binned"),
    *("mips", "mips_start", "mips_finish"),
)
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # torch's names, and Triton's


@dataclass(frozen=True)
class Form:
    """One way of compiling a kernel.

    Args:
        label: distinct among the kernel's forms: dtypes, tile, and whatever constants matter.
        kernel: the ``@triton.jit`` function.
        types: of the arguments that are not constant, by name.
        constants: the ``tl.constexpr`` arguments, and arguments that a launch would find to be 1.
        warps: warps in a block.
        stages: loads in flight.
        tensor_cores: whether the form is wrong to compile without an architecture's own tensor-core instructions, or
            on which architectures.
        stack: bytes a thread may keep on its stack, by architecture (80, 90, 100); elsewhere none.
        spills: whether it may keep more there: for layouts that are seldom met, at their price in speed.
        architectures: those it is launched on.
        quick: whether ``make test`` compiles it; ``make soak`` compiles all.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    tensor_cores: bool | tuple[int, ...] = False
    stack: Mapping[int, int] = field(default_factory=dict)
    spills: bool = False
    architectures: tuple[int, ...] = (80, 90, 100)
    quick: bool = False


def with_ones(form: Form, *names: str, quick: bool = False) -> Form:
    """The form of a launch that finds these arguments to be 1: Triton makes them constants, which have no methods."""
    types = {name: kind for name, kind in form.types.items() if name not in names}
    assert len(types) + len(names) == len(form.types)
    constants = {**form.constants, **dict.fromkeys(names, 1)}
    return replace(form, label=f"{form.label}, {' = '.join(names)} = 1", types=types, constants=constants, quick=quick)


def odd(form: Form, *even: str) -> Form:
    """The form of a launch whose counts and strides are no multiples of 16, but for ``even``.

    Its loads keep an address for every element, which do not fit the registers.
    """
    types = {
        name: kind if kind.startswith("*") or name in even else kind.removesuffix(":16")
        for name, kind in form.types.items()
    }
    return replace(form, label=f"{form.label}, odd", types=types, spills=True, quick=False)


def forms(modules: tuple[str, ...] = MODULES) -> Iterator[Form]:
    """The forms of all kernels; needs Triton."""
    for name in modules:
        yield from importlib.import_module(f"jasper_fast.kernels.{name}").forms()
