"""Merge configurations as plain values: sections merge field by field, and lists are replaced.

A section in place of a list changes items of the list, by name or by position from 0.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

EXAMPLE = "e.g. --stages.0.lr 1e-4"
# Fields with a list of sections, or one section, for which a text is enough: the text is the named field.
SHORT_FORMS = {
    ("student",): "model",
    ("teachers",): "model",
    ("data", "sources"): "path",
    ("images", "sources"): "path",
    ("evaluate",): "path",
}


class NoSuchItem(IndexError):
    """A key leads to no item of a list.

    Args:
        message: what was given, and what is known.
        nearest: position of the item with the most similar name, or None.
    """

    def __init__(self, message: str, nearest: int | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


def merge(base: Any, change: Any, problems: list[str] | None = None, key: str = "") -> Any:
    """Return ``base`` with the values of ``change``. Neither is modified.

    Args:
        base: plain values.
        change: plain values. A mapping merges into a mapping, or into the items of a list by name or position. Anything
            else replaces the base.
        problems: list that gets a line for each key that leads to no item of a list. Its values go to the item with the
            most similar name, so that their problems are found too. None raises the first problem.
        key: dotted key of ``base``, for the problems.

    Raises:
        NoSuchItem: a key of a change leads to no item of a list, and ``problems`` is None.

    Example:
        >>> merge({"a": 1, "stages": [{"name": "x", "lr": 1}]}, {"stages": {"x": {"lr": 2}}})
        {'a': 1, 'stages': [{'name': 'x', 'lr': 2}]}
    """
    if not isinstance(change, dict) or not isinstance(base, (dict, list)) or _is_plain_list(base):
        return copy.deepcopy(change)
    merged = copy.copy(base)
    for part, value in change.items():
        inner = f"{key}.{part}" if key else str(part)
        if isinstance(merged, dict):
            merged[part] = merge(merged.get(part), value, problems, inner)
        elif (place := _known_position(merged, str(part), problems, key)) == len(merged):
            merged.append(copy.deepcopy(value))
        elif place is not None:
            merged[place] = merge(merged[place], value, problems, inner)
    return merged


def item_position(items: list[Any], part: str) -> int:
    """Return the position of a list's item, given as its position or name. The position after the last one is allowed.

    Raises:
        NoSuchItem: there is no such item.
    """
    if part.isascii() and part.isdecimal() and int(part) <= len(items):
        return int(part)
    positions: dict[str, int] = {}
    for position, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") is not None:
            positions.setdefault(str(item["name"]), position)
    if part in positions:
        return positions[part]
    names = [*positions]
    if near := difflib.get_close_matches(part, names, n=1):
        raise NoSuchItem(f"no item is named {part!r}; did you mean `{near[0]}`?", positions[near[0]])
    known = f", or by name ({', '.join(names)})" if names else ""
    raise NoSuchItem(
        f"a list is indexed by position from 0 to {max(0, len(items) - 1)}{known}; {len(items)} adds an item "
        f"(got {part!r}), {EXAMPLE}"
    )


def _known_position(items: list[Any], part: str, problems: list[str] | None, key: str) -> int | None:
    """Return the position of an item. Report a wrong name, and return the most similar item, or None."""
    try:
        return item_position(items, part)
    except NoSuchItem as error:
        if problems is None:
            raise
        problems.append(f"{key}: {error}" if key else str(error))
        return error.nearest


def expand_short_forms(tree: dict[str, Any]) -> None:
    """Replace a text by a section where one is expected, in place: ``teachers: NAME`` becomes ``[{model: NAME}]``."""
    for (*path, last), field in SHORT_FORMS.items():
        section: Any = tree
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or section.get(last) is None:
            continue
        value = section[last]
        if isinstance(value, str):
            section[last] = {field: value} if last == "student" else [{field: value}]
        elif isinstance(value, list):
            section[last] = [{field: item} if isinstance(item, str) else item for item in value]


def _is_plain_list(value: Any) -> bool:
    """Return True for a list of values that are no sections."""
    return isinstance(value, list) and not all(isinstance(item, dict) for item in value)
