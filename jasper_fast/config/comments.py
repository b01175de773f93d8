"""The meaning of each field, read from the comments in the source of the configuration's classes.

The comment of a field is at the end of its line or on the lines directly above.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from contextlib import suppress

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from jasper_fast.config.schema import nested_section

WIDTH = 120  # columns of a commented line
COLUMN = 36  # first column of a comment at the end of a line
BREAK = re.compile("[\n\x85\u2028\u2029]")  # ends a line in YAML


def field_meanings(model: type[BaseModel]) -> dict[str, str]:
    """Read the meaning of each field of a section.

    A field made from a table has a description. A field that holds a section has the first sentence of the section's
    docstring, unless it has a comment. Without the source, e.g. in an archive of compiled modules, comments are
    missing.
    """
    texts = {name: info.description for name, info in model.model_fields.items() if info.description}
    with suppress(OSError):
        texts |= _source_comments(inspect.getsource(model))
    for name, info in model.model_fields.items():
        if not texts.get(name) and (section := nested_section(info.annotation)) is not None:
            texts[name] = summary(section).partition(". ")[0].rstrip(".")
    return texts


def summary(model: type[BaseModel]) -> str:
    """Return a section's docstring as one line."""
    return " ".join((model.__doc__ or "").replace("``", "`").split())


def add_comments(text: str, schema: type[BaseModel]) -> str:
    """Add the meaning of each field to a configuration as YAML, at the end of its line or above it.

    Args:
        text: block-style YAML of a configuration.
        schema: schema of the whole configuration.
    """
    root = YAML(typ="safe", pure=True).compose(text)
    comments = {}  # line number: comment, and True if it may follow the line
    for key, value, comment in _commented(root, schema):
        start, end = key.start_mark.index, value.end_mark.index
        is_line = not isinstance(value, ScalarNode) or not BREAK.search(text, start, end)
        comments[text.count("\n", 0, start)] = (comment, is_line)
    lines = []
    for number, line in enumerate(text.removesuffix("\n").split("\n")):
        comment, may_follow = comments.get(number, ("", False))
        commented = f"{line:<{COLUMN}}  # {comment}"
        if may_follow and len(commented) <= WIDTH:
            line = commented
        elif comment:
            indent = " " * (len(line) - len(line.lstrip(" "))) + "# "
            lines += textwrap.wrap(comment, WIDTH, initial_indent=indent, subsequent_indent=indent)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _source_comments(source: str) -> dict[str, str]:
    """Read the comment of each field from the source of its class."""
    source = textwrap.dedent(source)
    comments = {}  # line number: text, and True for a line with nothing else
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement in body.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        above: list[str] = []
        line = statement.lineno - 1
        while line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        last = statement.end_lineno or statement.lineno
        inside = [comments[n][0] for n in range(statement.lineno, last + 1) if n in comments]
        texts[statement.target.id] = " ".join(above + inside)
    return texts


def _commented(node: Node, schema: type[BaseModel]) -> Iterator[tuple[ScalarNode, Node, str]]:
    """Yield the key, value and meaning of each field below a node."""
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _commented(item, schema)
    elif isinstance(node, MappingNode):
        comments = field_meanings(schema)
        for key, value in node.value:
            if comment := comments.get(key.value):
                yield key, value, comment
            field = schema.model_fields.get(key.value)
            if field is not None and (section := nested_section(field.annotation)) is not None:
                yield from _commented(value, section)
