"""A configuration is checked whole: every problem at once, each with its key and the mend."""

import pytest

from jasper_fast.config import config_difference, dump_config, load_arguments, load_config, recipe_names
from jasper_fast.config_text import parse_overrides
from jasper_fast.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_round_trips(name, tmp_path):
    config = load_config(name)
    assert config.name == name
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_all_problems_are_reported_at_once():
    overrides = [
        ("stages.0.lrr", 1),
        ("stages.99.lr", "2"),
        ("student.heads", "[4, 4]"),
        ("stages.1.lr", "abc"),
        ("teachers.0.vectors", "x.npy"),
        ("sed", "2"),
    ]
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    text = str(error.value)
    for expected in (
        "stages.0.lrr: unknown key; did you mean `lr`?",
        "--stages.99.lr",
        "head widths must differ",
        "stages.1.lr",
        "teachers.0: give either `model`",
        "did you mean `seed`?",
    ):
        assert expected in text
    assert len(error.value.problems) == len(overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("stages.0.train", "[]"), "trains nothing"),
        (("stages.0.heads", "[7]"), "the student has"),
        (("stages.0.steps", "0"), "stages.0.steps"),
        (("stages.0.steps", "1.5"), "stages.0.steps"),
        (("stages.0.texts", "1"), "less than batch_size"),
        (("stages.1.name", "head"), "used twice"),
        (("stages.0.weights", "{cosine: 0, similarity: 0, relative_similarity: 0}"), "every loss has weight 0"),
        (("checkpoint.keep", "1"), "checkpoint.keep"),
        (("student.heads", "[384, 128, 64, 32, 16]"), r"heads \[16\] stand in no stage"),
        (("data.cut_sentences", "[3, 1]"), "must not exceed"),
        (("data.sources", "[]"), "data.sources"),
        (("student.heads", "[384, 0]"), "student.heads.1"),
        (("student.vector_dropout", "1.0"), "student.vector_dropout"),
        (("stages.0.temperature", "0"), "stages.0.temperature"),
        (("stages.0.temperature", "{384: -1}"), "stages.0.temperature"),
        (("stages.0.temperature", "{9: 0.1}"), r"temperature names \[9\]"),
        (("stages.0.codes", "[int4]"), "stages.0.codes"),
        (("stages.0.random_share", "1.0"), "stages.0.random_share"),
        (("stages.2.random_share", "0.999"), "leaves no room for 4 neighbours"),
        (("stages.2.batch_size", "510"), "not a multiple of neighbours 4"),
    ],
)
def test_impossible_values_are_named(override, message):
    recipe = load_config().model_dump(mode="json")
    recipe["stages"][0].update(train=["heads.384.*"], last_layers=0, name="head")
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [override])


def test_a_missing_file_lists_the_recipes():
    with pytest.raises(ConfigError, match="minilm-docstrings"):
        load_config("no-such-recipe")


def test_a_file_that_is_not_a_mapping(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(path)
    path.write_text("a: [1,")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(path)


def test_overrides_from_the_command_line():
    assert parse_overrides(["--a.b", "1", "--c=x"]) == [("a.b", "1"), ("c", "x")]
    config = load_config(None, parse_overrides(["--stages.0.lr", "1e-4", "--seed=3"]))
    assert config.stages[0].lr == 1e-4 and config.seed == 3
    changed = load_config(None, [("stages.0.train", ["*"]), ("student.prompts.query", "Query: ")])
    assert changed.student.prompts.query == "Query: " and changed.stages[0].train == ["*"]
    with pytest.raises(ConfigError, match="stages.0.train"):  # a list is wanted: no traceback from the YAML reader
        load_config(None, [("stages.0.train", "*")])
    with pytest.raises(ConfigError, match="needs a value"):
        parse_overrides(["--seed"])
    with pytest.raises(ConfigError, match="unexpected argument"):
        parse_overrides(["seed", "3"])


def test_the_difference_names_changed_added_and_dropped_fields():
    old = {"a": 1, "b": {"c": [1, 2]}, "gone": 1}
    new = {"a": 1, "b": {"c": [1, 3, 4]}}
    assert config_difference(old, new) == [
        "b.c.1: 2 -> 3",
        "b.c.2: '(absent)' -> 4",
        "gone: 1 -> '(absent)'",
    ]


def test_a_temperature_for_each_head_round_trips(tmp_path):
    config = load_config(None, [("stages.2.temperature", "{64: 0.07, 32: 0.1}")])
    assert config.stages[2].temperature == {64: 0.07, 32: 0.1}
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config == load_config(config.model_dump(mode="json"))
