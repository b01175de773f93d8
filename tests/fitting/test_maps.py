"""Maps from statistics, compared with least squares over the rows in float64."""

from __future__ import annotations

import numpy as np
import pytest

from jasper_fast.fitting import PairStatistics, low_rank_map, procrustes_map, ridge_map, start_map

SHAPES = [(200, 12, 12), (200, 12, 7), (200, 7, 12), (5, 12, 12), (1, 12, 7)]  # n, h, d, also with n < h


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pairs(n: int, h: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of two models that see the same thing, with noise."""
    draw = np.random.default_rng(seed)
    source = draw.standard_normal((n, h))
    return unit(source), unit(source @ draw.standard_normal((h, d)) + 0.3 * draw.standard_normal((n, d)))


def summed(source: np.ndarray, target: np.ndarray) -> PairStatistics:
    sums = PairStatistics(source.shape[1], target.shape[1])
    sums.add(source, target)
    return sums


def slow_ridge(source: np.ndarray, target: np.ndarray, strength: float, start: np.ndarray) -> np.ndarray:
    """Solve the least squares problem with one more row √λ I for the penalty."""
    h = source.shape[1]
    rows = np.concatenate([source.astype(np.float64), np.sqrt(strength) * np.eye(h)])
    wanted = np.concatenate([target.astype(np.float64), np.sqrt(strength) * start])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0]


def objective(source, target, strength, start, fitted) -> float:
    error = target.astype(np.float64) - source.astype(np.float64) @ fitted
    return float((error**2).sum() + strength * ((fitted - start) ** 2).sum())


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_is_the_penalised_least_squares_map(shape, strength):
    source, target = pairs(*shape)
    sums = summed(source, target)
    start = np.random.default_rng(1).standard_normal(shape[1:])
    for begin in (None, start):
        wanted = slow_ridge(source, target, strength, np.zeros(shape[1:]) if begin is None else begin)
        fitted = ridge_map(sums, strength, begin)
        assert fitted.dtype == np.float64 and fitted.shape == shape[1:]
        np.testing.assert_allclose(fitted, wanted, rtol=1e-9, atol=1e-10)


def test_duplicates_and_rank_deficiency():
    source, target = pairs(30, 12, 8)
    source[:, 6:] = source[:, :6]  # rank 6
    source, target = np.repeat(source, 3, axis=0), np.repeat(target, 3, axis=0)
    start = np.random.default_rng(1).standard_normal((12, 8))
    fitted = ridge_map(summed(source, target), 1e-3, start)
    np.testing.assert_allclose(fitted, slow_ridge(source, target, 1e-3, start), rtol=1e-7, atol=1e-8)


def test_directions_without_data_keep_the_start():
    source = np.eye(6, dtype=np.float32)[:2]
    fitted = ridge_map(summed(source, -source), 0.01, np.eye(6))
    np.testing.assert_allclose(fitted[2:], np.eye(6)[2:], atol=1e-12)
    assert fitted[0, 0] < -0.9


def test_a_strong_penalty_returns_the_start_and_a_weak_one_least_squares():
    source, target = pairs(200, 12, 7)
    sums, start = summed(source, target), np.ones((12, 7))
    np.testing.assert_allclose(ridge_map(sums, 1e12, start), start, atol=1e-8)
    wanted = np.linalg.lstsq(source.astype(np.float64), target.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(ridge_map(sums, 1e-10, start), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_the_strength_must_be_positive(strength):
    sums = summed(*pairs(20, 4, 4))
    for fit in (lambda: ridge_map(sums, strength), lambda: low_rank_map(sums, strength, 2)):
        with pytest.raises(ValueError, match=r"strength: got .*expected a finite number > 0. Fix: "):
            fit()


def test_a_strength_below_the_rounding_of_float64():
    sums = PairStatistics(2, 2)
    sums.add(np.array([[1.0, 1.0], [1.0, 1.0]]), np.eye(2))
    with pytest.raises(ValueError, match=r"strength: got 1e-300, expected at least 1.8e-15.*Fix: give a larger one"):
        ridge_map(sums, 1e-300)
    np.testing.assert_allclose(np.ones(2) @ ridge_map(sums, 1e-9), [0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("start", [np.zeros((4, 3)), np.full((4, 5), np.nan)])
def test_a_start_of_another_shape_or_not_finite(start):
    with pytest.raises(ValueError, match=r"start: got shape .*expected \(4, 5\)"):
        ridge_map(summed(*pairs(20, 4, 5)), 1.0, start)


def test_no_pairs():
    sums = PairStatistics(4, 4)
    for fit in (lambda: ridge_map(sums, 1.0), lambda: low_rank_map(sums, 1.0, 2), lambda: procrustes_map(sums)):
        with pytest.raises(ValueError, match="got no pairs, expected at least one. Fix: "):
            fit()
    np.testing.assert_array_equal(start_map(sums, same_space=True), np.eye(4))


@pytest.mark.parametrize("shape", SHAPES)
def test_procrustes_is_semi_orthogonal_and_the_best_of_its_kind(shape):
    source, target = pairs(*shape)
    fitted = procrustes_map(summed(source, target))
    assert fitted.dtype == np.float64 and fitted.shape == shape[1:]
    h, d = shape[1:]
    square = fitted @ fitted.T if h <= d else fitted.T @ fitted
    np.testing.assert_allclose(square, square[0, 0] * np.eye(min(h, d)), atol=1e-10)
    draw = np.random.default_rng(3)
    unscaled = fitted / np.sqrt(square[0, 0])
    agreement = float((source @ unscaled * target).sum())
    error = ((target - source @ fitted) ** 2).sum()
    for factor in (0.99, 1.01):
        assert ((target - factor * source @ fitted) ** 2).sum() > error
    for _ in range(20):
        other = np.linalg.qr(draw.standard_normal((max(h, d), min(h, d))))[0]
        assert float((source @ (other if h >= d else other.T) * target).sum()) <= agreement + 1e-6


def test_procrustes_recovers_a_rotation():
    source, _ = pairs(100, 8, 8)
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((8, 8)))[0]
    fitted = procrustes_map(summed(source.astype(np.float64), source.astype(np.float64) @ rotation))
    np.testing.assert_allclose(fitted, rotation, atol=1e-10)


def test_procrustes_of_rows_without_length():
    with pytest.raises(ValueError, match="without common directions"):
        procrustes_map(summed(np.zeros((3, 4)), np.ones((3, 4))))


def test_the_start_is_the_identity_only_in_one_space_of_one_width():
    square, narrow = summed(*pairs(50, 6, 6)), summed(*pairs(50, 6, 4))
    np.testing.assert_array_equal(start_map(square, same_space=True), np.eye(6))
    np.testing.assert_array_equal(start_map(square, same_space=False), procrustes_map(square))
    np.testing.assert_array_equal(start_map(narrow, same_space=True), procrustes_map(narrow))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_low_rank_map_has_its_rank_and_the_least_objective(shape):
    source, target = pairs(*shape)
    sums, start = summed(source, target), np.random.default_rng(1).standard_normal(shape[1:])
    draw = np.random.default_rng(2)
    for rank in (1, 3):
        fitted = low_rank_map(sums, 0.5, rank, start)
        assert np.linalg.matrix_rank(fitted - start, tol=1e-8) <= rank
        best = objective(source, target, 0.5, start, fitted)
        left, values, right = np.linalg.svd(ridge_map(sums, 0.5, start) - start, full_matrices=False)
        truncated = start + left[:, :rank] * values[:rank] @ right[:rank]
        assert best <= objective(source, target, 0.5, start, truncated) + 1e-9
        for _ in range(10):  # no small change of the same rank is better
            left, values, right = np.linalg.svd(
                fitted - start + 0.01 * draw.standard_normal(shape[1:]), full_matrices=False
            )
            near = start + left[:, :rank] * values[:rank] @ right[:rank]
            assert best <= objective(source, target, 0.5, start, near) + 1e-9


def test_the_low_rank_map_of_full_rank_is_the_ridge_map():
    sums = summed(*pairs(200, 7, 12))
    np.testing.assert_allclose(low_rank_map(sums, 2.0, 7), ridge_map(sums, 2.0), atol=1e-10)
    assert np.linalg.matrix_rank(low_rank_map(sums, 2.0, 3), tol=1e-8) == 3


@pytest.mark.parametrize("rank", [0, 5, 1.0, True])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match=r"rank: got .*expected a whole number from 1 to 4. Fix: "):
        low_rank_map(summed(*pairs(20, 4, 6)), 1.0, rank)
