"""The benchmark of maps and projections at small size: its figures are consistent, and learned axes keep more."""

from __future__ import annotations

import json

import numpy as np

from bench import fit


def test_all_parts_at_small_size(tmp_path, capsys):
    vectors = fit.clustered(2000, 48, 0).numpy()
    np.save(tmp_path / "own.npy", vectors)
    command = ["--width", "32", "--rows", "300", "600", "--streamed", "15000", "--widths", "8", "--seconds", "3"]
    fit.main([*command, "--vectors", str(tmp_path / "own.npy"), "--out", str(tmp_path / "fit.json")])
    found = json.loads((tmp_path / "fit.json").read_text())
    assert [case["rows"] for case in found["fits"]] == [300, 600]
    assert all(case["statistics_s"] > 0 and case["candidates_s"] > 0 for case in found["fits"])
    assert 0 < found["stream"]["before_mib"] <= found["stream"]["peak_mib"] < 1024
    (learned,) = found["learned"]
    assert found["vectors"] == "own" and learned["rows"] == 1800 and learned["steps"] > 3
    assert learned["seconds"] >= 3 and learned["targets"][0]["met"] is True
    assert learned["overlap_learned"] > learned["overlap_principal"]
    assert found["environment"]["load"] >= 0
    assert "300 pairs, 32 wide" in capsys.readouterr().out


def test_only_the_stated_size_is_compared_with_its_target():
    assert "targets" not in fit.fit(200, 16)
