"""Endpoints that are down, slow or wrong, damaged golden files, and arguments that do not fit."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import numpy as np
import pytest

from jasper_fast import compare
from jasper_fast.drift.comparison import Options, compare_models, open_side
from jasper_fast.drift.endpoint import EndpointOptions, EndpointSide
from jasper_fast.exporting import golden
from jasper_fast.exporting.golden import Text, golden_texts, read_golden, write_golden
from jasper_fast.utils.errors import JasperError
from tests.helpers.endpoints import openai, server

TEXTS = [Text("query", "one"), Text("document", "a longer text")]


def rows_of(texts):
    return np.array([[len(text), 1.0, 2.0] for text in texts]) / 10


def drip(handler):
    """Send headers, then a byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def sleep(handler):
    time.sleep(3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sleep, r"no complete answer in 0.4 s. Fix: .*--timeout"),
        (drip, r"no complete answer in 0.4 s"),
        ((500, "out of memory"), r"HTTP 500 .*\(out of memory\). Fix: check the log"),
        ((404, "no such route"), r"HTTP 404 .*Fix: check the address"),
        ((401, ""), "--key-variable"),
        ((413, "inputs must have less than 512 tokens"), r"less than 512 tokens.*--auto-truncate"),
        ((200, "<html>hello</html>"), r"the answer is not JSON .got '<html>hello"),
        ({"error": "busy"}, r"no embedding for each text .got .*busy"),
        ({"data": [{"embedding": [1.0, 2.0]}] * 7}, "got 7, expected 1 embeddings"),
        ([1, 2], "no embedding for each text"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:24]),
)
def test_an_endpoint_that_fails(answer, message):
    with server(lambda *_: answer) as address, pytest.raises(JasperError, match=message):
        EndpointSide(address + "/v1/embeddings", EndpointOptions(model="x", timeout=0.4))


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([[1.0, float("nan")], [1.0, 1.0]], "embedding of text 1 is not finite"),
        ([[1.0, 1.0], [None, 1.0]], "embedding of text 2 is not finite|not rows of numbers"),
        ([[1.0, 1.0], [1.0]], "not rows of numbers of one width"),
        ([["a", "b"], ["c", "d"]], "not rows of numbers"),
        ([[], []], "expected 2 rows"),
    ],
)
def test_embeddings_that_are_no_numbers(embeddings, message):
    def answer(path, content):
        rows = embeddings if len(content["input"]) == 2 else [[1.0, 1.0]]
        return {"data": [{"embedding": row, "index": i} for i, row in enumerate(rows)]}

    with server(answer) as address, pytest.raises(JasperError, match=message):
        EndpointSide(address + "/v1/embeddings", EndpointOptions(model="x")).embed(TEXTS)


def test_nothing_listens():
    with server(lambda *_: None) as address:
        pass
    with pytest.raises(JasperError, match=r"no answer .*refused.*Fix: start the server, and check host and port"):
        EndpointSide(address + "/embed", EndpointOptions())


def test_requests_of_an_openai_style_server(monkeypatch):
    seen = []

    def answer(path, content):
        seen.append((path, content))
        reply = openai(rows_of)(path, content)
        for item in reply.get("data", []) if content else []:
            item["embedding"] = base64.b64encode(np.array(item["embedding"], "<f4").tobytes()).decode()
        return reply

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # of no use for a local server
    with server(answer) as address:
        side = EndpointSide(address + "/v1/embeddings", EndpointOptions(dimensions=2))
        rows = side.embed(TEXTS, {"query": "q: ", "document": ""})
        assert len(side.embed(TEXTS * 20)) == 40 and len(side.embed(TEXTS, together=False)) == 2
    np.testing.assert_allclose(rows, [[0.6, 0.1], [1.3, 0.1]], rtol=1e-6)
    assert seen[0] == ("/v1/models", None)
    fields = {"encoding_format": "float", "model": "tiny", "dimensions": 2}
    assert seen[2] == ("/v1/embeddings", {"input": ["q: one", "a longer text"], **fields})
    assert [len(content["input"]) for _, content in seen[3:]] == [32, 8, 1, 1]


