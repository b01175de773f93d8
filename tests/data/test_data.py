"""Training texts: reading, malformed rows, exclusion, augmentation, order, caching."""

from __future__ import annotations

import builtins
import csv
import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jasper_fast.config.data import DataConfig, EvalConfig, SourceConfig
from jasper_fast.config.run import Config
from jasper_fast.data import text_dataset as data_module
from jasper_fast.data.augment import WordReplacer, cut_and_shuffle, sentences
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.prepare import count_trained_pieces, prepare_texts
from jasper_fast.data.text import normal_form, text_digest
from jasper_fast.data.text_dataset import build_all_texts, build_texts, texts_fingerprint
from jasper_fast.data.text_sources import read_source
from jasper_fast.utils.errors import JasperError
from tests.helpers.beir import write_beir
from tests.helpers.processes import exit_code

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


ROWS = [{"title": f"Title {i}", "text": f'The {i}th text, with a "quote" and an ü.'} for i in range(20)]
DOCUMENT = "A first sentence stands here. Dr. Smith wrote the second one! Is this the third? It is."


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, *sources: SourceConfig, **others) -> DataConfig:
    plain = {"cut_share": 0.0, "shuffle_share": 0.0, "held_out": 0, "cache": str(folder / "cache")}
    return DataConfig(sources=list(sources), **{**plain, **others})


def source(path: Path, **others) -> SourceConfig:
    return SourceConfig(path=str(path), **others)


