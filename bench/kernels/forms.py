"""Every form in which a Triton kernel is launched, recorded from calls of the functions that launch it.

Triton compiles a kernel again for other dtypes and constants, and for integers that are 1 or divisible by 16. The calls
here have small CPU tensors, and each launch is recorded in place of running. So a form is what a launch has. No module
of kernels needs a list.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
I8, I32 = torch.int8, torch.int32
NAMES = {F16: "fp16", BF16: "bf16", F32: "fp32", F64: "fp64", I8: "i8", torch.uint8: "u8", torch.int16: "i16"}
NAMES |= {I32: "i32", torch.int64: "i64"}  # torch's dtypes to Triton's
FLOATS = (F32, BF16, F16)
LAYOUTS = {"even": (32, 64), "odd": (23, 37), "wide": (8, 2560), "one": (1, 1)}  # rows and width
STORED = (*FLOATS, I8)
BLOCKS = (64, 1024, 4096, 16_384)  # bins of the kernel that finds thresholds
CAPACITIES = (1024, 2048, 4096, 8192)  # candidates of the kernel that selects


@dataclass(frozen=True)
class Form:
    """One way of compiling a kernel.

    Args:
        label: name of the call that launched it, distinct among the kernel's forms.
        kernel: ``@triton.jit`` function.
        types: types of the arguments that are not constant, by name. ``"*fp32:16"`` is an aligned pointer, and
            ``"i32:16"`` an integer divisible by 16.
        constants: ``tl.constexpr`` arguments, and arguments that are None or 1.
        options: other options of the launch, such as the number of warps.
        quick: True for a form that ``make test`` compiles. ``make soak`` compiles all.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    quick: bool

    @property
    def kind(self) -> str:
        """Return the kind of forms whose threads need about the same number of registers: a kernel, or kinds of scans.

        A scan through pointers keeps an address for every element, and odd widths and strides have several.
        """
        if "DESCRIPTORS" not in self.constants:
            return self.name
        odd = ", odd" * (self.types.get("stride_c") == "i32")
        if "QUERIES" not in self.types:
            return f"scan of scores{odd}"
        if self.constants["DESCRIPTORS"]:
            return "scan by descriptors"
        wide = self.types["CORPUS"].startswith("*fp32")
        return f"scan by pointers{odd}" if odd or not wide else "scan by pointers, float32"

    @property
    def architectures(self) -> tuple[int, ...]:
        """Return the architectures of the launch. Tensor descriptors are from Hopper on."""
        return (90, 100) if self.constants.get("DESCRIPTORS") else (80, 90, 100)

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return self.kernel.fn.__name__

    def needs_tensor_cores(self, sm: int) -> bool:
        """Return True for tiles of products. On sm_100 Triton multiplies integers with an older instruction."""
        if self.name == "pair_scores_kernel":
            return True
        integers = "i8" in self.types.get("CORPUS", "")
        return "DESCRIPTORS" in self.constants and "QUERIES" in self.types and not (integers and sm == 100)


def record() -> list[Form]:
    """Return the forms of all kernels. Needs Triton."""
    from triton.runtime.jit import KernelInterface

    forms: dict[object, Form] = {}
    labels: Counter[tuple[str, str]] = Counter()
    label, quick = "", False

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def add(*values: Any, **options: Any) -> None:
            types, constants, options = specialized(kernel, values, options)
            name = kernel.fn.__name__
            key = (name, *map(str, (types, constants, options)))
            if key not in forms:
                labels[name, label] += 1
                number = labels[name, label]
                own = label if number == 1 else f"{label} ({number})"
                forms[key] = Form(own, kernel, types, constants, options, quick)

        return add

    with mock.patch.object(KernelInterface, "__getitem__", launch):
        for label, quick, call in calls():  # noqa: B007
            call()
    return sorted(forms.values(), key=lambda form: form.name)


