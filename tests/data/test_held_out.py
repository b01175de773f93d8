"""Held-out documents: nothing of them is trained on, every text is accounted for, and without them nothing changes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jasper_fast.config.data import DataConfig, SourceConfig
from jasper_fast.data import text_dataset as data_module
from jasper_fast.data.augment import sentences
from jasper_fast.data.held_out import held_out_document
from jasper_fast.data.text import normal_form, text_digest
from jasper_fast.data.text_counts import TextCounts
from jasper_fast.data.text_dataset import BuiltTexts, build_all_texts, texts_fingerprint
from jasper_fast.data.text_sources import sample_texts

NOUNS = ("cat", "dog", "lathe", "river", "engine", "violin", "market", "island", "planet", "letter")


def row(i: int) -> dict[str, str]:
    """Return a document with a title, a note and a body of 1 to 6 sentences."""
    noun, other = NOUNS[i % 10], NOUNS[i // 10 % 10]
    body = " ".join(f"Sentence {j} about the {noun} and the {other} of case {i}." for j in range(1 + i % 6))
    return {"title": f"The {noun} of case {i}", "text": body, "note": f"Note {i}"}


ROWS = [row(i) for i in range(120)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def csv_file(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def text_file(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(r["text"] for r in rows))
    return str(path)


def lists(path: Path) -> str:
    return jsonl(path, [{"examples": [r["title"], r["text"]]} for r in ROWS])


# Sources of a folder, and more settings.
Case = tuple[Callable[[Path], list[dict[str, Any]]], dict[str, Any]]
TWO, THREE = ["title", "text"], ["title", "note", "text"]
CASES: dict[str, Case] = {
    "one column": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS)}], {}),
    "two joined": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS), "columns": TWO}], {}),
    "two apart": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS), "columns": TWO, "join": False}], {}),
    "three joined": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS), "columns": THREE}], {"cut_share": 1.0}),
    "three apart": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS), "columns": THREE, "join": False}], {}),
    "csv": (lambda f: [{"path": csv_file(f / "a.csv", ROWS), "columns": TWO}], {}),
    "txt": (lambda f: [{"path": text_file(f / "a.txt", ROWS)}], {}),
    "list cells": (lambda f: [{"path": lists(f / "a.jsonl"), "columns": ["examples"]}], {}),
    "uncut": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS)}], {"cut_share": 0.0, "shuffle_share": 0.0}),
    "shuffled": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS)}], {"cut_share": 1.0, "shuffle_share": 0.5}),
    "variants": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS), "columns": TWO, "variants": 3}], {}),
    "limits": (
        lambda f: [{"path": jsonl(f / "a.jsonl", ROWS), "columns": TWO, "join": False, "limit": 150}],
        {"limit": 120},
    ),
    "too short": (lambda f: [{"path": jsonl(f / "a.jsonl", ROWS)}], {"min_chars": 60}),
    "two sources": (
        lambda f: [
            {"path": jsonl(f / "a.jsonl", ROWS[:70])},
            {"path": text_file(f / "b.txt", ROWS[50:]), "variants": 1},
            {"path": jsonl(f / "c.jsonl", ROWS[:30]), "columns": ["title"], "role": "query"},
        ],
        {},
    ),
    # each text again: in another case, as a question, and cut out of a longer document
    "copies": (
        lambda f: [
            {"path": jsonl(f / "a.jsonl", ROWS)},
            {"path": jsonl(f / "b.jsonl", [{"text": r["text"].upper() + " "} for r in ROWS])},
            {"path": jsonl(f / "c.jsonl", ROWS), "role": "query"},
            {"path": jsonl(f / "d.jsonl", [{"text": f"More. {r['text']} No end here"} for r in ROWS])},
        ],
        {"cut_share": 1.0, "cut_sentences": (1, 2)},
    ),
}
EXCLUDED = frozenset(normal_form(text) for r in ROWS[::9] for text in (r["text"], r["text"].split(". ")[0] + "."))


def built(folder: Path, case: str, excluded: frozenset[str] = EXCLUDED, **changes: Any) -> BuiltTexts:
    sources, settings = CASES[case]
    tree = {"sources": sources(folder), "cache": str(folder / "cache"), "held_out": 500, **settings, **changes}
    return build_all_texts(DataConfig.model_validate(tree), 3, excluded)


def forms_of(document: dict[str, str]) -> set[str]:
    """Return the normal forms of a held-out document, of its parts, and of all its runs of sentences."""
    forms = {normal_form(document[c]) for c in ("text", "query", "body")} - {""}
    for part in (document["text"], document["body"]):
        spans = sentences(part)
        forms |= {normal_form(part[spans[i][0] : spans[j][1]]) for i in range(len(spans)) for j in range(i, len(spans))}
    return forms


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_a_held_out_document_is_trained_on(case: str, tmp_path: Path) -> None:
    texts = built(tmp_path, case)
    held_out, counts = texts.held_out.to_list(), texts.counts
    assert texts.held_out.column_names == ["text", "role", "digest", "query", "body"]
    barred = set().union(*map(forms_of, held_out))
    trained = {normal_form(text) for text in texts.texts["text"]}
    assert not trained & barred
    assert 1 <= len(held_out) == counts.held_out <= counts.rows // 10
    assert counts.unexplained == 0 and counts.texts == len(texts.texts) > 0
    for document in held_out:
        assert document["role"] == "document" and document["digest"] == text_digest(document["text"])
        assert bool(document["query"]) == bool(document["body"])
        assert normal_form(document["text"]) not in EXCLUDED
    if case == "copies":
        assert counts.like_held_out > 0
    # all rows of the held-out documents, found by the number of their case, are gone
    if case not in ("copies", "two sources", "limits", "list cells"):
        numbers = {document["text"].split("case ")[1].split()[0].rstrip(".") for document in held_out}
        in_training = {word.rstrip(".") for text in texts.texts["text"] for word in text.split() if word[0].isdigit()}
        made_up = case in ("variants", "shuffled")  # variants exchange the words of other documents
        assert made_up or not {n for n in numbers if int(n) > 6} & in_training


@pytest.mark.parametrize("case", CASES)
def test_without_held_out_documents_the_counts_still_add_up(case: str, tmp_path: Path) -> None:
    texts = built(tmp_path, case, held_out=0)
    assert len(texts.held_out) == 0 and texts.held_out.column_names[0] == "text"
    assert texts.counts.unexplained == 0 and texts.counts.held_out == texts.counts.like_held_out == 0


# What version 0.1.0 made of the same sources: the number of texts and their fingerprint.
GOLDEN = {
    "one column": (110, "19487618811dd5c5337908f2083452cb"),
    "two joined": (114, "03921eb564d96b057b5c6ea547b572c9"),
    "two apart": (230, "92598ee3460609d9d41198c961e222f0"),
    "three joined": (130, "b82828982a96aea2de83dfb08556ddc1"),
    "three apart": (350, "af09d57f352d1c236fad54831b297837"),
    "csv": (114, "03921eb564d96b057b5c6ea547b572c9"),
    "txt": (110, "19487618811dd5c5337908f2083452cb"),
    "list cells": (230, "92598ee3460609d9d41198c961e222f0"),
    "uncut": (106, "dff1ce2bbd01ecb3528d80c202058440"),
    "shuffled": (141, "9802e2d9c812973fd258c22556fd0d48"),
    "variants": (453, "73f779e6e486f20750e8a047e234ea7b"),
    "limits": (120, "4bf79f1be1bb936ef17a26142f497fd4"),
    "too short": (94, "836e239c81f157d90aff5c3a65231d73"),
    "two sources": (201, "14f6573db7c02cdf6919ce6988630158"),
    "copies": (917, "5f8d02bc0fddbcc998a8b0ad01a2ce0c"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_held_out_0_gives_the_texts_of_older_versions(case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the draw of a limit depends on the path of the source
    texts = built(Path("."), case, held_out=0).texts
    assert (len(texts), texts_fingerprint(texts)) == GOLDEN[case]


@pytest.mark.parametrize(("rows", "number"), [(1, 0), (2, 0), (9, 0), (10, 1), (11, 1), (19, 1), (20, 2), (60, 5)])
def test_at_most_a_tenth_is_held_out(rows: int, number: int, tmp_path: Path) -> None:
    source = {"path": jsonl(tmp_path / "a.jsonl", ROWS[:rows])}
    data = {
        "sources": [source],
        "cache": str(tmp_path / "cache"),
        "held_out": 5,
        "cut_share": 0.0,
        "shuffle_share": 0.0,
    }
    texts = build_all_texts(DataConfig.model_validate(data), 0)
    assert len(texts.held_out) == number and len(texts.texts) == rows - number


def test_equal_documents_count_once(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("one text here", "One text  here", "another", "a third") for _ in range(30)]
    data = {"sources": [{"path": jsonl(tmp_path / "a.jsonl", rows)}], "cache": str(tmp_path / "cache")}
    texts = build_all_texts(DataConfig.model_validate(data), 0)
    assert len(texts.held_out) == 0 and len(texts.texts) == 4 and texts.counts.duplicates == 116


def test_the_choice_depends_on_the_seed_and_not_on_the_order(tmp_path: Path) -> None:
    def held_out(seed: int, rows: list[dict[str, str]], name: str) -> list[str]:
        source = {"path": jsonl(tmp_path / name, rows)}
        data = DataConfig.model_validate({"sources": [source], "cache": str(tmp_path / "cache")})
        return build_all_texts(data, seed).held_out["text"][:]

    first = held_out(0, ROWS, "a.jsonl")
    assert len(first) == 12 and first == held_out(0, ROWS[::-1], "b.jsonl")
    assert set(first) != set(held_out(1, ROWS, "a.jsonl"))


def test_memory_and_disk_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = built(tmp_path, "copies")
    monkeypatch.setattr(data_module, "MAX_BUFFERED_CHARS", 2000)
    through_disk = built(tmp_path, "copies", cache=str(tmp_path / "other"))
    assert through_disk.texts["text"][:] == in_memory.texts["text"][:]
    assert through_disk.held_out.to_list() == in_memory.held_out.to_list()
    assert through_disk.counts == in_memory.counts


def test_damaged_held_out_texts_are_built_again(tmp_path: Path) -> None:
    first = built(tmp_path, "one column")
    (file,) = (tmp_path / "cache").glob("texts-*/held-out.arrow")
    expected = first.held_out.to_list()
    file.write_bytes(file.read_bytes()[:-30])
    assert built(tmp_path, "one column").held_out.to_list() == expected


BODY = "It is old. It has a mill. It floods."


@pytest.mark.parametrize(
    ("cells", "join", "text", "query", "body"),
    [
        (("A river", BODY), True, f"A river\n{BODY}", "A river", BODY),
        (("A river", BODY), False, BODY, "A river", BODY),
        (("A river", "N", BODY), True, f"A river\nN\n{BODY}", "A river", f"N\n{BODY}"),
        (("A river", "N", BODY), False, BODY, "A river", BODY),
        ((BODY,), True, BODY, "It is old.", "It has a mill. It floods."),
        ((f"  {BODY}\n",), True, BODY, "It is old.", "It has a mill. It floods."),
        (("", BODY), True, BODY, "It is old.", "It has a mill. It floods."),
        ((BODY, "short"), True, f"{BODY}\nshort", "It is old.", "It has a mill. It floods.\nshort"),
        ((BODY, "short"), False, BODY, "It is old.", "It has a mill. It floods."),
        (("One. Two.",), True, "One. Two.", "", ""),
        (("A title", ""), True, "A title", "", ""),
    ],
)
def test_query_of_a_document(cells: tuple[str, ...], join: bool, text: str, query: str, body: str) -> None:
    document = held_out_document(cells, join)
    assert (document.text, document.query, document.body) == (text, query, body)


def test_docstrings_stay_two_texts_and_are_held_out_as_rows(tmp_path: Path, monkeypatch) -> None:
    rows = [(r["title"], r["text"]) for r in map(row, range(1000))]
    monkeypatch.setattr("jasper_fast.data.docstrings.training_rows", lambda: rows)
    assert SourceConfig(path="docstrings").join is SourceConfig(path="glyphs").join is False
    assert SourceConfig(path="docstrings", join=True).join is SourceConfig(path="a.jsonl").join is True
    data = {"sources": [{"path": "docstrings", "limit": 400}], "cache": str(tmp_path / "cache"), "held_out": 30}
    texts = build_all_texts(DataConfig.model_validate(data), 0)
    assert len(texts.held_out) == 30 and texts.counts.documents == 400 and texts.counts.unexplained == 0
    assert all(document["query"] and document["body"] == document["text"] for document in texts.held_out)
    trained = {normal_form(text) for text in texts.texts["text"]}
    assert not trained & set().union(*map(forms_of, texts.held_out.to_list()))
    assert "limited by data.sources.0.limit: 400 of " in texts.counts.line()


def test_the_draw_of_one_column_does_not_depend_on_join(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    joined, apart = (SourceConfig(path=path, limit=20, join=join) for join in (True, False))
    assert list(sample_texts(joined, 0)) == list(sample_texts(apart, 0))


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"rows": 1, "documents": 1, "texts": 1}, "texts: 1 document read → 1 training text"),
        (
            {"rows": 1999, "documents": 1999, "held_out": 199, "excluded": 603, "duplicates": 12, "like_held_out": 2}
            | {"too_short": 3, "cut": 300, "kept": 1000, "pieces": 900, "shuffled": 1, "variants": 5, "texts": 2207},
            "texts: 1,999 documents read, 199 held out, 603 dropped as evaluation texts, 2 equal to a held-out text or "
            "a part of it, 3 too short, 12 duplicates; 30 % cut into 900 pieces, 1 with shuffled words, 5 variants → "
            "2,207 training texts",
        ),
        (
            {"rows": 20, "documents": 40, "texts": 30, "beyond_limit": 10}
            | {"limits": ("data.sources.0.limit: 40 of 90 texts",)},
            "texts: 20 rows read with 40 texts in their columns, limited by data.sources.0.limit: 40 of 90 texts → "
            "30 training texts (data.limit leaves out 10)",
        ),
    ],
)
def test_the_line_names_what_happened(counts: dict[str, Any], line: str) -> None:
    assert TextCounts(**counts).line() == line
    assert TextCounts(**counts).line("none longer than 9 tokens") == f"{line}; none longer than 9 tokens"
    assert TextCounts.from_dict(json.loads(json.dumps(TextCounts(**counts).to_dict()))) == TextCounts(**counts)


@pytest.mark.parametrize("wrong", [-1, 1.5, "many", None, True])
def test_a_wrong_number_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="held_out"):
        DataConfig.model_validate({"sources": [{"path": "x"}], "held_out": wrong})
