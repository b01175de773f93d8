"""Checks of the losses' arguments, from their metadata alone: no check waits for a device."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LossOptions(NamedTuple):
    """The options of all losses. Each loss reads those that it needs."""

    margin: float = 0.015  # of relative similarity
    ties: str = "exclude"  # of relative similarity
    temperature: float | Mapping[int, float] = 0.05  # of the neighbourhood loss: one number, or one for each width


def check_heads(student: Tensor | Mapping[int, Tensor], teacher: Tensor) -> list[Tensor]:
    """Return the heads as a list.

    Args:
        student: embeddings (B, D), or one (B, width) tensor for each head, by width.
        teacher: embeddings (B, E).

    Raises:
        TypeError: a floating-point tensor was expected.
        ValueError: no heads, a head whose width is not its key, unequal numbers of rows, or several devices.
    """
    if not isinstance(student, Mapping):
        check_pair(student, teacher)
        return [student]
    if not student:
        raise ValueError("student: expected at least one head, got an empty mapping")
    for width, head in student.items():
        check_pair(head, teacher, f"student[{width!r}]")
        if head.shape[1] != width:
            raise ValueError(
                f"student[{width!r}]: expected embeddings of that width, got shape {tuple(head.shape)}. Fix: make its "
                f"key {head.shape[1]}"
            )
    return list(student.values())


def check_pair(student: Tensor, teacher: Tensor, name: str = "student") -> None:
    """Raise unless both are matrices of floating-point numbers with equally many rows on one device.

    Args:
        student: any object.
        teacher: any object.
        name: the student's name in messages.

    Raises:
        TypeError: a dense floating-point tensor was expected.
        ValueError: another shape or number of rows, or two devices.
    """
    for label, tensor in ((name, student), ("teacher", teacher)):
        check_matrix(label, tensor)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{name} has {student.shape[0]} rows and teacher {teacher.shape[0]}: expected one teacher row for each "
            "student row"
        )
    check_device(name, student, "teacher", teacher)


def check_matrix(name: str, tensor: Tensor) -> None:
    """Raise unless this is a dense matrix of floating-point numbers with at least one row and column.

    Raises:
        TypeError: a dense floating-point tensor was expected.
        ValueError: another shape.
    """
    _check_dense(name, tensor, "(B, D)")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}. Fix: convert with .float()"
        )
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{name}: expected shape (B, D) with B, D >= 1, got {tuple(tensor.shape)}. Fix: pass v[None] for a "
            "single embedding v"
        )


def check_pair_of_widths(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise as `check_matrix` does, or unless both have the same width and device."""
    check_matrix(name, tensor)
    check_matrix(other_name, other)
    if tensor.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} have width {tensor.shape[1]} and {other_name} {other.shape[1]}: expected equal widths. Fix: pass "
            "both from one head"
        )
    check_device(name, tensor, other_name, other)


def check_rows(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both have equally many rows and the same device."""
    if tensor.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} have {tensor.shape[0]} rows and {other_name} {other.shape[0]}: expected one row for each of the "
            f"{other_name}"
        )
    check_device(name, tensor, other_name, other)


def check_indices(name: str, indices: Tensor, shape: str) -> None:
    """Raise unless this is an int64 tensor of a shape such as "(Q,)" or "(Q, K)", without a dimension of 0.

    Raises:
        TypeError: a dense int64 tensor was expected.
        ValueError: another shape.
    """
    _check_dense(name, indices, shape)
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 indices, got {indices.dtype}. Fix: convert with .long()")
    letters = shape.strip("(),").split(", ")
    if indices.dim() != len(letters) or 0 in indices.shape:
        raise ValueError(
            f"{name}: expected shape {shape} with {', '.join(letters)} >= 1, got {tuple(indices.shape)}. Fix: pass "
            "one row for each query"
        )


def check_range(name: str, indices: Tensor, lowest: int, end: int) -> None:
    """Raise IndexError if an index is outside lowest..end - 1. On other devices than a CPU, reading them would wait."""
    if indices.device.type == "cpu":
        least, most = indices.aminmax()
        if least < lowest or most >= end:
            wrong = int(least) if least < lowest else int(most)
            raise IndexError(f"{name}: expected rows from {lowest} to {end - 1}, got {wrong}. Fix: check the indices")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} and {other_name}: expected one device, got {tensor.device} and {other.device}. Fix: move one with "
            ".to(device)"
        )


def _check_dense(name: str, tensor: Tensor, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a tensor of shape {shape}, got {type(tensor).__name__}. Fix: use torch.as_tensor"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a sparse or nested one. Fix: convert with .to_dense()")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: Any) -> float:
    """Return a finite number as a float.

    Args:
        name: the argument's name in messages.
        value: any object. Numbers of NumPy are numbers. True and False are not.

    Raises:
        TypeError: the value is not a number.
        ValueError: the number is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def check_temperature(value: Any, name: str = "temperature") -> float:
    """Return a finite number above 0 as a float. Raise as `check_number` does."""
    if check_number(name, value) <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return float(value)
