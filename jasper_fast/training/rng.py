"""State of the random number generators that an encoder pass may draw from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the CPU's generator and of the GPU's, if the device is one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Restore states that :func:`random_state` returned."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def replay(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw the same random numbers as after ``state``, then continue as if nothing had been drawn."""
    now = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(now, device)