def test_several_models_are_listed():
    with (
        server(lambda *_: {"data": [{"id": "a"}, {"id": "b"}]}) as address,
        pytest.raises(JasperError, match=r"several models .a, b.. Fix: choose one with --model NAME"),
    ):
        EndpointSide(address + "/v1/embeddings", EndpointOptions())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://localhost:1/v1", "expected an address that ends in /v1/embeddings or /embed"),
        ("http://[::1/v1/embeddings", "the address is malformed"),
        ("http://localhost:port/embed", "no answer .nonnumeric port"),
        ("./nothing-here", "there is no such file or folder"),
        ("nothing.onnx", "there is no such file or folder"),
        ("nothing/golden.json", "there is no such file or folder"),
    ],
)
def test_what_cannot_be_opened(name, message):
    with pytest.raises(JasperError, match=message):
        open_side(name)


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.onnx").write_text("a")
    with pytest.raises(JasperError, match="unknown kind of file"):
        open_side(str(tmp_path / "a.txt"))
    with pytest.raises(JasperError, match="no tokenizer next to the graph"):
        open_side(str(tmp_path / "a.onnx"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(JasperError, match="onnxruntime cannot load the graph"):
        open_side(str(tmp_path / "a.onnx"))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    facts = {"model": "m", "prompts": {"query": "", "document": ""}, "weights": {}}
    return write_golden(tmp_path, lambda texts, role: rows_of(texts) + (role == "query"), facts)


def test_a_golden_file_has_texts_of_all_kinds(recorded):
    read = read_golden(recorded)
    assert list(read.texts) == golden_texts() and len(read.texts) >= 24
    assert read.facts["width"] == 3 and read.facts["normalized"] is False and read.facts["versions"]["torch"]
    for text, row in zip(read.texts, read.embeddings, strict=True):
        np.testing.assert_allclose(row, rows_of([text.text])[0] + (text.role == "query"), rtol=1e-5)
    lengths = [len(text.text.split()) for text in read.texts]
    assert min(lengths) == 1 and max(lengths) == 1600
    assert {text.role for text in golden_texts(["query"])} == {"query"}
    with pytest.raises(JasperError, match="an embedding is not finite"):
        write_golden(recorded.parent, lambda texts, role: rows_of(texts) * np.nan, {})
    assert read_golden(recorded).texts == read.texts  # as it was


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("format"), "field `format` is missing"),
        (lambda c: c.update(format=9), "unknown format .got 9, expected 1"),
        (lambda c: c.update(width=4), "embedding 0 has a width of 3, expected 4"),
        (lambda c: c["embeddings"][2].__setitem__(1, float("nan")), "embedding 2 has a value that is not a finite"),
        (lambda c: c["embeddings"][2].__setitem__(1, "0.5"), "embedding 2 has a value that is not a finite"),
        (lambda c: c["embeddings"][2].__setitem__(1, 0.123), "texts or numbers were edited"),
        (lambda c: c["texts"][0].update(text="another"), "texts or numbers were edited"),
        (lambda c: c["texts"][0].pop("role"), "a role and a text"),
        (lambda c: c["texts"].pop(), "as many of both"),
        (lambda c: c.update(prompts=[]), "field `prompts` is list"),
    ],
)
def test_a_damaged_golden_file(recorded, edit, message):
    content = json.loads(recorded.read_text())
    edit(content)
    recorded.write_text(json.dumps(content))
    with pytest.raises(JasperError, match=message):
        read_golden(recorded)


def test_what_is_no_golden_file(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(JasperError, match="not a golden file"):
        read_golden(tmp_path / "x.json")


def test_a_golden_file_has_only_its_own_texts(recorded, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("new\n")
    with pytest.raises(JasperError, match="lacks 2 of 2 texts"):
        compare_models(str(recorded), str(recorded), Options(texts=tmp_path / "texts.txt"))
    monkeypatch.setattr(golden, "WORD_COUNTS", (5,))
    (tmp_path / "older").mkdir()
    older = write_golden(tmp_path / "older", lambda texts, role: rows_of(texts), read_golden(recorded).facts)
    with pytest.raises(JasperError, match="the golden file lacks"):
        compare_models(str(recorded), str(older))


def test_the_command_ends_in_a_verdict_and_a_status(recorded, tmp_path, capsys):
    facts = read_golden(recorded).facts
    (tmp_path / "wrong").mkdir()
    wrong = write_golden(tmp_path / "wrong", lambda texts, role: 2 * (rows_of(texts) + (role == "query")), facts)
    assert compare.main([str(recorded), str(recorded)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "same: B gives the embeddings of A"
    assert compare.main([str(recorded), str(wrong)]) == 1
    shown = capsys.readouterr().out
    assert "found: normalisation: the vectors of A" in shown and shown.splitlines()[-1].startswith("different: the vec")
    assert compare.main([str(recorded), str(wrong), "--accept", "normalisation", "--role", "query", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["same"] and content["texts"] == 6 and content["findings"][0]["kind"] == "normalisation"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dimensions", "4"], "has 3 numbers a text. Fix: give at most that many"),
        (["--texts", "none.txt"], "the texts cannot be read"),
        (["--texts", "empty.txt"], "no texts"),
        (["--key-variable", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE is not set"),
        (["third"], "third is not the folder of a run|only two models"),
    ],
)
def test_arguments_that_do_not_fit(recorded, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    with pytest.raises(JasperError, match=message):
        compare.main([str(recorded), str(recorded), *arguments])


@pytest.mark.parametrize("arguments", [["--accept", "noise"], ["--min-cosine", "2"], ["--timeout", "0"]])
def test_values_that_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        compare.main(["a", "b", *arguments])
    assert "expected" in capsys.readouterr().err


def test_a_server_without_prompts_or_modules_to_try(recorded):
    with server(openai(lambda texts: rows_of(texts)[:, ::-1])) as address:
        comparison = compare_models(str(recorded), address + "/v1/embeddings")
    assert not comparison.same and "were not tried" in comparison.notes[0]


def test_prompts_to_send_must_be_known():
    with server(openai(rows_of)) as address, pytest.raises(JasperError, match="declares no prompts"):
        compare_models(*[address + "/v1/embeddings"] * 2, Options(send_prompts=True))
