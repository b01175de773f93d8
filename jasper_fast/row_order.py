"""Check that vectors without keys are in the order of the training texts.

Texts that resemble each other have vectors that resemble each other. A row's *profile* is its similarity to every other
sampled row. In the right order, the profile of a vector is most like the profile of its own text among all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, rankdata, spearmanr

FEWEST = 8  # rows; fewer prove nothing about their order
FEWEST_FOR_PARTS = 30  # rows; fewer do not tell a wrong part from a poor reference
PERMUTATIONS = 200
SIGNIFICANT = 3.0  # standard deviations above random orders, at least
ROWS_PER_DEVIATION = 50  # evidence grows with the rows, so the right order must stand out more
BINS = 10
CHARACTERS = 2000  # of a text that are compared


class Fit(NamedTuple):
    """Agreement between vectors and texts in the given order."""

    rows: int
    correlation: float  # Spearman, of the pairs' similarities
    deviations: float  # above random orders
    block: tuple[int, int] | None  # sampled rows, from .. to before, that fit their texts no better than chance
    wrong: float  # estimated fraction of rows, spread over the sample, that fit no better than chance; 0.0 for noise

    @property
    def is_significant(self) -> bool:
        return _is_significant(self.deviations, self.rows)


def lexical_similarities(texts: Sequence[str]) -> np.ndarray:
    """Cosines of the texts' character n-grams, weighted by rarity. (n, n) float64"""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    grams = vectorizer.fit_transform([text[:CHARACTERS] for text in texts])
    return (grams @ grams.T).toarray()


def centred_similarities(vectors: np.ndarray) -> np.ndarray:
    """Cosines of the vectors without their mean. (n, D) -> (n, n) float64"""
    centred = vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def fit_of_order(similarities: np.ndarray, references: Sequence[np.ndarray], seed: int = 0) -> Fit:
    """Measure how well vectors fit the texts in the given order.

    Args:
        similarities: (n, n) of the vectors.
        references: each (n, n), of the texts. Their profiles are averaged; the correlation is that of the last one.
        seed: for the random orders.
    """
    pairs = np.triu_indices(len(similarities), 1)
    correlation = float(spearmanr(similarities[pairs], references[-1][pairs]).statistic)
    given, expected = _profiles(similarities), _unit(np.sum([_profiles(reference) for reference in references], axis=0))
    deviations = _deviations(given, expected, np.random.default_rng(seed))
    block, wrong = None, 0.0
    if _is_significant(deviations, len(given)) and len(given) >= FEWEST_FOR_PARTS:
        percentiles = _percentiles(given, expected)
        for _ in range(2):  # rows that fit poorly are poor evidence about the others
            percentiles = _percentiles(given * np.clip(2 * percentiles - 1, 0, 1), expected)
        block, wrong = _wrong_block(percentiles), _wrong_fraction(percentiles)
    return Fit(len(given), float(np.nan_to_num(correlation)), deviations, block, wrong)


def _is_significant(deviations: float, rows: int) -> bool:
    return deviations >= max(SIGNIFICANT, rows / ROWS_PER_DEVIATION)


def _profiles(similarities: np.ndarray) -> np.ndarray:
    """Ranks of each row's similarities, without the row itself and without what all rows share. (n, n), unit rows"""
    profiles = similarities.astype(np.float64)
    n = len(profiles)
    np.fill_diagonal(profiles, -np.inf)
    profiles = rankdata(profiles, axis=1) - (n + 2) / 2
    np.fill_diagonal(profiles, 0)
    profiles -= profiles.sum(axis=0) / (n - 1)
    np.fill_diagonal(profiles, 0)
    return _unit(profiles)


def _unit(profiles: np.ndarray) -> np.ndarray:
    return profiles / np.maximum(np.linalg.norm(profiles, axis=1, keepdims=True), 1e-12)


def _deviations(given: np.ndarray, expected: np.ndarray, generator: np.random.Generator) -> float:
    """Mantel's test: the agreement of the profiles against that of random orders, in standard deviations."""
    orders = (generator.permutation(len(given)) for _ in range(PERMUTATIONS))
    random = [np.vdot(given[np.ix_(order, order)], expected) for order in orders]
    return float((np.vdot(given, expected) - np.mean(random)) / max(float(np.std(random)), 1e-12))


def _percentiles(given: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Fraction of the texts whose profile is less like a vector's than that of its own text. (n,)

    Near 1 for a row in its place, and uniform between 0 and 1 for any other.
    """
    scores = given @ expected.T
    own = np.diag(scores)[:, None]
    return ((scores < own).sum(axis=1) + 0.5 * ((scores == own).sum(axis=1) - 1)) / (len(scores) - 1)


def _wrong_block(percentiles: np.ndarray) -> tuple[int, int] | None:
    """Find the run of rows that uniform percentiles explain best, if it is better than chance allows.

    The score of a row is the log-likelihood ratio of the uniform distribution against that of all rows. By chance a
    run reaches a total t with a probability of at most n·exp(-t).
    """
    n = len(percentiles)
    bins = np.minimum((percentiles * BINS).astype(int), BINS - 1)
    density = (np.bincount(bins, minlength=BINS) + 1) / (n + BINS) * BINS
    total, start, best, block = 0.0, 0, float(np.log(n)) + 4, None
    for row, score in enumerate(-np.log(density[bins])):
        if total <= 0:
            total, start = 0.0, row
        total += score
        if total > best:
            best, block = total, (start, row + 1)
    return block


def _wrong_fraction(percentiles: np.ndarray) -> float:
    """Estimate the fraction of rows out of place from percentiles below one half, beyond what the rest explain.

    The model is that rows in place have normal deviates with a standard deviation near 1. Then their upper 35 %
    determine how many of them fall below one half.
    """
    n = len(percentiles)
    upper = min(float(np.quantile(percentiles, 0.65)), 1 - 0.5 / n)
    explained = float(norm.cdf(norm.ppf(0.65) - norm.ppf(upper))) if upper > 0.5 else 1.0
    low = float((percentiles < 0.5).mean())
    margin = 0.06 + 3 * np.sqrt(max(explained * (1 - explained), 0.03) / n)
    return min(1.0, 2 * (low - explained)) if low - explained > margin else 0.0
