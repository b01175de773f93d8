"""Overrides of configuration fields: ``--key.sub value``, each key once, lists with commas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jasper_fast.config.yaml import NOT_YAML, DuplicateKey, parse_yaml
from jasper_fast.utils.errors import ConfigError
from jasper_fast.utils.names import CONFIG_FILES


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Parse ``--key.sub value`` and ``--key.sub=value`` arguments into (key, value) pairs.

    Raises:
        ConfigError: an argument has another form, or a key is given twice. The message lists all of them.
    """
    pairs, problems = override_pairs(arguments)
    if problems:
        raise ConfigError(problems, "the command line")
    return pairs


def override_pairs(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Parse arguments into (key, value) pairs and a list of problems."""
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            problems.append(_unexpected(argument))
        elif not all(key.split(".")):
            problems.append(f"{argument}: expected a field's name, e.g. --stages.0.lr 1e-4")
        elif equals:
            pairs.append((key, value))
        elif not rest or rest[0].startswith("--"):
            problems.append(f"{argument} needs a value, e.g. {argument} 1")
        else:
            pairs.append((key, rest.pop(0)))
    return pairs, problems + _repeated([key for key, _ in pairs])


def override(
    tree: dict[str, Any],
    key: str,
    value: Any,
    problems: list[str],
    takes_list: Callable[[str, bool], bool] = lambda key, several: False,
) -> None:
    """Set the field of a dotted key in a configuration.

    Args:
        tree: configuration as plain values, changed in place.
        key: dotted key, e.g. ``stages.0.lr``.
        value: new value. Text is parsed as YAML, and as a list if the field takes one.
        problems: list that gets a line if the key leads to no field.
        takes_list: function that returns True if the field of a key takes a list of plain values. Its second argument
            is True if the value has commas.
    """
    *parents, last = key.split(".")
    try:
        value = _value(value, key, takes_list) if isinstance(value, str) else value
        node: Any = tree
        for part, name in zip(parents, _prefixes(parents), strict=True):
            node = _inside(node, part, name)
        if isinstance(node, list):
            node[_position(node, last)] = value
        else:
            node[last] = value
    except (IndexError, TypeError, DuplicateKey) as error:
        problems.append(f"--{key}: {error}")


def _unexpected(argument: str) -> str:
    if argument.endswith(CONFIG_FILES) or Path(argument).is_file():
        return f"unexpected argument {argument!r}; did you mean --config {argument}?"
    return f"unexpected argument {argument!r}. Fix: set a field like --stages.0.lr 1e-4"


def _repeated(keys: Sequence[str]) -> list[str]:
    """Report keys that undo an earlier one: the same key again, or the section around it."""
    problems = []
    for position, key in enumerate(keys):
        earlier = keys[:position]
        if key in earlier:
            problems.append(f"--{key} is given twice. Fix: give it once")
        elif undone := [one for one in earlier if one.startswith(f"{key}.")]:
            problems.append(f"--{key} would undo --{undone[0]}, which comes before it. Fix: put --{key} first")
    return problems


def _prefixes(parts: Sequence[str]) -> list[str]:
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _inside(node: Any, part: str, name: str) -> Any:
    """Return the section or list ``part`` of a node. A missing section is created."""
    if isinstance(node, list):
        child = node[_position(node, part)]
    else:
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
    if not isinstance(child, (dict, list)):
        raise TypeError(f"`{name}` is a value, not a section")
    return child


def _position(items: list[Any], part: str) -> int:
    if not (part.isascii() and part.isdecimal() and int(part) < len(items)):
        raise IndexError(
            f"a list is indexed by position from 0 to {len(items) - 1} (got {part!r}), e.g. --stages.0.lr 1e-4"
        )
    return int(part)


def _value(text: str, key: str, takes_list: Callable[[str, bool], bool]) -> Any:
    """Parse an override's value as YAML. Text that is not YAML, such as ``*`` or ``Query: ``, is returned unchanged.

    Raises:
        DuplicateKey: a mapping in the value has a key twice.
    """
    if not text.strip():  # YAML reads empty text as null
        return text
    try:
        value = parse_yaml(text)
    except DuplicateKey:
        raise
    except NOT_YAML:
        value = text
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        value = text
    if value is None or isinstance(value, (dict, list)):
        return value
    parts = text.split(",")
    if takes_list(key, len(parts) > 1):
        return [_value(part.strip(), key, lambda key, several: False) for part in parts]
    return value
