"""Write docs/config.md, the reference of all YAML fields: ``python -m bench config-page`` (``--check`` only compares).

Names, types and defaults come from the pydantic schema. The meaning of a field is its comment in the source of its
class, which `jasper_fast.config.comments` reads.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jasper_fast.config.comments import field_meanings, summary
from jasper_fast.config.run import Config
from jasper_fast.utils.atomic import write_atomic

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
INTRO = """# Configuration reference

Written by `python -m bench config-page` from the classes of `jasper_fast.config.run`.

A run is a YAML 1.2 file, or the name of a shipped recipe. `python -m jasper_fast.train --print-config` prints the
resolved values of a run, with the meanings below as comments. Unknown fields and impossible values are errors, and all
of them are reported at once.

Every field can be overridden on the command line by its dotted name, for example `--stages.1.lr 3e-4`. Items of a list
are counted from 0. A list may be given with commas (`--student.heads 384,128`), and an empty value is empty text. A key
may be given only once.

A default of *required* means that the field must be given. A default of `null` means that the field is not set.
"""


@dataclass
class Part:
    """Class of the schema and the places where it is used."""

    model: type[BaseModel]
    places: list[str] = field(default_factory=list)


def parts() -> list[Part]:
    """List the classes of the schema in the order of a configuration."""
    by_model: dict[type[BaseModel], Part] = {}

    def visit(model: type[BaseModel], place: str) -> None:
        part = by_model.setdefault(model, Part(model))
        part.places.append(place)
        for name, info in model.model_fields.items():
            many = "list" in str(info.annotation)
            for section in sections(info.annotation):
                visit(section, f"{place}.{name}".lstrip(".") + ("[]" if many else ""))

    visit(Config, "")
    return list(by_model.values())


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the classes of the schema inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections(inner)


def type_name(schema: dict[str, Any]) -> str:
    """Describe a field's JSON schema in words."""
    if "$ref" in schema:
        return "section"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(type_name(one) for one in options if one.get("type") != "null"))
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return "two numbers: " + ", ".join(type_name(one) for one in schema["prefixItems"])
        return f"list of {type_name(schema.get('items', {})).replace('section', 'sections')}"
    if kind == "object":
        values = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), {})
        return f"mapping to {type_name(values)}"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
    return names.get(str(kind), "value") + bounds(schema)


def bounds(schema: dict[str, Any]) -> str:
    """Describe the range of a number."""
    words = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[key]:,g}" for key, sign in words.items() if key in schema and abs(schema[key]) < 1e6]
    return f" {', '.join(limits)}" if limits else ""


def default_of(info: FieldInfo) -> str:
    """Format a field's default as YAML."""
    if info.is_required():
        return "*required*"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "defaults"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)}`"


def table(part: Part) -> str:
    """Format the table of a class."""
    schema = part.model.model_json_schema()["properties"]
    meanings = field_meanings(part.model)
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, info in part.model.model_fields.items():
        kind, meaning = type_name(schema[name]), meanings.get(name, "")
        for inner in dict.fromkeys(sections(info.annotation)):
            title = anchor_of(inner)
            kind = re.sub("sections?", rf"[\g<0>](#{title})", kind)
        cells = (f"`{name}`", kind, default_of(info), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def anchor_of(model: type[BaseModel]) -> str:
    """Return the anchor of a class's heading."""
    return model.__name__.removesuffix("Config").lower() or "run"


def page() -> str:
    """Format the whole page."""
    texts = [INTRO.strip()]
    for part in parts():
        title = part.model.__name__.removesuffix("Config") or "Run"
        used = ", ".join(f"`{place}`" for place in part.places if place)
        texts.append(f"## {title}")
        if used:
            texts.append(f"Used in: {used}.")
        texts += ["\n".join(textwrap.wrap(summary(part.model), 120)), table(part)]
    return "\n\n".join(texts) + "\n"


def main(argv: list[str]) -> int:
    """Write the page. With ``--check``, compare it instead, and return 1 if it differs."""
    parser = argparse.ArgumentParser(prog="python -m bench config-page", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the committed page with the schema")
    options = parser.parse_args(argv)
    wanted = page()
    if options.check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted
        print("docs/config.md is up to date" if same else "docs/config.md differs: run python -m bench config-page")
        return int(not same)
    write_atomic(PAGE, wanted)
    return 0
