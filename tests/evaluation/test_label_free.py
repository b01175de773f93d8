"""Label-free scores equal slow references, also with ties, and the advice claims only what was measured."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from jasper_fast.evaluation.advice import advice, loss_trend
from jasper_fast.evaluation.label_free import (
    HeldOut,
    cosines,
    neighbour_weights,
    pair_correlation,
    score_held_out,
    standard_error,
)
from jasper_fast.evaluation.score import fit_pca
from jasper_fast.models.embedder import normalise
from jasper_fast.utils.errors import JasperError

COUNT = 30
WORDS = [f"text number {i}" for i in range(COUNT)]


def vectors(seed: int, width: int = 16, count: int = COUNT) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((count, width)))


def slow_overlap(student: np.ndarray, teacher: np.ndarray, k: int) -> float:
    """The overlap in float64, by sorting, for rows without ties."""
    shared = []
    for i in range(len(student)):
        nearest = []
        for rows in (student.astype(np.float64), teacher.astype(np.float64)):
            order = sorted((j for j in range(len(rows)) if j != i), key=lambda j: -(rows[i] @ rows[j]))
            nearest.append(set(order[:k]))
        shared.append(len(nearest[0] & nearest[1]) / k)
    return float(np.mean(shared))


def encoder(by_text: dict[str, np.ndarray], widths: tuple[int, ...] = (16, 4)) -> Any:
    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        rows = np.stack([by_text[text] for text in texts])
        return {width: normalise(rows[:, :width]) for width in widths}

    return encode


def held_out(count: int = COUNT, queries: bool = True) -> HeldOut:
    asked = [f"query {i}" if queries else "" for i in range(count)]
    return HeldOut.of({"text": WORDS[:count], "query": asked, "body": [f"body {i}" for i in range(count)]})


def all_vectors(seed: int) -> dict[str, np.ndarray]:
    kinds = ("text number", "query", "body")
    return {f"{kind} {i}": row for n, kind in enumerate(kinds) for i, row in enumerate(vectors(seed + n))}


def test_scores_equal_slow_references_at_every_width_and_precision() -> None:
    by_text, teacher = all_vectors(0), vectors(9, 24)
    documents = held_out()
    pca = fit_pca(np.stack([*by_text.values()]), [16, 4])
    encoders = {"student before": encoder(by_text, (16,)), "student": encoder(by_text)}
    scores = score_held_out(documents, teacher, encoders, {"student PCA": pca})
    assert (scores["documents"], scores["queries"], scores["chance"]) == (COUNT, COUNT, 10 / 29)
    rows = {(row["model"], row["width"], row.get("precision", "float32")): row for row in scores["rows"]}
    heads = [("student", width, form) for width in (16, 4) for form in ("float32", "int8", "ubinary")]
    assert set(rows) == {("student before", 16, "float32"), ("student PCA", 4, "float32"), *heads}
    student = np.stack([by_text[text] for text in WORDS])
    for width in (16, 4):
        reduced = normalise(student[:, :width])
        row = rows["student", width, "float32"]
        assert row["overlap"] == pytest.approx(slow_overlap(reduced, teacher, 10))
        assert row["spearman"] == pytest.approx(slow_spearman(reduced, teacher))
        queries, bodies = (
            normalise(np.stack([by_text[f"{n} {i}"] for i in range(COUNT)])[:, :width]) for n in ("query", "body")
        )
        assert row["ndcg"] == pytest.approx(slow_ndcg(queries, bodies))
        assert abs(rows["student", width, "int8"]["overlap"] - row["overlap"]) < 0.1
    signs = np.where(student > 0, 1.0, -1.0)
    expected = (neighbour_weights(cosines(signs)) * neighbour_weights(cosines(teacher))).sum(axis=1) / 10
    assert rows["student", 16, "ubinary"]["overlap"] == pytest.approx(expected.mean())
    assert rows["student", 16, "ubinary"]["overlap_error"] == pytest.approx(expected.std(ddof=1) / COUNT**0.5)
    compared = {(d["width"], d["to"]): d for d in scores["differences"]}
    assert set(compared) == {(16, "student before"), (4, "widest"), (4, "student PCA")}
    assert compared[16, "student before"]["difference"] == 0
    for name, other in (("widest", ("student", 16)), ("student PCA", ("student PCA", 4))):
        difference = rows["student", 4, "float32"]["overlap"] - rows[(*other, "float32")]["overlap"]
        assert compared[4, name]["difference"] == pytest.approx(difference)


def test_the_students_queries_among_the_teachers_documents() -> None:
    by_text, by_teacher = all_vectors(0), all_vectors(40)
    for text, row in by_text.items():  # a student of this teacher
        by_teacher[text] = normalise((row + 0.5 * by_teacher[text])[None])[0]
    teacher = np.stack([by_teacher[text] for text in WORDS])
    encoders = {"teacher": encoder(by_teacher, (16,)), "student": encoder(by_text)}
    rows = {(row["model"], row["width"]): row for row in score_held_out(held_out(), teacher, encoders)["rows"]}
    row = rows["documents by teacher", 16]
    student = np.stack([by_text[text] for text in WORDS])
    shared = []
    for i in range(COUNT):
        found, wanted = (
            set(sorted((j for j in range(COUNT) if j != i), key=lambda j: -float(rows @ teacher[j]))[:10])
            for rows in (student[i].astype(np.float64), teacher[i].astype(np.float64))
        )
        shared.append(len(found & wanted) / 10)
    assert row["overlap"] == pytest.approx(np.mean(shared))
    assert row["overlap_error"] == pytest.approx(np.std(shared, ddof=1) / COUNT**0.5) and "spearman" not in row
    queries = np.stack([by_text[f"query {i}"] for i in range(COUNT)])
    bodies = np.stack([by_teacher[f"body {i}"] for i in range(COUNT)])
    assert row["ndcg"] == pytest.approx(slow_ndcg(queries, bodies))
    without = score_held_out(held_out(), teacher, {"student": encoder(by_text)})["rows"]  # a file of embeddings
    (row,) = [row for row in without if row["model"] == "documents by teacher"]
    assert row["overlap"] == pytest.approx(np.mean(shared)) and "ndcg" not in row


def slow_spearman(student: np.ndarray, teacher: np.ndarray) -> float:
    """Pearson's correlation of average ranks, pair by pair."""
    pairs = [(i, j) for i in range(len(student)) for j in range(i)]
    ranks = []
    for rows in (student.astype(np.float64), teacher.astype(np.float64)):
        values = np.array([rows[i] @ rows[j] for i, j in pairs])
        ranks.append([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])
    return float(np.corrcoef(*ranks)[0, 1])


