"""Rotations R (d, d) of one space, whose first coordinates are good narrow embeddings.

``T R`` keeps every inner product. Its first w coordinates, normalised again, are the narrow embedding of width w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jasper_fast.fitting.projections import (
    BLUNT,
    RATE,
    SHARP,
    SHARP_WIDTH,
    check_documents,
    check_length,
    checked_groups,
    fractions,
    group_batches,
    mined_groups,
    principal_axes,
)
from jasper_fast.losses import neighbourhood_loss


def learned_rotation(
    documents: np.ndarray,
    second_moment: np.ndarray,
    widths: Sequence[int],
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Return a rotation whose prefixes keep the documents' nearest neighbours better than principal axes.

    It starts at the principal axes. It lowers the sum of ``neighbourhood_loss`` over the prefixes, on the batches of
    ``learned_axes``. A QR decomposition in each step keeps the axes orthonormal.

    Args:
        documents: (n, d) float32 embeddings, memory-mapped or not.
        second_moment: (d, d) sum TᵀT of the documents.
        widths: widths of the prefixes to learn. Those of d or more are left out.
        seconds: time of the training, without the search for neighbours. Give this or ``steps``.
        steps: number of batches.
        seed: seed of the neighbours and batches.
        progress: function that gets the finished fraction, from 0 to 1, before each step and at the end.
        groups: result of ``mined_groups``. None: they are mined here.

    Returns:
        (d, d) float64, orthogonal. The principal axes, if no width is below d or there are too few different
        documents to learn from.

    Raises:
        ValueError: wrong shapes, not exactly one of ``seconds`` and ``steps``, numbers out of range, or a document
            with NaN or infinity.

    Example:
        >>> import numpy as np
        >>> documents = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
        >>> rotation = learned_rotation(documents, documents.T @ documents, [8, 4], steps=2)
        >>> bool(np.allclose(rotation.T @ rotation, np.eye(16)))
        True
    """
    check_documents(documents)
    check_length(seconds, steps)
    size = documents.shape[1]
    start = principal_axes(second_moment, size)
    prefixes = sorted({width for width in widths if width < size})
    groups = mined_groups(documents, seed=seed) if groups is None else checked_groups(groups, len(documents))
    if not prefixes or not len(groups) or len(np.unique(groups)) <= prefixes[-1]:
        return start
    axes = torch.tensor(start[:, : prefixes[-1]], dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([axes], lr=RATE)
    batches = group_batches(groups, seed)
    for done, rows in zip(fractions(seconds, steps, progress), batches, strict=False):
        optimizer.param_groups[0]["lr"] = RATE * (1.0 - done)
        teacher = torch.from_numpy(np.asarray(documents[rows], dtype=np.float32))
        rotated = teacher @ _orthonormal(axes)
        losses = [neighbourhood_loss(rotated[:, :w], teacher, temperature=_temperature(w)) for w in prefixes]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        with torch.no_grad():
            axes.copy_(_orthonormal(axes))
    learned = axes.detach().double().numpy()
    if not np.isfinite(learned).all():
        raise ValueError(
            "documents: got NaN or infinity in a document, expected finite numbers. Fix: encode the documents again"
        )
    return complete_rotation(learned, second_moment)


def nested_rotation(projections: Mapping[int, np.ndarray], second_moment: np.ndarray) -> np.ndarray:
    """Return a rotation from independent projections: each prefix has the directions of the narrower ones.

    Of the span of each projection, the directions farthest outside the prefix so far are added until its width is
    reached. The lengths of the directions are lost, which costs more than ``learned_rotation``.

    Args:
        projections: {w: (d, w)} projections, in any order.
        second_moment: (d, d) sum TᵀT, whose principal axes fill the rest.

    Returns:
        (d, d) float64, orthogonal.

    Raises:
        ValueError: a projection does not fit the second moment.
    """
    size = len(second_moment)
    axes = np.empty((size, 0))
    for width in sorted(projections):
        projection = np.asarray(projections[width], dtype=np.float64)
        if projection.shape != (size, width):
            raise ValueError(
                f"projections[{width}]: got shape {projection.shape}, expected {(size, width)}. "
                "Fix: give projections of this space"
            )
        span = np.linalg.svd(projection, full_matrices=False)[0]
        outside = span - axes @ (axes.T @ span)
        directions = np.linalg.svd(outside, full_matrices=False)[0]
        axes = np.concatenate([axes, directions[:, : width - axes.shape[1]]], axis=1)
    return complete_rotation(axes, second_moment)


def complete_rotation(axes: np.ndarray, second_moment: np.ndarray) -> np.ndarray:
    """Complete orthonormal axes to a rotation, by the principal axes of what they leave.

    Args:
        axes: (d, k) orthonormal columns up to rounding, which become the first k axes.
        second_moment: (d, d) sum TᵀT.

    Returns:
        (d, d) float64, orthogonal.
    """
    size, kept = axes.shape
    first = _orthonormal(torch.from_numpy(np.asarray(axes, dtype=np.float64))).numpy()
    # Columns of a complete QR decomposition after the k-th span what the axes leave.
    rest = np.linalg.qr(first, mode="complete")[0][:, kept:]
    if not rest.shape[1]:
        return first
    _, vectors = np.linalg.eigh(rest.T @ second_moment @ rest)
    return np.concatenate([first, rest @ vectors[:, ::-1]], axis=1)


def _temperature(width: int) -> float:
    return SHARP if width <= SHARP_WIDTH else BLUNT


def _orthonormal(axes: Tensor) -> Tensor:
    """Return orthonormal columns with the nested spans of ``axes``. Columns keep their direction."""
    columns, triangle = torch.linalg.qr(axes)
    return columns * torch.where(torch.diagonal(triangle) < 0, -1.0, 1.0).to(columns.dtype)
