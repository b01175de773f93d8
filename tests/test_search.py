"""`python -m jasper_fast.search`: what is built can be asked, and finds what the vectors say."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jasper_fast.errors import JasperError
from jasper_fast.search import TextIndex, build, main

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
    assert [index.texts[i].as_py() for i in range(5)] == [f"x {text}" for text in tiny_texts[:5]]
    assert index.vectors.dtype == "int8" and len(index) == 5


def test_what_is_wrong_is_said(built, text_file, tiny_bert, tmp_path, tiny_qwen2):
    with pytest.raises(JasperError, match=r"no text index here \(search.json is missing\)"):
        main(["ask", str(tmp_path), "x"])
    with pytest.raises(JasperError, match="absent: there is no such folder; make an index with"):
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
    with pytest.raises(JasperError, match="32 coordinates"):
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
