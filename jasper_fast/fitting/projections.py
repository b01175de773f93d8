"""Narrow projections P (d, w) of one space: principal axes, and axes learned from nearest neighbours.

Embeddings are normalised after a projection, so a narrow embedding is ``norm(T P)``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch

from jasper_fast.losses import neighbourhood_loss
from jasper_fast.losses.arguments import check_temperature
from jasper_fast.mips import topk

GROUP, GROUPS = 8, 64  # documents of a neighbourhood, and neighbourhoods of a batch
MINED, ANCHORS = 50_000, 16_384  # documents that are searched, and those that get a neighbourhood
RATE = 2e-3  # Adam's first learning rate, which falls linearly to 0
SHARP, BLUNT = 0.05, 0.07  # temperatures of the loss, up to SHARP_WIDTH and above
SHARP_WIDTH = 48


def principal_axes(second_moment: np.ndarray, width: int) -> np.ndarray:
    """Return the leading eigenvectors of a second moment TᵀT, the uncentred principal axes.

    They keep the inner products of T best. With fewer documents than ``width``, they keep them exactly.

    Args:
        second_moment: (d, d) symmetric floats, such as ``PairStatistics.target``.
        width: w, from 1 to d.

    Returns:
        (d, w) float64, orthonormal columns, the largest eigenvalue first. The largest component of each is positive.

    Raises:
        ValueError: the second moment is not a finite symmetric matrix or is zero, or the width is out of range.

    Example:
        >>> import numpy as np
        >>> principal_axes(np.diag([1.0, 3.0, 2.0]), 2).tolist()
        [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    moment = np.asarray(second_moment, dtype=np.float64)
    size = moment.shape[0] if moment.ndim else 0
    if moment.shape != (size, size) or not size or not np.isfinite(moment).all():
        raise ValueError(
            f"second_moment: got shape {moment.shape}, expected (d, d) finite numbers. Fix: give PairStatistics.target"
        )
    largest = float(np.abs(moment).max())
    if not largest:
        raise ValueError("second_moment: got zeros, expected a sum over documents. Fix: add documents first")
    if float(np.abs(moment - moment.T).max()) > 1e-6 * largest:
        raise ValueError("second_moment: got an asymmetric matrix, expected TᵀT. Fix: give PairStatistics.target")
    if isinstance(width, bool) or not isinstance(width, int | np.integer) or not 1 <= width <= size:
        raise ValueError(f"width: got {width!r}, expected a whole number from 1 to {size}. Fix: give one of these")
    _, vectors = np.linalg.eigh(moment)
    axes = vectors[:, ::-1][:, :width]
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0))
    return np.ascontiguousarray(axes * signs)


def mined_groups(documents: np.ndarray, *, seed: int = 0, rows: int = MINED, groups: int = ANCHORS) -> np.ndarray:
    """Return groups of a document and its seven nearest other documents, by exact search.

    Equal rows count once. Of more than ``rows`` documents, a random subset is searched, so that time is bounded.

    Args:
        documents: (n, d) float32 or float64 embeddings.
        seed: seed of the subset and of the order of the groups.
        rows: most documents to search.
        groups: most groups to return.

    Returns:
        (g, 8) int64 row numbers in random order of groups. Each row has the document first, then its neighbours,
        nearest first. With fewer than eight different documents, g is 0.

    Raises:
        ValueError: the documents are not an (n, d) array of floats, or one has NaN or infinity.
    """
    check_documents(documents)
    draw = np.random.default_rng(seed)
    numbers = np.sort(draw.permutation(len(documents))[:rows])
    subset = np.ascontiguousarray(documents[numbers], dtype=np.float32)
    finite = np.isfinite(subset).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"documents: row {numbers[int(np.argmin(finite))]} holds NaN or infinity, expected finite numbers. "
            "Fix: encode its text again, or leave it out"
        )
    different = _different_rows(subset)
    subset, numbers = subset[different], numbers[different]
    if len(subset) < GROUP:
        return np.empty((0, GROUP), dtype=np.int64)
    anchors = draw.permutation(len(subset))[:groups]
    _, found = topk(subset[anchors], subset, GROUP)
    # The document comes first, even if a longer row has a larger inner product with it.
    later = np.argsort(found == anchors[:, None], axis=1, kind="stable")[:, : GROUP - 1]
    nearest = np.concatenate([anchors[:, None], np.take_along_axis(found, later, axis=1)], axis=1)
    return numbers[nearest].astype(np.int64)


