"""Layers of a configuration: a file or mapping, the file or recipe that it extends, and so on."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jasper_fast.config.merge import expand_short_forms, merge
from jasper_fast.config.yaml import read_yaml
from jasper_fast.utils.errors import ConfigError
from jasper_fast.utils.names import CONFIG_FILES

DEFAULT_RECIPE = "minilm-docstrings"
EXTENDS = "extends"  # key with the recipe or file that a configuration changes


@dataclass(frozen=True)
class Layers:
    """A configuration and what it extends.

    Args:
        trees: plain values, the base first.
        recipe: the recipe that is the base. None: the base is a file or mapping.
        where: name of the last layer in messages.
        stem: name for a run of this configuration. None: the last layer is a mapping.
    """

    trees: list[dict[str, Any]]
    recipe: str | None
    where: str
    stem: str | None

    def merged(self, problems: list[str], recipe: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the merged layers as new plain values.

        Args:
            problems: list that gets a line for each item of a list that a layer changes and its base does not have.
            recipe: tree in place of the base. None: the base itself.
        """
        tree: dict[str, Any] = {}
        for layer in [recipe if recipe is not None else self.trees[0], *self.trees[1:]]:
            tree.pop("name", None)  # each layer is another run
            tree = merge(tree, layer, problems)
        return tree


def recipe_names() -> list[str]:
    """List the recipes that ship with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in (files("jasper_fast") / "recipes").iterdir() if p.name.endswith(".yaml")
    )


def read_layers(source: str | Path | Mapping[str, Any] | None) -> Layers:
    """Read a configuration and all that it extends.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.

    Raises:
        ConfigError: a file or recipe is missing, is no configuration, or extends itself.
    """
    if isinstance(source, Mapping):
        tree, where, folder, stem, recipe = copy.deepcopy(dict(source)), "the given configuration", Path(), None, None
    else:
        name = str(source) if source is not None else DEFAULT_RECIPE
        tree, where, recipe = _read(name, "--config")
        folder, stem = Path(name).parent, recipe or run_name(name)
    trees, chain, base_of = [tree], [_identity(source, recipe)], where
    while EXTENDS in trees[0]:
        name = trees[0].pop(EXTENDS)
        if not isinstance(name, str) or not name.strip():
            raise ConfigError([f"{EXTENDS}: expected a recipe or a file, got {name!r}"], base_of)
        path = name if name in recipe_names() else str(folder / Path(name).expanduser())
        tree, base_of, recipe = _read(path, f"{base_of}, {EXTENDS}")
        if (identity := _identity(path, recipe)) in chain:
            raise ConfigError([f"{EXTENDS}: {name} extends itself. Fix: let the base file extend another one"], where)
        trees.insert(0, tree)
        chain.append(identity)
        folder = Path(path).parent
    for tree in trees:
        expand_short_forms(tree)
    return Layers(trees, recipe, where, stem)


def run_name(path: str | Path) -> str:
    """Return a name for a run from the name of a file or folder."""
    stem = Path(path).name
    for suffix in (".gz", ".bz2", ".xz", ".zst", *CONFIG_FILES, ".jsonl", ".csv", ".tsv", ".txt", ".parquet"):
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"


def _read(name: str, where: str) -> tuple[dict[str, Any], str, str | None]:
    """Return the values of a recipe or file, its name in messages, and the recipe's name or None."""
    if name in recipe_names():
        shown = f"recipe {name}"
        return read_yaml(files("jasper_fast") / "recipes" / f"{name}.yaml", shown), shown, name
    if not os.path.exists(name):  # also False for an invalid file name
        raise ConfigError([_no_such_file(name)], where)
    return read_yaml(Path(name), name), name, None


def _identity(source: Any, recipe: str | None) -> str:
    """Return what two names of one recipe or file have in common."""
    return f"recipe {recipe}" if recipe else "mapping" if isinstance(source, Mapping) else os.path.realpath(source)


def _no_such_file(name: str) -> str:
    """Describe a missing configuration, and propose the file or recipe with the most similar name."""
    with suppress(OSError, ValueError):
        neighbours = [str(file) for file in Path(name).parent.iterdir() if file.name.endswith(CONFIG_FILES)]
        if near := difflib.get_close_matches(Path(name).name.removesuffix(".yaml"), recipe_names(), n=1, cutoff=0.8):
            return f"{name!r} is neither a file nor a recipe; did you mean `{near[0]}`?"
        if near := difflib.get_close_matches(name, neighbours, n=1, cutoff=0.8):
            return f"{name!r} is neither a file nor a recipe; did you mean `{near[0]}`?"
    return f"{name!r} is neither a file nor a recipe. Fix: give a file, or one of {', '.join(recipe_names())}"
