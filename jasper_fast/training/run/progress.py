"""The time to go of a run: planned seconds of each phase, corrected by the speed that is observed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PRIOR_FRACTION, PRIOR_SECONDS = 0.1, 10.0  # the plan weighs as much as this part of the run, and at least so long


@dataclass
class Phase:
    """A part of a run with its own speed.

    Args:
        name: its name.
        units: number of steps, texts or other units.
        seconds: planned seconds of all units.
        done: units that are done.
    """

    name: str
    units: int
    seconds: float
    done: int = 0

    @property
    def remaining(self) -> float:
        """Planned seconds of the units that are not done."""
        return self.seconds * (1.0 - self.done / self.units) if self.units else 0.0


class Progress:
    """The phases of a run, in order, and the time to go.

    The planned time of the rest is multiplied by the ratio of actual to planned seconds so far. The ratio starts at 1
    and forgets old phases slowly. So one short phase that was planned badly does not move it.

    Args:
        phases: the phases in their order. Empty: the time to go is unknown.

    Example:
        >>> progress = Progress([Phase("distil", 100, 50.0), Phase("evaluation", 1, 10.0)])
        >>> progress.advance("distil", 50, 25.0)
        35.0
    """

    def __init__(self, phases: Iterable[Phase] = ()) -> None:
        self.phases = list(phases)
        total = sum(phase.seconds for phase in self.phases)
        self._prior = max(PRIOR_SECONDS, PRIOR_FRACTION * total)
        self._actual = self._planned = self._prior

    def find(self, name: str) -> Phase | None:
        """Return the phase of a name. None: it was not planned."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def advance(self, name: str, units: int, seconds: float | None) -> float | None:
        """Count units of a phase as done. All earlier phases count as finished.

        Args:
            name: the name of the phase.
            units: the further units.
            seconds: the seconds that they took. None: they were done before, and say nothing about the speed.

        Returns:
            the seconds to go. None: the run has no plan.
        """
        phase = self.find(name)
        if phase is None:
            return self.to_go()
        for earlier in self.phases[: self.phases.index(phase)]:
            earlier.done = earlier.units
        phase.done = min(phase.units, phase.done + units)
        if seconds is not None and phase.units:
            planned = phase.seconds * units / phase.units
            keep = 0.5 ** (seconds / self._prior)
            self._actual = keep * self._actual + seconds
            self._planned = keep * self._planned + planned
        return self.to_go()

    def to_go(self) -> float | None:
        """Return the seconds to go. None: the run has no plan."""
        if not self.phases:
            return None
        return sum(phase.remaining for phase in self.phases) * self._actual / self._planned

    def line(self, name: str, done: int) -> str:
        """Return the text of the progress bar, such as ``distil 120/500 · 6:12 to go``."""
        phase, seconds = self.find(name), self.to_go()
        count = f"{name} {done}/{phase.units}" if phase is not None else f"{name} {done}"
        return count if seconds is None else f"{count} · {clock(seconds)} to go"


def clock(seconds: float) -> str:
    """Format seconds as ``M:SS``, or ``H:MM:SS`` from an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Format seconds for a person: ``8 seconds``, ``11 minutes``, ``3.5 hours``."""
    for size, unit in ((3600.0, "hour"), (60.0, "minute")):
        if seconds >= 1.5 * size:
            amount = seconds / size
            return f"{amount:.1f} {unit}s" if amount < 10 else f"{amount:.0f} {unit}s"
    return f"{seconds:.0f} second{'' if round(seconds) == 1 else 's'}"
