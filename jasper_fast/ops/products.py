"""Matrix products with sums in float32, whatever precision the user allows cuBLAS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_lock = threading.Lock()


@contextmanager
def full_float32() -> Iterator[None]:
    """Let cuBLAS multiply float32 matrices in float32, where the user allows TF32."""
    matmul = torch.backends.cuda.matmul
    if matmul.fp32_precision != "tf32":
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # TF32 was allowed through the newer setting alone, so only that changes
        before = None
        matmul.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before is None:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(before)


def multiply(a: Tensor, x: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """Multiply matrices with float32 sums.

    Args:
        a: (M, K) left factor. On a GPU 16-bit factors of one dtype use the tensor cores, and others full float32.
        x: (K, N) right factor.
        out: (M, N) float32 result, rows contiguous. None makes a new one.
        add: add to ``out``.

    Returns:
        (M, N) float32.
    """
    if out is None:
        out = torch.empty(len(a), x.shape[1], dtype=torch.float32, device=a.device)
    if a.is_cuda and a.dtype == x.dtype != torch.float32:
        if not add:
            return torch.mm(a, x, out_dtype=torch.float32, out=out)
        return torch.addmm(out, a, x, out_dtype=torch.float32, out=out)
    with full_float32():
        return torch.addmm(out, a.float(), x.float(), beta=float(add), out=out)


@contextmanager
def bfloat16_sums_in_float32() -> Iterator[None]:
    """Keep cuBLAS from adding parts of a bfloat16 product in bfloat16, where the user allows that."""
    settings = torch.backends.cuda.matmul
    with _lock:  # Searches of several devices run in threads, and the setting is global.
        before = settings.allow_bf16_reduced_precision_reduction
        settings.allow_bf16_reduced_precision_reduction = False
        try:
            yield
        finally:
            settings.allow_bf16_reduced_precision_reduction = before
