"""YAML 1.2 for configurations: no duplicate keys, one document, and a limit on expanded aliases."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from jasper_fast.utils.errors import ConfigError

MAX_VALUES = 100_000  # per document, with expanded aliases; the longest recipe has a few hundred
NEXT_LINE = "\x85"  # a line break of YAML 1.1
# ruamel.yaml also raises built-in errors: for an impossible date, tag, escape or version, 5,000 digits, deep nesting.
NOT_YAML = (YAMLError, ValueError, LookupError, TypeError, ArithmeticError, AssertionError, RecursionError)


class DuplicateKey(ValueError):
    """Error for a mapping that has the same key twice."""


def read_yaml(file: Path | Traversable, where: str) -> dict[str, Any]:
    """Read the mapping of fields in a YAML file.

    Args:
        file: file to read.
        where: name of the file in messages.

    Raises:
        ConfigError: the file is unreadable, not text, not YAML, not a mapping, or has a key twice.
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
        kind = "nothing" if tree is None else type(tree).__name__
        raise ConfigError([f"expected a mapping of fields, found {kind}"], where)
    if invalid := [key for key in tree if not isinstance(key, str)]:
        raise ConfigError([f"{key!r}: a field's name must be text" for key in invalid], where)
    return tree


def parse_yaml(text: str, *, duplicates: bool = False) -> Any:
    """Parse one YAML document as plain values.

    Args:
        text: the document.
        duplicates: True to accept a key that is given twice. The first value counts.

    Raises:
        DuplicateKey: a mapping has a key twice.
        NOT_YAML: the text is not YAML. The error is of one of these types, and :func:`yaml_problem` describes it.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = duplicates
    root = yaml.compose(text)
    nodes: dict[int, Node] = {}
    if root is not None and _size(root, {}, nodes) > MAX_VALUES:
        raise ValueError(f"aliases expand to more than {MAX_VALUES:,} values or contain themselves")
    if not duplicates:
        for node in nodes.values():
            _check_keys(node)
    return yaml.load(text)


def dump_yaml(tree: Any) -> str:
    """Format plain values as YAML, which :func:`parse_yaml` reads back unchanged."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 1 << 16  # long values stay on one line
    text = io.StringIO()
    yaml.dump(tree, text)
    if NEXT_LINE in text.getvalue():  # written as it is, and read as a space
        yaml.allow_unicode, text = False, io.StringIO()
        yaml.dump(tree, text)
    return text.getvalue()


def yaml_problem(error: Exception) -> str:
    """Describe a YAML error in one line, with the line number if it is known."""
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


def _size(node: Node, sizes: dict[int, float], nodes: dict[int, Node]) -> float:
    """Count the values of a node with its aliases expanded.

    Args:
        node: node to count. The count is infinite for a node that contains itself.
        sizes: counts by node id, filled in.
        nodes: all nodes by id, in the order of the text, filled in.
    """
    if id(node) not in sizes:
        nodes[id(node)] = node
        sizes[id(node)] = float("inf")  # until its parts are counted
        sizes[id(node)] = 1 + sum(_size(part, sizes, nodes) for part in _parts(node))
    return sizes[id(node)]


def _parts(node: Node) -> Iterator[Node]:
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair


def _check_keys(node: Node) -> None:
    """Reject a duplicate key. ruamel.yaml misses it if a mapping merges another."""
    seen = set()
    for key, _ in node.value if isinstance(node, MappingNode) else ():
        if not isinstance(key, ScalarNode):
            continue
        if (key.tag, key.value) in seen:
            raise DuplicateKey(f"line {key.start_mark.line + 1}: `{key.value}` is given twice. Fix: keep one")
        seen.add((key.tag, key.value))
