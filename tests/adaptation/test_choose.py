"""Choices by held-out agreement: maps, lengths and projections."""

import numpy as np
import pytest

from jasper_fast.adaptation.choose import (
    FORMS,
    HeldOutVectors,
    best_option,
    candidate_lengths,
    candidates,
    choose_length,
    choose_maps,
    choose_projection,
)
from jasper_fast.fitting.agreement import agreement
from jasper_fast.fitting.maps import ridge_map
from jasper_fast.fitting.statistics import PairStatistics

WIDTH, DOCUMENTS, QUESTIONS = 16, 300, 60


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def turned(rows, seed=5):
    """A space that only a map can lead back from."""
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0]
    return unit(rows @ rotation)


def held_out(change, noise=0.0, seed=0):
    """Return the teacher's embeddings, the student's (``change`` of them, with noise), and fitting pairs."""
    random = np.random.default_rng(seed)
    documents = unit(random.standard_normal((DOCUMENTS, WIDTH)))
    answers = np.arange(QUESTIONS)
    questions = unit(documents[answers] + 0.2 * random.standard_normal((QUESTIONS, WIDTH)))
    student = [unit(change(rows) + noise * random.standard_normal(rows.shape)) for rows in (questions, documents)]
    held = HeldOutVectors(student[0], questions, student[1], documents, answers)
    pairs = PairStatistics(WIDTH, WIDTH)
    pairs.add(student[1][QUESTIONS:], documents[QUESTIONS:])
    return held, pairs


def test_a_map_wins_where_the_student_uses_another_space():
    held, pairs = held_out(turned)
    chosen = choose_maps(candidates(pairs, None, same_space=True), held)
    choice = chosen["asymmetric"]
    assert choice.name.startswith("documents, λ ")
    assert [row["name"] for row in choice.table if row["chosen"]] == [choice.name]
    unfitted, fitted = (next(row for row in choice.table if row["name"] == name) for name in ("unfitted", choice.name))
    assert unfitted["overlap"] < 0.2 and fitted["overlap"] > 0.95
    assert fitted["difference"] == pytest.approx(fitted["overlap"] - unfitted["overlap"])
    assert "points of the teacher's ten neighbours against unfitted" in choice.reason
    # A rotation changes no ranking within one space, so no map can beat the unfitted student there.
    assert chosen["symmetric"].name == "unfitted"
    assert chosen["symmetric"].record()["table"][0]["overlap"] == 1


def test_the_unfitted_map_wins_where_fitting_cannot_help():
    held, pairs = held_out(lambda rows: rows, noise=0.1)
    for choice in choose_maps(candidates(pairs, None, same_space=True), held).values():
        row = next(row for row in choice.table if row["chosen"])
        assert row["name"] == "unfitted" or row["difference"] > row["difference_error"] > 0
        np.testing.assert_array_equal(choice.map.shape, (WIDTH, WIDTH))


def test_agreement_of_a_candidate_is_that_of_its_embeddings_in_float64():
    held, pairs = held_out(turned, noise=0.05)
    options = list(candidates(pairs, None, same_space=False))
    chosen = choose_maps(options, held)
    for place in (0, 3):
        head = options[place].map
        questions = unit(held.student_questions.astype(float) @ head)
        for form, documents in zip(
            FORMS, (unit(held.corpus_student.astype(float) @ head), held.corpus_teacher), strict=True
        ):
            overlap = agreement(questions, documents, held.teacher_questions, held.corpus_teacher).overlap
            assert chosen[form].table[place]["overlap"] == pytest.approx(overlap.mean(), abs=0.002)


def test_candidates_are_unfitted_and_the_mean_over_documents_and_sentences_by_strength():
    _, documents = held_out(turned)
    sentences = PairStatistics(WIDTH, WIDTH)
    sentences.add(np.eye(WIDTH), np.eye(WIDTH)[::-1])
    unfitted, *fitted = candidates(documents, sentences, same_space=True)
    assert (unfitted.name, unfitted.texts, unfitted.strength) == ("unfitted", "", None)
    np.testing.assert_array_equal(unfitted.map, np.eye(WIDTH))
    assert [option.strength for option in fitted] == [0.1, 1.0, 10.0, 100.0]
    assert fitted[1].name == "documents and sentences, λ 1"
    for option in fitted:
        alone = [ridge_map(sums, option.strength, np.eye(WIDTH)) for sums in (documents, sentences)]
        assert np.abs(alone[0] - alone[1]).max() > 0.01
        np.testing.assert_allclose(option.map, (alone[0] + alone[1]) / 2, atol=1e-12)


