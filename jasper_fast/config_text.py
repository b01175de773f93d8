"""Configurations as text: YAML files, and ``--key.sub value`` on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from jasper_fast.errors import ConfigError


def read_yaml(file: Path | Traversable, where: str) -> dict[str, Any]:
    """The mapping of fields in a YAML file.

    Args:
        where: what messages call the file.

    Raises:
        ConfigError: it cannot be read, is not text, or holds something else.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], where) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"not text in UTF-8 ({error}); save it in that encoding"], where) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise ConfigError([f"not YAML: {error}"], where) from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise ConfigError([f"expected a mapping of fields, found {found}"], where)
    return tree


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Turn ``--key.sub value`` and ``--key.sub=value`` arguments into (key, value) pairs.

    Raises:
        ConfigError: every argument that is neither.
    """
    pairs, problems = override_pairs(arguments)
    if problems:
        raise ConfigError(problems, "the command line")
    return pairs


def override_pairs(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The (key, value) pairs among arguments, and what is wrong with the others."""
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            problems.append(f"unexpected argument {argument!r}; overrides look like --stages.0.lr 1e-4")
        elif "=" in argument:
            key, value = argument[2:].split("=", 1)
            pairs.append((key, value))
        elif not rest or rest[0].startswith("--"):
            problems.append(f"{argument} needs a value, e.g. {argument} 1")
        else:
            pairs.append((argument[2:], rest.pop(0)))
    return pairs, problems


def override(tree: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    """Set the field of a dotted key, text read as YAML; where there is no such place, ``problems`` gets a line."""
    *parents, last = key.split(".")
    value = _value(value) if isinstance(value, str) else value
    node: Any = tree
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            problems.append(f"--{key}: `{parents[-1]}` is a value, not a section")
    except (ValueError, IndexError):
        problems.append(f"--{key}: a list is indexed by position from 0 to {len(node) - 1}, e.g. --stages.0.lr 1e-4")
    except AttributeError:
        problems.append(f"--{key}: no such section")


def _value(text: str) -> Any:
    """An override's value as YAML; text that is not YAML, such as ``*`` or ``Query: ``, stands for itself."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    return text if isinstance(value, dict) and not text.lstrip().startswith("{") else value
