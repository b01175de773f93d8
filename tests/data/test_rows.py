"""Training texts, evaluation sets, captions and questions are read by the same rules, from files of any system."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jasper_fast.config.data import EvalConfig, ImageSourceConfig, SourceConfig
from jasper_fast.data.eval_loaders import load_eval
from jasper_fast.data.eval_sets import ClassificationSet, RetrievalSet, SimilaritySet
from jasper_fast.data.image_sources import read_images
from jasper_fast.data.rows import read_lines, read_rows
from jasper_fast.data.text_sources import read_source
from jasper_fast.search import _lines as read_questions
from jasper_fast.utils.errors import JasperError
from tests.helpers.packing import PACKERS, pack

TEXTS = ["first text", "a second, longer", "third \u2028 with \x85 odd \x0b breaks \x0c in \x1c it \u2029 \x1d\x1e end"]


def training(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    file = folder / f"texts.jsonl{end}"
    file.write_bytes(data("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)))
    return [text for (text,) in read_source(SourceConfig(path=str(file)))]


def lines(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    file = folder / f"texts.txt{end}"
    file.write_bytes(data("".join(f"{text}\n" for text in TEXTS)))
    return [text for (text,) in read_source(SourceConfig(path=str(file)))]


def csv_table(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    file = folder / f"texts.csv{end}"
    file.write_bytes(data("id, text \n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))))
    return [text for (text,) in read_source(SourceConfig(path=str(file)))]


def tsv_table(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    file = folder / f"texts.tsv{end}"
    file.write_bytes(data(" text\tid\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(TEXTS))))
    return [text for (text,) in read_source(SourceConfig(path=str(file)))]


def beir(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    rows = [json.dumps({"_id": f"d{i}", "text": text}, ensure_ascii=False) for i, text in enumerate(TEXTS)]
    (folder / "qrels").mkdir()
    (folder / f"corpus.jsonl{end}").write_bytes(data("\n".join(rows) + "\n"))
    (folder / f"queries.jsonl{end}").write_bytes(data("\n".join(rows) + "\n"))
    (folder / "qrels" / f"test.tsv{end}").write_bytes(data("q\td\tscore\nd0\td1\t1\nd1\td0\t1\nd2\td0\t1\n"))
    evalset = load_eval(EvalConfig(path=str(folder)))
    assert isinstance(evalset, RetrievalSet) and evalset.queries == evalset.documents
    return evalset.documents


def similarity(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    file = folder / f"pairs.tsv{end}"
    file.write_bytes(data("score\tsentence1\tsentence2\n" + "".join(f"{i}\t{t}\tx\n" for i, t in enumerate(TEXTS))))
    evalset = load_eval(EvalConfig(path=str(file)))
    assert isinstance(evalset, SimilaritySet) and evalset.name == "pairs"
    return evalset.left


def classification(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    rows = [json.dumps({"text": text, "label": i % 2}, ensure_ascii=False) for i, text in enumerate(TEXTS)]
    for part in ("train", "test"):
        (folder / f"{part}.jsonl{end}").write_bytes(data("\n".join(rows) + "\n"))
    evalset = load_eval(EvalConfig(path=str(folder)))
    assert isinstance(evalset, ClassificationSet)
    return evalset.test_texts


def captions(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    rows = [{"image": f"{i}.png", "caption": text} for i, text in enumerate(TEXTS)]
    for row in rows:
        (folder / row["image"]).write_bytes(b"not decoded here")
    (folder / f"captions.jsonl{end}").write_bytes(
        data("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    )
    return [image_captions[0] for _, _, image_captions in read_images(ImageSourceConfig(path=str(folder)))]


def questions(folder: Path, data: Callable[[str], bytes], end: str) -> list[str]:
    (folder / f"questions.txt{end}").write_bytes(data("".join(f"{text}\n" for text in TEXTS)))
    return read_questions(str(folder / f"questions.txt{end}"))


KINDS = [training, lines, csv_table, tsv_table, beir, similarity, classification, captions, questions]
WRITTEN: dict[str, Callable[[str], bytes]] = {
    "plain": lambda text: text.encode(),
    "byte order mark": lambda text: ("\ufeff" + text).encode(),
    "two marks": lambda text: ("\ufeff\ufeff" + text).encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 big end first": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "no last line end": lambda text: text.rstrip("\n").encode(),
    "blank lines": lambda text: text.replace("\n", "\n\n").encode(),
}


def equal(kind: Callable, texts: list[str]) -> bool:
    """Compare texts with the expected ones. The white space of captions is collapsed."""
    return texts == ([" ".join(text.split()) for text in TEXTS] if kind is captions else TEXTS)


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read_however_it_was_written(kind: Callable, how: str, tmp_path: Path) -> None:
    assert equal(kind, kind(tmp_path, WRITTEN[how], ""))


@pytest.mark.parametrize("end", [*PACKERS, ".GZ"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_may_be_compressed(kind: Callable, end: str, tmp_path: Path) -> None:
    assert equal(kind, kind(tmp_path, lambda text: pack(("\ufeff" + text).encode(), end), end))


@pytest.mark.parametrize("end", PACKERS)
def test_compressed_files_that_were_joined_are_read_whole_and_cut_ones_rejected(end: str, tmp_path: Path) -> None:
    parts = [pack(f"\ufeff{part}\n".encode() * 999, end) for part in ("one", "two", "three")]
    file = tmp_path / f"texts.txt{end}"
    file.write_bytes(b"".join(parts))
    assert [row["text"] for _, row in read_rows(file)] == ["one"] * 999 + ["two"] * 999 + ["three"] * 999
    for content in (parts[0][:-5], b"".join(parts)[:-9], b"plain text", parts[0][: len(parts[0]) // 2]):
        file.write_bytes(content)
        with pytest.raises(JasperError, match=rf"texts.txt\{end}: cannot be read completely .*Fix: "):
            list(read_rows(file))


NOT_TEXT = {
    "windows": ("caf\u00e9\n".encode("cp1252"), "line 1, character 4: byte 0xe9 is not UTF-8"),
    "second line": (b"good\nbad \xff here\n", "line 2, character 5: byte 0xff is not UTF-8"),
    "after accents": ("\u00e9\u00e9".encode() + b"\xc3(\n", "line 1, character 3: byte 0xc3 is not UTF-8"),
    "surrogate as bytes": (b"x \xed\xa0\xbd\n", "line 1, character 3: byte 0xed is not UTF-8"),
    "NUL": (b"good\nb\0d\n", "line 2, character 2: NUL is not a text character"),
    "UTF-16 without a mark": ("ab\n".encode("utf-16-le"), "line 1, character 2: NUL"),
    "UTF-16 cut short": ("ab\n".encode("utf-16")[:-1], "cannot be read completely"),
    "zstd without its suffix": (pack(b"text\n", ".zst"), "the content is that of a .zst file"),
    "gzip without its suffix": (pack(b"text\n", ".gz"), "the content is that of a .gz file"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "texts.csv", "texts.tsv", "questions.list"])
def test_what_is_no_text_is_named_with_file_line_and_place(case: str, name: str, tmp_path: Path) -> None:
    content, says = NOT_TEXT[case]
    if name.endswith(".jsonl"):
        content = content.replace(b"good", b'{"text": "good"}')
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(JasperError) as caught:
        list(read_rows(file))
    assert f"{file}" in str(caught.value) and says in str(caught.value) and "Fix: " in str(caught.value)


TABLES = {
    "line break in quotes": ("a.csv", 'text,n\n"one\ntwo",1\nx,2\n', ["one\ntwo", "x"]),
    "CRLF in quotes": ("a.csv", 'text,n\r\n"one\r\ntwo",1\r\nx,2\r\n', ["one\r\ntwo", "x"]),
    "doubled quotes": ("a.csv", 'text,n\n"he said ""hi"", and left",1\n', ['he said "hi", and left']),
    "quotes inside a cell": ("a.csv", 'text,n\n6" pipe,1\n', ['6" pipe']),
    "spaces in the header": ("a.csv", "\ufeff text , n\nx,1\n", ["x"]),
    "quoted header after a mark": ("a.csv", '\ufeff"text","n"\n"x","1"\n', ["x"]),
    "rows of nothing": ("a.csv", "\ntext,n\nx,1\n,\n , \ny,2\n", ["x", "y"]),
    "upper-case suffix": ("A.CSV", "text,n\nx,1\n", ["x"]),
    "stray quotes": ("a.tsv", 'text\tn\n"Hello, she said\t1\nsix " wide\t2\n"whole"\t3\n', None),
    "tsv of pandas": ("a.tsv", 'text\tn\n"he said ""hi"""\t1\nplain\t2\n', ['he said "hi"', "plain"]),
    "all quoted": ("a.tsv", '"text"\t"n"\n"a\tb"\t"1"\n"c\nd ""e"""\t"2"\n', ["a\tb", 'c\nd "e"']),
    "pandas index": ("a.tsv", '""\t"text"\n"0"\t"x"\n"1"\t"y"\n', ["x", "y"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_quoted_cells_of_tables(case: str, tmp_path: Path) -> None:
    name, content, expected = TABLES[case]
    (tmp_path / name).write_bytes(content.encode())
    texts = [row["text"] for _, row in read_rows(tmp_path / name, ["text"])]
    assert texts == (expected or ['"Hello, she said', 'six " wide', '"whole"'])


BAD_TABLES = {
    "semicolons": ("a.csv", "id;text\n1;x\n", r"line 1: no column 'text' .*separate the cells by commas, not by ';'"),
    "short row": ("a.csv", "text,n\nx,1\ny\n", r"line 3: wrong number of cells \(got 1, expected 2: text, n\)"),
    "long row": ("a.tsv", "text\tn\nx\t1\ty\n", r"line 2: wrong number of cells \(got 3, expected 2"),
    "tab in quotes": ("a.tsv", 'text\tn\n"a\tb"\t1\n', r"line 2: wrong number of cells .*save as .csv"),
    "break in quotes": ("a.tsv", 'text\tn\n"a\nb"\t1\n', r"line 2: wrong number of cells"),
    "open quote": ("a.csv", 'text,n\nx,1\n"y,2\nz,3\n', r"line 3: not a table row"),
    "text after a quote": ("a.csv", 'text,n\n"x" y,2\n', r"line 2: not a table row"),
    "same name twice": ("a.csv", "text,n,text\nx,1,y\n", r"line 1: column 'text' appears twice"),
    "place of a later row": ("a.csv", 'text,n\n"a\nb\nc",1\ny\n', r"line 5: wrong number of cells"),
    "empty": ("a.csv", "", r"line 1: no column 'text' \(got columns: none\)"),
    "deep JSON": ("a.jsonl", "[" * 100_000, r"line 1: not JSON"),
    "long number": ("a.jsonl", '{"text": ' + "1" * 5000 + "}", r"line 1: not JSON"),
    "raw tab in JSON": ("a.jsonl", '{"text": "a\tb"}', r"line 1: not JSON"),
    "cut JSON": ("a.jsonl", '{"text": "x"}\n{"text": "y', r"line 2: not JSON"),
    "an array of rows": ("a.jsonl", '[\n{"text": "x"}\n]\n', r"line 1: not JSON"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_malformed_rows_are_named(case: str, tmp_path: Path) -> None:
    name, content, says = BAD_TABLES[case]
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises(JasperError, match=rf"{name},? {says}") as caught:
        list(read_rows(tmp_path / name, ["text"]))
    assert "Fix: " in str(caught.value)


def test_parquet_without_chosen_columns_gives_all(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "caption": ["x"]}), tmp_path / "A.PARQUET")
    assert list(read_rows(tmp_path / "A.PARQUET")) == [
        (f"{tmp_path}/A.PARQUET, row 1", {"image": "a.png", "caption": "x"})
    ]


def test_lines_keep_what_is_on_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b" a \r\rb\r\nc\n\n\xef\xbb\xbfd")
    assert list(read_lines(tmp_path / "a")) == [(1, " a "), (2, ""), (3, "b"), (4, "c"), (5, ""), (6, "d")]


def test_missing_and_odd_files_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(JasperError, match="cannot be read completely"):
            list(read_lines(path))
