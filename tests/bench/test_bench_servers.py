"""The comparison with a server sees wrong embeddings, a server without `dimensions`, and a missing server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from bench.servers import PATH_VARIABLE, main, serve_and_compare
from jasper_fast.exporting.parity import PROBES
from jasper_fast.models.embedder import load_model
from jasper_fast.utils.errors import JasperError

SERVER = '''#!{python}
"""Answer with stored rows, as an OpenAI-style server does."""
import http.server, json, sys
rows = json.load(open({rows!r}))

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer("up")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/embeddings" and len(asked["input"]) == len(rows)
        width = asked.get("dimensions") if {obeys} else None
        self.answer({{"data": [{{"index": i, "embedding": row[:width]}} for i, row in enumerate(rows)]}})

    def log_message(self, *arguments):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''


@pytest.fixture(scope="module")
def folder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served") / "model"
    modules = [Transformer(str(tiny_bert), max_seq_length=24), Pooling(32), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(place))
    return place


@pytest.fixture
def serve(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(change=lambda rows: rows, obeys: bool = True) -> None:
        rows = tmp_path / "rows.json"
        rows.write_text(json.dumps(change(load_model(str(folder)).encode(list(PROBES.values()))).tolist()))
        script = tmp_path / "server"
        script.write_text(SERVER.format(python=sys.executable, rows=str(rows), obeys=obeys))
        script.chmod(0o755)
        monkeypatch.setenv(PATH_VARIABLE, str(script))

    return start


def test_the_same_embeddings_at_both_widths(folder, serve, capsys):
    serve()
    assert serve_and_compare(folder, 8) == pytest.approx(1, abs=1e-6)
    assert main([str(folder), "--dimensions", "8"]) == 0
    printed = capsys.readouterr().out
    assert "cosine at least 1.000000" in printed
    assert "note: infinity_emb does not normalise after `dimensions`" in printed  # the rows are cut alone


def test_other_embeddings_are_seen(folder, serve):
    serve(change=lambda rows: np.roll(rows, 1, axis=0))
    assert main([str(folder), "--dimensions", "8"]) == 1


def test_a_server_without_dimensions_is_an_error(folder, serve):
    serve(obeys=False)
    with pytest.raises(JasperError, match=r"expected \(6, 8\)"):
        serve_and_compare(folder, 8)


def test_a_server_that_stops_is_an_error(folder, tmp_path, monkeypatch):
    script = tmp_path / "server"
    script.write_text("#!/bin/sh\necho 'no such model'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv(PATH_VARIABLE, str(script))
    with pytest.raises(JasperError, match="cannot serve the folder .no such model."):
        serve_and_compare(folder, 8)


def test_a_missing_server_is_skipped_with_a_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(PATH_VARIABLE, os.fspath(tmp_path / "missing"))
    assert serve_and_compare(folder, 8) is None
    assert capsys.readouterr().out.startswith("skipped: infinity_emb is not installed. Fix: ")
