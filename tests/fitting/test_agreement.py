"""Agreement with the teacher's ranking against a slow reference in float64."""

import numpy as np
import pytest

from jasper_fast.fitting.agreement import DEPTH, TIE, Reference, agreement, mean_error
from jasper_fast.utils.errors import JasperError


def unit(count, width, seed):
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def slow_question(question, documents, asked, known, answer):
    """The definition, for one question, with sorted lists."""
    teacher = [float(asked.astype(float) @ row.astype(float)) for row in known]
    model = [float(question.astype(float) @ row.astype(float)) for row in documents]
    best = sorted(teacher, reverse=True)[:DEPTH]
    ranked = sorted(range(len(model)), key=lambda at: (-model[at], at))[:DEPTH]
    gain = [sum(score >= one - TIE for one in best) for score in teacher]
    discount = [1 / np.log2(rank + 2) for rank in range(DEPTH)]
    dcg = sum(gain[at] * factor for at, factor in zip(ranked, discount, strict=False))
    ideal = sum(one * factor for one, factor in zip(sorted(gain, reverse=True), discount, strict=False))
    own = [float(np.abs(known[at] - known[answer]).max()) < 1e-7 for at in ranked]
    found = next((factor for hit, factor in zip(own, discount, strict=False) if hit), 0.0)
    return np.mean([gain[at] > 0 for at in ranked]), dcg / ideal, found


@pytest.mark.parametrize("documents", [4, 10, 60], ids="{} documents".format)
def test_agreement_matches_the_slow_definition(documents):
    known, answers = unit(documents, 16, 0), np.arange(30) % documents
    asked = known[answers] + 0.8 * unit(30, 16, 1)
    model, queries = known[:, :7] + 0.1 * unit(documents, 7, 2), asked[:, :7]
    got = agreement(queries, model, asked, known, answers)
    expected = [slow_question(queries[i], model, asked[i], known, answers[i]) for i in range(30)]
    for values, column in zip((got.overlap, got.ndcg, got.answer_ndcg), zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(values, column, atol=1e-12)
    if documents > DEPTH:
        assert 0.1 < got.overlap.mean() < 0.95 and 0.1 < got.answer_ndcg.mean() < 0.95


def test_the_teacher_agrees_with_itself():
    known, asked = unit(100, 8, 0), unit(20, 8, 1)
    got = agreement(asked, known, asked, known)
    assert got.answer_ndcg is None
    np.testing.assert_array_equal(got.overlap, 1)
    np.testing.assert_allclose(got.ndcg, 1, atol=1e-12)


def test_any_copy_of_a_document_counts():
    """Rows 0 to 24 and 25 to 49 are the same documents. The model sees only one of each pair."""
    half = unit(25, 8, 0)
    known, asked = np.concatenate([half, half]), half[:5] + 0.1 * unit(5, 8, 1)
    late = np.concatenate([-half, half])  # the first copies come last
    early = np.concatenate([half, -half])
    for answers in (np.arange(5), np.arange(25, 30)):
        one, other = (agreement(asked, rows, asked, known, answers) for rows in (late, early))
        np.testing.assert_array_equal(one.answer_ndcg, 1)
        np.testing.assert_array_equal(one.overlap, other.overlap)
        np.testing.assert_allclose(one.ndcg, other.ndcg, atol=1e-12)
        assert one.overlap.mean() < 1  # only five of the ten nearest can be found


def test_scores_that_differ_by_rounding_tie():
    """Twelve documents have the teacher's best score, up to rounding: any ten of them are right."""
    known = np.repeat(unit(1, 8, 0), 30, axis=0)
    known[12:] = unit(18, 8, 1) * 0.5
    known[:12] *= 1 + 2e-7 * np.arange(12, dtype=np.float32)[:, None] / 12
    asked = known[:1]
    one_way, model = np.ones((1, 1), np.float32), np.linspace(1, 0, 30, dtype=np.float32)[:, None]
    for order in (np.arange(30), np.concatenate([np.arange(11, -1, -1), np.arange(12, 30)])):
        got = agreement(one_way, model[order], asked, known)
        assert got.overlap[0] == 1 and got.ndcg[0] == pytest.approx(1)


def test_losing_the_nearest_costs_more_than_losing_the_tenth():
    known = np.linspace(1, 0.1, 40, dtype=np.float32)[:, None]
    one = np.ones((1, 1), np.float32)
    lost_first, lost_tenth = known.copy(), known.copy()
    lost_first[0], lost_tenth[9] = 0, 0
    first, tenth = (agreement(one, rows, one, known) for rows in (lost_first, lost_tenth))
    assert first.overlap[0] == tenth.overlap[0] == 0.9
    assert first.ndcg[0] < tenth.ndcg[0] < 1


def test_mean_error_counts_documents_instead_of_questions():
    values = np.random.default_rng(0).standard_normal(200)
    assert mean_error(values) == pytest.approx(values.std(ddof=1) / np.sqrt(200))
    doubled, groups = np.repeat(values, 2), np.repeat(np.arange(200) * 7, 2)
    assert mean_error(doubled, groups) == pytest.approx(mean_error(values))
    assert mean_error(doubled) < 0.8 * mean_error(values)
    assert mean_error(np.ones(1)) == np.inf


BAD = [
    (lambda q, d: (q[:0], d, q[:0], d), "no embeddings of the questions"),
    (lambda q, d: (q, d, q, d[:0]), "no embeddings of the documents"),
    (lambda q, d: (q, d * np.nan, q, d), "12 such rows of 12"),
    (lambda q, d: (q, d, q * np.inf, d), "by the teacher contain NaN"),
    (lambda q, d: (q[:, :3], d, q, d), "got 3 and 8, expected one width"),
    (lambda q, d: (q, d[:11], q, d), "embed the same texts with both"),
    (lambda q, d: (q, d, q, d, np.zeros(2, int)), "one document for each question"),
    (lambda q, d: (q, d, q, d, np.full(5, 12)), "rows 12 to 12, expected 0 to 11"),
]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_wrong_input_is_an_error_with_a_fix(change, message):
    with pytest.raises(JasperError, match=message) as caught:
        agreement(*change(unit(5, 8, 0), unit(12, 8, 1)))
    assert "Fix: " in str(caught.value)


def test_one_reference_measures_models_of_different_widths():
    known, asked = unit(50, 16, 0), unit(9, 16, 1)
    reference = Reference(asked, known)
    for width in (4, 16):
        np.testing.assert_array_equal(
            reference.measure(asked[:, :width], known[:, :width]).overlap,
            agreement(asked[:, :width], known[:, :width], asked, known).overlap,
        )
