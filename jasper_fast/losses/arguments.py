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
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{label}: expected a tensor of shape (B, D), got {type(tensor).__name__}. Fix: use torch.as_tensor"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(
                f"{label}: expected a dense tensor, got a sparse or nested one. Fix: convert with .to_dense()"
            )
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(
                f"{label}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}. Fix: convert with "
                ".float()"
            )
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(
                f"{label}: expected shape (B, D) with B, D >= 1, got {tuple(tensor.shape)}. Fix: pass v[None] for a "
                "single embedding v"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{name} has {student.shape[0]} rows and teacher {teacher.shape[0]}: expected one teacher row for each "
            "student row"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{name} is on {student.device} and teacher on {teacher.device}. Fix: move one with .to(device)"
        )


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


def check_temperature(value: Any) -> float:
    """Return a finite number above 0 as a float. Raise as `check_number` does."""
    if check_number("temperature", value) <= 0:
        raise ValueError(f"temperature: expected a number > 0, got {value}")
    return float(value)