def slow_ndcg(queries: np.ndarray, bodies: np.ndarray) -> float:
    scores = queries.astype(np.float64) @ bodies.T.astype(np.float64)
    ranks = [1 + int((row > row[i]).sum()) for i, row in enumerate(scores)]
    return float(np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks]))


def test_ties_count_as_the_mean_over_all_orders() -> None:
    similarities = np.array(
        [[9, 5, 3, 3, 3], [5, 9, 1, 1, 0], [3, 1, 9, 2, 2], [3, 1, 2, 9, 4], [3, 0, 2, 4, 9]], float
    )
    wanted = np.zeros((5, 5))
    orders = [*permutations(range(5))]
    for order in orders:
        for i in range(5):
            ranked = sorted((j for j in range(5) if j != i), key=lambda j: (-similarities[i, j], order[j]))
            wanted[i, ranked[:2]] += 1 / len(orders)
    np.testing.assert_allclose(neighbour_weights(similarities, 2), wanted)


def test_a_copy_of_the_teacher_is_perfect_and_a_collapsed_student_is_chance() -> None:
    by_text = {text: row for text, row in zip(WORDS, vectors(3), strict=True)}
    documents = held_out(queries=False)
    encoders = {"student": encoder(by_text, (16,))}
    (copy, *_) = score_held_out(documents, vectors(3), encoders)["rows"]
    assert copy["overlap"] == 1 and copy["spearman"] == pytest.approx(1) and "ndcg" not in copy
    flat = {text: np.eye(16, dtype=np.float32)[0] for text in WORDS}
    scores = score_held_out(documents, vectors(3), {"student": encoder(flat, (16,))})
    assert scores["rows"][0]["overlap"] == pytest.approx(scores["chance"])
    assert scores["rows"][0]["spearman"] == 0
    assert pair_correlation(np.ones((3, 3)), np.eye(3)) == 0
    assert standard_error(np.array([1.0, 3.0])) == 1.0


@pytest.mark.parametrize("count", [0, 1, 10, 11, 20])
def test_few_documents_give_no_score(count: int) -> None:
    scores = score_held_out(held_out(count, queries=False), vectors(0, count=count), {})
    assert scores == {
        "documents": count,
        "queries": 0,
        "missing": f"too few held-out documents (got {count}, expected at least 21). "
        "At most a tenth is held out, so give 210 documents or more",
    }
    assert advice(scores) == ""


