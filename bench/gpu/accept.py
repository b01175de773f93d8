"""The acceptance run, ``python -m bench gpu --accept``: everything that waits for a GPU, in one call of ten minutes.

The tests run first, those that are most likely to fail before the others. Then each kernel is measured next to its
alternatives, and then losses, search and training. Each section is a process, so an error of the GPU ends that section
only. A section has its part of the remaining time, and is ended with all its processes when this is over.

Everything is on disk as soon as it is known. In the folder ``accept``, ``SECTION.json`` holds the state of a section,
``SECTION.log`` what it printed, and ``SECTION.jsonl`` the results of its tests one by one. The benchmarks write their
files after each case. All sections are ``planned`` first, so a run that was cut off shows where.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import energy
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError

BUDGET_S = 570.0  # of a call that may take ten minutes
LEAST = 0.1  # A section that has less of its planned time is left out.
MARGIN_S = 10.0  # between the end of a benchmark's budget and the end of its process
TAIL = 2000  # stored characters of what a failed section printed
WORKERS = 12  # processes of a group of tests, which mostly compile


@dataclass(frozen=True)
class Section:
    """One process of the run.

    Args:
        name: name of its files.
        title: description.
        seconds: planned duration on an H200, from which its part of the time follows.
        command: command. ``{budget}`` in an argument is replaced by the seconds after which no case starts.
    """

    name: str
    title: str
    seconds: float
    command: tuple[str, ...]


# Name, file, planned seconds. The first test bounds that truncated products may break, the last is well covered before.
TESTS = (
    ("tests-losses", "tests/kernels/test_kernels.py", 60),
    ("tests-relative", "tests/kernels/test_relative_similarity_kernels.py", 45),
    ("tests-search", "tests/mips/test_mips_cuda.py", 40),
    ("tests-chunks", "tests/mips/test_mips_chunks.py", 10),
    ("tests-replay", "tests/mips/test_mips_replay.py", 10),
    ("tests-rerank", "tests/mips/test_mips_rerank.py", 25),
    ("tests-ranking", "tests/kernels/test_ranking_kernels.py", 20),
    ("tests-properties", "tests/kernels/test_kernel_properties.py", 20),
    ("tests-index", "tests/mips/test_mips_index.py", 10),
)


def plan(folder: Path, page: Path) -> list[Section]:
    """Return the sections in order.

    Args:
        folder: folder of the results.
        page: page that the last section writes.
    """
    python, records = (sys.executable, "-u", "-m"), folder / "accept"
    parallel: tuple[str, ...] = ()
    if importlib.util.find_spec("xdist") is not None:
        parallel = ("-n", str(min(WORKERS, os.cpu_count() or 1)))
    sections = []
    for name, file, seconds in TESTS:
        recorded = ("-p", "bench.gpu.recorder", "--record", str(records / f"{name}.jsonl"))
        command = (*python, "pytest", "-m", "gpu", "-q", *recorded, *parallel, file)
        sections.append(Section(name, f"GPU tests of {file}", seconds, command))
    for name, benchmark, title, seconds in (
        ("kernels", "gpu-kernels", "each kernel next to its alternatives, and the constants of the model", 75),
        ("losses", "losses", "losses, with energy", 100),
        ("mips", "mips", "search", 55),
        ("train", "train", "steps of a student of 1.5 B parameters with random weights", 90),
    ):
        out = str(folder / f"{name}-cuda.json")
        repeats = () if name == "train" else ("--repeats", "3")
        command = (*python, "bench", benchmark, "--device", "cuda", "--out", out, "--budget", "{budget}", *repeats)
        sections.append(Section(name, title, seconds, command))
    command = (*python, "bench", "gpu", "--results", str(folder), "--page", str(page))
    return [*sections, Section("page", "the page from these results", 10, command)]


def check_device() -> None:
    """Raise JasperError without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise JasperError(
            "bench gpu --accept: no CUDA device is in use (python -m jasper_fast.env gives the reason). "
            "Fix: run it on a machine with a GPU; --dry-run prints the plan anywhere"
        )


def describe(sections: Sequence[Section], budget: float) -> str:
    """Format the plan with the minutes of each section and their sum."""
    lines, total = [], 0.0
    for section in sections:
        lines.append(f"{total / 60:5.1f} min  {section.name:<17} {section.seconds / 60:4.1f} min  {section.title}")
        total += section.seconds
    lines.append(f"{total / 60:5.1f} min  planned, of a budget of {budget / 60:.1f} min")
    return "\n".join(lines)


def accept(sections: Sequence[Section], folder: Path, budget: float = BUDGET_S) -> int:
    """Run the sections one after the other, and return 0 if all succeeded.

    Args:
        sections: sections in order.
        folder: folder of the results.
        budget: seconds for everything. A section gets a part in proportion to its plan, and what others left.
    """
    begin, records = time.monotonic(), folder / "accept"
    records.mkdir(parents=True, exist_ok=True)
    for old in [*records.glob("*.json"), *records.glob("*.jsonl"), *records.glob("*.log")]:
        old.unlink()
    for number, section in enumerate(sections):
        _record(records, number, section, "planned")
    counter, succeeded = energy.counter(), True
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for number, section in enumerate(sections):
            left = budget - (time.monotonic() - begin)
            limit = left * section.seconds / sum(later.seconds for later in sections[number:])
            if limit < LEAST * section.seconds:
                _record(records, number, section, "left out", limit_s=limit)
                succeeded = False
                continue
            state = _run(records, number, section, limit, counter)
            print(f"{section.name}: {state}, {time.monotonic() - begin:.0f} of {budget:.0f} s", flush=True)
            succeeded &= state == "done"
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0 if succeeded else 1


def _run(records: Path, number: int, section: Section, limit: float, counter: Callable[[], float] | None) -> str:
    """Run one section, record it, and return its state."""
    _record(records, number, section, "running", limit_s=limit)
    log, joules, begin = records / f"{section.name}.log", counter() if counter else None, time.monotonic()
    command = [argument.format(budget=f"{max(1.0, limit - MARGIN_S):.0f}") for argument in section.command]
    status, state = None, "running"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
            state = "done" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        except BaseException:
            state = "cut off"
            raise
        finally:
            _end(process)
            figures: dict[str, Any] = {"limit_s": limit, "seconds": time.monotonic() - begin, "status": status}
            if counter and joules is not None:
                figures["energy_j"] = counter() - joules
            if state != "done":
                figures["tail"] = log.read_bytes()[-TAIL:].decode(errors="replace")
            _record(records, number, section, state, **figures)
    return state


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a section with the processes that it started, which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _record(records: Path, number: int, section: Section, state: str, **figures: Any) -> None:
    row = {
        "number": number,
        "name": section.name,
        "state": state,
        "title": section.title,
        "planned_s": section.seconds,
        **figures,
    }
    write_atomic(records / f"{section.name}.json", json.dumps(row, indent=1) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the last run in the order of the plan, empty without one."""
    rows = [json.loads(file.read_text()) for file in (folder / "accept").glob("[!.]*.json")]
    return sorted(rows, key=lambda row: row["number"])
