"""Counting pairs a block at a time, the vectors that choices are made with, and the lengths to compare."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from datasets import Dataset

from jasper_fast.adaptation import steps
from jasper_fast.adaptation.documents import Corpus
from jasper_fast.adaptation.state import DOCUMENTS, SENTENCES, State
from jasper_fast.adaptation.steps import count_pairs, held_out_vectors
from jasper_fast.data.text import text_digest
from jasper_fast.data.text_counts import TextCounts


class Rows:
    """Unit rows that are made when they are read, as if they were on disk."""

    def __init__(self, width, seed):
        self.width, self.seed = width, seed

    def read(self, rows):
        made = np.empty((len(rows), self.width), np.float32)
        for place, row in enumerate(rows):
            made[place] = np.cos(np.arange(self.width) * (row % 97 + self.seed) + row)
        return made / np.linalg.norm(made, axis=1, keepdims=True)


def corpus_of(documents, held_out, questions, sentences):
    digests = [text_digest(str(i)) for i in range(documents + questions + sentences)]
    texts = Dataset.from_dict({"digest": digests})
    answers = np.arange(questions) % held_out
    return Corpus(texts, held_out, documents, questions, answers, {}, TextCounts(), 0)


def test_the_sums_are_those_of_all_rows_but_the_held_out_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "BLOCK", 16)
    monkeypatch.setattr(steps, "SAVED_ROWS", 30)
    corpus, student, teacher = corpus_of(100, 10, 12, 40), Rows(6, 1), Rows(9, 2)
    state, saved = State(tmp_path, {}), []
    new = count_pairs(state, corpus, student, teacher, lambda: saved.append(state.sums[DOCUMENTS].count))
    assert new == {DOCUMENTS: 90, SENTENCES: 40} and len(saved) == 4  # twice on the way, and at the ends
    for kind, rows in ((DOCUMENTS, range(10, 100)), (SENTENCES, range(112, 152))):
        left, right = student.read(rows).astype(np.float64), teacher.read(rows).astype(np.float64)
        np.testing.assert_allclose(state.sums[kind].cross, left.T @ right, atol=1e-12)
        np.testing.assert_allclose(state.sums[kind].target, right.T @ right, atol=1e-12)
    again = count_pairs(state, corpus, student, teacher, lambda: pytest.fail("nothing to save"))
    assert again == {DOCUMENTS: 0, SENTENCES: 0} and state.sums[DOCUMENTS].count == 90


def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "BLOCK", 256)
    fixed = np.ones((256, 128), np.float32) / 128**0.5

    class Constant(Rows):
        def read(self, rows):
            return fixed[: len(rows)].copy()

    corpus = corpus_of(20_000, 10, 0, 0)
    tracemalloc.start()
    count_pairs(State(tmp_path, {}), corpus, Constant(128, 0), Constant(128, 0), lambda: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6 < 2 * 20_000 * 128 * 4  # bytes; all rows would take 20 MB


def test_held_out_documents_are_searched_by_their_questions():
    corpus, student, teacher = corpus_of(50, 5, 8, 10), Rows(4, 1), Rows(6, 2)
    held = held_out_vectors(corpus, student, teacher)
    np.testing.assert_array_equal(held.student_questions, student.read(range(50, 58)))
    np.testing.assert_array_equal(held.corpus_teacher, teacher.read(range(50)))
    np.testing.assert_array_equal(held.answers, corpus.answers)


def test_without_questions_the_held_out_documents_search_the_others():
    corpus, student, teacher = corpus_of(50, 5, 0, 0), Rows(4, 1), Rows(6, 2)
    held = held_out_vectors(corpus, student, teacher)
    np.testing.assert_array_equal(held.teacher_questions, teacher.read(range(5)))
    np.testing.assert_array_equal(held.corpus_student, student.read(range(5, 50)))
    assert held.answers is None
