"""Files of queries with candidates and grades."""

from __future__ import annotations

import json

import pytest

from jasper_fast.data.query_files import GivenQuery, read_queries
from jasper_fast.utils.errors import JasperError


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_every_form_of_a_file_is_read(tmp_path):
    rows = write(
        tmp_path / "q.jsonl",
        {"query": " what is ice ", "candidates": ["frozen water", "a metal"], "grades": [2, 0]},
        {"query": "rivers", "candidates": "the Rhine"},
        {"query": "alone", "id": 7},
    )
    assert read_queries(rows) == [
        GivenQuery("what is ice", ("frozen water", "a metal"), (2.0, 0.0)),
        GivenQuery("rivers", ("the Rhine",)),
        GivenQuery("alone"),
    ]
    (tmp_path / "q.txt").write_text("one query\n\nanother\n")
    assert read_queries(tmp_path / "q.txt") == [GivenQuery("one query"), GivenQuery("another")]
    (tmp_path / "q.tsv").write_text("query\tcandidates\tgrades\nice\tfrozen water\t1\nice\ta metal\t0\nrain\t\t\n")
    graded = read_queries(tmp_path / "q.tsv", graded=True)
    assert graded == [GivenQuery("ice", ("frozen water", "a metal"), (1.0, 0.0)), GivenQuery("rain")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], r"line 1: no column `query` \(got columns: question\). Fix"),
        ([{"query": " "}], "`query` is not a text"),
        ([{"query": 5}], "`query` is not a text"),
        ([{"query": "a", "candidates": ["b", None]}], "`candidates` is not a text"),
        ([{"query": "a", "candidates": ["b"], "grades": [1, 2]}], "1 candidates and 2 grades"),
        ([{"query": "a", "grades": [1]}], "0 candidates and 1 grades"),
        ([{"query": "a", "candidates": ["b"], "grades": ["high"]}], "a grade is not a finite number"),
        ([{"query": "a", "candidates": ["b"], "grades": [float("nan")]}], "a grade is not a finite number"),
        ([{"query": "a", "candidates": ["b"], "grades": [True]}], "a grade is not a finite number"),
        (
            [{"query": "a", "candidates": ["b"]}, {"query": "a", "candidates": ["b"]}],
            "line 2: a candidate is listed twice",
        ),
        ([{"query": "a \ud83d"}], "lone surrogate"),
    ],
)
def test_malformed_rows_are_rejected(tmp_path, rows, message):
    with pytest.raises(JasperError, match=message):
        read_queries(write(tmp_path / "q.jsonl", *rows))


def test_files_that_cannot_be_used_are_rejected(tmp_path):
    with pytest.raises(JasperError, match="no such file of queries. Fix: correct"):
        read_queries(tmp_path / "missing.jsonl")
    (tmp_path / "q.pdf").write_text("x")
    with pytest.raises(JasperError, match="not a file of queries"):
        read_queries(tmp_path / "q.pdf")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(JasperError, match="no query. Fix"):
        read_queries(tmp_path / "empty.jsonl")


def test_grades_are_needed_if_they_are_the_targets(tmp_path):
    with pytest.raises(JasperError, match="candidates without `grades`"):
        read_queries(write(tmp_path / "q.jsonl", {"query": "a", "candidates": ["b"]}), graded=True)
    with pytest.raises(JasperError, match="no query has candidates with grades"):
        read_queries(write(tmp_path / "q.jsonl", {"query": "a"}), graded=True)
