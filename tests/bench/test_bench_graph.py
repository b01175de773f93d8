"""The graph benchmark at small size: ours and FAISS find the same neighbours."""

from __future__ import annotations

import json

import numpy as np

from bench.mips.graph import main


def test_the_graph_is_the_one_that_faiss_finds(tmp_path, capsys):
    main(["--rows", "2000", "--width", "32", "--neighbours", "4", "--out", str(tmp_path / "graph.json")])
    found = json.loads((tmp_path / "graph.json").read_text())
    assert found["rows"] == 2000 and found["found_by_faiss_too"] > 0.999
    assert 0 < found["plan_share"] == found["plan_seconds"] / found["step_seconds"]
    assert "2,000 × 32, 4 to a neighbourhood" in capsys.readouterr().out


def test_vectors_of_ones_own(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    np.save(tmp_path / "own.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    main(["--vectors", str(tmp_path / "own.npy"), "--neighbours", "3", "--out", str(tmp_path / "graph.json")])
    found = json.loads((tmp_path / "graph.json").read_text())
    assert (found["rows"], found["vectors"]) == (300, "own") and found["found_by_faiss_too"] == 1.0
