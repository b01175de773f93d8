"""A Triton driver for a GPU that is not there: kernels are compiled to PTX for it, and run by the emulator.

    from tests.kernels.ptx import driver
    emulator = driver.install(90)        # in a process without TRITON_INTERPRET
    pair_losses.neighbourhood([student], teacher, 0.05, True)      # CPU tensors, bfloat16 included

Triton specialises arguments as for a launch on a GPU: divisible by 16, equal to 1, aligned.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.kernels.ptx import arithmetic, data, tensor_cores, tma, warp
from tests.kernels.ptx.machine import Behaviour, Machine, TensorMap
from tests.kernels.ptx.memory import Memory, Zeros
from tests.kernels.ptx.parse import Kernel, UnsupportedError, parse
from tests.kernels.ptx.virtual import VirtualTensor

INSTRUCTIONS = (arithmetic, data, tensor_cores, tma, warp)  # whose import registers them
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes, by the number in Triton's metadata
NUMBERS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "i64": "<q", "u64": "<Q", "i32": "<i", "u32": "<I"}
NUMBERS |= {"i1": "<b", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H"}
PROPERTIES = {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}

Grid = tuple[int, int, int]


@dataclass
class Emulator:
    """Settings and record of all launches.

    Args:
        capability: architecture, 80 or 90.
        races: check accesses of memory for races.
        behaviour: choices of the hardware.
        programs: function that chooses programs of a grid. None runs all.
        edit: function of a kernel's name and PTX that returns the PTX to run.
        launches: number of launches by kernel.
        seconds: time of their emulation.
    """

    capability: int
    races: bool = True
    behaviour: Behaviour = field(default_factory=Behaviour)
    programs: Callable[[Grid], Iterable[Grid]] | None = None
    edit: Callable[[str, str], str] | None = None
    launches: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    parsed: dict[str, Kernel] = field(default_factory=dict)

    def kernel(self, name: str, ptx: str) -> Kernel:
        """Parse the PTX of a kernel, once."""
        ptx = self.edit(name, ptx) if self.edit else ptx
        if ptx not in self.parsed:
            self.parsed[ptx] = parse(ptx, name)
        return self.parsed[ptx]


@dataclass
class Arguments:
    """The arguments of a launch, as the hardware sees them."""

    memory: Memory
    parameters: list[bytes] = field(default_factory=list)
    maps: list[TensorMap] = field(default_factory=list)

    def add(self, name: str, kind: str, value: Any, descriptor: dict[str, Any] | None) -> None:
        """Append an argument of a Triton type."""
        if descriptor is not None:
            self._add_descriptor(name, value, descriptor)
        elif kind.startswith("*"):
            self._add_tensor(name, value)
            self.parameters.append(struct.pack("<Q", value.data_ptr()))
        else:
            self.parameters.append(struct.pack(NUMBERS[kind], value))

    def _add_tensor(self, name: str, tensor: Any) -> None:
        assert tensor.device.type == "cpu"
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        content = Zeros() if isinstance(tensor, VirtualTensor) else bytes_at(tensor.data_ptr(), size)
        self.memory.add(tensor.data_ptr(), content, size, name)

    def _add_descriptor(self, name: str, value: Any, meta: dict[str, Any]) -> None:
        self._add_tensor(name, value.base)
        size = value.base.element_size()
        assert value.base.data_ptr() % 16 == 0, f"{name}: a tensor map needs an address that is a multiple of 16"
        assert all(s * size % 16 == 0 for s in value.strides[:-1]), f"{name}: a tensor map needs rows of 16 bytes"
        assert all(side <= 256 for side in meta["block_size"]), f"{name}: a box has at most 256 elements on a side"
        shape, strides = tuple(value.shape), tuple(value.strides)
        swizzle = SWIZZLES[meta["swizzle"]]
        box = tuple(meta["block_size"])
        self.parameters.append(struct.pack("<q", len(self.maps)) + bytes(120))
        self.parameters += [struct.pack("<i", n) for n in shape] + [struct.pack("<q", n) for n in strides]
        self.maps.append(TensorMap(value.base.data_ptr(), shape, strides[0], box, size, swizzle))


def bytes_at(address: int, size: int) -> np.ndarray:
    """Return the memory at an address."""
    if not size:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


class Launcher:
    """What Triton calls with the arguments of a launch."""

    emulator: Emulator  # set by a subclass

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = source.signature, metadata

    def __call__(
        self, x: int, y: int, z: int, stream: int, ptx: str, packed: Any, metadata: Any, enter: Any, leave: Any,
        *values: Any,
    ) -> None:  # fmt: skip
        if x * y * z == 0:
            return
        emulator, name = self.emulator, self.metadata.name
        begin = time.perf_counter()
        arguments = Arguments(Memory(emulator.races))
        descriptors = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        for (label, kind), value in zip(self.signature.items(), values, strict=True):
            if kind != "constexpr":
                described = next(descriptors) if kind.startswith("tensordesc") else None
                arguments.add(label, kind, value, described)
        kernel = emulator.kernel(name, ptx)
        sizes = [size for _, size in kernel.parameters]
        given = [*arguments.parameters, bytes(8), bytes(8)][: len(sizes)]  # the last are scratch memory
        for (label, size), own in zip(kernel.parameters, given, strict=True):
            if len(own) != size:
                raise UnsupportedError(f"parameter {label} of {name} has {size} bytes, not {len(own)}")
        machine = Machine(kernel, given, arguments.memory, self.metadata.shared, arguments.maps, emulator.behaviour)
        grid = (x, y, z)
        for program in emulator.programs(grid) if emulator.programs else programs(grid):
            machine.run(program, grid)
        emulator.launches[name] += 1
        emulator.seconds[name] += time.perf_counter() - begin


def programs(grid: Grid) -> Iterable[Grid]:
    """Return all programs of a grid."""
    return ((x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0]))


class Driver:
    """What Triton asks its driver for."""

    def __init__(self, emulator: Emulator) -> None:
        self.capability = emulator.capability
        self.launcher_cls = type("Launcher", (Launcher,), {"emulator": emulator})
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: PROPERTIES,
            # A module, its function, registers, spills, and the most threads of a program.
            load_binary=lambda name, ptx, shared, device: (None, ptx.decode(), 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install(capability: int, cache: Path | None = None) -> Emulator:
    """Make Triton compile for an emulated GPU in this process.

    Args:
        capability: architecture, 80 or 90.
        cache: folder of compiled kernels. They are PTX in place of binaries, so no GPU may read them.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET=1 is set, so kernels would be interpreted. Fix: unset it")

    def stop_at_ptx(backend: Any, stages: dict[str, Any], *_: Any) -> None:
        stages["cubin"] = lambda ptx, metadata: ptx.encode()

    triton.knobs.runtime.add_stages_inspection_hook = stop_at_ptx
    triton.knobs.cache.dir = str(cache or Path(triton.knobs.cache.dir).with_name("emulated"))
    emulator = Emulator(capability)
    triton.runtime.driver.set_active(Driver(emulator))
    return emulator
