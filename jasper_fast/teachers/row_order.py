"""Check that embeddings without keys are in the order of the training texts.

Similar texts have similar embeddings. A row's *profile* is its similarity to every other sampled row. In the right
order, the profile of an embedding is closest to the profile of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, rankdata, spearmanr

MIN_ROWS = 8  # rows; fewer say nothing about their order
MIN_ROWS_FOR_PARTS = 30  # rows; with fewer, a wrong part looks like a poor reference
PERMUTATIONS = 200
SIGNIFICANT = 3.0  # minimum standard deviations above random orders
ROWS_PER_DEVIATION = 50  # evidence grows with the rows, so the threshold grows too
BINS = 10
CHARACTERS = 2000  # characters of each text to compare


class Fit(NamedTuple):
    """Agreement of embeddings and texts in the given order."""

    rows: int
    correlation: float  # Spearman correlation of the pairs' similarities
    deviations: float  # standard deviations above random orders
    block: tuple[int, int] | None  # first and last + 1 of consecutive sampled rows that fit no better than chance
    wrong: float  # estimated fraction of scattered rows that fit no better than chance; 0.0 within the noise

    @property
    def is_significant(self) -> bool:
        """True if the order fits better than chance."""
        return _is_significant(self.deviations, self.rows)


def lexical_similarities(texts: Sequence[str]) -> np.ndarray:
    """Compute the cosines of the texts' TF-IDF weighted character n-grams, (n, n) float64."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    grams = vectorizer.fit_transform([text[:CHARACTERS] for text in texts])
    return (grams @ grams.T).toarray()


def centred_similarities(vectors: np.ndarray) -> np.ndarray:
    """Compute the cosines of embeddings, (n, D), after subtracting their mean. Returns (n, n) float64."""
    centred = vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def fit_of_order(similarities: np.ndarray, references: Sequence[np.ndarray]) -> Fit:
    """Measure how well embeddings fit the texts in the given order.

    Args:
        similarities: (n, n) float64, cosines of the embeddings.
        references: similarities of the texts, (n, n) float64 each. Their profiles are averaged. The correlation uses
            the last one.
    """
    pairs = np.triu_indices(len(similarities), 1)
    correlation = float(spearmanr(similarities[pairs], references[-1][pairs]).statistic)
    profiles, expected = (
        _profiles(similarities),
        _unit(np.sum([_profiles(reference) for reference in references], axis=0)),
    )
    deviations = _deviations(profiles, expected, np.random.default_rng(0))
    block, wrong = None, 0.0
    if _is_significant(deviations, len(profiles)) and len(profiles) >= MIN_ROWS_FOR_PARTS:
        percentiles = _percentiles(profiles, expected)
        for _ in range(2):  # rows that fit badly are weak evidence about the others
            percentiles = _percentiles(profiles * np.clip(2 * percentiles - 1, 0, 1), expected)
        block, wrong = _wrong_block(percentiles), _wrong_fraction(percentiles)
    return Fit(len(profiles), float(np.nan_to_num(correlation)), deviations, block, wrong)


def _is_significant(deviations: float, rows: int) -> bool:
    return deviations >= max(SIGNIFICANT, rows / ROWS_PER_DEVIATION)


def _profiles(similarities: np.ndarray) -> np.ndarray:
    """Rank each row's similarities to the others, and subtract the mean of each column. (n, n), unit rows."""
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


def _deviations(profiles: np.ndarray, expected: np.ndarray, generator: np.random.Generator) -> float:
    """Run Mantel's test: the agreement of the profiles in standard deviations above that of random orders."""
    orders = (generator.permutation(len(profiles)) for _ in range(PERMUTATIONS))
    random = [np.vdot(profiles[np.ix_(order, order)], expected) for order in orders]
    return float((np.vdot(profiles, expected) - np.mean(random)) / max(float(np.std(random)), 1e-12))


def _percentiles(profiles: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the fraction of texts that fit an embedding worse than its text does, (n,) float64.

    It is near 1 for a row in its place, and uniform between 0 and 1 for any other row.
    """
    scores = profiles @ expected.T
    diagonal = np.diag(scores)[:, None]
    return ((scores < diagonal).sum(axis=1) + 0.5 * ((scores == diagonal).sum(axis=1) - 1)) / (len(scores) - 1)


def _wrong_block(percentiles: np.ndarray) -> tuple[int, int] | None:
    """Find the consecutive rows that uniform percentiles explain best, or None if chance explains them.

    The score of a row is the log-likelihood ratio of the uniform distribution against that of all rows. By chance,
    consecutive rows reach a total of t with a probability of at most n·exp(-t).
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
    """Estimate the fraction of misplaced rows from the excess of percentiles below one half.

    The model gives rows in place normal deviates with a standard deviation near 1. Their upper 35 % then determine how
    many of them fall below one half. All beyond that number count as misplaced.
    """
    n = len(percentiles)
    upper = min(float(np.quantile(percentiles, 0.65)), 1 - 0.5 / n)
    explained = float(norm.cdf(norm.ppf(0.65) - norm.ppf(upper))) if upper > 0.5 else 1.0
    low = float((percentiles < 0.5).mean())
    margin = 0.06 + 3 * np.sqrt(max(explained * (1 - explained), 0.03) / n)
    return min(1.0, 2 * (low - explained)) if low - explained > margin else 0.0
