"""The state of a call in progress: its texts, its results so far, and the time to go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jasper_fast.adaptation.documents import Corpus
from jasper_fast.adaptation.export import NARROW
from jasper_fast.adaptation.request import Request
from jasper_fast.adaptation.state import State
from jasper_fast.adaptation.steps import LENGTH_ROWS, SECONDS
from jasper_fast.training.run.progress import Phase, Progress, clock

SHORT_TEXT = 0.2  # time that a question or sentence takes, as a fraction of a document's
PLANNED = {"fit": 5.0, "scores": 5.0, "export": 15.0}  # seconds


@dataclass
class Work:
    """An adaptation in progress.

    Args:
        request: the call.
        state: the saved state.
        corpus: the texts.
        results: what results.json will have.
        progress: the planned steps, whose time depends on the speed of the machine.
        fixed: seconds of the projections and of the rotation, which do not.
        counts: (n,) int64, tokens of a sample of the documents.
    """

    request: Request
    state: State
    corpus: Corpus
    results: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    fixed: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Print the title of a step with the time to go, and time the step."""
        to_go = self.progress.to_go()
        print(title + (f" · {clock(to_go + self.fixed)} to go" if to_go is not None else ""), flush=True)
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self.results["seconds"][name] = round(spent, 2)
        if name == "projections":
            self.fixed = 0.0
        elif (phase := self.progress.find(name)) is not None:
            self.progress.advance(name, phase.units, spent)

    def note(self, line: str) -> None:
        """Print something that was decided for the user, and keep it for the report."""
        print(line, flush=True)
        self.results["notes"].append(line)


def plan_time(work: Work, speed: dict[str, Any], lengths: list[int]) -> None:
    """Plan the time of the steps that follow.

    Args:
        work: the adaptation, whose plan is set.
        speed: measured speeds of student and teacher.
        lengths: lengths of the student to compare, its own first.
    """
    corpus, request = work.corpus, work.request
    student = speed["student"]["documents_per_s"]
    units = corpus.documents + SHORT_TEXT * (len(corpus.texts) - corpus.documents)
    phases = []
    if request.max_length is None and "length" not in work.state.facts and len(lengths) > 1:
        documents = min(corpus.documents, LENGTH_ROWS) * sum(lengths) / lengths[0]
        phases.append(Phase("length", 1, documents / student))
    if "teacher" not in work.results["seconds"] and speed["teacher"] is not None:
        phases.insert(0, Phase("teacher", 1, units / speed["teacher"]["documents_per_s"]))
    phases.append(Phase("student", 1, units / student))
    phases.append(Phase("fit", 1, PLANNED["fit"] + corpus.documents / 20_000))
    phases += [Phase(name, 1, PLANNED[name]) for name in ("scores", "export")]
    work.progress, work.fixed = Progress(phases), SECONDS * (len(request.widths or NARROW) + 1)
