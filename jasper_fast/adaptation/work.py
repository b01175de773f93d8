"""The state of a call in progress: its texts, its results so far, and the time to go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jasper_fast.adaptation.documents import Corpus
from jasper_fast.adaptation.plan import FIXED
from jasper_fast.adaptation.request import Request
from jasper_fast.adaptation.state import State
from jasper_fast.training.run.progress import Phase, Progress, clock


@dataclass
class Work:
    """An adaptation in progress.

    Args:
        request: the call.
        state: the saved state.
        corpus: the texts.
        results: what results.json will have.
        progress: the planned steps, whose time depends on the speed of the machine.
        fixed: planned seconds of the steps whose time does not.
        counts: (n,) int64, tokens of a sample of the documents.
    """

    request: Request
    state: State
    corpus: Corpus
    results: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    fixed: dict[str, float] = field(default_factory=dict)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Print the title of a step with the time to go, and time the step."""
        to_go = self.progress.to_go()
        print(title + (f" · {clock(to_go + sum(self.fixed.values()))} to go" if to_go is not None else ""), flush=True)
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self.results["seconds"][name] = round(spent, 2)
        self.fixed.pop(name, None)
        if (phase := self.progress.find(name)) is not None:
            self.progress.advance(name, phase.units, spent)

    def plan(self, phases: Sequence[Phase]) -> None:
        """Plan the steps that are not done yet, and keep the plan of the whole call for the report."""
        self.results.setdefault("planned", {phase.name: round(phase.seconds, 1) for phase in phases})
        left = [phase for phase in phases if phase.name not in self.results["seconds"]]
        self.progress = Progress(phase for phase in left if phase.name not in FIXED)
        self.fixed = {phase.name: phase.seconds for phase in left if phase.name in FIXED}

    def note(self, line: str) -> None:
        """Print something that was decided for the user, and keep it for the report."""
        print(line, flush=True)
        self.results["notes"].append(line)
