"""Sums over pairs of embeddings, compared with whole products in float64."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jasper_fast.fitting import PairStatistics, statistics


def pairs(rows: int, h: int = 5, d: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((rows, h)).astype(np.float32), draw.standard_normal((rows, d)).astype(np.float32)


def summed(*parts: tuple[np.ndarray, np.ndarray]) -> PairStatistics:
    sums = PairStatistics(parts[0][0].shape[1], parts[0][1].shape[1])
    for source, target in parts:
        sums.add(source, target)
    return sums


def same(a: PairStatistics, b: PairStatistics) -> bool:
    return a.count == b.count and all(
        np.allclose(getattr(a, name), getattr(b, name), rtol=1e-13, atol=1e-12)
        for name in ("source", "cross", "target")
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_blocks_sum_to_the_whole_products_in_float64(dtype, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 7)
    source, target = (part.astype(dtype) for part in pairs(100))
    sums = summed((source, target))
    s, t = source.astype(np.float64), target.astype(np.float64)
    assert sums.count == 100 and sums.source.dtype == sums.cross.dtype == sums.target.dtype == np.float64
    np.testing.assert_allclose(sums.source, s.T @ s, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(sums.cross, s.T @ t, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(sums.target, t.T @ t, rtol=1e-13, atol=1e-12)


def test_sums_keep_what_float32_would_lose():
    source = np.full((20_000, 1), 0.1, dtype=np.float32)
    exact = 20_000 * float(np.float32(0.1)) ** 2
    assert summed((source, source)).source[0, 0] == pytest.approx(exact, rel=1e-12)


def test_rows_and_parts_add_up_in_any_order():
    source, target = pairs(90)
    whole = summed((source, target))
    assert same(summed((source[20:], target[20:]), (source[:20], target[:20])), whole)
    order = np.random.default_rng(1).permutation(90)
    assert same(summed((source[order], target[order])), whole)


def test_several_statistics_in_one_file(tmp_path):
    documents, sentences = summed(pairs(30)), summed(pairs(40, seed=1))
    save_file(documents.arrays("documents.") | sentences.arrays("sentences."), tmp_path / "sums.safetensors")
    stored = load_file(tmp_path / "sums.safetensors")
    assert same(PairStatistics.of_arrays(stored, "documents."), documents)
    again = PairStatistics.of_arrays(stored, "sentences.")
    again.add(*pairs(30))
    assert again.count == 70 and same(again, summed(pairs(30), pairs(40, seed=1)))


def test_memory_mapped_rows(tmp_path):
    source, target = pairs(50)
    np.save(tmp_path / "s.npy", source)
    assert same(summed((np.load(tmp_path / "s.npy", mmap_mode="r"), target)), summed((source, target)))


def test_no_rows_add_nothing():
    sums = summed(pairs(10), pairs(0))
    assert same(sums, summed(pairs(10)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_bad_row_is_named_and_leaves_the_sums_as_they_were(bad, side, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 8)
    sums, new = summed(pairs(20)), pairs(20, seed=1)
    new[side][13, 2] = bad
    with pytest.raises(ValueError, match=rf"{('source', 'target')[side]}: row 13 holds NaN or infinity.*Fix: "):
        sums.add(*new)
    assert same(sums, summed(pairs(20)))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.zeros((4, 6)), np.zeros((4, 3)), r"source: got shape \(4, 6\), expected \(n, 5\). Fix: "),
        (np.zeros((4, 5)), np.zeros((4, 5)), r"target: got shape \(4, 5\), expected \(n, 3\). Fix: "),
        (np.zeros(5), np.zeros((1, 3)), r"source: got shape \(5,\)"),
        (np.zeros((4, 5)), np.zeros((3, 3)), "got 4 source rows and 3 target rows"),
        (np.zeros((4, 5), dtype=np.int8), np.zeros((4, 3)), "source: got int8, expected an array of floats"),
        ([[0.0] * 5], np.zeros((1, 3)), "source: got list, expected an array of floats"),
    ],
)
def test_wrong_rows(source, target, message):
    with pytest.raises(ValueError, match=message):
        PairStatistics(5, 3).add(source, target)


@pytest.mark.parametrize("widths", [(0, 3), (3, -1), (2.0, 3), (True, 3)])
def test_wrong_widths(widths):
    with pytest.raises(ValueError, match=r"_width: got .*Fix: "):
        PairStatistics(*widths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross": None}, "cross missing"),
        ({"count": np.array([-1])}, "count: got"),
        ({"count": np.array([1.5])}, "count: got"),
        ({"cross": np.zeros(3)}, r"cross: got shape \(3,\)"),
        ({"source": np.zeros((3, 3))}, r"source: got shape \(3, 3\) and float64, expected \(5, 5\)"),
        ({"target": np.zeros((3, 3), dtype=np.float32)}, "target: got .* float32"),
        ({"target": np.full((3, 3), np.nan)}, "target: got"),
    ],
)
def test_damaged_arrays(change, message):
    arrays = {name: value for name, value in (summed(pairs(9)).arrays() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        PairStatistics.of_arrays(arrays)
