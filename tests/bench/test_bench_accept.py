"""The acceptance run on fake sections, its plan, and the model that its figures are compared with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import accept, model, recorder, report
from bench.gpu.accept import Section
from bench.pages import gpu

ROOT = Path(__file__).parents[2]
FAILING = """
import time
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_slow(): time.sleep(60)
"""


def section(name: str, code: str, seconds: float = 1.0) -> Section:
    return Section(name, f"fake {name}", seconds, (sys.executable, "-c", code))


def states(folder: Path) -> dict[str, str]:
    return {row["name"]: row["state"] for row in accept.read(folder)}


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_crash_and_a_hang_end_their_sections_only(tmp_path, capsys):
    """A hanging section is ended with the process that it started."""
    hang = (
        "import subprocess, sys, time, pathlib; p = subprocess.Popen([sys.executable, '-c', 'import time; "
        f"time.sleep(60)']); pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(p.pid)); time.sleep(60)"
    )
    sections = [
        section("good", "print('fine')", 5),
        section("crash", "import os; print('before', flush=True); os.abort()", 5),
        section("hang", hang, 0.4),
        section("after", "print('fine')", 5),
    ]
    assert accept.accept(sections, tmp_path, 8.0) == 1
    assert states(tmp_path) == {"good": "done", "crash": "failed", "hang": "out of time", "after": "done"}
    crash, hung = accept.read(tmp_path)[1:3]
    assert crash["status"] == -signal.SIGABRT and "before" in crash["tail"] and hung["status"] is None
    assert 0.1 < hung["limit_s"] <= hung["seconds"] < 5
    assert not alive(int((tmp_path / "child").read_text()))
    assert "hang: out of time" in capsys.readouterr().out
    text = "\n".join(report.acceptance(tmp_path))
    assert "| fake hang | **out of time** |" in text and "| fake after | done |" in text


def test_sections_without_time_are_left_out(tmp_path):
    sections = [section("first", "import time; time.sleep(60)", 30), section("second", "pass", 30)]
    assert accept.accept(sections, tmp_path, 0.5) == 1
    assert states(tmp_path) == {"first": "left out", "second": "left out"}


def test_unused_time_goes_to_later_sections(tmp_path):
    assert accept.accept([section("first", "pass", 10), section("second", "pass", 10)], tmp_path, 40.0) == 0
    first, second = accept.read(tmp_path)
    assert 19 < first["limit_s"] <= 20 and 38 < second["limit_s"] < 40


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_leaves_what_it_found(tmp_path, sent):
    """After SIGTERM no process of the section is left."""
    code = (
        "import sys; from pathlib import Path; from bench.gpu.accept import Section, accept; "
        "run = lambda name, code: Section(name, name, 5, (sys.executable, '-c', code)); "
        f"own = Path({str(tmp_path / 'child')!r}); "
        "wait = f'import os, pathlib, time; pathlib.Path({str(own)!r}).write_text(str(os.getpid())); time.sleep(60)'; "
        f"accept([run('one', 'pass'), run('two', wait), run('three', 'pass')], Path({str(tmp_path)!r}), 60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    child = tmp_path / "child"
    try:
        until(lambda: child.is_file() and child.read_text())
        driver.send_signal(sent)
        assert driver.wait(20) == (-signal.SIGKILL if sent == signal.SIGKILL else 128 + signal.SIGTERM)
        found = states(tmp_path)
        assert found == {"one": "done", "two": "running" if sent == signal.SIGKILL else "cut off", "three": "planned"}
        if sent == signal.SIGTERM:
            until(lambda: not alive(int(child.read_text())))
        assert "| two |" in "\n".join(report.acceptance(tmp_path))
    finally:
        if child.is_file() and alive(int(child.read_text())):
            os.kill(int(child.read_text()), signal.SIGKILL)


def test_another_run_replaces_the_records(tmp_path):
    (tmp_path / "accept").mkdir()
    (tmp_path / "accept" / "old.json").write_text("{}")
    (tmp_path / "accept" / ".unfinished-x.json").write_text("{")
    accept.accept([section("new", "pass")], tmp_path, 30.0)
    assert states(tmp_path) == {"new": "done"}


def test_tests_are_recorded_one_by_one(tmp_path):
    """The results of a group of tests survive its end by SIGKILL, with the name of the test that ran then."""
    file, rows = tmp_path / "test_some.py", tmp_path / "accept" / "some.jsonl"
    file.write_text(FAILING)
    rows.parent.mkdir()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.recorder", "-p", "no:xdist", "-p", "no:randomly"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["--record", str(rows), "--rootdir", str(tmp_path), "-c", os.devnull, str(file)]
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    until(lambda: rows.is_file() and "test_slow" in rows.read_text())
    running.kill()
    running.wait()
    with rows.open("a") as out:
        out.write('{"test": "test_some.py::test_slow", "outco')  # a line that was cut off
    found = {name.rpartition("::")[2]: own for name, own in recorder.read(rows).items()}
    assert {name: own["outcome"] for name, own in found.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_slow": "started"
    }  # fmt: skip
    assert "one is not two" in found["test_bad"]["message"]
    (rows.parent / "some.json").write_text(
        json.dumps({"number": 0, "name": "some", "title": "some tests", "state": "out of time", "planned_s": 9})
    )
    text = "\n".join(report.acceptance(tmp_path))
    assert "**out of time**, 1 of 3 tests passed" in text
    assert "test_bad`: failed" in text and "test_slow`: cut off" in text


def test_the_plan_fits_ten_minutes_and_has_all_gpu_tests(tmp_path, capsys):
    sections = accept.plan(tmp_path, tmp_path / "gpu.md")
    assert sum(section.seconds for section in sections) <= accept.BUDGET_S < 600
    files = {str(f.relative_to(ROOT)) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text()}
    files -= {"tests/bench/test_bench_accept.py"}  # this line
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    planned = {file for _, file, _ in accept.TESTS}
    assert files <= planned and all((ROOT / file).is_file() for file in planned)
    assert all(Path(file).stem in conftest for file in planned - files)  # whose tests all are GPU tests on a GPU
    assert gpu.main(["--accept", "--dry-run", "--budget", "300"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {section.name} " in printed for section in sections) and "budget of 5.0 min" in printed
    position = [printed.index(f" {name} ") for name in ("tests-losses", "kernels", "losses", "mips", "train")]
    assert position == sorted(position)


def test_each_benchmark_of_the_plan_takes_its_options(tmp_path, monkeypatch):
    """Without a GPU, they parse their options, then report that no GPU was found."""
    import importlib

    from bench.__main__ import BENCHMARKS

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for section in accept.plan(tmp_path, tmp_path / "gpu.md"):
        if "{budget}" in section.command:
            name, *arguments = section.command[section.command.index("bench") + 1 :]
            module = importlib.import_module(BENCHMARKS[name.replace("-", "_")])
            if name == "mips":  # it takes any device
                continue
            with pytest.raises(SystemExit, match="no CUDA device"):
                module.main([argument.format(budget=9) for argument in arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_error(tmp_path):
    from jasper_fast.utils.errors import JasperError

    with pytest.raises(JasperError, match=r"no CUDA device is in use .* Fix: run it on a machine with a GPU"):
        gpu.main(["--accept", "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_model_meets_the_targets_that_it_predicts():
    judged = [(where, target) for where, (_, targets) in report.predictions().items() for target in targets]
    predicted = [(where, target) for where, target in judged if target["value"] is not None]
    assert len(predicted) >= 11
    assert not [(where, target["what"]) for where, target in predicted if not target["met"]]


def test_the_model_adds_up():
    assert model.bf16(8192, 8192, 8192) == pytest.approx(2 * 8192**3 / 790e12, rel=0.01)
    assert model.exact(8192, 1024) > 3.8 * model.exact(4096, 1024) > 0
    assert model.similarity(65536, [1024], 1024, model.bf16) < model.bf16(65536, 65536, 1024)
    few, many = (model.search_case(size, 1_000_000, 1024, 10)["seconds"] for size in (1, 16))
    assert few == many  # both read all rows once


def test_the_page_has_predictions_next_to_measurements(tmp_path):
    case = {"name": "exact", "methods": {"jasper_fast": {"both_s": 2 * model.exact(4096, 1024)}}}
    (tmp_path / "losses-cuda.json").write_text(json.dumps({"environment": {}, "relative_similarity": [case]}))
    search = {"queries": 1, "rows": 1_000_000, "width": 1024, "k": 10, "seconds": {"bare bf16 product": 1.0}}
    (tmp_path / "mips-cuda.json").write_text(json.dumps({"search": {"cases": [search]}}))
    lines = "\n".join(report.times(tmp_path)).splitlines()
    (own,) = [line for line in lines if line.startswith("| relative similarity, exact | jasper_fast")]
    assert own.endswith("| 2.00 |")
    (own,) = [line for line in lines if line.startswith("| search, 1 of 1,000,000 x 1024, k 10 | bare")]
    assert "| 1,000 ms |" in own
    target = {"what": "ms", "at_most": 9.0, "value": 12.0, "met": False}
    (table,) = report.verdict({("relative similarity, exact", "ms"): target, ("new", "ms"): target})
    assert "| relative similarity, exact | ms | at most 9 | 6.18 | 12 | **not met** |" in table
    assert "| new | ms | at most 9 |  | 12 | **not met** |" in table and "0 of 2 targets" in table


def test_kernels_are_measured_next_to_their_alternatives(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from bench.gpu import kernels
    from jasper_fast.kernels import mips_rescore

    monkeypatch.setattr(mips_rescore, "PAIRS", 256)  # the interpreter is slow for each program
    monkeypatch.setattr(kernels, "SHRINK", 1024)
    monkeypatch.setattr(kernels, "ALLOWED", 0.5)
    out = tmp_path / "kernels-cuda.json"
    plain = kernels.kernels

    def broken(device, shrink):
        yield from plain(device, shrink)

        def make():
            raise RuntimeError("no such kernel")

        yield "broken", make
        wrong = {"jasper_fast": lambda: torch.zeros(3), "eager": lambda: torch.ones(3)}
        yield "wrong", lambda: kernels.Case(1.0, wrong, lambda: torch.ones(3))

    monkeypatch.setattr(kernels, "kernels", broken)
    assert kernels.main(["--device", "cpu", "--quick", "--repeats", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert "no such kernel" in results["cases"].pop("broken")["error"]
    wrong = results["cases"].pop("wrong")["methods"]
    assert "relative error" in wrong["jasper_fast"]["error"] and wrong["eager"]["seconds"] > 0
    for name, case in {**results["constants"], **results["cases"]}.items():
        assert case["predicted_s"] > 0, name
        assert all(own["seconds"] > 0 for own in case["methods"].values()), (name, case)
    assert all({"jasper_fast", "eager"} <= set(case["methods"]) for case in results["cases"].values())
    cases, constants = report.kernels(results)
    assert "| info_nce loss | cuBLAS |" in cases and "| 1,000 launches | torch |" in constants
    assert kernels.main(["--device", "cpu", "--quick", "--out", str(out), "--budget", "0"]) == 0
    assert "budget of 0 s is spent" in json.loads(out.read_text())["constants"]["sum of 4 GB"]["error"]
