"""Export a model whose embeddings may be cut: a Dense head of full width, rotated so that its prefixes are good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.exporting.adapted import dense_layer, identity_layer, save_modules, split_head
from jasper_fast.exporting.axes import Axes
from jasper_fast.exporting.flat import for_older_readers
from jasper_fast.exporting.parity import check_rows, source_rows
from jasper_fast.models.folder import read_json, write_json
from jasper_fast.models.hub import prompt_of
from jasper_fast.models.sentence_transformer import ROLES, role_modules, roles_differ
from jasper_fast.reporting.model_card import write_card

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

NARROW = (128, 64, 32)  # prefixes of a model without narrow heads


def write_prefix(
    model: SentenceTransformer,
    axes: Axes,
    widths: Sequence[int],
    folder: Path,
    facts: Mapping[str, Any],
    *,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write a model with one rotated Dense head, or two such models for one that encodes queries differently.

    The rotation keeps every inner product at full width. The first w coordinates, normalised again, are the embedding
    of width w.

    Args:
        model: sentence-transformers model with embeddings of width d.
        axes: rotation (d, d).
        widths: widths for which the axes were made, for the card.
        folder: unpublished folder.
        facts: facts for the model card.
        trust_remote_code: permission to run the model's code while the export is checked. Default: False.

    Returns:
        The model folders: ``folder``, or ``query`` and ``document`` in it.

    Raises:
        JasperError: an exported embedding differs from the rotated one of the model.
    """
    places: dict[tuple[str, ...], Path] = {(role,): folder / role for role in ROLES}
    if not roles_differ(model):
        places = {ROLES: folder}
    full = len(axes.rotation)
    export = {"form": "prefix", "width": full, "prefix_widths": [*widths], "axes": axes.facts()}
    for roles, place in places.items():
        place.mkdir(exist_ok=True)
        expected = {role: source_rows(model, role) @ axes.rotation for role in roles}
        stem, linear = split_head(role_modules(model, roles[0]))
        head = dense_layer(linear or identity_layer(model, roles[0]), axes.rotation)
        prompts = {role: prompt_of(model.prompts, role) for role in roles}
        _save(stem, head, prompts, str(model.device), place)
        encoder = read_json(place / "config.json")
        write_json(place / "config.json", {**encoder, "matryoshka_dimensions": [full, *widths]})  # vLLM reads it
        student = {**facts.get("student", {}), "prompts": prompts}
        only = {"role": roles[0]} if len(roles) == 1 else {}  # the other role has another folder
        write_card(place, {**facts, "student": student, "export": {**export, **only}}, [full], flat=True)
        check_rows(place, expected, str(model.device), trust_remote_code=trust_remote_code)
    return [*places.values()]


def _save(stem: Sequence[Any], head: Any, prompts: Mapping[str, str], device: str, folder: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    save_modules([*stem, head, Normalize()], prompts, device, folder)
    for_older_readers(folder)
