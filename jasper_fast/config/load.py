"""Load a configuration from a recipe, a file, a mapping or arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from jasper_fast.config.comments import add_comments
from jasper_fast.config.default_stages import complete_stages, keep_given_sizes, prefer_minutes
from jasper_fast.config.layers import Layers, read_layers, recipe_names, run_name
from jasper_fast.config.merge import expand_short_forms
from jasper_fast.config.messages import Problem, argument_message, problems_of
from jasper_fast.config.overrides import override, override_pairs
from jasper_fast.config.own_texts import without_limits
from jasper_fast.config.run import Config, run_problems
from jasper_fast.config.schema import takes_list, takes_text
from jasper_fast.config.yaml import dump_yaml
from jasper_fast.utils.errors import ConfigError

OLDER_RUN: dict[str, Any] = {"refit": False}  # what a stored configuration means that lacks a field
OLDER_DATA: dict[str, Any] = {"held_out": 0}  # the same for its section `data`
OLDER_SOURCE: dict[str, Any] = {"join": False}  # the same for a source of texts


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
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
    out: str | Path | None = None,
) -> Config:
    """Read and validate a configuration.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        overrides: pairs of dotted key and value, e.g. ``("stages.distil.lr", 1e-4)``. A value that is text is parsed
            as YAML.
        out: the run's folder, whose name is the run's if the configuration gives none.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is impossible. The message lists all of them,
            each with its key.
    """
    return _load(source, overrides, [], out)


def load_arguments(
    source: str | Path | Mapping[str, Any] | None,
    arguments: Sequence[str],
    options: Sequence[str] = (),
    out: str | Path | None = None,
) -> Config:
    """Read and validate a configuration with overrides from a command line.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        arguments: ``--key.sub value`` pairs, and the short options of :data:`~jasper_fast.config.overrides.ALIASES`.
        options: names of the command's other options, which are proposed for a misspelt key.
        out: the run's folder, as in :func:`load_config`.

    Raises:
        ConfigError: as in :func:`load_config`. Problems of the arguments are listed separately from those of the file.
    """
    return _load(source, *override_pairs(arguments), out, options)


def stored_config(tree: dict[str, Any], where: str) -> Config:
    """Load a configuration that a run stored, in this version or an older one.

    A missing field has its default, or its value in `OLDER_RUN`, `OLDER_DATA` or `OLDER_SOURCE`.

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
    """Return a stored configuration with the fields whose absence does not mean today's default."""
    tree = {**OLDER_RUN, **tree}
    data = tree.get("data")
    if not isinstance(data, Mapping):
        return tree
    data = {**OLDER_DATA, **data}
    if isinstance(data.get("sources"), list):
        data["sources"] = [{**OLDER_SOURCE, **s} if isinstance(s, Mapping) else s for s in data["sources"]]
    return {**tree, "data": data}


def _load(
    source: Any,
    overrides: Sequence[tuple[str, Any]],
    problems: list[str],
    out: str | Path | None,
    options: Sequence[str] | None = None,
) -> Config:
    """Read and validate a configuration with overrides.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        overrides: pairs of dotted key and value.
        problems: problems of the overrides that are known already.
        out: the run's folder, or None.
        options: names of the command's other options. None means that the overrides come from Python.
    """
    layers = read_layers(source)
    override_problems = list(problems)
    tree, notes, misnamed = _resolve(layers, overrides, out, override_problems)
    config, invalid = _validate(tree)
    all_problems = [*misnamed, *invalid]
    if config is not None and not override_problems and not misnamed:
        return config.with_notes(notes)
    file_problems = all_problems
    if overrides:
        tree, _, misnamed = _resolve(layers, (), out, [])
        file_problems = [*misnamed, *_validate(tree)[1]]
    for problem in all_problems:
        if problem not in file_problems:
            override_problems.append(problem.line if options is None else argument_message(Config, problem, options))
    remaining = [problem.line for problem in all_problems if problem in file_problems]
    place = "the overrides" if options is None else "the command line"
    raise ConfigError(override_problems, place, {layers.where: remaining})


def _resolve(
    layers: Layers, overrides: Sequence[tuple[str, Any]], out: str | Path | None, problems: list[str]
) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """Return the values of all layers, overrides and defaults that depend on others, and lines about the latter.

    The third part has a problem for each name that is that of no item of a list.

    Args:
        layers: the configuration and what it extends.
        overrides: pairs of dotted key and value.
        out: the run's folder, or None.
        problems: list that gets a line for each override that leads to no field.
    """
    misnamed: list[str] = []
    recipe: dict[str, Any] | None = None
    removed: list[str] = []
    if layers.recipe is not None:
        changed = _overridden(layers.merged([]), overrides, [])
        sets_given = any("evaluate" in tree for tree in layers.trees[1:]) or _sets(overrides, "evaluate")
        recipe, removed = without_limits(layers.trees[0], changed, sets_given)
    tree = _overridden(layers.merged(misnamed, recipe), overrides, problems)
    notes = []
    if removed:
        notes.append(f"your texts replace those of recipe {layers.recipe}, and so their settings: {', '.join(removed)}")
        keep_given_sizes(tree.get("stages"), layers.trees[0]["stages"])
    prefer_minutes(tree.get("stages"), layers.trees[0].get("stages"))
    if removed and len(layers.trees) == 1 and not _sets(overrides, "name"):
        tree.pop("name", None)
    if tree.get("name") is None:
        file = layers.stem if layers.stem != layers.recipe else None
        tree["name"] = file or run_name(out or _first_source(tree) or "run")
    notes += complete_stages(tree, misnamed)
    return tree, notes, [Problem(line) for line in misnamed]


def _overridden(tree: dict[str, Any], overrides: Sequence[tuple[str, Any]], problems: list[str]) -> dict[str, Any]:
    """Return values with overrides."""
    for key, value in overrides:
        override(tree, key, value, problems, partial(takes_list, Config), partial(takes_text, Config))
        expand_short_forms(tree)
    return tree


def _sets(overrides: Sequence[tuple[str, Any]], section: str) -> bool:
    return any(key.split(".")[0] == section for key, _ in overrides)


def _first_source(tree: Mapping[str, Any]) -> str | None:
    """Return the path of the first text source, or None if it is missing."""
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    first = sources[0] if isinstance(sources, list) and sources else None
    path = first.get("path") if isinstance(first, dict) else None
    return path if isinstance(path, str) else None


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
