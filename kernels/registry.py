"""Registry of every Triton kernel in every form of launch: the list that is compiled and checked without a GPU.

A kernel's module ends with ``forms()``, which yields its kernels' `Form`s. `MODULES` lists the modules. A form's types
carry what a launch would detect: ``"*fp32:16"`` is an aligned pointer, ``"i32:16"`` an integer divisible by 16. An
argument that is 1 at launch, such as a unit stride, belongs to the constants.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MODULES = (
    *("rows", "pair_losses", "info_nce", "gather", "pairs", "dominance_counts", "relative_similarity_binned"),
    *("mips", "mips_rescore", "mips_prologue", "mips_epilogue"),
)
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # torch's names to Triton's


@dataclass(frozen=True)
class Form:
    """One way of compiling a kernel.

    Args:
        label: description of the form, distinct among the kernel's forms: dtypes, tile, and relevant constants.
        kernel: ``@triton.jit`` function.
        types: types of the arguments that are not constant, by name.
        constants: ``tl.constexpr`` arguments, and arguments that are 1 at launch.
        warps: number of warps in a block.
        stages: number of loads in flight.
        tensor_cores: True for a form that must use the architecture's tensor-core instructions, or the architectures
            on which it must.
        stack: allowed bytes of a thread's stack by architecture (80, 90, 100). The default is 0.
        spills: True to allow more stack, for rare layouts that may be slow.
        architectures: architectures of the launch.
        quick: True for a form that ``make test`` compiles. ``make soak`` compiles all.
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
    """Return the form of a launch with these arguments 1, which Triton makes constants without methods."""
    types = {name: kind for name, kind in form.types.items() if name not in names}
    assert len(types) + len(names) == len(form.types)
    constants = {**form.constants, **dict.fromkeys(names, 1)}
    return replace(form, label=f"{form.label}, {' = '.join(names)} = 1", types=types, constants=constants, quick=quick)


def unaligned(form: Form, *even: str) -> Form:
    """Return the form of a launch whose counts and strides, except ``even``, are no multiples of 16.

    Its loads keep an address for every element, and these do not fit the registers.
    """
    types = {
        name: kind if kind.startswith("*") or name in even else kind.removesuffix(":16")
        for name, kind in form.types.items()
    }
    return replace(form, label=f"{form.label}, odd", types=types, spills=True, quick=False)


def forms() -> Iterator[Form]:
    """Yield the forms of all kernels. Needs Triton."""
    for name in MODULES:
        yield from importlib.import_module(f"jasper_fast.kernels.{name}").forms()