@pytest.fixture(params=["jsonl", "jsonl.gz", "csv", "tsv", "parquet", "folder"])
def same_rows(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write the same rows in every format that has columns."""
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        return jsonl(path, ROWS)
    if request.param == "jsonl.gz":
        path.write_bytes(gzip.compress(jsonl(tmp_path / "plain", ROWS).read_bytes()))
    elif request.param == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["title", "text"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif request.param == "tsv":  # no quoting: a quote in a cell is text
        lines = ["title\ttext", *(f"{row['title']}\t{row['text']}" for row in ROWS)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    else:
        path.mkdir()
        jsonl(path / "a.jsonl", ROWS[:5])
        pq.write_table(pa.Table.from_pylist(ROWS[5:]), path / "b.parquet")
        (path / "README.md").write_text("not a source")
    return path


def test_every_form_gives_the_same_rows(same_rows: Path) -> None:
    expected = [(row["text"], row["title"]) for row in ROWS]
    assert list(read_source(source(same_rows, columns=["text", "title"]))) == expected


def test_a_list_in_the_only_column_gives_a_text_each(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"examples": ["one", "two"]}, {"examples": []}, {"examples": ["three"]}])
    assert list(read_source(source(path, columns=["examples"]))) == [("one",), ("two",), ("three",)]
    with pytest.raises(JasperError, match=r"line 1: column 'examples' is not text but list"):
        list(read_source(source(jsonl(path, [{"examples": ["one"], "text": "t"}]), columns=["text", "examples"])))
    with pytest.raises(JasperError, match=r"line 1: column 'examples', item 2 is null"):
        list(read_source(source(jsonl(path, [{"examples": ["one", None]}]), columns=["examples"])))


def test_text_files_give_a_text_per_line(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one line\n\n  another  \n")
    assert list(read_source(source(tmp_path / "lines.txt"))) == [("one line",), ("another",)]


BAD = {
    "null": (b'{"text": "good"}\n{"text": null}\n', "bad.jsonl", r"bad.jsonl, line 2: column 'text' is null"),
    "number": (b'{"text": 7}\n', "bad.jsonl", r"line 1: column 'text' is not text but int \(7\)"),
    "column": (b'{"body": "x", "head": "y"}\n', "bad.jsonl", r"line 1: no column 'text' \(got columns: body, head\)"),
    "json": (b'{"text": "good"}\n{"text": \n', "bad.jsonl", r"line 2: not JSON"),
    "surrogate": (
        b'{"text": "good"}\n{"text": "half \\ud83d"}\n',
        "bad.jsonl",
        r"bad.jsonl, line 2: column 'text' has a lone surrogate \('\\ud83d', half a character\) at character 6\. Fix",
    ),
    "list": (b'["text"]\n', "bad.jsonl", r"line 1: not a JSON object \(got list\)"),
    "gzip": (b"plain text", "bad.jsonl.gz", r"bad.jsonl.gz: cannot be read"),
    "cut": (
        gzip.compress(b'{"text": "good"}\n' * 999)[:-20],
        "bad.jsonl.gz",
        r"bad.jsonl.gz: cannot be read completely",
    ),
    "utf8": (b'{"text": "\xff\xfe"}\n', "bad.jsonl", r"bad.jsonl, line 1, character 11: byte 0xff is not UTF-8"),
    "cells": (
        b"text,title\na,b\na,b,c\n",
        "bad.csv",
        r"bad.csv, line 3: wrong number of cells \(got 3, expected 2: text, title\)",
    ),
    "missing cell": (
        b"title,text\na,b\na\n",
        "bad.csv",
        r"bad.csv, line 3: wrong number of cells \(got 1, expected 2: title, text\)",
    ),
    "parquet": (b"PAR1 but not really", "bad.parquet", r"bad.parquet: not a readable parquet file"),
    "empty": (b"", "bad.jsonl", r"bad.jsonl: the source has no rows"),
    "blank": (b"\n \n", "bad.txt", r"bad.txt: the source has no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_their_row(case: str, tmp_path: Path) -> None:
    content, name, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JasperError, match=message):
        build_texts(settings(tmp_path, source(tmp_path / name)), seed=0)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".locks"]  # no unfinished folder


def test_a_cache_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(JasperError, match="could not write .*cache: a file is where a folder should be"):
        build_texts(settings(tmp_path, source(jsonl(tmp_path / "rows.jsonl", ROWS))), seed=0)


def test_bad_parquet_columns_are_named_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(JasperError, match="bad.parquet, row 2: column 'text' is null"):
        list(read_source(source(path)))
    with pytest.raises(JasperError, match="row 1: column 'n' is not text but int"):
        list(read_source(source(path, columns=["n"])))
    with pytest.raises(JasperError, match=r"no column 'body' \(got columns: text, n\)"):
        list(read_source(source(path, columns=["text", "body"])))


def test_reading_shows_no_bar_in_a_log(tmp_path: Path, monkeypatch, capsys) -> None:
    import tqdm

    monkeypatch.setattr(tqdm, "tqdm", lambda *args, delay, **kwargs: tqdm.std.tqdm(*args, **kwargs))  # at once
    build_texts(settings(tmp_path, source(jsonl(tmp_path / "rows.jsonl", [{"text": "a first text"}]))), seed=0)
    assert "reading" not in capsys.readouterr().err


def test_every_file_of_every_source_is_tried_before_one_is_read_whole(tmp_path: Path) -> None:
    first = source(jsonl(tmp_path / "first.jsonl", [{"text": "good"}, {"text": None}]))
    other = jsonl(tmp_path / "other.jsonl", [{"body": "x"}])
    for second, message in (
        (source(other), r"other.jsonl, line 1: no column 'text'"),
        (source(jsonl(tmp_path / "none.jsonl", [])), r"none.jsonl: the source has no rows"),
    ):
        with pytest.raises(JasperError, match=message):
            build_texts(settings(tmp_path, first, second), seed=0)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("first.jsonl", "other.jsonl"):
        (tmp_path / name).rename(folder / name)
    with pytest.raises(JasperError, match=r"other.jsonl, line 1: no column 'text'"):
        build_texts(settings(tmp_path, source(folder)), seed=0)


def test_what_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(JasperError, match="no such file or folder"):
        build_texts(settings(tmp_path, source(tmp_path / "absent.jsonl")), seed=0)
    with pytest.raises(JasperError, match="no file of a supported format. Fix: give one of .jsonl"):
        build_texts(settings(tmp_path, source(tmp_path)), seed=0)
    with pytest.raises(JasperError, match="nobody/no-such-dataset: not a local file or folder, .* hub dataset failed"):
        build_texts(settings(tmp_path, SourceConfig(path="nobody/no-such-dataset")), seed=0)


def test_hub_names_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    arguments = {}

    def load(path, name, **options):
        arguments.update(options, path=path, name=name)
        return datasets.IterableDataset.from_generator(lambda: ({"text": f"text {i}"} for i in range(1000)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = SourceConfig(path="owner/name", config="en", split="dev", limit=50, revision="abc")
    texts = build_texts(settings(tmp_path, config), seed=0)
    assert arguments == {"path": "owner/name", "name": "en", "split": "dev", "streaming": True, "revision": "abc"}
    assert len(set(texts["text"])) == 50
    assert max(int(t.split()[1]) for t in texts["text"]) > 100  # drawn at random, not the first 50


@pytest.mark.parametrize("limit", [None, 50])
@pytest.mark.parametrize("fault", ["ConnectionError", "TimeoutError", "HTTPError"])
def test_a_stream_that_breaks_off_names_its_source(
    fault: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import errors

    error = errors.HTTPError("Server Disconnected") if fault == "HTTPError" else getattr(builtins, fault)()

    def rows():
        yield from ({"text": f"text {i}"} for i in range(30))
        raise error

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    config = SourceConfig(path="owner/name", split="dev", limit=limit)
    with pytest.raises(JasperError, match=r"owner/name \(dev\): reading failed after \d+ rows .*run the same command"):
        build_texts(settings(tmp_path, config), seed=0)


def test_columns_are_texts_of_their_own_or_joined(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    apart = build_texts(settings(tmp_path, source(path, columns=["title", "text"], join=False)), seed=0)
    joined = build_texts(settings(tmp_path, source(path, columns=["title", "text"])), seed=0)
    assert set(apart["text"]) == {row[c] for row in ROWS for c in row}
    assert set(joined["text"]) == {f"{row['title']}\n{row['text']}" for row in ROWS}
    assert apart.column_names == ["text", "role", "digest"]
    assert all(row["digest"] == text_digest(row["text"], row["role"]) for row in apart)


def test_limits_draw_by_the_seed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)

    def drawn(seed: int, **limits) -> list[str]:
        both = source(path, columns=["title", "text"], join=False, limit=limits.get("of_source"))
        return build_texts(settings(tmp_path, both, limit=limits.get("of_all")), seed)["text"][:]

    for which in ("of_source", "of_all"):
        first, other = drawn(0, **{which: 11}), drawn(1, **{which: 11})
        assert len(set(first)) == len(set(other)) == 11
        assert set(first) != set(other)
    assert drawn(0, of_source=1000) != drawn(1, of_source=1000)  # all texts, in another order
    assert sorted(drawn(0, of_source=1000)) == sorted(drawn(1))


def test_equal_texts_are_kept_once_per_role(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "same"}, {"text": "same"}, {"text": " same "}, {"text": "x"}])
    texts = build_texts(settings(tmp_path, source(path), source(path, role="query")), seed=0)
    assert sorted(zip(texts["text"], texts["role"], strict=True)) == [("same", "document"), ("same", "query")]


def test_evaluation_documents_are_dropped_before_they_are_cut(tmp_path: Path) -> None:
    rows = [
        {"title": "T", "text": "  " + DOCUMENT.replace("Is this", "IS THIS").replace(" ", "  ")},
        {"title": "U", "text": "Kept. And this one too."},
    ]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    cut = {"cut_share": 1.0, "cut_sentences": (1, 1)}
    barred = {normal_form(DOCUMENT), normal_form("Kept.")}
    texts = build_texts(settings(tmp_path, source(path), **cut), 0, barred)
    assert texts["text"][:] == ["And this one too."]  # the piece "Kept." is an evaluation text too
    assert len(build_texts(settings(tmp_path, source(path), **cut), 0)) == 6
    joined = settings(tmp_path, source(path, columns=["title", "text"], join=True))
    assert build_texts(joined, 0, {normal_form(DOCUMENT)})["text"][:] == ["U\nKept. And this one too."]
    with pytest.raises(
        JasperError, match=r"no training text is left \(texts: 2 documents read, 2 dropped as evaluation"
    ):
        build_texts(settings(tmp_path, source(path)), 0, {normal_form(row["text"]) for row in rows})


def test_run_texts_leave_out_its_evaluation_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": f"A sentence about {i}."} for i in range(30)])
    for name, numbers in (("near", (3, 4)), ("far", (98, 99))):
        pairs = "".join(f"0.5\tA Sentence about {i}.\tAnother {i}\n0.1\tOne {i}\tTwo {i}\n" for i in numbers)
        (tmp_path / f"{name}.tsv").write_text(f"score\tsentence1\tsentence2\n{pairs}")
    config = Config.model_validate(
        {
            "name": "t",
            "student": {"model": "m", "heads": [8]},
            "teachers": [{"model": "m"}],
            "data": settings(tmp_path, source(path)).model_dump(),
            "evaluate": [{"path": str(tmp_path / f"{name}.tsv")} for name in ("near", "far")],
            "stages": [{"name": "s", "train": ["*"], "heads": [8], "batch_size": 2, "lr": 0.1, "steps": 1}],
        }
    )
    prepared = prepare_texts(config)
    texts = prepared.texts
    assert len(texts) == 28 and prepared.transductive == []
    assert not {"A sentence about 3.", "A sentence about 4."} & set(texts["text"])
    everything = build_all_texts(config.data, config.seed)
    monkeypatch.setattr("jasper_fast.data.prepare.build_all_texts", lambda *_: everything)
    assert prepare_texts(config).transductive == ["near"]


def test_documents_of_a_transductive_set_are_trained_on_and_its_questions_are_not(tmp_path: Path) -> None:
    rows = [{"text": f"A sentence about {i}."} for i in range(20)]
    (tmp_path / "searched").mkdir()
    folder = write_beir(tmp_path / "searched", [row["text"] for row in rows[:5]], queries=1)
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q0", "text": "a Sentence  about 7."}) + "\n")

    def prepared(**chosen: object) -> tuple[set[str], list[str]]:
        config = Config.model_validate(
            {
                "name": "t",
                "student": {"model": "m", "heads": [8]},
                "teachers": [{"model": "m"}],
                "data": settings(tmp_path, source(jsonl(tmp_path / "rows.jsonl", rows)), cut_share=0.0).model_dump(),
                "evaluate": [{"path": str(folder), **chosen}],
                "stages": [{"name": "s", "train": ["*"], "heads": [8], "batch_size": 2, "lr": 0.1, "steps": 1}],
            }
        )
        prepared = prepare_texts(config)
        return set(prepared.texts["text"]), prepared.transductive

    texts = [row["text"] for row in rows]
    assert prepared() == ({*texts[5:7], *texts[8:]}, [])
    assert prepared(transductive=True) == ({*texts[:7], *texts[8:]}, ["searched"])


def test_transductive_is_for_retrieval_sets(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("score\tsentence1\tsentence2\n0.5\tone\ttwo\n0.1\tthree\tfour\n")
    with pytest.raises(JasperError, match=r"`transductive` applies only to retrieval sets \(got kind 'sts'\)"):
        load_evals([EvalConfig(path=str(tmp_path / "pairs.tsv"), transductive=True)])
    with pytest.raises(JasperError, match="'docstrings': held-out docstrings are never used for training"):
        load_evals([EvalConfig(path="docstrings", transductive=True)])


def test_held_out_texts_with_a_trained_piece_are_counted(tmp_path: Path) -> None:
    rows = [{"text": "See the notes below."}, {"text": "It returns a copy. Of  the ARRAY."}, {"text": "Nothing else."}]
    texts = build_texts(settings(tmp_path, source(jsonl(tmp_path / "rows.jsonl", rows)), cut_share=0.0), seed=0)
    held_out = [
        "It is fast. See the notes below. It is small.",  # one sentence
        "First. It returns a copy. Of the array. Last.",  # two
        "It returns a copy of the array.",
        "Nothing else. See the notes below.",  # counted once
    ]
    assert count_trained_pieces(held_out, texts, 2) == 3 and count_trained_pieces(held_out, texts, 1) == 2


def test_a_share_of_documents_is_cut_into_sentences(tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"Sentence {j} of text {i} ends." for j in range(30))} for i in range(400)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    texts = build_texts(settings(tmp_path, source(path), cut_share=0.3), seed=0)["text"][:]
    whole = {row["text"] for row in rows} & set(texts)
    assert 0.22 < 1 - len(whole) / len(rows) < 0.38
    lengths = Counter(text.count(" ends.") for text in texts if text not in whole)
    assert set(lengths) == set(range(1, 11))
    # no sentence is lost or duplicated
    assert sum(n * count for n, count in lengths.items()) == 30 * (len(rows) - len(whole))
    queries = build_texts(settings(tmp_path, source(path, role="query"), cut_share=1.0, shuffle_share=1.0), seed=0)
    assert set(queries["text"]) == {row["text"] for row in rows}


def test_treatment_shuffles_words_and_depends_on_seed_and_text_alone() -> None:
    (shuffled,) = cut_and_shuffle(DOCUMENT, 0, 0.0, (1, 10), 1.0)
    assert shuffled != DOCUMENT and Counter(shuffled.split()) == Counter(DOCUMENT.split())
    assert (
        cut_and_shuffle(DOCUMENT, 0, 0.0, (1, 10), 1.0) == [shuffled] != cut_and_shuffle(DOCUMENT, 1, 0.0, (1, 10), 1.0)
    )
    assert cut_and_shuffle(DOCUMENT, 0, 1.0, (2, 2), 0.0) == [
        "A first sentence stands here. Dr. Smith wrote the second one!",
        "Is this the third? It is.",
    ]


def test_variants_exchange_words_that_stand_between_the_same_two(tmp_path: Path) -> None:
    things = ["guitar", "drum", "flute", "violin", "horn", "harp"]
    people = ["man", "woman", "boy", "girl", "child", "band"]
    rows = [{"text": f"a {who} plays the {what}"} for who, what in zip(people, things, strict=True)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    plain = set(build_texts(settings(tmp_path, source(path)), seed=0)["text"])
    texts = build_texts(settings(tmp_path, source(path, variants=5)), seed=0)["text"][:]
    made = set(texts) - plain
    assert plain < set(texts) and 5 <= len(made) <= 30 and len(set(texts)) == len(texts)
    for text in made:
        a, who, plays, the, what = text.split()
        assert (a, plays, the) == ("a", "plays", "the") and f"a {who} plays" in str(rows) and what in things
    barred = {normal_form(sorted(made)[0])}
    assert set(build_texts(settings(tmp_path, source(path, variants=5)), 0, barred)["text"]) == set(texts) - {
        sorted(made)[0]
    }
    exchanges = WordReplacer(plain)
    assert exchanges.variant("nothing known here", 0, 0) == "nothing known here" and exchanges.variant("", 0, 0) == ""


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (DOCUMENT, 4),
        ("See Fig. 3 and Eq. (2), i.e. The J. Smith form. Next one.", 2),
        ("No capital follows. then it goes on", 1),
        ('He said "Stop." Then he left.', 2),
        ("A heading\n\nand a paragraph", 2),
        ("これは文です。次の文です。", 2),
        ("   ", 0),
        ("no mark at all", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    spans = sentences(text)
    assert len(spans) == count
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())


def test_same_settings_reuse_and_changed_data_do_not(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    first = build_texts(settings(tmp_path, source(path)), seed=0)
    file = Path(first.cache_files[0]["filename"])
    made = file.stat().st_mtime_ns
    again = build_texts(settings(tmp_path, source(path)), seed=0)
    assert file.stat().st_mtime_ns == made and texts_fingerprint(again) == texts_fingerprint(first)

    jsonl(path, [*ROWS, {"text": "one more"}])
    changed = build_texts(settings(tmp_path, source(path)), seed=0)
    assert len(changed) == len(ROWS) + 1 and texts_fingerprint(changed) != texts_fingerprint(first)
    assert texts_fingerprint(changed.select(range(5))) != texts_fingerprint(changed.select(range(6)))


def test_damaged_texts_are_built_again(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    file = Path(build_texts(settings(tmp_path, source(path)), seed=0).cache_files[0]["filename"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    build_texts(settings(tmp_path, source(path)), seed=0)
    assert file.read_bytes() == whole


def test_many_texts_pass_through_the_disk_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"Text number {i % 900}."} for i in range(1000)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    in_memory = build_texts(settings(tmp_path, source(path)), seed=0)
    monkeypatch.setattr(data_module, "MAX_BUFFERED_CHARS", 2000)
    monkeypatch.setattr(data_module, "FILE_CHARACTERS", 5000)
    through_disk = build_texts(settings(tmp_path, source(path), cache=str(tmp_path / "other")), seed=0)
    assert len(through_disk) == 900 and len(through_disk.cache_files) > 2
    assert through_disk["text"][:] == in_memory["text"][:]
    assert sorted(p.name for p in Path(through_disk.cache_files[0]["filename"]).parent.iterdir())[:3] == [
        "dataset_info.json",
        "held-out.arrow",
        "state.json",
    ]


def build_and_die(config: DataConfig) -> None:
    data_module.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    build_texts(config, seed=0)


def test_a_killed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert exit_code(build_and_die, settings(tmp_path, source(path))) == -signal.SIGKILL
    cache = tmp_path / "cache"
    assert [p.name.startswith(".unfinished-texts-") for p in cache.iterdir() if p.name != ".locks"] == [True]
    assert len(build_texts(settings(tmp_path, source(path)), seed=0)) == len(ROWS)
    assert not list(cache.glob(".unfinished-*"))


def test_order_and_treatment_do_not_depend_on_process_or_source_order(tmp_path: Path) -> None:
    one, two = jsonl(tmp_path / "one.jsonl", ROWS[:9]), jsonl(tmp_path / "two.jsonl", ROWS[9:])
    here = texts_fingerprint(build_texts(settings(tmp_path, source(one), source(two), cut_share=0.5), seed=3))
    turned = texts_fingerprint(build_texts(settings(tmp_path, source(two), source(one), cut_share=0.5), seed=3))
    assert here == turned
    config = settings(tmp_path, source(one), source(two), cut_share=0.5, cache=str(tmp_path / "elsewhere"))
    code = (
        "import sys; from jasper_fast.config.data import DataConfig; from jasper_fast.data.text_dataset import *;"
        "print(texts_fingerprint(build_texts(DataConfig.model_validate_json(sys.argv[1]), 3)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    elsewhere = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == here
