"""Licence of a distilled model, from the licences of its base model and teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jasper_fast.utils.names import public_name

UNKNOWN_LICENCE = "unknown: check the model's page"
# Identifiers of the hub whose models may be distilled and published under another of them.
PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib", "unlicense"}
    | {"cc0-1.0", "0bsd", "wtfpl", "cc-by-3.0", "cc-by-4.0", "cdla-permissive-2.0", "ms-pl", "bsl-1.0", "postgresql"}
)
NO_NAME = frozenset({"other", "unknown"})  # identifiers of the hub that name no licence
_NOTICE = "keep its copyright notice and its text in every copy"
_CREDIT = "name the authors and the licence, link to it, and say what was changed"
OBLIGATIONS = {  # start of an identifier: what a copy of the model must do
    "apache-2.0": "add its text, keep the notices and the file NOTICE, and say what was changed",
    "mit": _NOTICE,
    "bsd": _NOTICE,
    "isc": _NOTICE,
    "zlib": "do not misrepresent the origin, and mark changed versions",
    "ms-pl": "keep its notices and its text",
    "bsl-1.0": _NOTICE,
    "postgresql": _NOTICE,
    "cc-by-nc": f"{_CREDIT}. Commercial use is not permitted",
    "cc-by-sa": f"{_CREDIT}. Publish under the same licence",
    "cc-by-nd": f"{_CREDIT}. Changed versions may not be published",
    "cc-by": _CREDIT,
    "cdla-permissive": "pass on its text",
    "gpl": "publish the source and changes under the same licence",
    "agpl": "publish the source and changes under the same licence, also for a network service",
    "lgpl": "publish changes under the same licence",
    "openrail": "pass on its use restrictions",
    "creativeml-openrail": "pass on its use restrictions",
    "bigscience-openrail": "pass on its use restrictions",
    "gemma": "pass on its terms and its use restrictions",
    "llama": "pass on its terms, its notice and its name",
}
FREE = frozenset({"cc0-1.0", "0bsd", "unlicense", "wtfpl"})


def model_parts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the models that a student is made of, as (name with its role, licence) pairs, the base model first."""
    base = public_name(facts.get("student", {}).get("model", ""))
    parts = [(f"base model {base}".strip(), facts.get("licence", UNKNOWN_LICENCE))]
    into = bool(facts.get("adapted", {}).get("into"))  # then the first teacher is an index
    for position, teacher in enumerate(facts.get("teachers", [])):
        role = "index" if into and not position else "teacher"
        parts.append((f"{role} {public_name(teacher['model'])}", teacher.get("licence", UNKNOWN_LICENCE)))
    return parts


def derived_licence(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the licence of a distilled model, and the reason.

    If all parts have the same licence, or all have permissive ones, it is the licence of the base model. Otherwise it
    is "other", and a person must decide. The asymmetric form of an adapted model holds its teacher too, so all parts
    must have the same licence.

    Args:
        facts: facts of the run, as from ``run_facts`` of the model card.

    Returns:
        The hub's identifier of the licence, e.g. ``apache-2.0`` or ``other``, and a sentence or two.

    Example:
        >>> derived_licence({"student": {"model": "a/b"}, "licence": "mit", "teachers": []})[0]
        'mit'
        >>> derived_licence({"student": {"model": "a/b"}, "licence": "mit", "teachers": [{"model": "c/d"}]})
        ('other', 'No licence is named, because the licence of teacher c/d is unknown.')
    """
    parts = model_parts(facts)
    unknown = [name for name, licence in parts if licence == UNKNOWN_LICENCE or licence.lower() in NO_NAME]
    if unknown:
        return "other", f"No licence is named, because the licence of {' and of '.join(unknown)} is unknown."
    identifiers = [licence.lower() for _, licence in parts]
    if len(set(identifiers)) == 1:
        return identifiers[0], f"The base model and all teachers have the licence {identifiers[0]}."
    if facts.get("adapted", {}).get("form") == "asymmetric":
        named = " and ".join(f"{name} has the licence {licence}" for name, licence in parts)
        return "other", f"No licence is named, because the folder holds several models: {named}."
    strict = [f"{name} has the licence {licence}" for name, licence in parts if licence.lower() not in PERMISSIVE]
    if strict:
        reason = f"No licence is named, because {' and '.join(strict)}."
        return "other", f"{reason} Read its terms on models trained with its outputs before you publish this one."
    return identifiers[0], "This is the licence of the base model. The licences of all teachers permit it."


def obligations(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a copy of the model must do, as (licence, obligation) pairs, one for each licence of a part.

    Args:
        facts: facts of the run, as from ``run_facts`` of the model card.

    Example:
        >>> obligations({"student": {"model": "a/b"}, "licence": "mit"})
        [('mit', 'keep its copyright notice and its text in every copy')]
    """
    return [
        (licence, _obligation(licence.lower())) for licence in dict.fromkeys(part[1] for part in model_parts(facts))
    ]


def _obligation(licence: str) -> str:
    if licence in FREE:
        return "nothing"
    if licence == UNKNOWN_LICENCE.lower() or licence in NO_NAME:
        return "find out its licence before you publish the model"
    starts = [start for start in OBLIGATIONS if licence.startswith(start)]
    return OBLIGATIONS[max(starts, key=len)] if starts else "read its terms"


def licence_text(facts: Mapping[str, Any]) -> str:
    """Return the content of the file LICENSE: the licence, its reason, and the licences of all parts."""
    licence, reason = derived_licence(facts)
    head = f"Licence: {licence}"
    if licence != "other":
        head += "\nMeaning of this identifier: https://huggingface.co/docs/hub/repositories-licenses"
    parts = "\n".join(f"- {name}: {licence}" for name, licence in model_parts(facts))
    duties = "\n".join(f"- {licence}: {duty}" for licence, duty in obligations(facts))
    return (
        f"{head}\n\n{reason}\n\nParts of this model:\n\n{parts}\n\n"
        f"What these licences ask of a copy (a summary, no legal advice):\n\n{duties}\n"
    )
