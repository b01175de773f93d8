"""Floating-point formats of a GPU that numpy lacks, and its roundings."""

from __future__ import annotations

import numpy as np

FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def integer(kind: str) -> type:
    """Return numpy's integer type of a PTX type such as s32, u8 or b16."""
    return (SIGNED if kind[0] == "s" else UNSIGNED)[int(kind[1:])]


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def cut_to_tf32(values: np.ndarray) -> np.ndarray:
    """Cut float32 off to TF32's 11 bits, as tensor cores do with their operands."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """Round float32 to TF32, to nearest, ties away from zero (cvt.rna.tf32)."""
    rounded = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def towards_zero(values: np.ndarray) -> np.ndarray:
    """Round float64 to float32 towards zero, as tensor cores do with their sums."""
    nearest = values.astype(np.float32)
    beyond = np.isfinite(nearest) & (np.abs(nearest.astype(np.float64)) > np.abs(values))
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a b + c in float64, rounded nearly as if once, by error-free transformations."""
    product, total = a * b, a * b + c
    halves = [(x * 134217729.0) - ((x * 134217729.0) - x) for x in (a, b)]  # Dekker: the upper 26 bits
    (ah, bh), (al, bl) = halves, (a - halves[0], b - halves[1])
    lost = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    virtual = total - product
    lost = lost + ((product - (total - virtual)) + (c - virtual))
    return np.where(np.isfinite(total + lost), total + lost, total)
