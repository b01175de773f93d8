"""Messages about invalid configurations: one line per problem, with its key and the most similar field."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from jasper_fast.config.schema import Location, field_keys, section_at

MAX_VALUE_CHARS = 200  # longer values are cut in messages
MAX_SUGGESTIONS = 4  # similar keys in a message
# Names that other tools use for a field.
SYNONYMS = {
    "learning_rate": "lr",
    "epochs": "steps",
    "max_steps": "steps",
    "batch": "batch_size",
    "bs": "batch_size",
    "max_seq_length": "max_length",
    "widths": "heads",
    "dim": "heads",
    "output_dir": "out",
    "output": "out",
    "docs": "texts",
    "extends": "config",
    "extend": "extends",
    "base": "extends",
}


class Problem(NamedTuple):
    """One problem of a configuration."""

    line: str
    unknown: Location | None = None  # location of an unknown key, from which `argument_message` makes a better hint


def problems_of(
    schema: type[BaseModel],
    tree: dict[str, Any],
    error: ValidationError,
    rules: Callable[[Mapping[str, Any]], list[str]],
) -> list[Problem]:
    """Describe all problems of a configuration that pydantic rejected.

    Args:
        schema: schema of the whole configuration.
        tree: configuration as plain values.
        error: error that pydantic raised for the tree.
        rules: function that lists the contradictions between sections. Pydantic does not call it if a field is invalid.
    """
    unknown = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
    problems = [Problem(_unknown_key(schema, location), location) for location in unknown]
    corrected = _correct_keys(schema, tree, unknown)
    try:
        schema.model_validate(corrected)
    except ValidationError as other:
        problems += [Problem(line) for e in other.errors() for line in _explain(e)]
        if all(e["loc"] for e in other.errors()):  # a field is invalid, so pydantic did not reach the rules
            problems += map(Problem, rules(corrected))
    return problems


def argument_message(schema: type[BaseModel], problem: Problem, options: Sequence[str]) -> str:
    """Format a problem of the command line. An unknown key may be a misspelt option of the command."""
    if problem.unknown is None:
        return problem.line
    return "--" + _unknown_key(schema, problem.unknown, options, dashes="--")


def _correct_keys(schema: type[BaseModel], tree: dict[str, Any], unknown: Iterable[Location]) -> dict[str, Any]:
    """Copy the tree and correct misspelt keys if possible, so that they hide no other problem."""
    tree = copy.deepcopy(tree)
    for location in unknown:
        *path, key = location
        section: Any = tree
        for step in path:
            section = section[step]
        value = section.pop(key)
        for near in _most_similar(str(key), list(section_at(schema, path).model_fields)):
            section.setdefault(near, value)
    return tree


def _explain(error: Any) -> list[str]:
    """Format a pydantic error as lines with key, problem and value."""
    # For a field with several types, the location also contains the type, e.g. constrained-float.
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, int) or part.isidentifier())
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    hidden = isinstance(value, (dict, BaseModel)) or error["type"] == "missing"
    shown = repr(value) if len(repr(value)) <= MAX_VALUE_CHARS else repr(value)[: MAX_VALUE_CHARS - 1] + "…"
    is_project_error = error["type"] == "value_error"  # our own messages may already contain the value
    lines = [
        f"{line}{'' if hidden or is_project_error and repr(value) in line else f', got {shown}'}"
        for line in message.splitlines()
    ]
    return [f"{key}: {line}" if key else line for line in lines]


def _unknown_key(schema: type[BaseModel], location: Location, options: Sequence[str] = (), dashes: str = "") -> str:
    """Format an unknown key with similar keys, or with all keys of its section."""
    *path, name = location
    fields = list(section_at(schema, path).model_fields)
    others = options or ("extends",)  # a file may also say what it extends
    if near := _most_similar(str(name), [*others, *fields] if not path else fields):
        proposals = [f"{dashes}{near[0]}" if not path else near[0]]
    else:
        proposals = [dashes + key for key in _similar_keys(schema, str(name))]
    if 0 < len(proposals) <= MAX_SUGGESTIONS:
        hint = "did you mean " + " or ".join(f"`{key}`" for key in proposals) + "?"
    else:
        hint = f"known: {', '.join(fields)}"
    return f"{'.'.join(map(str, location))}: unknown key; {hint}"


def _most_similar(name: str, candidates: Sequence[str]) -> list[str]:
    """Return the most similar name in a list of one, or an empty list."""
    plain = name.replace("-", "_").lower()
    if SYNONYMS.get(plain) in candidates:
        return [SYNONYMS[plain]]
    by_plain = {one.replace("-", "_"): one for one in candidates}
    return [by_plain[one] for one in difflib.get_close_matches(plain, by_plain, n=1)]


def _similar_keys(schema: type[BaseModel], name: str) -> list[str]:
    """Return the keys of all sections that end in this name or in the most similar one."""
    keys = list(field_keys(schema))
    near = _most_similar(name, sorted({key.rpartition(".")[2] for key in keys}))
    return [key for key in keys if key.rpartition(".")[2] in near]
