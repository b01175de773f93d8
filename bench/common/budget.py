"""Time budget of a benchmark. Cases that would start after it are left out and reported."""

from __future__ import annotations

import time


class Budget:
    """Time budget that starts when the object is created.

    Args:
        seconds: length of the budget. None: no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._begin = time.monotonic()

    def spent(self) -> str | None:
        """Return the reason to leave out the next case, or None while there is time."""
        if self.seconds is None or time.monotonic() - self._begin < self.seconds:
            return None
        return f"left out: the budget of {self.seconds:g} s is spent"
