"""The section `rank` of a stage."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from jasper_fast.config.rank import RankStageConfig
from jasper_fast.config.stage import StageConfig


def stage(**fields) -> StageConfig:
    return StageConfig(**{"name": "r", "train": ["*"], "heads": [8], "steps": 1, "lr": 1e-3, "rank": {}} | fields)


def test_the_temperature_of_scores_follows_the_targets():
    assert RankStageConfig().score_temperature == 0.05
    assert RankStageConfig(targets="bundle:judge").score_temperature == 1.0
    assert RankStageConfig(targets="grades", queries="q.jsonl").score_temperature == 1.0
    assert RankStageConfig(targets="bundle:judge", teacher_temperature=2.5).score_temperature == 2.5
    assert [RankStageConfig(targets=t, queries="q").cross_encoder for t in ("teacher", "grades", "folder")] == [
        None,
        None,
        "folder",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": {"listwise": 0}}, "listwise and contrastive both have weight 0"),
        ({"rank": {"targets": "grades"}}, "made queries have no grades. Fix: set queries"),
        ({"rank": {"candidates": 1}}, "greater than or equal to 2"),
        ({"rank": {"temperature": 0}}, "greater than 0"),
        ({"rank": {"margin": -0.1}}, "greater than or equal to 0"),
        ({"rank": {"queries": ""}}, "at least 1 character"),
        ({"vision": {}}, "`rank` and `vision` are two kinds of stages"),
        ({"batches": "neighbours"}, "a ranking stage draws random queries"),
        ({"narrow_start": "principal"}, "narrow heads start as they are"),
        ({"max_chars": 80}, "max_chars is for random batches of texts only"),
    ],
)
def test_impossible_settings_are_rejected(fields, message):
    with pytest.raises(ValidationError, match=message):
        stage(**fields)


def test_older_configurations_have_no_ranking():
    assert stage(rank=None).rank is None and StageConfig.model_fields["rank"].default is None
