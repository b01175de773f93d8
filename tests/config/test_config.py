"""A configuration is checked whole: all problems at once, each with its key and the fix."""

from __future__ import annotations

import inspect
import re

import pytest

from jasper_fast.config.diff import config_difference
from jasper_fast.config.load import dump_config, load_arguments, load_config, recipe_names
from jasper_fast.config.overrides import parse_overrides
from jasper_fast.config.stage import StageConfig
from jasper_fast.config.yaml import parse_yaml
from jasper_fast.utils.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_round_trips(name, tmp_path):
    config = load_config(name)
    assert config.name == name
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("name", recipe_names())
def test_printed_fields_have_comments_and_round_trip(name):
    config = load_config(name)
    plain, text = dump_config(config), dump_config(config, comments=True)
    assert load_config(parse_yaml(text)) == config
    assert all(line in plain or len(line) <= 120 for line in text.splitlines())
    uncommented = [
        line.partition("  # ")[0].rstrip() for line in text.splitlines() if not line.lstrip().startswith("#")
    ]
    assert uncommented == plain.splitlines()
    assert re.search(r"^seed: 0 +# seed of new weights", text, re.MULTILINE)
    assert re.search(r"^  lr: \S+ +# peak learning rate$", text, re.MULTILINE)
    assert "    cosine: 10.0                      # distance to the teacher's embedding" in text


@pytest.mark.parametrize(
    "prompt", ["a\nb", "\na: b\n\n", "a  # b", "#", "a\u2028b", "a\u2029\u2028b", "'\t'", "é" * 200, "- x"]
)
def test_comments_leave_any_text_as_it_is(prompt):
    config = load_config(None, [("student.prompts", {"query": prompt, "document": prompt})])
    text = dump_config(config, comments=True)
    assert load_config(parse_yaml(text)) == config
    assert text.count("prompt of documents") == 1 + len(config.teachers)


def test_comments_are_optional_without_the_source(monkeypatch):
    def missing(model):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", missing)
    config = load_config()
    text = dump_config(config, comments=True)
    assert load_config(parse_yaml(text)) == config
    assert "prompt of documents" not in text and "globs over parameter names" in text


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
        "teachers.0: expected exactly one of `model` and `vectors`. Fix: give either `model`",
        "did you mean `seed`?",
    ):
        assert expected in text
    assert len(error.value.problems) == len(overrides)


def test_problems_of_a_stage_and_across_stages_come_with_the_fields_own():
    """One wrong field hides no other: not the rest of its stage, nor what only the whole can tell."""
    recipe = load_config().model_dump(mode="json")
    first, second, third = recipe["stages"]
    first.update(name="head", train=[], last_layers=0, texts=1)
    second.update(name="head", heads=[7], narrow_target="self", batch_sizes=16)
    third.update(heads=[128], lr="fast", codes=["int8"])
    recipe["student"]["prompts"]["query"] = "say {text} again"
    with pytest.raises(ConfigError) as error:
        load_arguments(recipe, ["--seed", "--student.max_length=0", "word"])
    expected = [
        "--seed needs a value",
        "unexpected argument 'word'",
        "stages.1.batch_sizes: unknown key; did you mean `batch_size`?",
        "student.max_length: Input should be greater than 0",
        "stages.0: stage 'head': it trains nothing",
        "stages.0: stage 'head': texts 1 is less than batch_size 128",
        "stages.2.lr: Input should be a valid number",
        "stage name 'head' is used twice",
        "student.heads [64, 32] are in no stage's heads",
        "stage 'head' uses heads [7], and the student has [384, 128, 64, 32]",
        "stage 'head': narrow_target 'self' needs the widest head, 384",
        "student.prompts.query: prompt 'say {text} again': nothing may follow",
    ]
    assert len(error.value.problems) == len(expected), error.value
    for line in expected:
        assert any(problem.startswith(line) for problem in error.value.problems), (line, error.value)


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        ([("studnt.heads", "[384]")], ["studnt: unknown key; did you mean `student`?"]),
        ([("student", "3")], ["student: Input should be a valid dictionary"]),
        ([("student.heads", "[384, wide]")], ["student.heads.1: Input should be a valid integer"]),
        ([("stages", "[]")], ["stages: List should have at least 1 item"]),
        ([("stages.0.heads", "[]")], ["stages.0.heads: List should have at least 1 item"]),
        ([("stages.0.vision", "{}"), ("imagess", "{sources: [{path: x}]}"), ("student.vision", "{model: x}")],
         ["imagess: unknown key; did you mean `images`?"]),
    ],
)  # fmt: skip
def test_one_mistake_is_told_once(overrides, problems):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    found = error.value.problems
    assert len(found) == len(problems) and all(map(str.startswith, found, problems)), found