def specialized(
    kernel: Any, values: tuple[Any, ...], options: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """Return the types of a launch's arguments, its constants, and its other options."""
    given = {**dict(zip(kernel.arg_names, values, strict=False)), **options}
    parameters = inspect.signature(kernel.fn).parameters
    types, constants = {}, {}
    for name in kernel.arg_names:
        value = given.pop(name)
        if "constexpr" in str(parameters[name].annotation) or value is None or (type(value) is int and value == 1):
            constants[name] = value
        else:
            types[name] = _type(value)
    return types, constants, given


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{NAMES[value.dtype]}{':16' * (value.data_ptr() % 16 == 0)}"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return f"i{32 if abs(value) < 2**31 else 64}{':16' * (value % 16 == 0)}"
    return f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"


Calls = Iterator[tuple[str, bool, Callable[[], object]]]


def calls() -> Calls:
    """Yield names of calls, whether ``make test`` compiles what they launch, and the calls."""
    for dtype in FLOATS:
        for layout, (rows, width) in LAYOUTS.items():
            if dtype == F32 or layout in ("even", "odd"):
                label, quick = f"{NAMES[dtype]}, {layout}", dtype == BF16 and layout == "even"
                yield from _losses(label, quick, _rows(rows, width, dtype), _rows(rows, 16, dtype))
    by_column = _rows(64, 32, BF16).T
    yield from _losses("bf16, by column", False, by_column, by_column)
    yield from _relative_losses()
    for stored in STORED:
        yield from _scans(stored)
    yield from _around_scans()


def _rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(rows, width, dtype=dtype)


def _losses(label: str, quick: bool, student: Tensor, teacher: Tensor) -> Calls:
    from jasper_fast.kernels import info_nce, pair_losses
    from jasper_fast.losses import listwise, similarity

    count, chosen = len(student), torch.zeros(len(student), dtype=torch.int64)
    for gradient in (True, False)[: 1 + quick]:
        own = label if gradient else f"{label}, loss only"
        tiled = partial(similarity.compute_by_form, similarity.kernel_parts(), [student], teacher, "tile")
        yield own, quick, partial(tiled, gradient, gradient)
        yield own, quick, partial(pair_losses.neighbourhood, [student], teacher, 0.05, gradient)
        for sides in ([teacher, teacher], []):
            call = partial(info_nce.info_nce, student, student, chosen, chosen, 0.05, sides, 0.1, gradient, gradient)
            yield own if sides else f"{own}, no teacher", quick, call
    candidates, scores = chosen[:, None].expand(count, count), torch.zeros(count, count)
    call = partial(listwise._listwise_triton, student, student, candidates, scores, 0.05, 0.1, True, True)
    yield label, quick, call


def _relative_losses() -> Calls:
    from jasper_fast.kernels import dominance_counts, pairs
    from jasper_fast.kernels import relative_similarity_binned as binned

    def counted(count: int, width: int) -> None:
        scores = pairs.pair_scores(torch.ones(count, width))
        dominance_counts.dominance(torch.zeros(2 * len(scores), dtype=I32))
        pairs.unpack_pairs(torch.zeros(len(scores), dtype=I32), count, 0.5)

    for count, width in ((64, 32), (60, 17), (12, 1), (23, 16), (2, 16)):
        yield f"{count} rows of {width}", (count, width) in ((64, 32), (23, 16)), partial(counted, count, width)

    def tables(width: int) -> None:
        scores, grid, fine = torch.empty(4, 32)[:, :width], torch.empty(5), torch.empty(256, dtype=I32)
        for other in (fine, None):
            binned.histogram(scores, scores, grid, torch.empty(32, 32, dtype=I32), fine, other)
        edges = torch.empty(257)
        binned.coefficients(scores, scores, grid, torch.empty(33, 33), edges, edges, 0.5)

    for width in (32, 17, 1):
        yield f"{width} columns", width == 17, partial(tables, width)


def _scans(stored: torch.dtype) -> Calls:
    from jasper_fast.kernels import mips

    def scan(size: int, count: int, width: int, masked: bool, norm: int, descriptors: bool) -> mips.Scan:
        rows, many = _rows(count, width, stored), mips.chunked(size)
        scales = None if stored != I8 else torch.ones(count), None if stored != I8 or many else torch.ones(size)
        mask = torch.ones(size, count, dtype=torch.bool) if masked else None
        limits = torch.ones(size), torch.ones(size)
        queries = _rows(size, width, BF16 if many else stored)
        return mips.Scan(rows, queries, scales, mask, torch.ones(-(-count // norm)), limits, descriptors)

    def launch(shape: tuple[int, int, int], masked: bool, descriptors: bool, norms: tuple[int, ...] = (1, 64)) -> None:
        size = shape[0]
        for norm in norms:
            mips.lower_bounds(scan(*shape, masked, norm, descriptors))
        counts = torch.zeros(size, dtype=I32)
        for wanted in (None, *([counts[:1]] if size <= 32 and not masked else [])):
            mips.collect(scan(*shape, masked, 64, descriptors), torch.ones(size), counts, 1024, wanted)

    name = NAMES[stored]
    for masked in (False, True)[: 2 - (stored == F16)]:
        kind, quick = f"{name}{', masked' * masked}", not masked and stored == BF16
        for descriptors in (True, False):
            own = f"{kind}, {'descriptors' if descriptors else 'pointers'}"
            fast = quick or (stored == I8 and descriptors and not masked)
            yield own, fast, partial(launch, (32, 640, 64), masked, descriptors)
            if not masked and stored != F16:
                width = 80 if descriptors else 37
                yield f"{own}, odd", False, partial(launch, (5, 601, width), False, descriptors, (64,))
                yield f"{own}, one query", False, partial(launch, (1, 640, 64), False, descriptors, (64,))
                if not descriptors:
                    yield f"{own}, one column", False, partial(launch, (1, 64, 1), False, False, (64,))
        if stored in (BF16, I8):  # others are converted
            yield f"{kind}, scores", quick, partial(launch, (64, 640, 64), masked, False)
            yield f"{kind}, scores, odd", False, partial(launch, (67, 601, 37), masked, False, (64,))


def _around_scans() -> Calls:
    from jasper_fast.kernels import mips_epilogue, mips_prologue, mips_rescore

    def thresholds(bins: int, ranks: tuple[int, int]) -> None:
        mips_prologue.thresholds(torch.ones(3, bins), ranks, torch.ones(3, dtype=F64))

    for bins in BLOCKS:
        yield f"{bins} bins", bins == 64, partial(thresholds, bins, (2, 3))
    for bins, ranks in ((64, (1, 2)), (64, (1, 1)), (1, (1, 1))):
        yield f"{bins} bins, ranks {ranks}", False, partial(thresholds, bins, ranks)

    def rerank(stored: torch.dtype, width: int, k: int, proven: bool, capacity: int = 1024, first: int = 0) -> None:
        size, corpus = 3, _rows(128, width, stored)
        counts, thresholds, limits = (
            torch.zeros(size, dtype=I32),
            torch.ones(size),
            (torch.ones(size), torch.ones(size)),
        )
        rows, flags = torch.zeros(size, capacity, dtype=I32), torch.zeros(size, dtype=torch.bool)
        scores, norms = torch.ones(size, capacity), torch.ones(2)
        found = mips_epilogue.Collected(counts, scores, rows, thresholds, norms, limits, thresholds)
        state = (
            torch.zeros(size, k, 2, dtype=torch.int64),
            torch.zeros(size, dtype=torch.int64),
            torch.ones(size, dtype=F64),
        )
        queries, scales = _rows(size, width, F64), torch.ones(128) if stored == I8 else None
        mips_epilogue.rerank(found, queries, corpus, scales, first, 2 * k + 64, proven, (*state, flags, flags.clone()))

    def operands(stored: torch.dtype, width: int) -> None:
        mips_prologue.operands(_rows(3, width, F64), stored, 1e-4, 1e-30)

    def rescore(stored: torch.dtype, width: int, count: int = 40) -> None:
        chosen, scales = torch.zeros(count, dtype=torch.int64), torch.ones(128) if stored == I8 else None
        mips_rescore.rescore(_rows(3, width, F64), _rows(128, width, stored), scales, chosen, chosen)

    for stored in STORED:
        for width in (64, 37, 1):
            label, quick = f"{NAMES[stored]}, width {width}", width == 64 and stored in (BF16, I8)
            yield label, quick, partial(operands, stored, width)
            yield label, quick, partial(rescore, stored, width)
            if width > 1:
                yield label, quick, partial(rerank, stored, width, 10, True)
        label = NAMES[stored]
        yield f"{label}, fast", False, partial(rerank, stored, 64, 10, False)
        yield f"{label}, one", False, partial(rescore, stored, 64, 1)
        yield f"{label}, k 1", False, partial(rerank, stored, 64, 1, True)
        yield f"{label}, far", False, partial(rerank, stored, 64, 10, True, first=2**33 + 1)
    for capacity in CAPACITIES:
        yield f"{capacity} candidates", capacity == 1024, partial(rerank, BF16, 64, 10, True, capacity=capacity)
