"""Where the time of a run goes: phases before, in and after training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from jasper_fast.training.run.phases import Phases, phase_lines, phase_seconds

LOG = [
    {"event": "planned", "planned_seconds": {"in all": 9.0}},
    {"event": "preparation", "seconds": 10.0, "phases": {"texts": 4.0, "teacher": 5.0}},
    {"event": "plan", "stage": "head", "seconds": 0.5},
    {"event": "pooling", "stage": "head", "texts": 3, "seconds": 1.5},
    {"event": "step", "stage": "head", "step": 1, "seconds": 2.0},
    {"event": "preparation", "seconds": 3.0, "phases": {"texts": 2.0}},  # the run resumed
    {"event": "step", "stage": "head", "step": 2, "seconds": 2.0},
    {"event": "step", "stage": "distil", "step": 3, "seconds": 7.0},
]


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Phases:
    """Return the clock of an ending that took six seconds, one of them without a phase."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    phases = Phases()
    for name, seconds in (("export", 2.0), ("evaluation", 2.0), ("export", 1.0)):
        with phases.measure(name):
            now[0] += seconds
    now[0] += 1.0
    return phases


def test_phases_come_in_the_order_of_a_run_and_over_all_resumes(tmp_path: Path, ending: Phases) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in LOG))
    seconds = phase_seconds(log, ending)
    assert list(seconds.items()) == [
        ("texts", 6.0), ("teacher", 5.0), ("head", 6.0), ("distil", 7.0), ("export", 3.0), ("evaluation", 2.0),
        ("other", 3.0),
    ]  # fmt: skip
    assert sum(seconds.values()) == 10.0 + 3.0 + 13.0 + ending.in_all


def test_a_log_of_an_older_version_has_no_phases_before_training(tmp_path: Path, ending: Phases) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"event": "preparation", "seconds": 10.0}) + "\n")
    assert phase_seconds(log, ending) == {"export": 3.0, "evaluation": 2.0, "other": 11.0}


def test_a_phase_that_fails_counts_too() -> None:
    phases = Phases()
    with pytest.raises(ValueError), phases.measure("texts"):
        raise ValueError
    assert phases.seconds["texts"] >= 0.0


def test_a_call_returns_its_result_and_counts() -> None:
    phases = Phases()
    assert phases.call("texts", divmod, 7, 3) == (2, 1) and list(phases.seconds) == ["texts"]


def test_the_terminal_shows_phases_that_took_time() -> None:
    assert phase_lines({"texts": 10.0, "plan": 0.4, "evaluation": 29.6}) == [
        "  texts           10 s   25 %",
        "  evaluation      30 s   74 %",
    ]
    assert phase_lines({"other": 0.0}) == [] and phase_lines({}) == []
