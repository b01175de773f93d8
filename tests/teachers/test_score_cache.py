"""Scores of a cross-encoder on disk."""

from __future__ import annotations

import numpy as np
import pytest

from jasper_fast.distributed.ranks import Ranks
from jasper_fast.teachers import score_cache
from jasper_fast.teachers.score_cache import ScoreCache
from jasper_fast.utils.errors import JasperError

PAIRS = [(f"query {n % 7}", f"document {n}") for n in range(20)]


class Judge:
    """A cross-encoder whose score is the number of the document. It keeps what it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.stop_after = stop_after

    def __call__(self):
        return self.score

    def score(self, pairs):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(list(pairs))
        return np.array([float(document.split()[1]) for _, document in pairs], np.float32)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(score_cache, "CHUNK", 6)


def cache(tmp_path, identity="one") -> ScoreCache:
    return ScoreCache(tmp_path, "bundle:judge", identity)


def test_scores_are_computed_once_and_found_in_any_order(tmp_path):
    judge, done = Judge(), []
    scores = cache(tmp_path).scores(PAIRS, judge, done.append)
    assert scores.dtype == np.float32 and scores.tolist() == list(range(20))
    assert [len(part) for part in judge.asked] == [6, 6, 6, 2] and done == [0, 6, 6, 6, 2]
    never = Judge(stop_after=0)
    assert cache(tmp_path).scores(PAIRS[::-1] + PAIRS[:3], never).tolist() == [*range(19, -1, -1), 0, 1, 2]
    assert cache(tmp_path).scores([], never).tolist() == []
    assert cache(tmp_path).folder.name.startswith("scores-bundle-judge-")


def test_another_cross_encoder_has_other_scores(tmp_path):
    cache(tmp_path).scores(PAIRS, Judge())
    judge = Judge()
    cache(tmp_path, "two").scores(PAIRS, judge)
    assert sum(map(len, judge.asked)) == 20


def test_an_interrupted_call_continues_with_the_same_chunks(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path).scores(PAIRS, Judge(stop_after=2))
    whole, rest = Judge(), Judge()
    cache(tmp_path / "whole").scores(PAIRS, whole)
    assert cache(tmp_path).scores(PAIRS, rest).tolist() == list(range(20))
    assert rest.asked == whole.asked[2:]


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"", lambda content: content + b"x"])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    own, lines = cache(tmp_path), []
    own.scores(PAIRS, Judge())
    file = sorted(own.folder.glob("*.npy"))[1]
    file.write_bytes(damage(file.read_bytes()))
    judge = Judge()
    assert own.scores(PAIRS, judge, warn=lines.append).tolist() == list(range(20))
    assert 0 < sum(map(len, judge.asked)) <= 6 and "failed its checksum" in lines[0] and len(lines) == 1


def test_equal_pairs_are_scored_together_and_no_others_share_a_key(tmp_path):
    pairs = [("a", "b"), ("a", "b"), ("ab", ""), ("", "ab"), ("a\0b", ""), ("a", "\0b")]
    scores = cache(tmp_path).scores(pairs, lambda: lambda part: np.arange(len(part), dtype=np.float32))
    assert scores[0] == scores[1] and len(set(scores.tolist())) == 5


def test_ranks_divide_the_chunks(tmp_path):
    class Silent(Ranks):
        def wait_for_all(self):
            pass

        def on_main(self, action):
            return action()

    parts = []
    for rank in (0, 1):
        judge = Judge()
        fresh = cache(tmp_path / str(rank))
        with pytest.raises(JasperError, match="scores of another process are missing"):
            fresh.scores(PAIRS, judge, ranks=Silent(rank, 2))
        parts.append(judge.asked)
    assert [len(part) for part in parts[0]] == [6, 6] and [len(part) for part in parts[1]] == [6, 2]
    assert sorted(pair for asked in parts for part in asked for pair in part) == sorted(PAIRS)


def test_scores_that_are_not_finite_are_rejected_and_not_kept(tmp_path):
    with pytest.raises(JasperError, match="2 of 2 scores are not finite"):
        cache(tmp_path).scores(PAIRS[:2], lambda: lambda part: np.full(len(part), np.nan, np.float32))
    assert cache(tmp_path).scores(PAIRS[:2], Judge()).tolist() == [0, 1]
