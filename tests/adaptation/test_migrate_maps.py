"""The table of maps: scores as a slow reference computes them, and the choice."""

from __future__ import annotations

import numpy as np
import pytest

from jasper_fast.adaptation.migration.maps import (
    Corpus,
    HeldOut,
    MapScore,
    _best,
    answer_ndcg,
    candidate_maps,
    compare_maps,
    mapped,
)
from jasper_fast.adaptation.migration.old_index import L2
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.models.embedder import normalise

PAIRS, HELD, WIDTH, OLD = 300, 60, 12, 16


@pytest.fixture(scope="module")
def spaces():
    """New (300, 12) and old (300, 16) embeddings of the same documents, and rows of others (200, 16)."""
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((PAIRS + 200, WIDTH)) * np.linspace(2, 0.3, WIDTH)
    new = normalise(hidden)
    turn = np.linalg.qr(generator.standard_normal((OLD, WIDTH)))[0].T
    old = normalise(new @ turn + 0.1 * generator.standard_normal((len(new), OLD)))
    return new[:PAIRS], old[:PAIRS], old[PAIRS:]


def held_out(new, old, others, metric="inner product", lengths=None):
    lengths = np.ones((PAIRS, 1), np.float32) if lengths is None else lengths
    corpus = np.concatenate([(old * lengths)[:HELD], others, (old * lengths)[HELD:]])
    return HeldOut(
        new[:HELD],
        normalise(new[:40] + 0.05),
        np.arange(40),
        np.arange(40),
        Corpus(corpus, metric),
        Corpus(old * lengths, metric),
        new,
    )


def statistics(new, old):
    found = PairStatistics(WIDTH, OLD)
    found.add(new[HELD:], old[HELD:])
    return found


def overlap(asked, truth, score) -> float:
    """Return the common fraction of the ten rows of highest score, by a slow sort in float64."""
    top = [np.argsort(-score(rows.astype(np.float64)), axis=1)[:, :10] for rows in (asked, truth)]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*top, strict=True)]))


@pytest.mark.parametrize("metric", ["inner product", L2])
def test_scores_are_those_of_a_slow_reference(spaces, metric):
    new, old, others = spaces
    lengths = np.random.default_rng(1).uniform(0.6, 1.4, (PAIRS, 1)).astype(np.float32)
    held = held_out(new, old, others, metric, lengths)
    table = compare_maps(statistics(new, old), held)
    rows = held.corpus.rows.astype(np.float64)

    def score(questions):
        if metric == L2:
            return -((questions[:, None, :] - rows[None]) ** 2).sum(axis=2)
        return questions @ rows.T

    maps = dict(candidate_maps(statistics(new, old)))
    assert [row.name for row in table.rows] == list(maps) and "none" not in maps
    for row in table.rows:
        expected = overlap(mapped(new[:HELD], maps[row.name]), rows[:HELD], score)
        assert row.overlap == pytest.approx(expected, abs=1e-9), row.name
        top = np.argsort(-score(mapped(new[:HELD], maps[row.name]).astype(np.float64)), axis=1)[:, :10]
        own = np.mean([number in found for number, found in enumerate(top)])
        assert row.own_row == pytest.approx(own)
    assert table.chance == pytest.approx(10 / len(rows))
    best = {row.name: row.overlap for row in table.rows}
    assert best["ridge, λ 1"] > best["rank 6, λ 1"] + 0.05 > best["rank 3, λ 1"]
    assert table.usable


def test_titles_count_as_a_fraction_of_the_new_models_own(spaces):
    new, old, others = spaces
    held = held_out(new, old, others)
    table = compare_maps(statistics(new, old), held)
    own = np.mean([1 / np.log2(2 + rank) if rank < 10 else 0 for rank in ranks(held.questions, new)])
    assert table.own == pytest.approx(own, abs=1e-6)
    maps = dict(candidate_maps(statistics(new, old)))
    row = table.best
    moved = mapped(held.questions, maps[row.name])
    for rows, value in [(held.corpus.rows, row.answer), (old, row.kept * own)]:
        expected = np.mean([1 / np.log2(2 + r) if r < 10 else 0 for r in ranks(moved, rows)])
        assert value == pytest.approx(expected, abs=1e-6)
    assert row.answer < row.kept * own


def ranks(questions, documents):
    scores = questions.astype(np.float64) @ documents.astype(np.float64).T
    return [(row > row[number]).sum() for number, row in enumerate(scores)]


def test_rows_of_other_documents_are_not_usable(spaces):
    """Neighbouring documents are alike, so the overlap is above chance, and the own row is not found."""
    groups = np.random.default_rng(4).standard_normal((PAIRS // 20, WIDTH)).repeat(20, axis=0)
    new = normalise(groups + 0.3 * np.random.default_rng(5).standard_normal((PAIRS, WIDTH)))
    turn = np.linalg.qr(np.random.default_rng(6).standard_normal((OLD, WIDTH)))[0].T
    shifted = normalise(np.roll(new, 1, axis=0) @ turn)
    order = np.random.default_rng(7).permutation(PAIRS)
    table = compare_maps(statistics(new[order], shifted[order]), held_out(new[order], shifted[order], spaces[2]))
    assert table.best.overlap > 3 * table.chance and not table.usable


def test_random_rows_are_no_better_than_chance(spaces):
    new, _, others = spaces
    noise = normalise(np.random.default_rng(2).standard_normal((PAIRS, OLD)))
    assert not compare_maps(statistics(new, noise), held_out(new, noise, others)).usable


def test_one_width_has_the_unmapped_space_as_a_candidate():
    found = PairStatistics(4, 4)
    found.add(np.eye(4), np.eye(4))
    names = [name for name, _ in candidate_maps(found)]
    assert names[:2] == ["none", "Procrustes"] and names[-2:] == ["rank 2, λ 1", "rank 1, λ 1"]


def test_titles_choose_the_map_and_overlap_breaks_ties():
    rows = [
        MapScore("copies the old model", 0.9, 0.01, 1.0, 0.70, 0.9),
        MapScore("a", 0.5, 0.01, 1.0, 0.800, 1.0),
        MapScore("b", 0.6, 0.01, 1.0, 0.799, 1.0),
    ]
    assert _best(rows, 30).name == "b"
    assert _best(rows, 29).name == "copies the old model"


def test_answers_beyond_ten_count_nothing():
    documents = np.eye(12, dtype=np.float32)
    questions = np.linspace(1, 0.1, 12, dtype=np.float32)[None]
    for answer, expected in [(0, 1.0), (1, 1 / np.log2(3)), (9, 1 / np.log2(11)), (10, 0.0)]:
        assert answer_ndcg(questions, documents, np.array([answer])) == pytest.approx(expected)
