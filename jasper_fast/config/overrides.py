"""Overrides of configuration fields: ``--key.sub value``, each key once, lists with commas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jasper_fast.config.merge import EXAMPLE, item_position
from jasper_fast.config.yaml import NOT_YAML, DuplicateKey, parse_yaml
from jasper_fast.utils.errors import ConfigError
from jasper_fast.utils.names import CONFIG_FILES

# Short options of the command line, in the order in which they apply, and the fields that they set.
ALIASES = {"texts": "data.sources", "columns": "data.sources.*.columns", "teacher": "teachers"}


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
            problems.append(f"{argument}: expected a field's name, {EXAMPLE}")
        elif equals:
            pairs.append((key, value))
        elif not rest or rest[0].startswith("--"):
            problems.append(f"{argument} needs a value, e.g. {argument} 1")
        else:
            pairs.append((key, rest.pop(0)))
    short = [(ALIASES[alias], value) for alias in ALIASES for key, value in pairs if key == alias]
    pairs = [*short, *((key, value) for key, value in pairs if key not in ALIASES)]
    return pairs, problems + _repeated([key for key, _ in pairs])


def override(
    tree: dict[str, Any],
    key: str,
    value: Any,
    problems: list[str],
    takes_list: Callable[[str, bool], bool] = lambda key, several: False,
    takes_text: Callable[[str], bool] = lambda key: False,
) -> None:
    """Set the field of a dotted key in a configuration.

    Args:
        tree: configuration as plain values, changed in place.
        key: dotted key, e.g. ``stages.0.lr`` or ``stages.distil.lr``. ``*`` means every item of a list.
        value: new value. Text is parsed as YAML, and as a list if the field takes one.
        problems: list that gets a line if the key leads to no field.
        takes_list: function that returns True if the field of a key takes a list of plain values. Its second argument
            is True if the value has commas.
        takes_text: function that returns True if the field of a key takes text and no number: ``3`` may be a name.
    """
    try:
        if isinstance(value, str):
            parsed = _value(value, key, takes_list)
            value = parsed if parsed is None or isinstance(parsed, (str, list, dict)) or not takes_text(key) else value
        _set(tree, key.split("."), value)
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


def _set(node: Any, parts: Sequence[str], value: Any, done: tuple[str, ...] = ()) -> None:
    """Set a field below a section or list.

    Args:
        node: section or list, changed in place.
        parts: the rest of the dotted key.
        value: new value.
        done: the parts of the key before ``node``.
    """
    part, *rest = parts
    if isinstance(node, list) and part == "*":
        for index in range(len(node)):
            _set(node, [str(index), *rest], value, done)
    elif rest:
        _set(_inside(node, part, ".".join((*done, part))), rest, value, (*done, part))
    elif not isinstance(node, list):
        node[part] = value
    elif (place := item_position(node, part)) == len(node):
        node.append(value)
    else:
        node[place] = value


def _inside(node: Any, part: str, name: str) -> Any:
    """Return the section or list ``part`` of a node. A missing section is created, also right after a list's end."""
    child: Any = None
    if not isinstance(node, list):
        child = node[part] = {} if node.get(part) is None else node[part]
    elif (place := item_position(node, part)) == len(node):
        child = {}
        node.append(child)
    else:
        child = node[place]
    if not isinstance(child, (dict, list)):
        raise TypeError(f"`{name}` is a value, not a section")
    return child


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
