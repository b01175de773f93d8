"""What is wrong with a configuration, in words: one line a problem, with its key and the field that was meant."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError

from jasper_fast.config_checks import run_problems

Location = tuple[int | str, ...]
LONGEST = 200  # characters of a value that a message repeats
MOST_MEANT = 4  # keys that a message proposes
# Names that other tools have for a field.
OTHER_NAMES = {
    "learning_rate": "lr",
    "epochs": "steps",
    "max_steps": "steps",
    "batch": "batch_size",
    "bs": "batch_size",
    "max_seq_length": "max_length",
    "widths": "heads",
    "dim": "heads",
    "output_dir": "out",
}


class Problem(NamedTuple):
    """A line about a configuration; for an unknown key also its place, so that a better hint can be found."""

    line: str
    unknown: Location | None = None


def problems_of(schema: type[BaseModel], tree: dict[str, Any], error: ValidationError) -> list[Problem]:
    """Describe all that is wrong with a tree that pydantic rejected.

    Args:
        schema: of the whole configuration.
        error: raised for the tree.
    """
    unknown = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
    problems = [Problem(_unknown_key(schema, location), location) for location in unknown]
    meant = _as_meant(schema, tree, unknown)
    try:
        schema.model_validate(meant)
    except ValidationError as other:
        problems += [Problem(line) for e in other.errors() for line in _explain(e)]
        if all(e["loc"] for e in other.errors()):  # a field is wrong, so the whole was not looked at
            problems += map(Problem, run_problems(meant))
    return problems


def as_argument(schema: type[BaseModel], problem: Problem, options: Sequence[str]) -> str:
    """Word a problem of the command line: an unknown key may be meant as one of the command's options."""
    if problem.unknown is None:
        return problem.line
    return "--" + _unknown_key(schema, problem.unknown, options, dashes="--")


def takes_list(schema: type[BaseModel], key: str, several: bool) -> bool:
    """Report whether a field takes a list of plain values.

    Args:
        key: dotted, e.g. ``stages.0.heads``.
        several: the value has commas; without, a field that also takes one plain value gets that.
    """
    *path, name = key.split(".")
    field = _section(schema, path).model_fields.get(name)
    if field is None:
        return False
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    lists = [kind for kind in kinds if get_origin(kind) in (list, tuple) and _nested(kind) is None]
    return bool(lists) and (several or len(lists) == len(kinds))


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of everything in a tree that has no parts."""
    if isinstance(tree, (dict, list)) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _as_meant(schema: type[BaseModel], tree: dict[str, Any], unknown: Iterable[Location]) -> dict[str, Any]:
    """Copy the tree with misspelt keys corrected where they can be guessed, so that they hide no other problem."""
    tree = copy.deepcopy(tree)
    for location in unknown:
        *path, key = location
        section: Any = tree
        for step in path:
            section = section[step]
        value = section.pop(key)
        for near in _near(str(key), list(_section(schema, path).model_fields)):
            section.setdefault(near, value)
    return tree


def _explain(error: Any) -> list[str]:
    """Word one pydantic error: key, problem and value."""
    # Of a field with several types the location also names the type that was tried, e.g. constrained-float.
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, int) or part.isidentifier())
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    hidden = isinstance(given, (dict, BaseModel)) or error["type"] == "missing"
    shown = repr(given) if len(repr(given)) <= LONGEST else repr(given)[: LONGEST - 1] + "…"
    ours = error["type"] == "value_error"  # our own messages may contain the value
    lines = [
        f"{line}{'' if hidden or ours and repr(given) in line else f', got {shown}'}" for line in message.splitlines()
    ]
    return [f"{key}: {line}" if key else line for line in lines]


def _unknown_key(schema: type[BaseModel], location: Location, options: Sequence[str] = (), dashes: str = "") -> str:
    *path, name = location
    known = list(_section(schema, path).model_fields)
    if near := _near(str(name), [*options, *known] if not path else known):
        meant = [f"{dashes}{near[0]}" if not path else near[0]]
    else:
        meant = [dashes + key for key in _elsewhere(schema, str(name))]
    if 0 < len(meant) <= MOST_MEANT:
        hint = "did you mean " + " or ".join(f"`{key}`" for key in meant) + "?"
    else:
        hint = f"known: {', '.join(known)}"
    return f"{'.'.join(map(str, location))}: unknown key; {hint}"


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Return the known name that was probably meant, or nothing."""
    plain = name.replace("-", "_").lower()
    if OTHER_NAMES.get(plain) in known:
        return [OTHER_NAMES[plain]]
    by_plain = {one.replace("-", "_"): one for one in known}
    return [by_plain[one] for one in difflib.get_close_matches(plain, by_plain, n=1)]


def _elsewhere(schema: type[BaseModel], name: str) -> list[str]:
    """Return the keys, in whatever section, that end in this name or in the nearest one."""
    keys = list(_keys(schema))
    near = _near(name, sorted({key.rpartition(".")[2] for key in keys}))
    return [key for key in keys if key.rpartition(".")[2] in near]


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all fields, ``N`` for a position in a list."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        if (inner := _nested(field.annotation)) is not None:
            yield from _keys(inner, f"{prefix}{name}.{'N.' if get_origin(field.annotation) is list else ''}")


def _section(schema: type[BaseModel], path: Iterable[int | str]) -> type[BaseModel]:
    """Return the section that a path leads to; unknown parts and positions are passed over."""
    for part in path:
        field = schema.model_fields.get(str(part))
        if field is not None:
            schema = _nested(field.annotation) or schema
    return schema


def _nested(annotation: Any) -> type[BaseModel] | None:
    """Return the section in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _nested(inner)) is not None), None)


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types of a union, or the one type."""
    origin = get_origin(annotation)
    if origin in (list, tuple, dict) or not get_args(annotation):
        return [annotation]
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin is Literal:
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _alternatives(inner)]
