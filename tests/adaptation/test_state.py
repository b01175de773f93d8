"""The saved state of an adaptation: settings, statistics and the texts that they cover."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jasper_fast.adaptation.state import ADAPT, DOCUMENTS, PROBES, STATISTICS, State, open_state, short_keys
from jasper_fast.data.text import text_digest
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.utils.errors import JasperError

DIGESTS = [text_digest(f"text {i}") for i in range(50)]
MODELS = {"student": 1, "teacher": 2}


def rows(width, seed=0):
    made = np.random.default_rng(seed).standard_normal((50, width)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_statistics_and_texts_come_back(tmp_path):
    state = State(tmp_path, {"a": 1})
    state.add(DOCUMENTS, rows(4), rows(6, 1), DIGESTS)
    state.save_facts(length=128)
    state.save_statistics(MODELS)
    again = open_state(tmp_path, {"a": 1})
    again.load_statistics()
    again.check_models(MODELS)
    assert again.facts == {"length": 128} and again.sums[DOCUMENTS].count == 50
    np.testing.assert_array_equal(again.sums[DOCUMENTS].cross, state.sums[DOCUMENTS].cross)
    new = again.is_new(DOCUMENTS, [*DIGESTS[:3], text_digest("another")])
    assert new.tolist() == [False, False, False, True]
    assert again.is_new("sentences", DIGESTS).all()
    for ours, theirs in zip(again.probes, state.probes, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(JasperError, match="of another student or teacher. Fix: "):
        again.check_models({**MODELS, "student": 3})


def test_parts_sum_to_the_whole(tmp_path):
    state, whole = State(tmp_path, {}), PairStatistics(4, 6)
    for part in (slice(0, 20), slice(20, 50)):
        state.add(DOCUMENTS, rows(4)[part], rows(6, 1)[part], DIGESTS[part])
    whole.add(rows(4), rows(6, 1))
    np.testing.assert_allclose(state.sums[DOCUMENTS].source, whole.source, atol=1e-12)
    assert len(state.counted[DOCUMENTS]) == 50


def test_other_settings_are_an_error_with_the_difference(tmp_path):
    State(tmp_path, {"teacher": {"revision": "x"}, "minutes": None}).save_facts()
    with pytest.raises(JasperError, match=r"(?s)teacher.revision: 'x' -> 'y'.*use another --out"):
        open_state(tmp_path, {"teacher": {"revision": "y"}, "minutes": None})


NEWER = json.dumps({"format": 99, "settings": {}, "facts": {}})


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', NEWER])
def test_a_damaged_or_newer_state_is_an_error(tmp_path, content):
    (tmp_path / ADAPT).write_text(content)
    with pytest.raises(JasperError, match="(damaged|another version).*Fix: "):
        open_state(tmp_path, {})


def test_damaged_statistics_are_an_error(tmp_path):
    state = State(tmp_path, {})
    state.add(DOCUMENTS, rows(4), rows(6, 1), DIGESTS)
    state.save_statistics(MODELS)
    file = tmp_path / STATISTICS
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(JasperError, match="damaged .*Fix: delete it"):
        State(tmp_path, {}).load_statistics()


def test_a_folder_with_something_else_is_rejected(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(JasperError, match="holds something else .*mine.txt.*Fix: use another --out"):
        open_state(tmp_path, {})


def test_vectors_of_another_model_are_recognised(tmp_path):
    state = State(tmp_path, {})
    teacher = rows(6, 1)
    state.add(DOCUMENTS, rows(4), teacher, DIGESTS)
    order = np.random.default_rng(2).permutation(50)
    shuffled = short_keys([DIGESTS[i] for i in order])
    state.check_probes(shuffled, lambda places: teacher[order[places]], "v.npy")
    state.check_probes(short_keys([text_digest("new")]), lambda places: pytest.fail("nothing to compare"), "v.npy")
    with pytest.raises(JasperError, match="v.npy: a document has another vector .*a cosine of"):
        state.check_probes(shuffled, lambda places: rows(6, 3)[order[places]], "v.npy")
    with pytest.raises(JasperError, match="widths 6 and 7"):
        state.check_probes(shuffled, lambda places: rows(7)[order[places]], "v.npy")
    assert len(state.probes[0]) == PROBES and (state.probes[0] == short_keys(DIGESTS)[:PROBES]).all()
