"""Differences between two configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the fields in which two dumped configurations differ, as lines ``key: old -> new``.

    A missing or empty value reads "not set".
    """
    a, b = dict(leaves(old)), dict(leaves(new))
    return [f"{k}: {_shown(a.get(k))} -> {_shown(b.get(k))}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def _shown(value: Any) -> str:
    """Format a value as in a configuration."""
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf of a tree."""
    if isinstance(tree, (dict, list)) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
