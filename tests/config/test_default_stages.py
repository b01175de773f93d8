"""Defaults of stages: minutes of the user against steps of a recipe."""

import pytest

from jasper_fast.config.load import load_config
from jasper_fast.utils.errors import ConfigError

MINIMAL = {"student": "x/y", "teachers": "x/y", "data": {"sources": "a.jsonl"}}


@pytest.mark.parametrize(
    ("overrides", "steps", "minutes"),
    [
        ([("stages.distil.minutes", 3)], 0, 3.0),
        ([("stages.distil.minutes", 3), ("stages.distil.lr", 1e-4)], 0, 3.0),
        ([("stages.distil.steps", 70)], 70, None),
    ],
)
@pytest.mark.parametrize("source", ["minilm-docstrings", MINIMAL])
def test_minutes_replace_the_steps_of_a_recipe_or_default(source, overrides, steps, minutes):
    stage = load_config(source, overrides).stages[1]
    assert (stage.name, stage.steps, stage.minutes) == ("distil", steps, minutes)


def test_minutes_and_steps_of_the_user_contradict_each_other():
    with pytest.raises(ConfigError, match="minutes"):
        load_config("minilm-docstrings", [("stages.distil.minutes", 3), ("stages.distil.steps", 70)])
