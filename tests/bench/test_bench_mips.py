"""The search benchmark runs completely, checks its results, and writes the JSON of the documentation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench.common.budget import Budget
from bench.common.targets import Target
from bench.mips import cpu as mips
from bench.mips import cuda as _mips_cuda
from bench.mips import signs
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
    (own,) = json.loads((tmp_path / "own.json").read_text())["search"]
    assert own["rows"] == 3000 - 1024 and own["bytes_per_row"]["float32"] >= 4 * 384 and own["build_s"]["ours, float32"]


def test_every_peer_finds_the_same_rows():
    corpus, queries = mips.clustered(2000, 32, 0), mips.clustered(4, 32, 1)
    sides = mips.Sides(corpus, ("float32",))
    assert {"torch", "NumPy"} <= set(sides.of(1)) and set(sides.of(100)) <= {"torch", "FAISS"}
    expected = sides.indexes["float32"].search(queries, 5)[1]
    for name, search in sides.of(4).items():
        found = search(queries, 5)
        ids = found.keys if name == "USearch" else found if name == "NumPy" else found[1]
        assert np.array_equal(np.asarray(ids), expected.numpy()), name


def test_no_row_among_the_best_is_beyond_the_bound_of_its_signs(tmp_path):
    corpus, queries = mips.clustered(3000, 64, 0), mips.clustered(40, 64, 1)
    few, many = signs.measure(corpus, queries)
    assert few["k"] == 10 and 10 / 3000 <= few["left"] <= many["left"] <= 1
    two = torch.tensor([[0.5, 0.5], [0.5, -0.5], [-0.5, -0.5]])  # their signs have no rounding, so the bound is exact
    np.testing.assert_allclose([entry["left"] for entry in signs.measure(two.repeat(100, 1), two[:1])], [1 / 3, 1 / 3])
    np.save(tmp_path / "mine.npy", torch.cat((corpus, mips.clustered(1024, 64, 2))).numpy())
    out = tmp_path / "signs.json"
    assert mips.main(["--signs", "--vectors", str(tmp_path / "mine.npy"), "--out", str(out)]) == 0
    assert [entry["rows"] for entry in json.loads(out.read_text())["signs"]] == [3000, 3000]


def test_vectors_are_extended_by_mixtures():
    rows = mips.clustered(50, 16, 0)
    longer = mips.extended(rows, 120)
    assert torch.equal(longer[:50], rows) and longer.shape == (120, 16)
    assert torch.allclose(longer.norm(dim=1), torch.ones(120)) and len(longer.unique(dim=0)) == 120
    assert torch.equal(mips.extended(rows, 20), rows[:20]) and torch.equal(mips.extended(rows, None), rows)


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
    """On a CPU, with the same code except for the kernels."""
    monkeypatch.setattr(_mips_cuda, "SHAPES", [(512, 65_536, 256, 16, ("bfloat16", "int8"))])
    found = _mips_cuda.measure("cpu", 1, quick=True)
    (case,) = found["cases"]
    assert (case["queries"], case["rows"], case["width"]) == (2, 4096, 16) and found["read_gb_s"] > 0
    assert {"certified, bfloat16", "fast, int8", "bare bf16 product", "bf16 matmul + topk"} <= set(case["seconds"])
    assert "x the bare product's time" in capsys.readouterr().out
    monkeypatch.setattr(_mips_cuda, "measure", lambda device, repeats, quick, keep, budget: keep({"device": device}))
    assert mips.main(["--device", "cuda", "--out", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["search"] == {"device": "cuda"} and {"commit", "gpus", "libraries"} <= set(written["environment"])
    index = FlatIPIndex(4)
    index.add(torch.randn(50, 4))
    monkeypatch.setattr(index, "search", lambda queries, k: (None, torch.arange(5).expand(len(queries), 5)))
    with pytest.raises(AssertionError, match="not exact"):
        _mips_cuda.verify(index, torch.randn(3, 4), 5)


def test_the_gpu_benchmark_goes_on_after_an_error_and_judges_its_targets(capsys, monkeypatch):
    shapes = [(2, 3000, 16, 5, ("bfloat16", "int8")), (2, 3000, 16, 6, ("bfloat16",)), (1, 3000, 8, 5, ("bfloat16",))]
    first = Target("x the bare product's time", lambda case: case["times_bare_product"], 0.0, at_most=True)
    fast = Target("ms fast", _mips_cuda.milliseconds("fast, bfloat16"), 1e9, at_most=True)
    absent = Target("ms", _mips_cuda.milliseconds("certified, int8"), 1.0, at_most=True)
    monkeypatch.setattr(_mips_cuda, "SHAPES", shapes)
    monkeypatch.setattr(_mips_cuda, "TARGETS", {shapes[0][:4]: [first, fast, absent]})
    monkeypatch.setattr(_mips_cuda, "bandwidth", lambda device, size, repeats: 1.0)
    plain, unit = _mips_cuda.verify, _mips_cuda.unit

    def verify(index: FlatIPIndex, queries: torch.Tensor, k: int) -> None:
        if index.dtype == "int8":
            raise AssertionError("the search is not exact")
        plain(index, queries, k)

    def broken(device: str, rows: int, width: int, seed: int) -> torch.Tensor:
        if width == 8:
            raise RuntimeError("the device fell off")
        return unit(device, rows, width, seed)

    monkeypatch.setattr(_mips_cuda, "verify", verify)
    monkeypatch.setattr(_mips_cuda, "unit", broken)
    kept = []
    found = _mips_cuda.measure("cpu", 1, keep=lambda found: kept.append(json.dumps(found)))
    one, two, three = found["cases"]
    assert one["errors"] == {"int8": "AssertionError('the search is not exact')"}
    assert {"certified, bfloat16", "fast, bfloat16", "bare bf16 product"} <= set(one["seconds"])
    assert [target["met"] for target in one["targets"]] == [False, True, None] and not two["targets"]
    assert three["errors"] == {"all": "RuntimeError('the device fell off')"} and not three["seconds"]
    assert len(kept) == 3 and json.loads(kept[-1]) == found
    printed = capsys.readouterr().out
    assert "x the bare product's time, at most 0: NOT met" in printed and "ms fast, at most 1e+09: met" in printed
    assert "target: not measured ms, at most 1" in printed and "the device fell off" in printed


def test_what_would_begin_after_the_budget_is_left_out(monkeypatch):
    monkeypatch.setattr(_mips_cuda, "SHAPES", [(512, 65_536, 256, 16, ("bfloat16",))])
    (case,) = _mips_cuda.measure("cpu", 1, quick=True, budget=Budget(0))["cases"]
    assert case["errors"] == {"all": "left out: the budget of 0 s is spent"} and not case["seconds"]


@pytest.mark.parametrize("in_bf16", [True, False])
def test_the_bare_product_is_also_that_of_the_search(monkeypatch, capsys, in_bf16):
    monkeypatch.setattr(mips, "multiply_in_bf16", lambda: in_bf16)
    sides = mips.Sides(mips.clustered(3000, 16, 0), ("float32",))
    found = mips.case(sides, mips.clustered(20, 16, 1), 20, 5, ("float32",), 1, 10.0)
    assert (found["bare_bf16_product_s"] is not None) == in_bf16 and found["bare_product_s"] > 0
    assert ("x the time of the bare bf16 product" in capsys.readouterr().out) == in_bf16
    assert not any(name.startswith("bare") for name in found["seconds"])
