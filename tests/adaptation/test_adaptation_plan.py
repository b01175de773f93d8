"""The planned time of an adaptation: printed before the work, for the widths and texts of the call."""

from __future__ import annotations

import json

import numpy as np
import pytest

import jasper_fast
from jasper_fast.adaptation import pipeline
from jasper_fast.adaptation.pipeline import read_request_corpus
from jasper_fast.adaptation.plan import Reading, expected_reading, planned_phases, planned_widths
from jasper_fast.adaptation.request import make_request
from jasper_fast.adaptation.state import State

pytestmark = pytest.mark.usefixtures("fast")


def seconds_of(request, corpus, folder, lengths=(64,)):
    speed = {name: {"documents_per_s": rate, "queries_per_s": rate} for name, rate in (("student", 10), ("teacher", 2))}
    reading = Reading(speed, np.ones(4, np.int64), lengths)
    phases = planned_phases(request, State(folder, {}), corpus, reading, 32)
    return {phase.name: phase.seconds for phase in phases}


def test_each_phase_has_its_time(world, tmp_path):
    options = world.options(cache=str(tmp_path / "cache"), widths=None)
    request = make_request(world.few, tmp_path / "out", **options)
    corpus = read_request_corpus(request)
    units = 90 + 0.2 * (len(corpus.texts) - 90)
    planned = seconds_of(request, corpus, tmp_path)
    assert list(planned) == ["teacher", "student", "fit", "projections", "scores", "export"]
    assert planned["teacher"] == pytest.approx(units / 2) and planned["student"] == pytest.approx(units / 10)
    assert planned["projections"] == 40  # seconds, for the student's one narrow width and the rotation
    assert "length" in seconds_of(request, corpus, tmp_path, (64, 128))
    longer = make_request(world.few, tmp_path / "out", **{**options, "minutes": 3, "widths": [16, 8, 4, 2]})
    planned = seconds_of(longer, corpus, tmp_path)
    assert planned["training"] == 180 and planned["projections"] == 100 and planned_widths(longer, 32) == [16, 8, 4, 2]


def test_cached_embeddings_take_no_time(world, tmp_path):
    options = world.options(cache=str(tmp_path / "cache"))
    jasper_fast.adapt(world.few, out=tmp_path / "out", **options)
    done = make_request(world.few, tmp_path / "other", **options)
    assert seconds_of(done, read_request_corpus(done), tmp_path)["teacher"] == 0
    more = make_request(world.many, tmp_path / "other", **options)
    corpus = read_request_corpus(more)
    units = 130 + 0.2 * (len(corpus.texts) - 130)
    assert 0 < seconds_of(more, corpus, tmp_path)["teacher"] < 0.6 * units / 2  # the texts of the first call are reused


def test_the_time_is_printed_before_anything_is_read(world, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "embed", stop)
    for minutes in (None, 3):
        with pytest.raises(KeyboardInterrupt):
            jasper_fast.adapt(
                world.few,
                out=tmp_path / f"out-{minutes}",
                **world.options(minutes=minutes, cache=str(tmp_path / "cache")),
            )
        said = capsys.readouterr().out
        assert said.index("planned time") < said.index("the teacher reads") and " to go" in said
        assert ("training 3.0" in said) == (minutes == 3)


def test_a_student_that_will_be_cut_is_measured_too(world, tmp_path, monkeypatch):
    from jasper_fast.adaptation import plan

    seen = []
    monkeypatch.setattr(plan, "speeds", lambda encode, *others: seen.append(encode(["a note"], "document")) or {})
    request = make_request(
        world.few, tmp_path / "out", columns=["title", "text"], teacher=str(world.teacher), cache=str(world.cache)
    )
    reading = expected_reading(request, None, read_request_corpus(request))
    assert max(seen[0]) == max(request.config.student.heads) and reading.lengths[0] == request.config.student.max_length
    assert json.dumps([int(count) for count in reading.counts])


def test_dry_run_has_the_minutes_of_each_phase(world, tmp_path, capsys):
    from jasper_fast.adapt import main

    given = ["--columns", "title,text", "--model", str(world.student), "--cache", str(world.cache), "--dry-run"]
    assert main([str(world.few), *given, "--out", str(tmp_path / "out"), "--minutes", "3"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("planned time: ")]
    for part in ("reading by the teacher ", "training 3.0", "reading by the student ", "fitting 0.1", "export 0.2"):
        assert part in line
    assert not (tmp_path / "out").exists()
