"""The search benchmark runs whole, checks what it measures, and writes what the documentation reads."""

import json

import numpy as np
import pytest
import torch

from bench import _mips_cuda, mips
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


def test_the_gpu_benchmark_measures_what_its_targets_name(tmp_path, capsys, monkeypatch):
    """Here on a CPU: the same code but for the kernels."""
    monkeypatch.setattr(_mips_cuda, "SHAPES", [(512, 65_536, 256, 16, ("bfloat16", "int8"))])
    found = _mips_cuda.measure("cpu", 1, quick=True)
    (case,) = found["cases"]
    assert (case["queries"], case["rows"], case["width"]) == (2, 4096, 16) and found["read_gb_s"] > 0
    assert {"certified, bfloat16", "fast, int8", "bare bf16 product", "bf16 matmul + topk"} <= set(case["seconds"])
    assert "x the bare product's time" in capsys.readouterr().out
    monkeypatch.setattr(_mips_cuda, "measure", lambda device, repeats, quick: {"device": device})
    assert mips.main(["--device", "cuda", "--out", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["search"] == {"device": "cuda"} and {"commit", "gpus", "libraries"} <= set(written["environment"])
    index = FlatIPIndex(4)
    index.add(torch.randn(50, 4))
    monkeypatch.setattr(index, "search", lambda queries, k: (None, torch.arange(5).expand(len(queries), 5)))
    with pytest.raises(AssertionError, match="not exact"):
        _mips_cuda.verify(index, torch.randn(3, 4), 5)
