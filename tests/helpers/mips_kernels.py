"""Cases and drivers of the search kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from jasper_fast.mips import segment as segments
from jasper_fast.mips import top_k
from jasper_fast.mips.segment import BIN, Segment, bin_norms, int8_codes
from jasper_fast.mips.top_k import SCRATCH, search
from tests.helpers.mips_cases import check, make, truth

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt")

from jasper_fast.kernels import mips as kernels  # noqa: E402

GPU = torch.cuda.is_available()
COMPILED = not triton.knobs.runtime.interpret  # for a GPU, or for an emulated one on CPU tensors
DEVICE = "cuda" if GPU else "cpu"
on_gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill the results of torch.empty with NaN or a large integer."""
    plain = torch.empty

    def poisoned(*arguments, **options):
        out = plain(*arguments, **options)
        if out.dtype == torch.bool or out.numel() == 0:
            return out
        return out.fill_(float("nan") if out.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)


def has_tensor_maps() -> bool:
    """Return True if kernels are compiled for Hopper or newer, or interpreted."""
    return not COMPILED or triton.runtime.driver.active.get_current_target().arch >= 90


@contextmanager
def through_kernels(descriptors: bool = False) -> Iterator[None]:
    """Take the GPU's path on this machine's device."""
    with mock.patch.object(top_k, "native", lambda segment: False):
        if GPU:
            yield
            return
        with (
            mock.patch.object(segments, "on_gpu", lambda rows: True),
            mock.patch.object(
                kernels,
                "supports_descriptors",
                lambda rows, queries: descriptors and has_tensor_maps() and rows.shape[1] % 16 == 0,
            ),
        ):
            yield


def segment_of(rows: Tensor, stored: str) -> tuple[Segment, Tensor]:
    """Return the segment and its float64 values."""
    if stored == "int8":
        codes, scales, _ = int8_codes(rows)
        segment = Segment(codes.to(DEVICE), scales.to(DEVICE))
    else:
        segment = Segment(rows.to(getattr(torch, stored)).to(DEVICE))
    with mock.patch.object(segments, "on_gpu", lambda rows: GPU):
        segment.norms = (
            bin_norms(segment) if stored != "float16" else segments.bin_maxima(segment.rows.double().norm(dim=1))
        )
    return segment, segment.values(0, len(rows), torch.float64).cpu()


def found(segment: list[tuple[int, Segment]], total: int, queries: Tensor, k: int, valid=None, precision="certified"):
    scores, ids = search(lambda: segment, total, queries.to(DEVICE), k, precision, valid, SCRATCH)
    return scores.cpu(), ids.cpu()


STORED = ["float32", "float16", "int8", *([pytest.param("bfloat16", marks=on_gpu)])]
SHARES = (None, 0.0, 0.02, 0.5, 1.0)
WIDTHS = (1, 2, 3, 8, 17, 32, 70)


def in_the_order_of_fp64(
    kind: str,
    stored: str,
    rows: int,
    size: int,
    width: int,
    share: float | None,
    masks: bool,
    descriptors: bool,
    seed: int,
    k: int,
    bins: int,
) -> None:
    """Check one search of a corpus in two segments, the first of ``bins`` bins."""
    if stored == "float16" and kind in ("huge", "tiny", "mixed scales"):
        kind = "normal"  # float16 cannot hold them
    split = bins * BIN
    corpus, queries = make(kind, rows, width, seed), make(kind, size, width, seed + 1)
    segment, values = segment_of(corpus, stored)
    parts = [(0, segment.slice(0, split)), *([(split, segment.slice(split, rows))] if split < rows else [])]
    generator = torch.Generator().manual_seed(seed)
    shape = (size, rows) if masks else (rows,)
    valid = None if share is None else torch.rand(shape, generator=generator) < share
    with through_kernels(descriptors):
        scores, ids = found(parts, rows, queries, k, valid)
    scale = (queries.double().norm(dim=1) * values.norm(dim=1).max()).numpy()
    allowed = np.ones((size, rows), bool) if valid is None else np.broadcast_to(valid.numpy(), (size, rows))
    check(scores, ids, truth(queries, values), values, scale, allowed)
