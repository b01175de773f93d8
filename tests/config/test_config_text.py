"""YAML: what is read as what, and what is refused with its file, line and key."""

from __future__ import annotations

import pytest

from jasper_fast.config.load import load_arguments, load_config
from jasper_fast.config.overrides import ALIASES
from jasper_fast.config.yaml import dump_yaml, parse_yaml, read_yaml
from jasper_fast.reporting.model_card import front_matter
from jasper_fast.utils.errors import ConfigError

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join(f'*{old}' for _ in range(9))}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join(f'*{old}' for _ in range(9))}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", "line 3: `name` is given twice. Fix: keep one"),
        ("stages:\n- name: a\n  lr: 1\n  lr: 2\n", "line 4: `lr` is given twice"),
        ("data: {limit: 1, limit: 1}\n", "line 1: `limit` is given twice"),
        ("'a': 1\na: 2\n", "line 2: `a` is given twice"),
        ("1: x\n1: y\n", "line 2: `1` is given twice"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  d: 1\n  d: 2\n", "line 5: `d` is given twice"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x\n", "line 4: `<<` is given twice"),
        ("1: x\n0x1: y\n", 'line 2, column 1: found duplicate key "1"'),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: expected a single document in the stream, but found another"),
        ("a:\n\t- 1\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("a: [1,", "line 1, column 7: expected the node content"),
        ("a: 1 b: 2", "line 1, column 7: mapping values are not allowed here"),
        ("a: *nowhere", "line 1, column 4: found undefined alias 'nowhere'"),
        ("a: @x", "line 1, column 4: found character '@' that cannot start any token"),
        ("a: \x00", "not YAML: unacceptable character #x0000"),
        ("a: &a [*a]", "contain themselves"),
        (BOMB, "aliases expand to more than 100,000 values"),
        (MERGE_BOMB, "aliases expand to more than 100,000 values"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("a: !!python/object:os.system x", "could not determine a constructor for the tag"),
        ("a: !!bool maybe", "not YAML: impossible value 'maybe'"),
        ('a: "\\UFFFFFFFF"', "not YAML: "),
        ("%YAML 1.11\n---\na: 1", "not YAML: "),
        ("a: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("null", "expected a mapping of fields, found nothing"),
        ("just words", "expected a mapping of fields, found str"),
        ("1: x\nname: y", "1: a field's name must be text"),
        ("null: x", "None: a field's name must be text"),
        ("? [1, 2]\n: x", r"(1, 2): a field's name must be text"),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_place(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert str(error.value).startswith(f"1 problem in {file}:\n  - ") and message in str(error.value), error.value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfen\x00a\x00m\x00e\x00", "not text in UTF-8"),
        (b"\x80\x04\x95\x00", "not text in UTF-8"),
        (b"PK\x03\x04\x00\x00", "unacceptable character"),
        (b"", "found nothing"),
        (b"# only a comment\n", "found nothing"),
    ],
)
def test_binary_and_empty_files(content, message, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("+1e5", 1e5),
        (".5", 0.5),
        ("1_000", 1000),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("yes", "yes"),
        ("off", "off"),
        ("True", True),
        ("~", None),
        ("1:30", "1:30"),
        ("'1e-4'", "1e-4"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
    ],
)
def test_values_are_those_of_yaml_1_2_and_come_back(text, value):
    assert parse_yaml(f"x: {text}") == {"x": value} == parse_yaml(dump_yaml({"x": value}))


@pytest.mark.parametrize(
    "text",
    [
        "1e-4",
        "017",
        "0o17",
        "yes",
        "null",
        "",
        "2026-01-01",
        "1_0",
        "a: b",
        "*",
        "=",
        "ü…🦊",
        "\udcff",
        "a\nb\n",
        " x ",
        "ü\x85x",
    ],
)
def test_text_that_looks_like_something_else_stays_text(text):
    assert parse_yaml(dump_yaml({"x": text, "y": {"z": [text]}})) == {"x": text, "y": {"z": [text]}}


def test_a_byte_order_mark_and_merged_sections_are_read(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfa: &a {x: 1}\nb: {<<: *a, y: 2}\n")
    assert read_yaml(tmp_path / "c.yaml", "c") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\nlicense: apache-2.0\n---\n# Card", "mit"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: mit\ndate: 2026-13-01\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n\tlicense: mit\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("---\na: &a [*a]\nlicense: mit\n---\n", None),
        ("---\nlicense: !!bool maybe\n---\n", None),
        ("# no header", None),
    ],
)
def test_other_peoples_cards_are_read_as_they_are(card, licence):
    assert front_matter(card).get("license") == licence


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["my-run.yaml"], "unexpected argument 'my-run.yaml'; did you mean --config my-run.yaml?"),
        (["my-run.yml"], "did you mean --config my-run.yml?"),
        (["word"], "unexpected argument 'word'. Fix: set a field like --stages.0.lr 1e-4"),
        (["--lr", "1e-4"], "--lr: unknown key; did you mean `--stages.N.lr`?"),
        (["--learning_rate", "1e-4"], "--learning_rate: unknown key; did you mean `--stages.N.lr`?"),
        (["--learning-rate=1e-4"], "--learning-rate: unknown key; did you mean `--stages.N.lr`?"),
        (["--epochs", "3"], "did you mean `--stages.N.steps`?"),
        (["--batch-size", "8"], "did you mean `--stages.N.batch_size`?"),
        (["--output", "x"], "--output: unknown key; did you mean `--out`?"),
        (["--dry_run", "1"], "did you mean `--dry-run`?"),
        (["--teachr", "x"], "--teachr: unknown key; did you mean `--teacher`?"),
        (["--text", "x"], "--text: unknown key; did you mean `--texts`?"),
        (["--column", "x"], "--column: unknown key; did you mean `--columns`?"),
        (["--extends", "x"], "--extends: unknown key; did you mean `--config`?"),
        (
            ["--max_length", "9"],
            "`--student.max_length` or `--teachers.N.max_length` or `--stages.N.rank.max_length` "
            "or `--stages.N.max_length`?",
        ),
        (["--stages.0.learning_rate", "1"], "--stages.0.learning_rate: unknown key; did you mean `lr`?"),
        (["--zzz", "1"], "--zzz: unknown key; known: name, seed, "),
        (["--seed", "1", "--seed", "1"], "--seed is given twice. Fix: give it once"),
        (["--seed=1", "--seed", "2"], "--seed is given twice. Fix: give it once"),
        (["--stages.0.lr", "1", "--stages.0", "{}"], "--stages.0 would undo --stages.0.lr, which comes before it"),
        (["--seed", ""], "seed: Input should be a valid integer, got ''"),
        (["--seed="], "seed: Input should be a valid integer, got ''"),
        (["--log.every", "--seed", "3"], "--log.every needs a value"),
        (
            ["--stages.-1.lr", "1"],
            "a list is indexed by position from 0 to 2, or by name (head, distil, reduce); 3 adds an item (got '-1')",
        ),
        (["--stages.+1.lr", "1"], "(got '+1')"),
        (["--stages.4.lr", "1"], "(got '4')"),
        (["--stages.3.lr", "1"], "stages.3.heads: Field required"),
        (["--stages.one.lr", "1"], "(got 'one')"),
        (["--stages.distill.lr", "1"], "--stages.distill.lr: no item is named 'distill'; did you mean `distil`?"),
        (["--teachers.5.model", "x"], "a list is indexed by position from 0 to 0; 1 adds an item (got '5')"),
        (["--name.x", "1"], "--name.x: `name` is a value, not a section"),
        (["--stages..lr=1"], "--stages..lr=1: expected a field's name"),
        (["--=1"], "--=1: expected a field's name"),
        (["--data.sources", "[{path: a, path: b}]"], "--data.sources: line 1: `path` is given twice"),
        (["--student.heads", "384,x"], "student.heads.1: Input should be a valid integer, got 'x'"),
        (["--stages.0.steps", "1,000"], "stages.0.steps: Input should be a valid integer, got '1,000'"),
        (["--data.sources", "3"], "data.sources: Input should be a valid list, got 3"),
        (["--stages", "a,b"], "stages.0: Input should be a valid dictionary"),
        (["--stages.0.last_layers", "-1"], "stages.0.last_layers: Input should be greater than or equal to 0, got -1"),
        (["--stages.0.last_layers", "al"], "stages.0.last_layers: Input should be 'all', got 'al'"),
        (["--texts", "a", "--data.sources", "b"], "--data.sources is given twice"),
        (["--seed", "\udcff"], "seed: Input should be a valid integer"),
        (["--seed", "9" * 5000], "seed: Input should be a valid integer"),
    ],
)
def test_problems_of_the_command_line_are_its_own(arguments, problem):
    with pytest.raises(ConfigError) as error:
        load_arguments(None, arguments, ("config", "out", "print-config", "dry-run", *ALIASES))
    assert str(error.value).splitlines()[0].endswith("in the command line:")
    assert problem in str(error.value) and "recipe" not in str(error.value), error.value


