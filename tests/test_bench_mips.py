"""The search benchmark runs whole, checks what it measures, and writes what the documentation reads."""

import json

import numpy as np
import pytest
import torch

from bench import mips
from jasper_fast.mips import FlatIPIndex


def test_a_quick_run_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        mips, "QUICK", [(3000, 16, 1, (1, 10), ("float32", "int8")), (3000, 16, 20, (10,), ("bfloat16",))]
    )
    assert mips.main(["--quick", "--repeats", "1", "--out", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(case["queries"], case["k"]) for case in results["search"]] == [(1, 1), (1, 10), (20, 10)]
    assert set(results["search"][0]["ratios"]) == {"float32", "int8"} and results["read_gb_s"] > 0
    assert " x with int8" in capsys.readouterr().out
    np.save(tmp_path / "mine.npy", torch.nn.functional.normalize(torch.randn(3000, 384), dim=1).numpy())
    monkeypatch.setattr(mips, "QUICK", [(3000, 384, 2, (5,), ("float32",))])
    assert (
        mips.main(
            ["--quick", "--repeats", "1", "--out", str(tmp_path / "own.json"), "--vectors", str(tmp_path / "mine.npy")]
        )
        == 0
    )
    assert json.loads((tmp_path / "own.json").read_text())["search"][0]["rows"] == 3000 - 1024


def test_the_memory_of_a_search_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(mips, "memory", lambda rows, width, size: mips._measure_memory(5000, 64, 8, 1))
    assert mips.main(["--memory", "--quick", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["memory"]
    assert 0 <= found["extra_mib"] < 500 and found["index_mib"] == 5000 * 64 * 2 / 2**20


def test_a_wrong_result_is_not_measured(monkeypatch):
    index = FlatIPIndex(4)
    index.add(torch.randn(50, 4))
    mips._verify(index, torch.randn(3, 4), 5)
    monkeypatch.setattr(index, "search", lambda queries, k: (None, torch.arange(5).expand(len(queries), 5)))
    with pytest.raises(AssertionError, match="not exact"):
        mips._verify(index, torch.randn(3, 4), 5)
