"""Stages of a configuration without `stages`: those of the recipe minilm-docstrings, for the student's widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jasper_fast.config.merge import merge
from jasper_fast.config.models import DEFAULT_HEADS


def complete_stages(tree: dict[str, Any], problems: list[str]) -> list[str]:
    """Add the default stages to a configuration that has no list of stages, in place.

    A mapping under ``stages`` changes the default stages by name. A student that is cut from its only teacher starts
    with ``head_init: identity``.

    Args:
        tree: configuration as plain values.
        problems: list that gets a line for each key under ``stages`` that is no default stage.

    Returns:
        lines that describe what was chosen.
    """
    changes = tree.get("stages")
    if changes is not None and not isinstance(changes, dict):
        return []
    student = tree["student"] if isinstance(tree.get("student"), dict) else {}
    stages = default_stages(student)
    tree["stages"] = merge(stages, changes or {}, problems, "stages")
    keep_given_sizes(tree["stages"], stages)
    prefer_minutes(tree["stages"], stages)
    names = ", ".join(str(stage.get("name")) for stage in tree["stages"] if isinstance(stage, dict))
    notes = [f"stages: none given, so the default ones are used ({names})"]
    if "head_init" not in student and _is_cut_teacher(student, tree.get("teachers")):
        student["head_init"] = "identity"
        notes.append("head_init: identity, since the student is made of its teacher's layers")
    return notes


def default_stages(student: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the default stages of a student.

    Args:
        student: the section `student` as plain values. If its heads are invalid, the default ones are used here.
    """
    heads = student.get("heads", DEFAULT_HEADS)
    if not isinstance(heads, list) or not heads or not all(type(width) is int for width in heads):
        heads = DEFAULT_HEADS
    widest, *narrow = sorted(heads, reverse=True)
    trained = [widest]
    if student.get("head_type") == "none":  # the pooled state is the embedding, and only the encoder trains
        small = {"heads": [widest], "small_data": "adapt"}
        return [{"name": "distil", **small, "last_layers": "all", "batch_size": 32, "lr": 4.0e-4, "steps": 720}]
    if student.get("head_type") == "prefix":  # narrow heads are parts of the widest one
        trained, narrow = [widest, *narrow], []
    common: dict[str, Any] = {"train": [f"heads.{widest}.*"], "heads": trained, "small_data": "adapt"}
    stages = [
        {"name": "head", **common, "batch_size": 128, "lr": 2.0e-4, "steps": 100},
        {
            "name": "distil",
            **common,
            "last_layers": "all",
            "weights": {"cosine": 10, "similarity": 0, "relative_similarity": 0},
            "batch_size": 32,
            "lr": 4.0e-4,
            "steps": 720,
        },
    ]
    if narrow:
        reduce: dict[str, Any] = {
            "name": "reduce",
            "train": [f"heads.{width}.*" for width in narrow],
            "heads": narrow,
            "small_data": "adapt",
            "weights": {"cosine": 0, "similarity": 0, "relative_similarity": 0, "neighbourhood": 1},
            "narrow_start": "principal",
            "batches": "neighbours",
            "neighbours": 8,
            "batch_size": 512,
            "lr": 2.0e-3,
            "steps": 600,
        }
        stages.append(reduce)
    return stages


def keep_given_sizes(stages: Any, base: Any) -> None:
    """Leave a batch size that the user has chosen as it is: too few texts for it are an error. Works in place.

    Args:
        stages: the stages with the user's changes.
        base: the stages without them.
    """
    sizes = {stage.get("name"): stage.get("batch_size") for stage in base}
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict) and stage.get("batch_size") != sizes.get(stage.get("name"), stage.get("batch_size")):
            stage.pop("small_data", None)


def prefer_minutes(stages: Any, base: Any) -> None:
    """Drop the steps of the base from stages that the user has given ``minutes`` and no steps, in place.

    Args:
        stages: the stages with the user's changes.
        base: the stages without them.
    """
    before = {stage.get("name"): stage for stage in base if isinstance(stage, dict)} if isinstance(base, list) else {}
    for stage in stages if isinstance(stages, list) else []:
        old = before.get(stage.get("name"), {}) if isinstance(stage, dict) else {}
        newly = old and stage.get("minutes") is not None and old.get("minutes") is None
        if newly and stage.get("steps") == old.get("steps"):
            stage.pop("steps", None)


def _is_cut_teacher(student: Mapping[str, Any], teachers: Any) -> bool:
    """Return True if the student's model is its only teacher, at full width."""
    if not isinstance(teachers, list) or len(teachers) != 1 or not isinstance(teachers[0], dict):
        return False
    (teacher,) = teachers
    whole = teacher.get("truncate_dim") is None and teacher.get("dense") is None
    return whole and student.get("model") is not None and student["model"] == teacher.get("model")
