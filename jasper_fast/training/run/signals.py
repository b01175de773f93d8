"""Signals that stop a run: SIGINT and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jasper_fast.utils.errors import JasperError

RESUME = "Run the same command to resume"
FINISH = "add --finish to export and evaluate the model as it is"


class Stopped(JasperError):
    """A signal asked the run to stop. What was computed before is saved."""


@contextmanager
def leave_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does. During training steps, :func:`stop_on_signal` takes its place."""
    try:
        old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: signals belong to somebody else
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGINT or SIGTERM arrived in the block. A second signal stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this step (repeat to stop at once)", flush=True)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals belong to somebody else
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
