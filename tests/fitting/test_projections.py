"""Principal axes, mined neighbours and learned axes, on clustered embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jasper_fast.fitting import learned_axes, mined_groups, principal_axes
from jasper_fast.losses import neighbourhood_loss


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(n: int, d: int = 48, clusters: int = 40, seed: int = 0) -> np.ndarray:
    """Return unit rows around centres, with a few strong directions that say nothing about clusters."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((clusters, d))
    rows = centres[draw.integers(0, clusters, n)] + 0.7 * draw.standard_normal((n, d))
    rows[:, :4] *= 3.0
    return unit(rows)


def overlap(documents: np.ndarray, axes: np.ndarray, k: int = 10) -> float:
    """Return the fraction of each document's k nearest neighbours that the projection keeps."""

    def nearest(rows: np.ndarray) -> np.ndarray:
        cosines = rows.astype(np.float64) @ rows.T
        np.fill_diagonal(cosines, -np.inf)
        return np.argsort(-cosines, axis=1)[:, :k]

    before, after = nearest(documents), nearest(unit(documents @ axes))
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(before, after, strict=True)]))


def pca(documents: np.ndarray, width: int) -> np.ndarray:
    rows = documents.astype(np.float64)
    return principal_axes(rows.T @ rows, width)


# Principal axes.


def test_principal_axes_are_the_leading_right_singular_vectors():
    documents = clustered(300).astype(np.float64)
    axes = principal_axes(documents.T @ documents, 5)
    wanted = np.linalg.svd(documents)[2][:5].T
    assert axes.shape == (48, 5) and axes.dtype == np.float64
    np.testing.assert_allclose(np.abs((axes * wanted).sum(axis=0)), 1.0, atol=1e-8)
    np.testing.assert_allclose(axes.T @ axes, np.eye(5), atol=1e-12)
    assert (np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0) > 0).all()


def test_fewer_documents_than_axes_keep_all_inner_products():
    documents = clustered(6).astype(np.float64)
    narrow = documents @ principal_axes(documents.T @ documents, 8)
    np.testing.assert_allclose(narrow @ narrow.T, documents @ documents.T, atol=1e-10)


@pytest.mark.parametrize(
    ("moment", "width", "message"),
    [
        (np.zeros((3, 4)), 2, r"second_moment: got shape \(3, 4\), expected \(d, d\)"),
        (np.zeros((0, 0)), 1, r"second_moment: got shape \(0, 0\)"),
        (np.full((3, 3), np.inf), 2, "second_moment: got shape .* finite"),
        (np.zeros((3, 3)), 2, "second_moment: got zeros.*Fix: add documents first"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), 1, "asymmetric"),
        (np.eye(3), 0, "width: got 0, expected a whole number from 1 to 3"),
        (np.eye(3), 4, "width: got 4"),
        (np.eye(3), 2.0, "width: got 2.0"),
    ],
)
def test_wrong_moments_and_widths(moment, width, message):
    with pytest.raises(ValueError, match=message):
        principal_axes(moment, width)


# Mined groups.


def test_groups_are_documents_with_their_nearest_neighbours():
    documents = clustered(200)
    groups = mined_groups(documents, seed=3)
    assert groups.shape == (200, 8) and groups.dtype == np.int64
    assert sorted(groups[:, 0]) == [*range(200)]
    cosines = documents.astype(np.float64) @ documents.astype(np.float64).T
    np.fill_diagonal(cosines, -np.inf)
    np.testing.assert_array_equal(groups[:, 1:], np.argsort(-cosines, axis=1)[groups[:, 0], :7])


def test_the_seed_decides_the_order():
    documents = clustered(60)
    np.testing.assert_array_equal(mined_groups(documents, seed=1), mined_groups(documents, seed=1))
    assert (mined_groups(documents, seed=1) != mined_groups(documents, seed=2)).any()


def test_a_subset_of_many_documents():
    documents = clustered(300)
    groups = mined_groups(documents, rows=100, groups=30)
    searched = np.unique(mined_groups(documents, rows=100))
    assert groups.shape == (30, 8) and len(np.unique(groups[:, 0])) == 30
    assert len(searched) == 100 and searched.max() > 100  # drawn from all documents
    cosines = documents[groups[:, 0]].astype(np.float64) @ documents[searched].astype(np.float64).T
    np.testing.assert_array_equal(groups, searched[np.argsort(-cosines, axis=1)[:, :8]])


def test_copies_count_once():
    different = clustered(40)
    documents = np.concatenate([different[:30], np.repeat(different, 20, axis=0)])
    groups = mined_groups(documents)
    assert groups.shape == (40, 8)
    assert all(len(np.unique(documents[group], axis=0)) == 8 for group in groups)


