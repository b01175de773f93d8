"""Rules across the sections of a configuration: stages, student, images and prompts must fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def run_problems(tree: Mapping[str, Any]) -> list[str]:
    """List the contradictions between stages, student and images.

    Args:
        tree: configuration as plain values. A missing or invalid value is skipped here, because the checks of its own
            field report it.
    """
    student, listed = _section(tree.get("student")), tree.get("stages")
    stages = [_section(stage) for stage in listed] if isinstance(listed, list) else []
    return [
        *_name_problems(stages),
        *_untrained_heads(student, stages),
        *_image_problems(tree, student, stages),
        *_head_problems(student, stages),
        *_prompt_problems(student),
    ]


def _name_problems(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for stage in stages if isinstance(name := stage.get("name"), str)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    return [f"stage name {name!r} is used twice. Fix: rename one stage" for name in repeated]


def _untrained_heads(student: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Report heads of the student that no text stage trains."""
    widths, heads = _widths(student.get("heads")), [_widths(stage.get("heads")) for stage in stages]
    if not widths or not stages or None in heads or student.get("head_type", "independent") != "independent":
        return []
    text_heads = [widths for stage, widths in zip(stages, heads, strict=True) if stage.get("vision") is None]
    idle = [width for width in widths if not any(width in stage_heads for stage_heads in text_heads if stage_heads)]
    if not idle:
        return []
    return [
        f"student.heads {idle} are in no stage's heads, so they would stay random. "
        "Fix: add them to the heads of a stage, or remove them"
    ]


def _image_problems(
    tree: Mapping[str, Any], student: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Report a vision stage without tower or images, and images without a vision stage."""
    vision_stages = [stage.get("name") for stage in stages if stage.get("vision") is not None]
    problems = []
    if vision_stages and student and (student.get("vision") is None or tree.get("images") is None):
        problems.append(
            f"stage {vision_stages[0]!r} learns from images, which needs `student.vision` and `images`. Fix: give both"
        )
    if stages and not vision_stages and tree.get("images") is not None:
        problems.append(
            "`images` are given, but no stage learns from images. Fix: give a stage `vision`, or leave images out"
        )
    return problems


def _head_problems(student: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Report stages with heads that the student lacks, and self-teaching stages without the widest head."""
    student_widths = _widths(student.get("heads"))
    problems = []
    for stage in stages:
        widths = _widths(stage.get("heads"))
        if not student_widths or widths is None:
            continue
        if missing := [width for width in widths if width not in student_widths]:
            problems.append(
                f"stage {stage.get('name')!r} uses heads {missing}, and the student has {student_widths}. "
                "Fix: correct the stage's heads or student.heads"
            )
        if stage.get("narrow_target") == "self" and student_widths[0] not in widths:
            problems.append(
                f"stage {stage.get('name')!r}: narrow_target 'self' needs the widest head, {student_widths[0]}. "
                "Fix: add it to the stage's heads"
            )
    return problems


def _prompt_problems(student: Mapping[str, Any]) -> list[str]:
    return [
        f"student.prompts.{role}: {problem}"
        for role, prompt in _section(student.get("prompts")).items()
        if isinstance(prompt, str) and (problem := prompt_problem(prompt))
    ]


def prompt_problem(prompt: str) -> str | None:
    """Describe why a student cannot have a prompt, or return None.

    sentence-transformers supports prefixes only, so ``{text}`` may only be at the end.
    """
    prefix, _, rest = prompt.partition("{text}")
    if not rest:
        return None
    return (
        f"prompt {prompt!r}: nothing may follow {{text}}, because sentence-transformers can only put a prompt before "
        f"the text. Fix: write {prefix + '{text}'!r}"
    )


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _widths(value: Any) -> list[int] | None:
    """Return distinct widths, widest first, or None for anything else."""
    if not isinstance(value, list) or not value or not all(type(width) is int and width > 0 for width in value):
        return None
    return sorted(value, reverse=True) if len(set(value)) == len(value) else None