@pytest.mark.parametrize(
    ("weights", "least"),
    [
        ({"cosine": 1}, 1),
        ({"cosine": 0, "relative_similarity": 0}, 2),
        ({"cosine": 0, "similarity": 0}, 3),
        ({"cosine": 0, "similarity": 0, "relative_similarity": 0, "neighbourhood": 1}, 3),
    ],
)
def test_a_batch_from_which_nothing_can_be_learnt_is_refused(weights, least):
    stage = {"name": "s", "train": ["*"], "heads": [8], "steps": 1, "lr": 0.1, "weights": weights}
    assert StageConfig(**stage, batch_size=least).weights.compares_texts(least) == (least > 1)
    if least > 1:
        for settings in (stage, stage | {"weights": {}, "narrow_weights": weights}):
            with pytest.raises(ValueError, match=f"nothing can be learnt .* from a batch of {least - 1}"):
                StageConfig(**settings, batch_size=least - 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("stages.0.train", "[]"), "trains nothing"),
        (("stages.0.lr", ".inf"), "stages.0.lr: Input should be a finite number"),
        (("stages.0.margin", ".nan"), "stages.0.margin: Input should be a finite number"),
        (("stages.0.weights.similarity", ".inf"), "weights.similarity: Input should be a finite number"),
        (("stages.0.lr", "true"), "stages.0.lr: expected a number, got True"),
        (("stages.0.temperature", "{384: true}"), "stages.0.temperature.384: expected a number, got True"),
        (("stages.0.temperature", "-1"), "stages.0.temperature: Input should be greater than 0, got -1"),
        (("seed", str(10**9 + 1)), "seed: Input should be less than or equal to 1000000000"),
        (("student.prompts.query", "say {text} again"), "student.prompts.query: .* nothing may follow {text}"),
        (("stages.0.heads", "[7]"), "the student has"),
        (("stages.0.steps", "0"), "stage .head.: neither `steps` nor `minutes`"),
        (("stages.0.steps", "1.5"), "stages.0.steps"),
        (("stages.0.texts", "1"), "less than batch_size"),
        (("stages.1.name", "head"), "used twice"),
        (("stages.0.weights", "{cosine: 0, similarity: 0, relative_similarity: 0}"), "every loss has weight 0"),
        (("checkpoint.keep", "1"), "checkpoint.keep"),
        (("student.heads", "[384, 128, 64, 32, 16]"), r"heads \[16\] are in no stage"),
        (("data.cut_sentences", "[3, 1]"), "must not exceed"),
        (("data.sources", "[]"), "data.sources"),
        (("student.heads", "[384, 0]"), "student.heads.1"),
        (("student.vector_dropout", "1.0"), "student.vector_dropout"),
        (
            ("stages.0.temperature", "0"),
            "^1 problem in .*\n.*stages.0.temperature: Input should be greater than 0, got 0",
        ),
        (
            ("stages.0.temperature", "{384: -1}"),
            "^1 problem in .*\n.*stages.0.temperature.384: .* greater than 0, got -1",
        ),
        (("images", "{sources: [{path: some}]}"), "`images` are given, but no stage learns from images"),
        (("stages.0.temperature", "{9: 0.1}"), r"temperature has widths \[9\], which the stage\'s heads \[384\] lack"),
        (("stages.0.codes", "[int4]"), "stages.0.codes"),
        (("stages.0.random_share", "1.0"), "stages.0.random_share"),
        (("stages.2.random_share", "0.999"), "leaves 1 of 512 texts for groups of 8 neighbours"),
        (("stages.2.batch_size", "510"), "not a multiple of neighbours 8"),
    ],
)
def test_impossible_values_are_named(override, message):
    recipe = load_config().model_dump(mode="json")
    recipe["stages"][0].update(train=["heads.384.*"], last_layers=0, name="head")
    recipe["stages"][2]["random_share"] = 0.0
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [override])


