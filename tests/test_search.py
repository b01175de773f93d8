"""`python -m jasper_fast.search`: a built index answers questions as its embeddings do."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jasper_fast.search import main
from jasper_fast.text_index import Hit, TextIndex, add, build, remove
from jasper_fast.utils.errors import JasperError
from tests.helpers.packing import pack

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [*tiny_texts, tiny_texts[0], "  "]  # one twice, one blank
    file.write_text("".join(json.dumps({"text": text, "other": "x"}) + "\n" for text in rows))
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, text_file: Path, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("search") / "index"
    assert main(["build", str(tiny_bert), str(text_file), "--out", str(folder)]) == 0
    return folder


def test_a_log_gets_no_bar(text_file, tiny_bert, tmp_path, capsys):
    assert main(["build", str(tiny_bert), str(text_file), "--out", str(tmp_path / "i"), "--limit", "9"]) == 0
    printed = capsys.readouterr()
    assert "9 texts in" in printed.out and "encoding" not in printed.err and "\r" not in printed.err


def test_hits_are_those_of_the_models_own_vectors(built, tiny_bert, tiny_texts):
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    questions = [tiny_texts[7], "the bridge near the river", "apples"]
    scores = model.encode(questions, normalize_embeddings=True) @ model.encode(tiny_texts, normalize_embeddings=True).T
    index = TextIndex(built)
    assert len(index) == 200
    for row, hits in zip(scores, index.ask(questions, 5), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row)[::-1][:5], atol=1e-5)
        assert [hit.text for hit in hits] == [tiny_texts[hit.id] for hit in hits]
    assert index.ask(questions[:1], 1)[0][0].text == tiny_texts[7]
    assert len(index.ask(["apples"], 1000)[0]) == 200
    assert index.ask([]) == []


def test_asking_from_the_command_line(built, tmp_path, capsys, monkeypatch, tiny_texts):
    assert main(["ask", str(built), tiny_texts[3], "-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == tiny_texts[3] and lines[2].startswith("  1. 1.000  ") and len(lines) == 4
    (tmp_path / "questions.txt").write_text(f"{tiny_texts[1]}\n\n{tiny_texts[2]}\n")
    assert main(["ask", str(built), "--file", str(tmp_path / "questions.txt"), "--json", "-k", "3"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["hits"][0]["text"] for one in found] == tiny_texts[1:3] and len(found[0]["hits"]) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tiny_texts[9]}\n\nnot read\n"))
    assert main(["ask", str(built), "-k", "1"]) == 0
    out = capsys.readouterr()
    assert tiny_texts[9] in out.out and "not read" not in out.out and " ms)" in out.err


def test_other_columns_and_limits(text_file, tiny_bert, tmp_path, tiny_texts):
    arguments = ["--columns", "other,text", "--limit", "5", "--dtype", "int8", "--max-length", "16"]
    assert main(["build", str(tiny_bert), str(text_file), "--out", str(tmp_path / "i"), *arguments]) == 0
    index = TextIndex(tmp_path / "i")
    assert [index.texts[i].as_py() for i in range(5)] == [f"x\n{text}" for text in tiny_texts[:5]]
    assert index.vectors.dtype == "int8" and len(index) == 5


def test_errors_say_what_is_wrong(built, text_file, tiny_bert, tmp_path, tiny_qwen2):
    with pytest.raises(JasperError, match=r"no text index here \(search.json is missing\)"):
        main(["ask", str(tmp_path), "x"])
    with pytest.raises(JasperError, match="absent: there is no such folder. Fix: make an index with"):
        main(["ask", str(tmp_path / "absent"), "x"])
    with pytest.raises(JasperError, match="give a question or --file, not both"):
        main(["ask", str(built), "x", "--file", "y"])
    with pytest.raises(JasperError, match="cannot be read"):
        main(["ask", str(built), "--file", str(tmp_path / "none.txt")])
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(JasperError, match="no questions in it"):
        main(["ask", str(built), "--file", str(tmp_path / "blank.txt")])
    with pytest.raises(JasperError, match="is not a text index"):
        main(["build", str(tiny_bert), str(text_file), "--out", str(tmp_path)])
    with pytest.raises(JasperError, match="no width 33 .expected at most 32."):
        main(["build", str(tiny_bert), str(text_file), "--out", str(tmp_path / "i"), "--width", "33"])
    with pytest.raises(JasperError, match="no texts to index"):
        build(str(tiny_bert), [" "], tmp_path / "i")
    with pytest.raises(JasperError, match="not the model that .* was built with"):
        main(["ask", str(built), "x", "--model", str(tiny_qwen2)])
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    (copy / "texts.arrow").write_bytes((copy / "texts.arrow").read_bytes()[:100])
    with pytest.raises(JasperError, match="damaged"):
        TextIndex(copy)
    assert not (tmp_path / "i").exists()


QUESTIONS = {
    "byte order mark": ("q.txt", "\ufeffone\ntwo\n".encode()),
    "UTF-16": ("q.txt", "one\r\ntwo\r\n".encode("utf-16")),
    "CR": ("q.txt", b"one\rtwo\r"),
    "blank lines": ("Q", b"\n one \n\n\ttwo"),
    "gz": ("q.txt.gz", b"one\ntwo"),
    "zst": ("q.ZST", b"one\ntwo"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_questions_are_read_by_the_rules_of_all_files(case, built, tmp_path, capsys):
    name, content = QUESTIONS[case]
    (tmp_path / name).write_bytes(pack(content, f".{name}"))
    assert main(["ask", str(built), "--file", str(tmp_path / name), "--json", "-k", "1", "--no-verify"]) == 0
    found = [json.loads(line)["question"] for line in capsys.readouterr().out.splitlines()]
    assert found == ["one", "two"]


BAD_QUESTIONS = {
    "windows": (b"one\ncaf\xe9\n", "q.txt, line 2, character 4: byte 0xe9 is not UTF-8"),
    "NUL": (b"one\n\0two\n", "q.txt, line 2, character 1: NUL"),
    "cut UTF-16": ("one".encode("utf-16")[:-1], "q.txt: cannot be read completely"),
    "nothing": (b"\xef\xbb\xbf\r\n \n", "q.txt: no questions in it"),
    "gzip": (pack(b"one", ".gz"), "q.txt: the content is that of a .gz file"),
    "line separators": ("\u2028\n".encode(), "q.txt: no questions in it"),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_question_files_that_are_no_text_are_named_before_the_index_is_opened(case, tmp_path):
    content, says = BAD_QUESTIONS[case]
    (tmp_path / "q.txt").write_bytes(content)
    with pytest.raises(JasperError, match=says):
        main(["ask", str(tmp_path / "no index"), "--file", str(tmp_path / "q.txt")])


def test_questions_and_texts_with_lone_surrogates_are_errors(built, tiny_bert, tmp_path, monkeypatch):
    with pytest.raises(JasperError, match="the question is not text in this terminal's encoding"):
        main(["ask", str(tmp_path / "no index"), "caf\udce9"])  # as a byte that is not UTF-8 arrives
    with pytest.raises(JasperError, match="question 2 has a lone surrogate"):
        TextIndex(built, verify=False).ask(["fine", "half \ud83d"])
    monkeypatch.setattr("sys.stdin", io.StringIO("who \udcff\n"))
    with pytest.raises(JasperError, match="the question is not text in this terminal's encoding"):
        main(["ask", str(built), "--no-verify"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    with pytest.raises(JasperError, match="the question is not utf-8 text"):
        main(["ask", str(built), "--no-verify"])
    with pytest.raises(JasperError, match="text 2 has a lone surrogate"):
        build(str(tiny_bert), ["fine", "half \ud83d"], tmp_path / "i")
    (tmp_path / "texts.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(JasperError, match="texts.jsonl, line 2: column 'text' has a lone surrogate"):
        main(["build", str(tiny_bert), str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "i")])
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("columns", ["", " ", ",", " , ", "\t", ",,"])
def test_columns_without_a_name_are_an_error_of_the_command_line(columns, text_file, tiny_bert, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["build", str(tiny_bert), str(text_file), "--out", str(tmp_path / "i"), "--columns", columns])
    assert caught.value.code == 2
    assert "argument --columns: expected column names separated by commas" in capsys.readouterr().err


@pytest.mark.parametrize("texts", ["", " ", "x" * 5000 + ".txt", "./a\0b.jsonl", "~nobody here/x.csv"])
def test_paths_that_cannot_be_are_errors(texts, tiny_bert, tmp_path):
    with pytest.raises(JasperError):
        main(["build", str(tiny_bert), texts, "--out", str(tmp_path / "i")])
    with pytest.raises(JasperError):
        main(["build", str(tiny_bert), texts, "--pictures", "--out", str(tmp_path / "i")])
    with pytest.raises(JasperError):
        main(["ask", str(tmp_path), "--file", texts])


ROWS = [("a-1", "apples and pears"), ("b-2", "a bridge over the river"), ("c-3", "apples and pears"), ("d-4", " ")]


def write_rows(file: Path, rows, column: str = "nid") -> Path:
    file.write_text("".join(json.dumps({column: number, "text": text}) + "\n" for number, text in rows))
    return file


def test_an_index_is_replaced_only_when_asked(tiny_bert, tmp_path):
    texts, out = write_rows(tmp_path / "t.jsonl", ROWS), tmp_path / "i"
    command = ["build", str(tiny_bert), str(texts), "--out", str(out)]
    main(command)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    refused = r"i: exists \(an index of 2 documents, built with .*\). Fix: add --replace, or choose another --out"
    with pytest.raises(JasperError, match=refused):
        main(["build", "no-such-model", str(tmp_path / "absent.jsonl"), "--out", str(out)])
    with pytest.raises(JasperError, match=refused):
        build("no-such-model", ["one"], out)
    with pytest.raises(JasperError, match="no-such-model"):
        build("no-such-model", ["one"], out, replace=True)
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    main([*command, "--limit", "1", "--replace"])
    assert len(TextIndex(out)) == 1
    (out / "search.json").write_text("{")
    with pytest.raises(JasperError, match="i: exists .a damaged index.. Fix: add --replace"):
        main(command)
    assert build(str(tiny_bert), ["one"], out, replace=True) == 1
    with pytest.raises(JasperError, match="is not a text index"):
        main(["build", str(tiny_bert), str(texts), "--out", str(tmp_path), "--replace"])


IDS = {
    "strings": ("t.jsonl", ["a-1", "b-2", "c-3", "d-4"], ["a-1", "b-2", "c-3"]),
    "numbers": ("t.jsonl", [40, 30, -(2**63), 10], [40, 30, -(2**63)]),
    "csv": ("t.csv", ["007", "8", "x y", "9"], ["007", "8", "x y"]),
    "parquet": ("t.parquet", [7, 8, 9, 10], [7, 8, 9]),
}


@pytest.mark.parametrize("case", IDS)
def test_ids_of_a_column_are_those_of_the_hits(case, tiny_bert, tmp_path, capsys):
    name, ids, kept = IDS[case]
    file, texts = tmp_path / name, [text for _, text in ROWS]
    if case == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts, "nid": ids, "more": ids}), file)
    elif case == "csv":
        file.write_text("nid,text\n" + "".join(f"{one},{text}\n" for one, text in zip(ids, texts, strict=True)))
    else:
        write_rows(file, zip(ids, texts, strict=True))
    out = tmp_path / "i"
    main(["build", str(tiny_bert), str(file), "--out", str(out), "--id-column", "nid"])
    assert [hit.id for hit in TextIndex(out).ask([texts[0]])[0]] == [kept[0], kept[2], kept[1]]  # the same text twice
    capsys.readouterr()
    main(["ask", str(out), texts[1], "-k", "1", "--json"])
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    assert hit["id"] == kept[1] and type(hit["id"]) is type(kept[1]) and hit["text"] == texts[1]
    main(["ask", str(out), texts[1], "-k", "1"])
    assert f"  1. 1.000  [{kept[1]}]  {texts[1]}" in capsys.readouterr().out


BAD_IDS = {
    "missing": (["nid", "x"], "t.jsonl, line 1: no column 'key' for the ids .got columns: nid, text.. Fix: set --id"),
    "twice": (["a", "b", "a"], "line 3: column 'nid': the id 'a' appears twice .first: .*line 1: column 'nid'.. Fix"),
    "null": (["a", None], "line 2: column 'nid' is null. Fix: give each document an id"),
    "blank": (["a", " "], "line 2: column 'nid' is empty. Fix"),
    "mixed": (["a", 1], "line 2: column 'nid' is int and the first id is str. Fix"),
    "float": ([1.5], "line 1: column 'nid' is not text or a 64-bit whole number .got float 1.5.. Fix"),
    "bool": ([True], "got bool True"),
    "large": ([2**63], "got int 9223372036854775808"),
    "surrogate": (["\ud83d"], "column 'nid' has a lone surrogate"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_unusable_ids_are_errors_before_the_model_is_opened(case, tmp_path):
    ids, says = BAD_IDS[case]
    file = write_rows(tmp_path / "t.jsonl", [(one, f"text {n}") for n, one in enumerate(ids)])
    column = "key" if case == "missing" else "nid"
    with pytest.raises(JasperError, match=says):
        main(["build", "no-such-model", str(file), "--out", str(tmp_path / "i"), "--id-column", column])
    if case != "missing":
        with pytest.raises(JasperError, match="^id [123]"):
            build("no-such-model", ["text"] * len(ids), tmp_path / "i", ids=ids)


SOURCES_WITHOUT_IDS = {
    "built-in": ("docstrings", [], "docstrings: a built-in source has no ids. Fix: leave out --id-column"),
    "lines": ("t.txt", [], "t.txt, line 1: no column 'nid' for the ids .got columns: text."),
    "lists": ("t.jsonl", [], "t.jsonl, line 1: a list of texts cannot have one id. Fix: write one text per row"),
    "pictures": (".", ["--pictures"], "--pictures takes images, which have no columns. Fix: leave out --id-column"),
}


@pytest.mark.parametrize("case", SOURCES_WITHOUT_IDS)
def test_sources_that_have_no_ids(case, tmp_path):
    name, more, says = SOURCES_WITHOUT_IDS[case]
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    (tmp_path / "t.jsonl").write_text('{"nid": 1, "text": ["one", "two"]}\n')
    texts = name if name == "docstrings" else str(tmp_path / name)
    with pytest.raises(JasperError, match=says):
        main(["build", "no-such-model", texts, "--out", str(tmp_path / "i"), "--id-column", "nid", *more])


def test_as_many_ids_as_texts(tmp_path):
    with pytest.raises(JasperError, match="ids: one per text is needed .got 1, expected 2.. Fix"):
        build("no-such-model", ["one", "two"], tmp_path / "i", ids=["a"])


ADDED = {
    "ids": ([("a", "one apple"), ("b", "two bridges")], [("c", "one apple"), ("d", "  "), ("e", "a river")], "float32"),
    "rows": ([(None, "one apple"), (None, "two bridges")], [(None, "one apple"), (None, "a river")], "float32"),
    "int8": ([(7, "one apple"), (8, "two bridges")], [(9, "one apple"), (3, "a river")], "int8"),
}


@pytest.mark.parametrize("case", ADDED)
def test_added_documents_are_those_of_one_build(case, tiny_bert, tmp_path, capsys):
    first, second, dtype = ADDED[case]
    ids = [] if case == "rows" else ["--id-column", "nid"]
    for name, rows in (("first", first), ("second", second), ("both", [*first, *second])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    for name in ("first", "both"):
        texts = str(tmp_path / f"{name}.jsonl")
        main(["build", str(tiny_bert), texts, "--out", str(tmp_path / name), "--dtype", dtype, *ids])
    for new in [2 if ids else 1, 0][: 1 if ids else 2]:
        capsys.readouterr()
        main(["add", str(tmp_path / "first"), str(tmp_path / "second.jsonl"), *ids])
        assert f"{new} new texts in " in capsys.readouterr().out
    added, built = TextIndex(tmp_path / "first"), TextIndex(tmp_path / "both")
    for one, other in zip(added.ask(["a river", "an apple"])[0], built.ask(["a river", "an apple"])[0], strict=True):
        assert (one.id, one.text) == (other.id, other.text) and abs(one.score - other.score) < 1e-5
    assert json.loads((tmp_path / "first/search.json").read_text()) == json.loads(
        (tmp_path / "both/search.json").read_text()
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["both", "first"]


BAD_ADDITIONS = {
    "no such index": ("absent", ["x"], [], "absent: there is no such folder. Fix: make an index with"),
    "without ids": ("i", ["x"], [], "i: an index with ids. Fix: set --id-column"),
    "known id": (
        "i",
        ["a-1"],
        ["--id-column", "nid"],
        "'a-1' appears twice: its document 1 has it already. Fix: add --replace",
    ),
    "numbers": ("i", [1], ["--id-column", "nid"], "the new ids are int, and its ids are str. Fix"),
    "pictures": ("i", ["x"], ["--pictures"], "no readable images"),
    "other model": ("i", ["x"], ["--id-column", "nid", "--model", "OTHER"], "not the model that .* was built with"),
}


@pytest.fixture(scope="module")
def with_ids(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("ids") / "i"
    build(str(tiny_bert), ["one", "two"], folder, ids=["a-1", "b-2"])
    return folder


@pytest.mark.parametrize("case", BAD_ADDITIONS)
def test_documents_that_cannot_be_added_leave_the_index_as_it_was(case, with_ids, tiny_qwen2, tmp_path):
    name, ids, more, says = BAD_ADDITIONS[case]
    before = {file: file.read_bytes() for file in with_ids.rglob("*") if file.is_file()}
    texts = write_rows(tmp_path / "t.jsonl", [(one, "three") for one in ids])
    source = tmp_path if case == "pictures" else texts
    more = [str(tiny_qwen2) if one == "OTHER" else one for one in more]
    with pytest.raises(JasperError, match=says):
        main(["add", str(with_ids.with_name(name)), str(source), *more])
    assert before == {file: file.read_bytes() for file in with_ids.rglob("*") if file.is_file()}


def test_an_index_that_changes_meanwhile_is_not_lost(tiny_bert, tmp_path):
    build(str(tiny_bert), ["one"], tmp_path / "i")

    def texts():
        build(str(tiny_bert), ["another"], tmp_path / "i", replace=True)
        yield "two"

    with pytest.raises(JasperError, match="i: changed while documents were written. Fix: run the same command again"):
        add(tmp_path / "i", texts())
    assert TextIndex(tmp_path / "i").texts.to_pylist() == ["another"]
    with pytest.raises(JasperError, match="i: an index of texts. Fix: leave out --pictures"):
        add(tmp_path / "i", ["a.png"], pictures=True)
    with pytest.raises(JasperError, match="i: an index without ids. Fix: leave out --id-column"):
        add(tmp_path / "i", ["x"], ids=["x"])


def test_documents_are_removed_and_replaced_by_their_ids(tiny_bert, tiny_texts, tmp_path, capsys):
    build(str(tiny_bert), tiny_texts[:6], tmp_path / "i", ids=[10, 11, 12, 13, 14, 15])
    (tmp_path / "ids.txt").write_text("13\n\n10\n")
    assert main(["remove", str(tmp_path / "i"), "12"]) == 0
    assert main(["remove", str(tmp_path / "i"), "--file", str(tmp_path / "ids.txt")]) == 0
    assert "1 document removed from" in (out := capsys.readouterr().out) and "2 documents removed" in out
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"nid": 11, "text": tiny_texts[20]}) + "\n")
    assert main(["add", str(tmp_path / "i"), str(new), "--id-column", "nid", "--replace"]) == 0
    index = TextIndex(tmp_path / "i")
    assert index.ids.to_pylist() == [14, 15, 11] and json.loads((tmp_path / "i/search.json").read_text())["texts"] == 3
    for text, wanted in ((tiny_texts[4], 14), (tiny_texts[5], 15), (tiny_texts[20], 11)):
        (hits,) = index.ask([text])
        assert (hits[0].id, hits[0].text) == (wanted, text) and len(hits) == 3


BAD_REMOVALS = {
    "unknown": (["a-1", "z"], "no document has the id 'z'"),
    "twice": (["a-1", "a-1"], "'a-1' is given twice"),
    "all": (["a-1", "b-2"], "no document would be left. Fix: delete the folder"),
    "none": ([], "give ids, or --file with one id per line"),
}


@pytest.mark.parametrize("case", BAD_REMOVALS)
def test_documents_that_cannot_be_removed_leave_the_index_as_it_was(case, with_ids):
    ids, message = BAD_REMOVALS[case]
    with pytest.raises(JasperError, match=message):
        main(["remove", str(with_ids), *ids])
    assert TextIndex(with_ids, verify=False).ids.to_pylist() == ["a-1", "b-2"]


def test_an_index_without_ids_names_the_option_that_gives_them(built):
    with pytest.raises(JasperError, match="an index without ids. Fix: build it with --id-column"):
        remove(built, ["3"])


def test_a_folder_with_model_and_index_can_move(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "a" / "model")
    build(str(tmp_path / "a" / "model"), ["one", "two"], tmp_path / "a" / "index")
    (tmp_path / "a").rename(tmp_path / "b")
    assert TextIndex(tmp_path / "b" / "index").ask(["two"])[0][0].text == "two"
    settings = json.loads((tmp_path / "b/index/search.json").read_text())
    del settings["model_from_index"]  # as older versions wrote it
    settings["model"] = str(tmp_path / "b" / "model")
    (tmp_path / "b/index/search.json").write_text(json.dumps(settings))
    assert len(TextIndex(tmp_path / "b" / "index")) == 2


@pytest.mark.parametrize(("columns", "full"), [(40, False), (80, False), (40, True)])
def test_hits_fit_the_terminal_unless_whole_texts_are_wanted(columns, full, monkeypatch, capsys):
    from jasper_fast.search import _columns, _show

    monkeypatch.setenv("COLUMNS", str(columns))
    texts = ["word " * 40, "漢字" * 60, "short", "x" * (columns - 12)]
    _show("question", [Hit(0.5, 1, text) for text in texts], as_json=False, full=full)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [_columns(line) <= columns for line in lines] == [not full, not full, True, True]
    assert [line.endswith("…") for line in lines] == [not full, not full, False, False]
    assert _columns(lines[0]) == columns or full


def test_the_part_of_long_texts_that_is_not_read_is_reported(tiny_bert, tmp_path, capsys):
    build(str(tiny_bert), ["the river " * 50, "the river", "a bridge", "a red bridge"], tmp_path / "i", max_length=16)
    said = "25 % of 4 texts are longer than 16 tokens, and the rest of these is not read. --max-length 64 reads more\n"
    assert said in capsys.readouterr().err
    build(str(tiny_bert), ["the river " * 50], tmp_path / "k", max_length=64)  # as many tokens as there are positions
    assert "the rest of these is not read\n" in capsys.readouterr().err
    build(str(tiny_bert), ["the river", "a bridge"], tmp_path / "j", max_length=16)
    assert "longer than" not in capsys.readouterr().err