def test_without_sentences_the_candidates_are_fitted_on_documents():
    _, documents = held_out(turned)
    for sentences in (None, PairStatistics(WIDTH, WIDTH)):
        _, *fitted = candidates(documents, sentences, same_space=True)
        assert [option.texts for option in fitted] == ["documents"] * 4
        np.testing.assert_array_equal(fitted[2].map, ridge_map(documents, 10.0, np.eye(WIDTH)))


def test_the_default_wins_unless_the_difference_exceeds_its_error():
    default = np.tile([0.0, 1.0], 50)
    better, uncertain = default.copy(), default.copy()
    better[::4] = 1.0
    uncertain[:5] = 1 - default[:5]  # three up, two down
    assert best_option({"default": default, "better": better, "worse": default * 0.5}) == "better"
    assert uncertain.mean() > default.mean()
    assert best_option({"default": default, "uncertain": uncertain}) == "default"
    assert best_option({"default": default, "same": default.copy()}) == "default"


def test_questions_of_one_document_count_once():
    """One document with ten questions improves: as independent questions, that would be certain."""
    default, better = np.zeros(100), np.zeros(100)
    better[:10] = default[50] = 1.0
    groups = np.concatenate([np.zeros(10, int), np.arange(1, 91)])
    assert best_option({"default": default, "better": better}) == "better"
    assert best_option({"default": default, "better": better}, groups) == "default"


def test_too_few_questions_keep_the_default():
    held, pairs = held_out(turned)
    few = HeldOutVectors(
        held.student_questions[:9], held.teacher_questions[:9], held.corpus_student, held.corpus_teacher
    )
    choice = choose_maps(candidates(pairs, None, same_space=True), few)["asymmetric"]
    assert choice.name == "unfitted" and choice.reason == "9 held-out questions are too few to compare"
    assert "overlap" not in choice.table[0]


def test_the_better_projection_is_chosen():
    held, _ = held_out(lambda rows: rows)
    useful, useless = np.eye(WIDTH)[:, :12], np.eye(WIDTH)[:, 12:]
    for forms in (FORMS, FORMS[:1], FORMS[1:]):
        maps = dict.fromkeys(forms, np.eye(WIDTH))
        choice = choose_projection(held, maps, {"PCA": useless, "learned": useful})
        assert choice.name == "learned" and choice.map is useful
        assert choose_projection(held, maps, {"PCA": useful, "learned": useless}).name == "PCA"
        alone = choose_projection(held, maps, {"PCA": useful})
        assert (alone.name, alone.reason) == ("PCA", "the only option")


def test_the_overlap_of_a_projection_is_the_mean_of_its_forms():
    held, pairs = held_out(turned)
    chosen = choose_maps(candidates(pairs, None, same_space=True), held)
    maps = {form: choice.map for form, choice in chosen.items()}
    options = {"first": np.eye(WIDTH)[:, :12], "last": np.eye(WIDTH)[:, 12:]}
    both = choose_projection(held, maps, options).table
    alone = [choose_projection(held, {form: head}, options).table for form, head in maps.items()]
    for row, *rows in zip(both, *alone, strict=True):
        assert row["overlap"] == pytest.approx(np.mean([r["overlap"] for r in rows]))


LENGTHS = [
    # (tokens of the texts, the student's length, its limit, expected)
    ([100] * 50 + [300] * 50, 128, 512, [128, 256, 512]),
    ([100] * 50 + [300] * 50, 128, 256, [128, 256]),
    ([100] * 50 + [300] * 50, 200, 512, [200, 128, 256, 512]),
    ([100] * 99 + [300], 128, 512, [128]),
    ([40] * 100, 256, 512, [256]),
    ([400] * 100, 256, 512, [256, 128, 512]),
]


@pytest.mark.parametrize(("counts", "current", "limit", "expected"), LENGTHS)
def test_lengths_are_compared_if_enough_texts_are_longer(counts, current, limit, expected):
    assert candidate_lengths(np.array(counts), current, limit) == expected


def test_the_length_that_reads_more_is_chosen():
    held, _ = held_out(lambda rows: rows, noise=0.3)
    asked = []

    def encode(length):
        asked.append(length)
        noise = np.random.default_rng(1).standard_normal(held.corpus_teacher.shape)
        return unit(held.corpus_teacher + noise * {256: 0.05, 512: 0.5}[length])

    choice = choose_length(encode, [128, 256, 512], 128, held)
    assert (choice.length, choice.before) == (256, 128) and asked == [256, 512]
    assert [row["length"] for row in choice.table] == [128, 256, 512]
    assert choice.record()["table"][1]["chosen"] is True
    assert choose_length(encode, [128, 512], 128, held).length == 128
