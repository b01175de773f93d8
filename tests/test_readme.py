"""What the README shows can be typed: its configuration is valid, its commands and files exist."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

from jasper_fast.config import load_arguments, load_config, recipe_names
from jasper_fast.config_text import parse_yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_configuration_shown_is_valid():
    (shown,) = blocks("yaml")
    config = load_config(parse_yaml(shown))
    assert [stage.name for stage in config.stages] == ["head", "distil", "reduce"]


def test_python_shown_parses_and_imports_what_there_is():
    for block in blocks("python"):
        compile(block, "README.md", "exec")
        for module, names in re.findall(r"from (jasper_fast[\w.]*) import (.+)", block):
            found = __import__(module, fromlist=["x"])
            assert all(hasattr(found, name.strip()) for name in names.split(","))


def test_commands_shown_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert {"jasper_fast.train", "jasper_fast.teach", "jasper_fast.evaluate", "jasper_fast.export"} <= modules
    assert all(find_spec(module) for module in modules)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake (train|test|soak|\w+)`", README)) <= targets


def test_the_command_for_pictures_of_ones_own_names_everything():
    (command,) = re.findall(r"python -m jasper_fast.train --config (pictures-alt .*?)\n```", README, flags=re.DOTALL)
    recipe, *overrides = shlex.split(command.replace("\\\n", " "))
    config = load_arguments(recipe, overrides)
    assert config.images is not None
    pictures, texts = config.images.sources[0], config.data.sources[0]
    assert (pictures.path, pictures.captions, texts.path) == ("my_pictures.zip", *["my_captions.jsonl"] * 2)
    assert pictures.caption_columns == texts.columns == ["caption"]


def test_files_and_recipes_named_exist():
    section = README.split("## How the pieces fit")[1]
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", section):
        assert (ROOT / name).exists() or (ROOT / "jasper_fast" / name).exists(), name
    shown = re.search(r"Shipped recipes: (.*?)\.\n\n", README, flags=re.DOTALL)
    assert shown is not None
    assert {n for n in re.findall(r"`([\w-]+)`", shown[1])} == set(recipe_names())
