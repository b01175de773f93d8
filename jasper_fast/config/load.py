"""Load a configuration from a recipe, a file, a mapping or arguments."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from jasper_fast.config.comments import add_comments
from jasper_fast.config.messages import Problem, argument_message, problems_of
from jasper_fast.config.overrides import override, override_pairs
from jasper_fast.config.run import Config, run_problems
from jasper_fast.config.schema import takes_list
from jasper_fast.config.yaml import dump_yaml, read_yaml
from jasper_fast.utils.errors import ConfigError
from jasper_fast.utils.names import CONFIG_FILES

DEFAULT_RECIPE = "minilm-docstrings"
OLDER_DATA: dict[str, Any] = {"held_out": 0}  # what a stored section `data` means that lacks a field
OLDER_SOURCE: dict[str, Any] = {"join": False}  # the same for a source of texts


def recipe_names() -> list[str]:
    """List the recipes that ship with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in (files("jasper_fast") / "recipes").iterdir() if p.name.endswith(".yaml")
    )


def describe_recipes() -> str:
    """Describe each recipe in one line: its name, its purpose, and its requirements or measured time.

    The first two lines of a recipe are the comments ``# PURPOSE.`` and ``# Needs: REQUIREMENTS.``
    """
    names = recipe_names()
    width = max(map(len, names))
    lines = []
    for name in names:
        text = (files("jasper_fast") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        purpose, needs = (line.removeprefix("# ").removesuffix(".") for line in text.splitlines()[:2])
        lines.append(f"{name:{width}}  {purpose} (needs {needs.removeprefix('Needs: ')})")
    return "\n".join(lines)


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[tuple[str, Any]] = ()
) -> Config:
    """Read and validate a configuration.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        overrides: pairs of dotted key and value, e.g. ``("stages.0.lr", 1e-4)``. A value that is text is parsed as
            YAML.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is impossible. The message lists all of them,
            each with its key.
    """
    return _load(source, overrides, [])


def load_arguments(
    source: str | Path | Mapping[str, Any] | None, arguments: Sequence[str], options: Sequence[str] = ()
) -> Config:
    """Read and validate a configuration with overrides from a command line.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        arguments: ``--key.sub value`` pairs.
        options: names of the command's other options, which are proposed for a misspelt key.

    Raises:
        ConfigError: as in :func:`load_config`. Problems of the arguments are listed separately from those of the file.
    """
    return _load(source, *override_pairs(arguments), options)


def stored_config(tree: dict[str, Any], where: str) -> Config:
    """Load a configuration that a run stored, in this version or an older one.

    A missing field has its default, or its value in `OLDER_DATA` or `OLDER_SOURCE`.

    Args:
        tree: dumped configuration, or the part of it that determines the results.
        where: place of the configuration in messages.

    Raises:
        ConfigError: a field is unknown in this version, or a value is rejected.
    """
    config, problems = _validate(_with_older_meaning(tree))
    if config is None:
        raise ConfigError([problem.line for problem in problems], where)
    return config


def _with_older_meaning(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the fields of the texts that older versions lacked."""
    data = tree.get("data")
    if not isinstance(data, Mapping):
        return tree
    data = {**OLDER_DATA, **data}
    if isinstance(data.get("sources"), list):
        data["sources"] = [{**OLDER_SOURCE, **s} if isinstance(s, Mapping) else s for s in data["sources"]]
    return {**tree, "data": data}


def _load(
    source: Any, overrides: Sequence[tuple[str, Any]], problems: list[str], options: Sequence[str] | None = None
) -> Config:
    """Read and validate a configuration with overrides.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        overrides: pairs of dotted key and value.
        problems: problems of the overrides that are known already.
        options: names of the command's other options. None means that the overrides come from Python.
    """
    tree, where = _read(source)
    file_tree, override_problems = copy.deepcopy(tree), list(problems)
    for key, value in overrides:
        override(tree, key, value, override_problems, partial(takes_list, Config))
    config, all_problems = _validate(tree)
    if config is not None and not override_problems:
        return config
    file_problems = _validate(file_tree)[1] if overrides else all_problems
    for problem in all_problems:
        if problem not in file_problems:
            override_problems.append(problem.line if options is None else argument_message(Config, problem, options))
    remaining = [problem.line for problem in all_problems if problem in file_problems]
    raise ConfigError(override_problems, "the overrides" if options is None else "the command line", {where: remaining})


def _validate(tree: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Return the configuration, or None and all its problems."""
    try:
        return Config.model_validate(tree), []
    except ValidationError as error:
        return None, problems_of(Config, tree, error, run_problems)


def dump_config(config: Config, *, comments: bool = False) -> str:
    """Format the resolved configuration as YAML, with every field.

    Args:
        config: configuration to format.
        comments: True to add the meaning of each field as a comment.
    """
    text = dump_yaml(config.model_dump(mode="json"))
    return add_comments(text, Config) if comments else text


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), "the given configuration"
    name = str(source) if source is not None else DEFAULT_RECIPE
    if name in recipe_names():
        where = f"recipe {name}"
        return read_yaml(files("jasper_fast") / "recipes" / f"{name}.yaml", where), where
    if not os.path.exists(name):  # also False for an invalid file name
        raise ConfigError([_no_such_file(name)], "--config")
    return read_yaml(Path(name), name), name


def _no_such_file(name: str) -> str:
    """Describe a missing configuration, and propose the file or recipe with the most similar name."""
    with suppress(OSError, ValueError):
        neighbours = [str(file) for file in Path(name).parent.iterdir() if file.name.endswith(CONFIG_FILES)]
        if near := difflib.get_close_matches(name.removesuffix(".yaml"), recipe_names(), n=1, cutoff=0.8):
            return f"{name!r} is neither a file nor a recipe; did you mean `{near[0]}`?"
        if near := difflib.get_close_matches(name, neighbours, n=1, cutoff=0.8):
            return f"{name!r} is neither a file nor a recipe; did you mean `{near[0]}`?"
    return f"{name!r} is neither a file nor a recipe. Fix: give a file, or one of {', '.join(recipe_names())}"