@pytest.mark.parametrize("name", ["no-such-recipe", "long" * 100, "nul\0"])
def test_a_missing_file_lists_the_recipes(name):
    with pytest.raises(ConfigError, match="minilm-docstrings"):
        load_config(name)


def test_a_file_that_is_not_a_mapping(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(path)
    for content, message in (
        (b"", "found nothing"),
        (b"a: [1,", "not YAML"),
        (b"name: 2026-13-01", "not YAML: month must be"),
        ("name: träge".encode("latin-1"), "not text in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["3", "1e10", "true", "2026-11-30"])
@pytest.mark.parametrize("key", ["name", "data.cache", "student.revision", "teachers.0.revision"])
def test_text_fields_take_names_that_look_like_numbers(key, text):
    config = load_config(None, parse_overrides([f"--{key}", text]))
    value = config
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    assert value == text


def test_overrides_from_the_command_line():
    assert parse_overrides(["--a.b", "1", "--c=x"]) == [("a.b", "1"), ("c", "x")]
    config = load_config(None, parse_overrides(["--stages.0.lr", "1e-4", "--seed=3"]))
    assert config.stages[0].lr == 1e-4 and config.seed == 3
    assert load_arguments(None, ["--stages.0.lr", "1e-4", "--seed=3"]) == config
    changed = load_config(None, [("stages.0.train", ["*"]), ("student.prompts.query", "Query: ")])
    assert changed.student.prompts.query == "Query: " and changed.stages[0].train == ["*"]
    assert load_config(None, [("stages.0.train", "*")]).stages[0].train == ["*"]  # no YAML; a list of one
    assert load_config(None, [("student.prompts.query", "2026-13-01")]).student.prompts.query == "2026-13-01"
    with pytest.raises(ConfigError, match="needs a value"):
        parse_overrides(["--seed"])
    with pytest.raises(ConfigError, match="unexpected argument"):
        parse_overrides(["seed", "3"])


def test_the_difference_names_changed_added_and_dropped_fields():
    old = {"a": 1, "b": {"c": [1, 2]}, "gone": 1}
    new = {"a": 1, "b": {"c": [1, 3, 4]}}
    assert config_difference(old, new) == [
        "b.c.1: 2 -> 3",
        "b.c.2: not set -> 4",
        "gone: 1 -> not set",
    ]


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        (None, 2, "not set -> 2"),
        ("a", None, "'a' -> not set"),
        (False, True, "false -> true"),
        ([1], [], "not set -> []"),
    ],
)
def test_the_difference_is_in_plain_words(old, new, shown):
    assert config_difference({"a": old, "b": 1}, {"a": new, "b": 1})[0] == f"a: {shown}"
    assert config_difference({"a": None, "b": 1}, {"b": 1}) == []


def test_a_temperature_for_each_head_round_trips(tmp_path):
    config = load_config(None, [("stages.2.temperature", "{64: 0.07, 32: 0.1}")])
    assert config.stages[2].temperature == {64: 0.07, 32: 0.1}
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config == load_config(config.model_dump(mode="json"))
