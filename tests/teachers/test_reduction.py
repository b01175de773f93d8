"""Teachers wider than the student: the projection, and training against reduced embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jasper_fast.teachers.reduction import FIT_ROWS, Reduction, fit_reduction, spread_rows, stored_reduction

WIDE, WIDTH = 96, 16


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def rotated() -> tuple[np.ndarray, np.ndarray]:
    """Draw embeddings, (300, 16), and the same ones rotated into 96 dimensions."""
    generator = np.random.default_rng(0)
    narrow = unit(generator.standard_normal((300, WIDTH)) + 0.5)
    basis = np.linalg.qr(generator.standard_normal((WIDE, WIDTH)))[0]
    return narrow, unit(narrow @ basis.T)


def test_embeddings_of_few_dimensions_keep_all_inner_products(rotated) -> None:
    narrow, wide = rotated
    found = fit_reduction(wide.__getitem__, 300, WIDTH)
    reduced = wide @ found.matrix
    np.testing.assert_allclose(reduced @ reduced.T, narrow @ narrow.T, atol=1e-5)
    assert found.variance == pytest.approx(1) and found.overlap == pytest.approx(1, abs=0.02)
    assert "96 dimensions are reduced to 16 by PCA; that keeps 100.0% of the variance" in found.line()


def test_the_leading_axes_are_kept(rotated) -> None:
    _, wide = rotated
    found = fit_reduction(wide.__getitem__, 300, 4)
    values = np.linalg.svd(wide.astype(np.float64), compute_uv=False) ** 2
    assert found.variance == pytest.approx(values[:4].sum() / values.sum(), rel=1e-5)
    assert found.overlap < 0.9


def test_fewer_texts_than_dimensions_are_kept_exactly(rotated) -> None:
    wide = rotated[1][:8]
    reduced = wide @ fit_reduction(wide.__getitem__, 8, WIDTH).matrix
    np.testing.assert_allclose(reduced @ reduced.T, wide @ wide.T, atol=1e-5)


def test_a_rotation_towards_the_student_changes_no_inner_product(rotated) -> None:
    narrow, wide = rotated
    plain = wide @ fit_reduction(wide.__getitem__, 300, WIDTH).matrix
    aligned = wide @ fit_reduction(wide.__getitem__, 300, WIDTH, narrow.__getitem__).matrix
    np.testing.assert_allclose(aligned @ aligned.T, plain @ plain.T, atol=1e-5)
    assert (aligned * narrow).sum(axis=1).mean() > 0.999
    assert (plain * narrow).sum(axis=1).mean() < 0.9


def test_a_stored_projection_is_read_and_a_damaged_one_fitted_again(rotated, tmp_path: Path) -> None:
    fitted = fit_reduction(rotated[1].__getitem__, 300, WIDTH)
    file, calls = tmp_path / "r.npz", list[int]()

    def fit() -> Reduction:
        calls.append(1)
        return fitted

    for expected in (1, 1):
        found = stored_reduction(file, fit)
        assert len(calls) == expected and found.fingerprint == fitted.fingerprint
        assert found[1:] == fitted[1:]
    file.write_bytes(file.read_bytes()[:200])
    assert stored_reduction(file, fit).fingerprint == fitted.fingerprint and len(calls) == 2


def test_rows_are_spread_without_repetition() -> None:
    assert spread_rows(5, FIT_ROWS).tolist() == [0, 1, 2, 3, 4]
    assert spread_rows(100, 3).tolist() == [0, 50, 99]
