"""The table of scores without labels, its differences and the recommendation."""

import numpy as np
import pytest

from jasper_fast.adaptation.choose import HeldOutVectors
from jasper_fast.adaptation.scores import (
    difference,
    expected_fraction,
    fractions_of,
    label_free_table,
    recommendation,
)
from jasper_fast.fitting.agreement import agreement, mean_error

WIDTH, DOCUMENTS, QUESTIONS = 16, 200, 80


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def space(noise=0.05, documents=DOCUMENTS, questions=QUESTIONS, answers=True, fade=0.8):
    """Documents whose later coordinates are smaller, and a student that is a rotated and noisy teacher."""
    random = np.random.default_rng(0)
    scale = fade ** np.arange(WIDTH)
    known = unit(random.standard_normal((documents, WIDTH)) * scale)
    own = np.arange(questions) % documents
    asked = unit(known[own] + 0.2 * random.standard_normal((questions, WIDTH)) * scale)
    rotation = np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))[0]
    student = [unit((rows + noise * random.standard_normal(rows.shape)) @ rotation) for rows in (asked, known)]
    held = HeldOutVectors(student[0], asked, student[1], known, own if answers else None)
    return held, rotation.T


def table(held, back, widths=(8, 4), forms=("symmetric", "asymmetric"), **others):
    projections = {width: np.eye(WIDTH)[:, :width] for width in widths}
    return label_free_table(held, {form: back for form in forms}, projections, **others)


def row(scores, model, form, width):
    (found,) = (r for r in scores["rows"] if (r["model"], r["form"], r["width"]) == (model, form, width))
    return found


def test_rows_are_the_agreement_of_each_model():
    held, back = space()
    scores = table(held, back, start=np.eye(WIDTH))
    questions, documents = unit(held.student_questions @ back), unit(held.corpus_student @ back)
    models = {
        ("student", "symmetric", 16): (questions, documents),
        ("student", "asymmetric", 16): (questions, held.corpus_teacher),
        ("student", "symmetric", 4): (unit(questions[:, :4]), unit(documents[:, :4])),
        ("student", "asymmetric", 4): (unit(questions[:, :4]), unit(held.corpus_teacher[:, :4])),
        ("student before", "symmetric", 16): (held.student_questions, held.corpus_student),
        ("student before", "asymmetric", 16): (held.student_questions, held.corpus_teacher),
        ("teacher", "teacher", 16): (held.teacher_questions, held.corpus_teacher),
    }
    teacher = row(scores, "teacher", "teacher", 16)
    for key, (asked, known) in models.items():
        expected = agreement(asked, known, held.teacher_questions, held.corpus_teacher, held.answers)
        got = row(scores, *key)
        assert got["overlap"] == pytest.approx(expected.overlap.mean(), abs=0.005)
        assert got["overlap_error"] == pytest.approx(mean_error(expected.overlap), abs=0.005)
        assert got["ndcg"] == pytest.approx(expected.ndcg.mean(), abs=0.005)
        assert got["answer_ndcg"] == pytest.approx(expected.answer_ndcg.mean(), abs=0.005)
        assert got["kept"] == pytest.approx(got["answer_ndcg"] / teacher["answer_ndcg"])
        assert got["bytes"] == 4 * got["width"]
    assert teacher["overlap"] == teacher["kept"] == 1 and teacher["kept_error"] == 0
    assert (scores["chance"], scores["answers"]) == (0.05, True)
    assert {(r["model"], r["width"]) for r in scores["rows"] if "PCA" in r["model"]} == {
        (model, width) for model in ("teacher PCA", "student PCA") for width in (8, 4)
    }
    # The unadapted student's own axes keep most where it is nearly the teacher.
    assert row(scores, "student PCA", "symmetric", 8)["overlap"] > row(scores, "student PCA", "symmetric", 4)["overlap"]


def test_only_the_adapted_student_has_an_expected_fraction():
    held, back = space()
    scores = table(held, back)
    cut = agreement(
        unit(held.teacher_questions[:, :4]),
        unit(held.corpus_teacher[:, :4]),
        held.teacher_questions,
        held.corpus_teacher,
    ).ndcg.mean()
    for form in ("symmetric", "asymmetric"):
        full, narrow = (row(scores, "student", form, width) for width in (16, 4))
        assert full["expected"] == pytest.approx(1 - 0.1 * (1 - full["overlap"]))
        assert narrow["teacher_ndcg"] == pytest.approx(cut, abs=0.005) and "teacher_ndcg" not in full
        assert narrow["expected"] == pytest.approx(full["expected"] * narrow["teacher_ndcg"])
    assert {r["model"] for r in scores["rows"] if "expected" in r} == {"student"}
    assert expected_fraction(1.0) == 1 and expected_fraction(0.0, 0.5) == 0.45


def test_differences_are_paired_over_questions():
    held, back = space()
    scores = table(held, back, start=np.eye(WIDTH))
    for form in ("symmetric", "asymmetric"):
        full, narrow = (row(scores, "student", form, width) for width in (16, 4))
        gain, error = difference(scores, form, 4, "full width")
        assert gain == pytest.approx(narrow["overlap"] - full["overlap"])
        assert 0 < error < full["overlap_error"] + narrow["overlap_error"]
        before = row(scores, "student before", form, 16)["overlap"]
        assert difference(scores, form, 16, "student before")[0] == pytest.approx(full["overlap"] - before)
        own = row(scores, "student PCA", "symmetric", 4)["overlap"]
        assert difference(scores, form, 4, "student PCA")[0] == pytest.approx(narrow["overlap"] - own)
    both = [row(scores, "student", form, 8)["overlap"] for form in ("asymmetric", "symmetric")]
    assert difference(scores, "asymmetric", 8, "symmetric")[0] == pytest.approx(both[0] - both[1])
    assert difference(scores, "symmetric", 16, "student before training") is None


