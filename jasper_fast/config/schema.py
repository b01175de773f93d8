"""Walk the fields of the configuration's models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

Location = tuple[int | str, ...]


def takes_list(schema: type[BaseModel], key: str, several: bool) -> bool:
    """Return True if a value of the command line becomes a list of plain values.

    Args:
        schema: schema of the whole configuration.
        key: dotted key of the field, e.g. ``stages.0.heads``.
        several: True if the value has commas. Without commas, a field that also takes a single value gets that.
    """
    *path, name = key.split(".")
    field = section_at(schema, path).model_fields.get(name)
    if field is None:
        return False
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    lists = [kind for kind in kinds if get_origin(kind) in (list, tuple)]
    if any(nested_section(kind) is not None for kind in lists):
        return several  # short forms of sections: one text is expanded later
    return bool(lists) and (several or len(lists) == len(kinds))


def takes_text(schema: type[BaseModel], key: str) -> bool:
    """Return True if a field takes text, and no number and no truth value.

    Args:
        schema: schema of the whole configuration.
        key: dotted key of the field, e.g. ``name``.
    """
    *path, name = key.split(".")
    field = section_at(schema, path).model_fields.get(name)
    kinds = [] if field is None else _alternatives(field.annotation)
    return str in kinds and not {int, float, bool} & set(kinds)


def field_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all fields. A position in a list is ``N``."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        if (inner := nested_section(field.annotation)) is not None:
            yield from field_keys(inner, f"{prefix}{name}.{'N.' if get_origin(field.annotation) is list else ''}")


def section_at(schema: type[BaseModel], path: Iterable[int | str]) -> type[BaseModel]:
    """Return the section at a path. Unknown parts are skipped, and so is an item's position or name after a list."""
    is_item = False
    for part in path:
        field = None if is_item else schema.model_fields.get(str(part))
        is_item = field is not None and get_origin(field.annotation) is list
        if field is not None:
            schema = nested_section(field.annotation) or schema
    return schema


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside a field's type, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for inner in get_args(annotation) if (section := nested_section(inner)) is not None), None)


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
