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


def merge(base: Any, change: Any) -> Any:
    """Return ``base`` with the values of ``change``. Neither is modified.

    Args:
        base: plain values.
        change: plain values. A mapping merges into a mapping, or into the items of a list by name or position. Anything
            else replaces the base.

    Raises:
        IndexError: a key of a change leads to no item of a list.

    Example:
        >>> merge({"a": 1, "stages": [{"name": "x", "lr": 1}]}, {"stages": {"x": {"lr": 2}}})
        {'a': 1, 'stages': [{'name': 'x', 'lr': 2}]}
    """
    if not isinstance(change, dict) or not isinstance(base, (dict, list)) or _is_plain_list(base):
        return copy.deepcopy(change)
    merged = copy.copy(base)
    for key, value in change.items():
        if isinstance(merged, dict):
            merged[key] = merge(merged.get(key), value)
        elif (place := item_position(merged, str(key))) == len(merged):
            merged.append(copy.deepcopy(value))
        else:
            merged[place] = merge(merged[place], value)
    return merged


def item_position(items: list[Any], part: str) -> int:
    """Return the position of a list's item, given as its position or name. The position after the last one is allowed.

    Raises:
        IndexError: there is no such item.
    """
    if part.isascii() and part.isdecimal() and int(part) <= len(items):
        return int(part)
    names = [str(item["name"]) for item in items if isinstance(item, dict) and item.get("name") is not None]
    if part in names:
        return next(i for i, item in enumerate(items) if isinstance(item, dict) and str(item.get("name")) == part)
    if near := difflib.get_close_matches(part, names, n=1):
        raise IndexError(f"no item is named {part!r}; did you mean `{near[0]}`?")
    known = f", or by name ({', '.join(names)})" if names else ""
    raise IndexError(
        f"a list is indexed by position from 0 to {max(0, len(items) - 1)}{known}; {len(items)} adds an item "
        f"(got {part!r}), {EXAMPLE}"
    )


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
