"""Check that embeddings without keys are in the order of the training texts.

Similar texts have similar embeddings. A row's *profile* is its similarity to every other sampled row. In the right
order, the profile of an embedding is closest to the profile of its text.

Neighbouring texts of a file often resemble each other. Shifted rows then fit better than random ones. So the given
order is also compared with other orders (`Alternative`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
SHIFTS = (1, -1, 2, -2, 3, -3)  # rows
WINDOW = 24  # sampled rows of a part that is compared with its shifted form
BETTER, BETTER_PART = 1.0, 3.0  # standard errors by which another order fits better: of all rows, and of a part


class Alternative(NamedTuple):
    """The embeddings of sampled texts in another order of the file."""

    name: str  # such as "the text 1 row before"
    texts: np.ndarray  # (m,) int64, positions among the sampled texts
    similarities: np.ndarray  # (m, m) float64, of the embeddings that these texts have in the other order
    partial: bool = True  # whether only a part of a file can be in this order


class Better(NamedTuple):
    """Another order that fits better than the given one, everywhere or in a part."""

    name: str
    part: tuple[int, int]  # first and last + 1 of the sampled rows
    correlation: float  # Spearman correlation of the pairs' similarities in that part
    given: float  # the same for the given order
    gain: float  # sum of the gains in agreement of the part's rows


class Fit(NamedTuple):
    """Agreement of embeddings and texts in the given order."""

    rows: int
    correlation: float  # Spearman correlation of the pairs' similarities
    deviations: float  # standard deviations above random orders
    block: tuple[int, int] | None  # first and last + 1 of consecutive sampled rows that fit no better than chance
    wrong: float  # estimated fraction of scattered rows that fit no better than chance; 0.0 within the noise
    better: Better | None = None  # another order that fits better

    @property
    def is_significant(self) -> bool:
        """True if the order fits better than chance."""
        return self.deviations >= self.required

    @property
    def required(self) -> float:
        """Standard deviations above random orders from which the order fits better than chance."""
        return required_deviations(self.rows)


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


def fit_of_order(
    similarities: np.ndarray, references: Sequence[np.ndarray], alternatives: Iterable[Alternative] = ()
) -> Fit:
    """Measure how well embeddings fit the texts in the given order.

    Args:
        similarities: (n, n) float64, cosines of the embeddings.
        references: similarities of the texts, (n, n) float64 each. Their profiles are averaged. The correlation uses
            the last one.
        alternatives: other orders to compare with. They are read only if the given order fits better than chance.
    """
    correlation = _correlation(similarities, references[-1])
    profiles, expected = _profiles(similarities), _mean_profiles(references)
    deviations = _deviations(profiles, expected, np.random.default_rng(0))
    block, wrong = None, 0.0
    if deviations < required_deviations(len(profiles)):
        return Fit(len(profiles), correlation, deviations, block, wrong)
    better = [found for other in alternatives if (found := _compare(similarities, references, other))]
    if better:
        best = max(better, key=lambda found: found.gain)
        return Fit(len(profiles), correlation, deviations, block, wrong, best)
    if len(profiles) >= MIN_ROWS_FOR_PARTS:
        percentiles = _percentiles(profiles, expected)
        for _ in range(2):  # rows that fit badly are weak evidence about the others
            percentiles = _percentiles(profiles * np.clip(2 * percentiles - 1, 0, 1), expected)
        block, wrong = _wrong_block(percentiles), _wrong_fraction(percentiles)
    return Fit(len(profiles), correlation, deviations, block, wrong)


def other_orders(rows: np.ndarray, total: int, gather: Callable[[np.ndarray], np.ndarray]) -> Iterator[Alternative]:
    """Yield the embeddings of sampled rows in other orders: shifted by a few rows, and reversed.

    Args:
        rows: (n,) int64, the sampled rows of the file.
        total: number of rows of the file.
        gather: function that reads the embeddings of (m,) rows, (m, D).
    """
    others = {
        f"the text {abs(shift)} row{'s' if abs(shift) > 1 else ''} {'before' if shift > 0 else 'after'}": rows + shift
        for shift in SHIFTS
    }
    reverse = "the text at the same distance from the other end"
    for name, other in {**others, reverse: total - 1 - rows}.items():
        inside = np.flatnonzero((other >= 0) & (other < total))
        vectors = np.nan_to_num(_unit(gather(other[inside])))  # faulty rows are reported when they are used
        yield Alternative(name, inside, centred_similarities(vectors), partial=name != reverse)


def order_problem(fit: Fit, between: Callable[[tuple[int, int]], str]) -> str | None:
    """Describe why an order is wrong. None: it fits.

    Args:
        fit: agreement of the order.
        between: function that names the first and last row of a part, as in "From v.npy row 0 to v.npy row 59".
    """
    measured = f"rank correlation with the texts' similarities: {fit.correlation:.2f}"
    if not fit.is_significant:
        return (
            "The embeddings fit the training texts no better than in a random order (got "
            f"{fit.deviations:.1f} standard deviations above random orders, expected at least {fit.required:.1f})"
        )
    if fit.better is not None:
        name, part, correlation, given, _ = fit.better
        return (
            f"{between(part)} each embedding fits {name} better than its own (rank correlation with the texts' "
            f"similarities: {correlation:.2f} in that order, {given:.2f} in the given one)"
        )
    if fit.block is not None:
        return f"{between(fit.block)} the embeddings do not fit the training texts ({measured})"
    if fit.wrong:
        return f"About {fit.wrong:.0%} of the embeddings do not fit the training texts ({measured})"
    return None


def required_deviations(rows: int) -> float:
    """Return the standard deviations above random orders from which an order fits better than chance."""
    return max(SIGNIFICANT, rows / ROWS_PER_DEVIATION)


def _compare(similarities: np.ndarray, references: Sequence[np.ndarray], other: Alternative) -> Better | None:
    """Return where the other order fits better than the given one, or None.

    A row's gain is the agreement of its profile in the other order, minus that in the given order. It is clearly
    negative for rows in their place.
    """
    square = np.ix_(other.texts, other.texts)
    given, texts = similarities[square], [reference[square] for reference in references]
    expected = _mean_profiles(texts)
    gains = ((_profiles(other.similarities) - _profiles(given)) * expected).sum(axis=1)
    part = _part_with_gain(gains, other.partial)
    if part is None:
        return None
    rows = slice(*part)
    found, before = (_correlation(one[rows, rows], texts[-1][rows, rows]) for one in (other.similarities, given))
    # A shift leaves rows at an end without an embedding. They belong to a part that reaches that end.
    first = int(other.texts[part[0]]) if part[0] else 0
    last = int(other.texts[part[1] - 1]) + 1 if part[1] < len(gains) else len(similarities)
    return Better(other.name, (first, last), found, before, float(gains[rows].sum()))


def _part_with_gain(gains: np.ndarray, partial: bool) -> tuple[int, int] | None:
    """Find all rows, or else consecutive ones if ``partial``, that gain significantly: first and last + 1, or None."""
    if _standard_errors(gains) > BETTER:
        return 0, len(gains)
    final = len(gains) - WINDOW
    starts = [*range(0, final, WINDOW // 2), final] if partial and final >= 0 else []
    errors = [_standard_errors(gains[start : start + WINDOW]) for start in starts]
    if not errors or max(errors) <= BETTER_PART:
        return None
    first = last = int(np.argmax(errors))
    while first > 0 and errors[first - 1] > BETTER:
        first -= 1
    while last + 1 < len(errors) and errors[last + 1] > BETTER:
        last += 1
    return starts[first], starts[last] + WINDOW


def _standard_errors(gains: np.ndarray) -> float:
    """Return the mean in standard errors."""
    return float(gains.mean() / max(float(gains.std()) / np.sqrt(len(gains)), 1e-12))


def _correlation(similarities: np.ndarray, reference: np.ndarray) -> float:
    pairs = np.triu_indices(len(similarities), 1)
    return float(np.nan_to_num(spearmanr(similarities[pairs], reference[pairs]).statistic))


def _mean_profiles(references: Sequence[np.ndarray]) -> np.ndarray:
    return _unit(np.sum([_profiles(reference) for reference in references], axis=0))


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