def test_duplicates_and_missing_queries() -> None:
    rows = {"text": ["a", "b", "a", "c"], "query": ["q", "", "q", "Q "], "body": ["x", "y", "x", "z"]}
    documents = HeldOut.of(rows)
    assert documents.texts == ["a", "b", "c"]
    assert documents.questions is not None
    assert (documents.questions.queries, documents.questions.documents) == (["q"], ["x", "z"])
    assert documents.questions.relevant == [{0: 1, 1: 1}]
    assert HeldOut.of({"text": []}) == HeldOut([], None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_numbers_that_are_not_finite_are_rejected(model: str, value: float) -> None:
    teacher, student = vectors(1), vectors(2)
    (teacher if model == "teacher" else student)[3, 2] = value
    rows = dict(zip(WORDS, student, strict=True))
    encoders = {"student": lambda texts, role: {16: np.stack([rows[text] for text in texts])}}
    with pytest.raises(JasperError, match=f"1 of 30 embeddings of the {model} contain NaN or infinity"):
        score_held_out(held_out(queries=False), teacher, encoders)


# --- advice


def measured(overlaps: dict[int, float], pca: dict[int, float] | None = None, gain: float = 0.2) -> dict[str, Any]:
    """Label-free results in which each difference has a standard error of one point."""
    widest = max(overlaps)
    differences = [{"width": widest, "to": "student before", "difference": gain, "error": 0.01}]
    for width in sorted(overlaps, reverse=True)[1:]:
        change = {"width": width, "to": "widest", "difference": overlaps[width] - overlaps[widest], "error": 0.01}
        differences.append(change)
        if pca:
            change = {"width": width, "to": "student PCA", "difference": overlaps[width] - pca[width], "error": 0.01}
            differences.append(change)
    rows = [{"model": "student", "width": width, "overlap": overlap} for width, overlap in overlaps.items()]
    return {"rows": rows, "differences": differences}


FALLS = {"stage": "distil", "fall": 0.05, "error": 0.01}


@pytest.mark.parametrize(
    ("label_free", "trend", "expected"),
    [
        ({}, FALLS, ""),
        (measured({64: 0.6}), None, ""),
        (
            measured({64: 0.6}),
            FALLS,
            "The loss of stage 'distil' still fell by 5.0 % in its last tenth, so more steps may help.",
        ),
        (
            measured({64: 0.6, 32: 0.55, 16: 0.5}),
            None,
            "Width 32 keeps the neighbours of width 64 within a tenth (−5.0 ± 1.0 points); narrower widths lose more "
            "than a tenth (16: −10.0 ± 1.0 points).",
        ),
        (
            measured({64: 0.6, 32: 0.5, 16: 0.58}),
            FALLS | {"fall": 0.015},
            "Narrower widths lose more than a tenth (32: −10.0 ± 1.0 points, 16: −2.0 ± 1.0 points).",
        ),
        (
            measured({64: 0.6, 32: 0.6, 16: 0.59}, {32: 0.61, 16: 0.55}),
            None,
            "Width 16 keeps the neighbours of width 64 within a tenth (−1.0 ± 1.0 points). At 16, trained heads beat "
            "PCA of width 64 (its main directions, found without training); at 32, no difference was measured to "
            "PCA of width 64.",
        ),
        (
            measured({64: 0.6, 32: 0.55}, {32: 0.6}, gain=0.01),
            FALLS,
            "Width 32 keeps the neighbours of width 64 within a tenth (−5.0 ± 1.0 points). At 32, trained heads lose "
            "to PCA of width 64 (its main directions, found without training); training gained nothing measurable "
            "(+1.0 ± 1.0 points).",
        ),
        (
            measured({64: 0.6, 32: 0.56}) | {"documents": 21},
            None,
            "Narrower widths lose more than a tenth (32: −4.0 ± 1.0 points); among so few documents, chance alone "
            "gives 50 %, which is subtracted here.",
        ),
        (
            measured({64: 0.49, 32: 0.5}) | {"documents": 21},
            None,
            "No width keeps more neighbours than chance (50 %).",
        ),
    ],
)
def test_advice(label_free: dict[str, Any], trend: dict[str, Any] | None, expected: str) -> None:
    assert advice(label_free, trend) == expected


def test_the_trend_compares_the_last_two_tenths_of_one_stage() -> None:
    losses = [9.0] * 80 + [2.0, 2.2] * 5 + [1.0, 1.1] * 5
    steps = [{"stage": "a", "loss": loss} for loss in losses] + [{"stage": "b", "loss": 5.0}] * 50
    trend = loss_trend(steps, "a")
    assert trend is not None and trend["fall"] == pytest.approx(0.5)
    error = (np.var(losses[80:90], ddof=1) / 10 + np.var(losses[90:], ddof=1) / 10) ** 0.5 / 2.1
    assert trend["error"] == pytest.approx(error)
    assert loss_trend(steps[:39], "a") == {"stage": "a", "steps": 39} and loss_trend(steps, "c") is None