def learned_axes(
    documents: np.ndarray,
    start: np.ndarray,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    temperature: float = 0.05,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Return a projection that keeps the documents' nearest neighbours better than its start.

    It lowers ``neighbourhood_loss`` between ``T P`` and ``T`` on batches of 64 mined groups, with Adam. With
    ``steps``, the result does not depend on the clock.

    Args:
        documents: (n, d) float32 embeddings of the teacher, memory-mapped or not.
        start: (d, w) projection, such as ``principal_axes``.
        seconds: time of the training, without the search for neighbours. Give this or ``steps``.
        steps: number of batches.
        temperature: divisor of the cosines in the loss, > 0.
        seed: seed of the neighbours and batches.
        progress: function that gets the finished fraction, from 0 to 1, before each step and at the end.
        groups: result of ``mined_groups``, which several widths can use. None: they are mined here.

    Returns:
        (d, w) float64. The start itself if there are at most w different documents, or fewer than eight: a start at
        the principal axes is then exact.

    Raises:
        ValueError: wrong shapes, not exactly one of ``seconds`` and ``steps``, numbers out of range, or a document
            with NaN or infinity.
    """
    check_documents(documents)
    start = np.asarray(start, dtype=np.float64)
    if start.ndim != 2 or start.shape[0] != documents.shape[1] or not start.shape[1] or not np.isfinite(start).all():
        raise ValueError(
            f"start: got shape {start.shape}, expected ({documents.shape[1]}, w) finite numbers. "
            "Fix: give principal_axes of these documents"
        )
    check_length(seconds, steps)
    temperature = check_temperature(temperature)
    groups = mined_groups(documents, seed=seed) if groups is None else checked_groups(groups, len(documents))
    if not len(groups) or len(np.unique(groups)) <= start.shape[1]:
        return start.copy()
    projection = torch.tensor(start, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([projection], lr=RATE)
    for done, rows in zip(fractions(seconds, steps, progress), group_batches(groups, seed), strict=False):
        optimizer.param_groups[0]["lr"] = RATE * (1.0 - done)
        teacher = torch.from_numpy(np.asarray(documents[rows], dtype=np.float32))
        loss = neighbourhood_loss(teacher @ projection, teacher, temperature=temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned: np.ndarray = projection.detach().double().numpy()
    if not np.isfinite(learned).all():
        raise ValueError(
            "documents: got NaN or infinity in a document, expected finite numbers. Fix: encode the documents again"
        )
    return learned


def fractions(seconds: float | None, steps: int | None, progress: Callable[[float], None] | None) -> Iterator[float]:
    """Yield the finished fraction before each step, below 1, and report it."""
    begun = time.monotonic()
    for step in count():
        done = step / steps if steps is not None else (time.monotonic() - begun) / (seconds or 1.0)
        if progress is not None:
            progress(min(1.0, done))
        if done >= 1.0:
            return
        yield done


def group_batches(groups: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield the different rows of 64 groups, sorted. Each pass over the groups has another order."""
    draw = np.random.default_rng([seed, 1])
    while True:
        order = draw.permutation(len(groups))
        for first in range(0, max(1, len(order) - GROUPS + 1), GROUPS):
            yield np.unique(groups[order[first : first + GROUPS]])


def _different_rows(rows: np.ndarray) -> np.ndarray:
    """Return the number of each different row's first place, ascending, (m,) int64."""
    places: dict[bytes, int] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.tobytes(), place)
    return np.fromiter(places.values(), dtype=np.int64, count=len(places))


def check_documents(documents: np.ndarray) -> None:
    """Reject documents that are no (n, d) array of floats, with a ValueError."""
    if not isinstance(documents, np.ndarray) or documents.dtype.kind != "f" or documents.ndim != 2:
        got = f"{documents.dtype} {documents.shape}" if isinstance(documents, np.ndarray) else type(documents).__name__
        raise ValueError(f"documents: got {got}, expected an (n, d) array of floats. Fix: give embeddings")


def check_length(seconds: float | None, steps: int | None) -> None:
    """Reject anything but one positive length of the training, with a ValueError."""
    if (seconds is None) == (steps is None):
        raise ValueError(f"got seconds {seconds} and steps {steps}, expected exactly one. Fix: leave one of them out")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1):
        raise ValueError(f"steps: got {steps!r}, expected a whole number of at least 1. Fix: give 1000, for example")
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds: got {seconds}, expected a finite number > 0. Fix: give 20, for example")


def checked_groups(groups: np.ndarray, documents: int) -> np.ndarray:
    """Return groups (g, 8) of row numbers below ``documents``. Others are rejected with a ValueError."""
    groups = np.asarray(groups)
    fits = groups.ndim == 2 and groups.dtype.kind in "iu"
    if not fits or (groups.size and (groups.min() < 0 or groups.max() >= documents)):
        raise ValueError(
            f"groups: got {groups.dtype} {groups.shape}, expected row numbers (g, 8) below {documents}. "
            "Fix: give mined_groups of these documents"
        )
    return groups
