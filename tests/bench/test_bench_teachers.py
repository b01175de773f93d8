"""`python -m bench teachers` scores teachers alone, together, centred and reduced."""

from __future__ import annotations

import json

import numpy as np

from bench import teachers
from tests.helpers.graphs import text_graph


def test_forms_of_a_concatenation(tiny_bert, tiny_texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text_graph(tiny_bert, tmp_path / "graph")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts[:120]))
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = [f"{i % 6}\t{tiny_texts[i]}\t{tiny_texts[i + 1]}" for i in range(120, 160)]
    (folder / "dev.tsv").write_text("\n".join(["score\tsentence1\tsentence2", *lines]) + "\n")
    tree = [
        ("name", "two"),
        ("student", json.dumps({"model": str(tiny_bert), "heads": [24], "max_length": 32})),
        ("teachers", json.dumps([{"model": str(tiny_bert)}, {"model": "graph", "max_length": 32}])),
        ("data.sources", json.dumps([{"path": "texts.jsonl", "columns": ["text"]}])),
        ("stages", json.dumps([{"name": "a", "train": ["*"], "heads": [24], "steps": 1, "lr": 0.1}])),
    ]
    options = [word for key, value in tree for word in (f"--{key}", value)]
    assert teachers.main(["--sets", "pairs", "--rows", "50", "--out", "out.json", *options]) == 0
    rows = {(row["model"], row["width"]): row for row in json.loads((tmp_path / "out.json").read_text())["scores"]}
    names = [(str(tiny_bert), 32), ("graph", 12), ("together", 44), ("together, PCA", 24)]
    assert set(rows) == {*names, ("together, centred", 44), ("together, centred, PCA", 24)}
    assert "together, centred, PCA" in capsys.readouterr().out
    assert 0 < rows["graph", 12]["mean_cosine"] < 1
    scores = [next(iter(row["scores"].values())) for row in rows.values()]
    assert np.isfinite(scores).all() and len(set(scores)) > 3


def test_a_concatenation_is_that_of_training():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(3, width)) for width in (4, 2)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    joined = teachers._concatenated(parts, [np.zeros(4), np.zeros(2)])
    np.testing.assert_allclose(joined, np.concatenate(unit, axis=1) / np.sqrt(2), atol=1e-6)
    moved = teachers._concatenated(parts, [parts[0][0] / 2, np.zeros(2)])
    np.testing.assert_allclose(moved[0], joined[0], atol=1e-6)  # the direction stays
    assert np.abs(moved[1] - joined[1]).max() > 0.01
