"""Two columns of any file of rows become a retrieval set, or the row that is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jasper_fast.config.data import EvalConfig
from jasper_fast.data.eval_loaders import load_eval
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.utils.errors import JasperError
from tests.helpers.beir import write_beir, write_jsonl

ROWS = [
    {"title": "Rain", "text": "Water falls."},
    {"title": "Snow", "text": "Ice falls."},
    {"title": " rain", "text": "Wet weather."},
    {"title": "Drizzle", "text": "water  falls."},
]


def read(path: Path, **settings: Any) -> RetrievalSet:
    evalset = load_eval(EvalConfig(path=str(path), query="title", document="text", **settings))
    assert isinstance(evalset, RetrievalSet)
    return evalset


@pytest.mark.parametrize("form", ["docs.jsonl", "docs.csv", "docs.tsv", "docs.parquet", "folder"])
def test_rows_of_every_format_are_merged(tmp_path: Path, form: str) -> None:
    if form == "folder":
        path = tmp_path / form
        write_jsonl(path / "a.jsonl", ROWS[:2])
        write_jsonl(path / "b.jsonl", ROWS[2:])
    elif form.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / form
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"other": 1.5} for row in ROWS]), path)
    elif form.endswith("jsonl"):
        path = tmp_path / form
        write_jsonl(path, ROWS)
    else:
        path, mark = tmp_path / form, "," if form.endswith("csv") else "\t"
        path.write_text("".join(f"{a}{mark}{b}\n" for a, b in [("title", "text"), *(r.values() for r in ROWS)]))
    evalset = read(path)
    assert (evalset.name, evalset.kind, evalset.sizes()) == (
        form.split(".")[0],
        "pairs",
        {"queries": 3, "documents": 3},
    )
    assert evalset.queries == ["Rain", "Snow", "Drizzle"]
    assert evalset.documents == ["Water falls.", "Ice falls.", "Wet weather."]
    assert evalset.relevant == [{0: 1, 2: 1}, {1: 1}, {0: 1}]
    assert set(evalset.held_out_texts()) == {*evalset.queries, *evalset.documents}


def test_limit_keeps_the_corpus_and_transductive_allows_its_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", ROWS)
    evalset = read(tmp_path / "docs.jsonl", limit=1, transductive=True, name="mine")
    assert (evalset.name, len(evalset.queries), len(evalset.documents)) == ("mine", 1, 3)
    assert list(evalset.held_out_texts()) == evalset.queries


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"headline": "a", "text": "b"}], r"line 1: no column 'title' \(got columns: headline, text\)"),
        ([*ROWS, {"title": "a"}], "line 5: no column 'text'"),
        ([*ROWS, {"title": "a", "text": "  "}], "line 5: `text` is empty"),
        ([{"title": "", "text": "b"}], "line 1: `title` is empty"),
        ([{"title": None, "text": "b"}], "line 1: `title` is not text"),
        ([{"title": ["a"], "text": "b"}], "line 1: `title` is not text"),
        ([], "no rows"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(JasperError, match=message) as error:
        read(path)
    assert "Fix: " in str(error.value)


def test_a_wrong_path_or_set_is_rejected(tmp_path: Path, tiny_texts: list[str]) -> None:
    with pytest.raises(JasperError, match="no such file or folder"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(JasperError, match="the folder is a BEIR set"):
        read(write_beir(tmp_path / "stories", tiny_texts[:20]))
    with pytest.raises(JasperError, match="a built-in set has no columns"):
        read(Path("docstrings"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": "title"}, "`query` needs `document` too"),
        ({"document": "text"}, "`document` needs `query` too"),
        ({"query": "text", "document": "text"}, "name the same column 'text'"),
    ],
)
def test_both_columns_are_needed_and_differ(columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(path="docs.jsonl", **columns)
