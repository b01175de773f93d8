"""pytest plugin of the acceptance run: ``-p bench.gpu.recorder --record FILE`` appends a JSON line for every event.

A test that was running when its process was ended has a line ``started`` and no result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MESSAGE = 600  # stored characters of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option ``--record``."""
    parser.addoption("--record", type=Path, help="file to which a JSON line is appended for every test")


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that collects all reports, not in its workers."""
    file = config.getoption("--record")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(file), "recorder")


class Recorder:
    """Writer of a line for the start and the result of each test."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, row: dict[str, Any]) -> None:
        """Append a line, which is on disk when this returns to a process that may be killed."""
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Record the start of a test."""
        self.write({"test": nodeid, "outcome": "started"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the result of a test, or of its setup or teardown if these decide it."""
        if report.when == "call" or report.outcome != "passed":
            message = "" if report.outcome == "passed" else report.longreprtext[-MESSAGE:]
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self.write(row | ({"message": message} if message else {}))


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the last row of every test by name. A last line that was cut off is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if rows.get(row["test"], {}).get("outcome") != "failed":  # a later teardown does not hide a failure
            rows[row["test"]] = row
    return rows
