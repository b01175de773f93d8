"""The seconds that a benchmark is given: what would begin after them is left out, and said to be."""

from __future__ import annotations

import time


class Budget:
    """Counts from when it is made.

    Args:
        seconds: None: no end.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._begin = time.monotonic()

    def spent(self) -> str | None:
        """Why to leave out what comes next; None while there is time."""
        if self.seconds is None or time.monotonic() - self._begin < self.seconds:
            return None
        return f"left out: the budget of {self.seconds:g} s is spent"