def test_problems_of_both_places_are_told_apart(tmp_path):
    recipe = load_config().model_dump(mode="json")
    recipe["stages"][0]["lr"], recipe["sed"] = "fast", 1
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    with pytest.raises(ConfigError) as error:
        load_arguments(tmp_path / "mine.yaml", ["--seed", "x", "--lr", "1"], ("out",))
    assert str(error.value).splitlines() == [
        "2 problems in the command line:",
        "  - --lr: unknown key; did you mean `--stages.N.lr`?",
        "  - seed: Input should be a valid integer, got 'x'",
        f"2 problems in {tmp_path / 'mine.yaml'}:",
        "  - sed: unknown key; did you mean `seed`?",
        "  - stages.0.lr: Input should be a valid number, unable to parse string as a number, got 'fast'",
    ]
    assert len(error.value.problems) == 4


def test_lists_take_commas_and_empty_text_is_text():
    def changed(key, value):
        return load_arguments(None, [f"--{key}", value])

    assert changed("student.heads", "384, 128,64,32") == load_config()
    assert changed("student.layers", "0,3").student.layers == [0, 3]
    assert changed("student.layers", "3").student.layers == 3  # the number 3, not a list
    assert changed("stages.1.train", "heads.*,encoder.*").stages[1].train == ["heads.*", "encoder.*"]
    assert changed("stages.1.train", "*").stages[1].train == ["*"]
    assert changed("data.cut_sentences", "1,3").data.cut_sentences == (1, 3)
    assert changed("name", "a.b").name == "a.b"
    assert changed("student.prompts.query", "a,b: ").student.prompts.query == "a,b: "
    assert changed("teachers.0.prompts.query", "").teachers[0].prompts.query == ""  # none; left out: the model's own
    assert changed("teachers.0.prompts.query", "null").teachers[0].prompts.query is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("minilm-docstring", "minilm-docstrings"),
        ("minilm_docstrings", "minilm-docstrings"),
        ("minilm-docstrings.yaml", "minilm-docstrings"),
        ("jasper_en", "jasper-en"),
        ("glyph", "glyphs"),
        ("{folder}/my-rnu.yaml", "{folder}/my-run.yaml"),
    ],
)
def test_a_misspelt_recipe_or_file_is_recognised(name, meant, tmp_path):
    (tmp_path / "my-run.yaml").touch()
    with pytest.raises(ConfigError, match="is neither a file nor a recipe; did you mean") as error:
        load_config(name.format(folder=tmp_path))
    assert f"`{meant.format(folder=tmp_path)}`?" in str(error.value)