def test_training_is_compared_with_the_student_before_it():
    held, back = space()
    noise = np.random.default_rng(3).standard_normal((2, DOCUMENTS, WIDTH))
    earlier = unit(held.student_questions + 0.3 * noise[0, :QUESTIONS]), unit(held.corpus_student + 0.3 * noise[1])
    scores = table(held, back, earlier=earlier)
    gain, error = difference(scores, "symmetric", 16, "student before training")
    untrained = row(scores, "student before training", "symmetric", 16)["overlap"]
    assert gain == pytest.approx(row(scores, "student", "symmetric", 16)["overlap"] - untrained)
    assert gain > 2 * error > 0


def test_questions_without_documents_have_no_answers():
    held, back = space(answers=False)
    scores = table(held, back, forms=("symmetric",))
    assert scores["answers"] is False
    assert not any("kept" in r or "answer_ndcg" in r for r in scores["rows"])
    full, narrow = (row(scores, "student", "symmetric", width)["overlap"] for width in (16, 4))
    assert difference(scores, "symmetric", 4, "full width")[0] == pytest.approx(narrow - full)


def test_fractions_have_the_mean_and_the_error_of_the_ratio():
    random = np.random.default_rng(0)
    teacher = random.random(400)
    values = 0.9 * teacher + 0.1 * random.random(400)
    kept = fractions_of(values, teacher)
    assert kept.mean() == pytest.approx(values.mean() / teacher.mean())
    draws = [random.integers(0, 400, 400) for _ in range(2000)]
    bootstrap = np.std([values[draw].mean() / teacher[draw].mean() for draw in draws])
    assert mean_error(kept) == pytest.approx(bootstrap, rel=0.1)
    np.testing.assert_allclose(fractions_of(0.5 * teacher, teacher), 0.5)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [({"documents": 20}, "got 20, expected at least 21"), ({"questions": 9}, "got 9, expected at least 10")],
)
def test_few_documents_or_questions_give_a_reason_instead_of_numbers(sizes, reason):
    scores = table(*space(**sizes))
    assert "rows" not in scores and reason in scores["missing"]
    assert recommendation(scores).startswith("No recommendation: too few")


def made(symmetric, asymmetric=None, error=0.005):
    """A table with the given overlaps by width."""
    rows, differences = [], []
    for form, by_width in (("symmetric", symmetric), ("asymmetric", asymmetric or {})):
        for width, overlap in by_width.items():
            full = by_width[max(by_width)]
            one = {"model": "student", "form": form, "width": width, "bytes": 4 * width, "overlap": overlap}
            rows.append(one | {"overlap_error": 0.008, "expected": 0.93})
            to = {"full width": full} if width < max(by_width) else {}
            to |= {"symmetric": symmetric[width]} if form == "asymmetric" else {}
            entry = {"form": form, "width": width, "error": error}
            differences += [entry | {"to": name, "difference": overlap - other} for name, other in to.items()]
    return {"rows": rows, "differences": differences}


def test_the_narrowest_width_within_a_twentieth_is_recommended():
    text = recommendation(made({384: 0.60, 128: 0.58, 64: 0.54, 32: 0.4}))
    assert text == (
        "Use symmetric at width 128 (512 bytes a document): it finds 58.0 ± 0.8 % of the teacher's ten neighbours; "
        "about 93 % of the teacher's nDCG@10 is expected; width 64 loses 6.0 ± 0.5 points against width 384."
    )
    assert recommendation(made({384: 0.60, 128: 0.5})).startswith("Use symmetric at width 384 (1,536 bytes")


def test_the_teachers_index_is_recommended_only_if_it_is_measurably_better():
    speed = {"student": {"documents_per_s": 22.0}, "teacher": {"documents_per_s": 11.0}}
    better = recommendation(made({384: 0.60}, {384: 0.70}), speed)
    assert better.startswith("Use asymmetric") and "gain +10.0 ± 0.5 points over symmetric" in better
    assert "new documents need the teacher, which encodes 11 a second here" in better
    unclear = recommendation(made({384: 0.60}, {384: 0.605}), speed)
    assert unclear.startswith("Use symmetric") and "gain nothing measurable" in unclear
    assert "11 a second" not in unclear
    assert "lose 3.0 ± 0.5 points" in recommendation(made({384: 0.60}, {384: 0.57}))


def test_a_loss_within_the_error_is_not_claimed():
    assert "loses" not in recommendation(made({384: 0.60, 128: 0.55}, error=0.05))


def test_nothing_is_estimated_for_a_student_far_from_the_teacher():
    held, back = space()
    elsewhere = np.random.default_rng(3).standard_normal((WIDTH, WIDTH))
    near, far = (table(held, head, forms=("asymmetric",)) for head in (back, elsewhere))
    for scores, estimated in ((near, True), (far, False)):
        adapted = [r for r in scores["rows"] if r["model"] == "student"]
        assert adapted and all(("expected" in r) is estimated for r in adapted)
        assert ("is expected" in recommendation(scores)) is estimated
        assert ("far from the teacher" in recommendation(scores)) is not estimated
