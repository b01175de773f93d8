"""Rotations: orthogonal, nested, and better at their prefixes than principal axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jasper_fast.fitting.projections import principal_axes
from jasper_fast.fitting.rotations import complete_rotation, learned_rotation, nested_rotation
from jasper_fast.losses import neighbourhood_loss
from jasper_fast.models.embedder import normalise

SIZE, WIDTHS = 16, [8, 4]


@pytest.fixture(scope="module")
def documents() -> np.ndarray:
    """Documents of forty topics, whose variance is about the same in all directions."""
    draw = np.random.default_rng(0)
    topics = np.repeat(draw.normal(size=(40, SIZE)), 8, axis=0)
    return normalise(topics + 0.7 * draw.normal(size=topics.shape))


def check_orthogonal(rotation: np.ndarray) -> None:
    assert rotation.shape == (SIZE, SIZE) and rotation.dtype == np.float64
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(SIZE), atol=1e-12)


def lost(documents: np.ndarray, rotation: np.ndarray) -> float:
    """Return the loss of all documents at all widths."""
    rows, cut = (torch.from_numpy(part) for part in (documents, (documents @ rotation).astype(np.float32)))
    return sum(float(neighbourhood_loss(cut[:, :width], rows, temperature=0.05)) for width in WIDTHS)


def test_learned_prefixes_keep_neighbours_better_than_principal_axes(documents: np.ndarray) -> None:
    moment = documents.T.astype(np.float64) @ documents
    done: list[float] = []
    learned = learned_rotation(documents, moment, WIDTHS, steps=60, progress=done.append)
    check_orthogonal(learned)
    assert lost(documents, learned) < 0.99 * lost(documents, principal_axes(moment, SIZE))
    assert done[0] == 0.0 and done[-1] == 1.0
    np.testing.assert_array_equal(learned, learned_rotation(documents, moment, WIDTHS, steps=60))


def test_without_a_narrow_width_or_documents_the_axes_are_principal(documents: np.ndarray) -> None:
    moment = documents.T.astype(np.float64) @ documents
    expected = principal_axes(moment, SIZE)
    np.testing.assert_array_equal(learned_rotation(documents, moment, [SIZE], steps=1), expected)
    np.testing.assert_array_equal(learned_rotation(documents[:7], moment, [4], steps=1), expected)
    np.testing.assert_array_equal(learned_rotation(documents[:8], moment, [8], steps=1), expected)


def test_nested_axes_span_the_narrowest_projection_first(documents: np.ndarray) -> None:
    moment = documents.T.astype(np.float64) @ documents
    draw = np.random.default_rng(1)
    projections = {8: draw.normal(size=(SIZE, 8)), 4: draw.normal(size=(SIZE, 4))}
    rotation = nested_rotation(projections, moment)
    check_orthogonal(rotation)
    outside = projections[4] - rotation[:, :4] @ (rotation[:, :4].T @ projections[4])
    np.testing.assert_allclose(outside, 0, atol=1e-12)
    # A narrower projection inside the wider one: both prefixes have exactly its directions.
    inside = {8: projections[8], 4: projections[8][:, :4]}
    first = nested_rotation(inside, moment)[:, :8]
    np.testing.assert_allclose(inside[8] - first @ (first.T @ inside[8]), 0, atol=1e-12)
    check_orthogonal(nested_rotation({}, moment))


def test_the_rest_is_ordered_by_what_it_keeps(documents: np.ndarray) -> None:
    moment = documents.T.astype(np.float64) @ documents
    rotation = complete_rotation(np.eye(SIZE)[:, :3], moment)
    check_orthogonal(rotation)
    np.testing.assert_allclose(np.abs(rotation[:, :3]), np.eye(SIZE)[:, :3], atol=1e-12)
    variances = np.diag(rotation.T @ moment @ rotation)[3:]
    assert (np.diff(variances) <= 1e-9).all()


def test_bad_arguments(documents: np.ndarray) -> None:
    moment = documents.T.astype(np.float64) @ documents
    with pytest.raises(ValueError, match="exactly one"):
        learned_rotation(documents, moment, WIDTHS)
    with pytest.raises(ValueError, match=r"projections\[4\].*expected \(16, 4\)"):
        nested_rotation({4: np.ones((SIZE, 5))}, moment)
    broken = documents.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        learned_rotation(broken, moment, WIDTHS, steps=1)
