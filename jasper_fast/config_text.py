"""YAML as configurations use it: YAML 1.2, every key once, one document, and no aliases that explode."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from jasper_fast.errors import ConfigError

MOST_VALUES = 100_000  # of one document, aliases expanded; the longest recipe has a few hundred
# ruamel.yaml lets Python's own errors through: an impossible date, tag, escape or version, 5,000 digits, deep nesting.
NOT_YAML = (YAMLError, ValueError, LookupError, TypeError, ArithmeticError, AssertionError, RecursionError)


class DuplicateKey(ValueError):
    """A mapping that has the same key twice."""


def read_yaml(file: Path | Traversable, where: str) -> dict[str, Any]:
    """Read the mapping of fields in a YAML file.

    Args:
        where: the file's name in messages.

    Raises:
        ConfigError: the file is unreadable, not text, not YAML, has a key twice, or holds no mapping.
    """
    try:
        tree = parse_yaml(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], where) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"not text in UTF-8 ({error}). Fix: save it as UTF-8"], where) from None
    except DuplicateKey as error:
        raise ConfigError([str(error)], where) from None
    except NOT_YAML as error:
        raise ConfigError([f"not YAML: {yaml_problem(error)}"], where) from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise ConfigError([f"expected a mapping of fields, found {found}"], where)
    if strange := [key for key in tree if not isinstance(key, str)]:
        raise ConfigError([f"{key!r}: a field's name must be text" for key in strange], where)
    return tree


def parse_yaml(text: str, *, duplicates: bool = False) -> Any:
    """Read one YAML document as plain values.

    Args:
        duplicates: accept a key that is given twice; the first value counts.

    Raises:
        DuplicateKey: a mapping has a key twice.
        NOT_YAML: any of these for text that is not YAML; :func:`yaml_problem` describes it.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = duplicates
    root = yaml.compose(text)
    nodes: dict[int, Node] = {}
    if root is not None and _size(root, {}, nodes) > MOST_VALUES:
        raise ValueError(f"aliases expand to more than {MOST_VALUES:,} values or contain themselves")
    if not duplicates:
        for node in nodes.values():
            _check_keys(node)
    return yaml.load(text)


def dump_yaml(tree: Any) -> str:
    """Write plain values as YAML that :func:`parse_yaml` reads back equal."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 1 << 16  # no value is folded
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def yaml_problem(error: Exception) -> str:
    """Describe in one line what is not YAML, with the line number where it is known."""
    if isinstance(error, MarkedYAMLError):
        mark, problem = error.problem_mark or error.context_mark, str(error.problem or error.context)
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    if isinstance(error, RecursionError):
        return "brackets or indents are nested too deeply"
    if isinstance(error, LookupError):
        return f"impossible value {error}"
    return next(iter(str(error).splitlines()), type(error).__name__)


def _size(node: Node, known: dict[int, float], nodes: dict[int, Node]) -> float:
    """Count the values of a node with its aliases expanded; infinite for a node that contains itself.

    Args:
        known: counts by node, filled in.
        nodes: every node once, in the order of the text, filled in.
    """
    if id(node) not in known:
        nodes[id(node)] = node
        known[id(node)] = float("inf")  # until its parts are counted
        known[id(node)] = 1 + sum(_size(part, known, nodes) for part in _parts(node))
    return known[id(node)]


def _parts(node: Node) -> Iterator[Node]:
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair


def _check_keys(node: Node) -> None:
    """Reject a key that is there twice; ruamel.yaml misses it where a mapping merges another."""
    seen = set()
    for key, _ in node.value if isinstance(node, MappingNode) else ():
        if not isinstance(key, ScalarNode):
            continue
        if (key.tag, key.value) in seen:
            raise DuplicateKey(f"line {key.start_mark.line + 1}: `{key.value}` is given twice. Fix: keep one")
        seen.add((key.tag, key.value))