def test_the_document_comes_first_even_if_a_longer_one_is_nearer():
    documents = clustered(20)
    documents[0] *= 50.0
    groups = mined_groups(documents)
    assert sorted(groups[:, 0]) == [*range(20)] and all(len(set(group)) == 8 for group in groups)


@pytest.mark.parametrize("documents", [clustered(0), clustered(7), np.repeat(clustered(7), 30, axis=0)])
def test_too_few_documents_for_a_group(documents):
    assert mined_groups(documents).shape == (0, 8)
    start = np.eye(48)[:, :3]
    np.testing.assert_array_equal(learned_axes(documents, start, steps=5), start)


# Learned axes.


@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_learned_axes_keep_more_neighbours_than_pca(temperature):
    documents, held_out = np.split(clustered(1600), [1000])
    start = pca(documents, 8)
    axes = learned_axes(documents, start, steps=150, temperature=temperature)
    assert axes.shape == (48, 8) and axes.dtype == np.float64
    assert overlap(documents, axes) > overlap(documents, start) + 0.05
    assert overlap(held_out, axes) > overlap(held_out, start) + 0.05


def test_steps_decide_the_result_alone():
    documents = clustered(700)
    start = pca(documents, 6)
    first = learned_axes(documents, start, steps=12, seed=4)
    np.testing.assert_array_equal(first, learned_axes(documents, start, steps=12, seed=4))
    groups = mined_groups(documents, seed=4)
    np.testing.assert_array_equal(first, learned_axes(documents, start, steps=12, seed=4, groups=groups))
    assert (first != learned_axes(documents, start, steps=12, seed=5)).any()
    assert (first != learned_axes(documents, start, steps=13, seed=4)).any()


def test_seconds_end_the_training_and_progress_is_reported():
    documents, fractions = clustered(300), []
    axes = learned_axes(documents, pca(documents, 6), seconds=0.5, progress=fractions.append)
    assert np.isfinite(axes).all() and len(fractions) > 2
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    fractions.clear()
    learned_axes(documents, pca(documents, 6), steps=4, progress=fractions.append)
    assert fractions == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_few_documents_still_train():
    documents = clustered(30)
    start = pca(documents, 6)

    def loss(axes: np.ndarray) -> float:
        return float(neighbourhood_loss(torch.from_numpy(documents @ axes), torch.from_numpy(documents)))

    assert loss(learned_axes(documents, start, steps=60)) < 0.8 * loss(start)


def test_axes_that_are_exact_stay_as_they_are():
    documents = clustered(12)
    start = pca(documents, 12)
    np.testing.assert_array_equal(learned_axes(documents, start, steps=5), start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "expected exactly one"),
        ({"seconds": 1.0}, "expected exactly one"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 1.5}, "steps: got 1.5"),
        ({"steps": None, "seconds": 0.0}, "seconds: got 0.0"),
        ({"steps": None, "seconds": float("nan")}, "seconds: got nan"),
        ({"temperature": 0.0}, "temperature: expected a number > 0"),
        ({"start": np.eye(47)[:, :3]}, r"start: got shape \(47, 3\), expected \(48, w\)"),
        ({"start": np.full((48, 3), np.nan)}, "start: got shape .* finite"),
        ({"start": np.empty((48, 0))}, r"start: got shape \(48, 0\)"),
        ({"documents": np.zeros(48, dtype=np.float32)}, r"documents: got float32 \(48,\)"),
        ({"documents": np.zeros((9, 48), dtype=np.int64)}, "documents: got int64"),
        ({"documents": [[0.0] * 48]}, "documents: got list"),
        ({"groups": np.array([[0, 50]])}, "groups: got int64 .* below 50"),
        ({"groups": np.zeros((3, 8))}, "groups: got float64"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"documents": clustered(50), "start": np.eye(48)[:, :3], "steps": 2} | change
    documents, start = arguments.pop("documents"), arguments.pop("start")
    with pytest.raises(ValueError, match=message):
        learned_axes(documents, start, **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_documents_with_nan_or_infinity(bad):
    documents = clustered(50)
    groups = mined_groups(documents)
    documents[17, 3] = bad
    for fit in (lambda: mined_groups(documents), lambda: learned_axes(documents, np.eye(48)[:, :3], steps=2)):
        with pytest.raises(ValueError, match="documents: row 17 holds NaN or infinity.*Fix: "):
            fit()
    with pytest.raises(ValueError, match="documents: got NaN or infinity"):
        learned_axes(documents, np.eye(48)[:, :3], steps=2, groups=groups)
