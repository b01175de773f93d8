"""What cannot be in a stage and in a whole run beyond what each field says of itself: every problem, as lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jasper_fast.loss_table import LOSSES, titles

if TYPE_CHECKING:
    from jasper_fast.config import StageConfig


def stage_problems(stage: StageConfig) -> list[str]:
    """What keeps a stage from teaching anything, or from doing all that it asks for."""
    problems = []
    size, narrow = stage.batch_size, stage.narrow_weights or stage.weights
    if not stage.train and not stage.last_layers:
        problems.append("it trains nothing: give `train` (globs) or `last_layers`")
    mined = round((1.0 - stage.random_share) * size)  # texts
    if stage.batches == "neighbours" and not stage.random_share and mined % stage.neighbours:
        problems.append(f"batch_size {size} is not a multiple of neighbours {stage.neighbours}")
    elif stage.batches == "neighbours" and mined < stage.neighbours:
        problems.append(
            f"random_share {stage.random_share} of a batch of {size} leaves no room for {stage.neighbours} neighbours"
        )
    if isinstance(stage.temperature, dict) and (strange := sorted(set(stage.temperature) - set(stage.heads))):
        problems.append(f"temperature names {strange}, which are no heads of the stage")
    if stage.texts is not None and stage.texts < size:
        problems.append(f"texts {stage.texts} is less than batch_size {size}")
    if stage.max_chars is not None and (stage.batches != "random" or stage.vision is not None):
        problems.append("max_chars is for random batches of texts; leave it or `batches: neighbours` out")
    if len(set(stage.heads)) != len(stage.heads):
        problems.append(f"a head is named twice in {stage.heads}")
    if stage.codes and all(loss.equal_widths for loss in narrow.weighted()):
        comparing = titles([loss for loss in LOSSES if not loss.equal_widths])
        problems.append(f"codes are trained by the narrow heads' {comparing} loss, and all of them have weight 0")
    contrastive = stage.vision is not None and stage.vision.contrastive and size > 1
    for name, weights in {"weights": stage.weights, "narrow_weights": narrow}.items():
        if not weights.learns(size) and not contrastive:
            least = ", ".join(f"{loss.title} {loss.rows}" for loss in LOSSES)
            problems.append(
                f"nothing can be learnt by its `{name}` from a batch of {size} (fewest texts of each loss: {least}). "
                "Fix: raise batch_size, or give a weight to a loss that needs fewer texts"
            )
            break  # without narrow weights both are the same
    if stage.vision is not None and stage.vision.among == "all" and not stage.vision.contrastive:
        problems.append("vision.among is about the contrastive term, whose weight is 0; set it to batch")
    if stage.vision is not None and stage.vision.balance and not contrastive:
        problems.append(
            "vision.balance is part of the contrastive term, which has weight 0 or a batch of 1; leave it out, or give "
            "vision.contrastive a weight and more pictures"
        )
    if stage.vision is not None and (stage.codes or stage.narrow_start != "as_is"):
        problems.append("codes and narrow_start are for stages of texts; leave them out here")
    if stage.vision is not None and (stage.batches != "random" or stage.narrow_target != "teacher"):
        problems.append(
            "a vision stage draws its batches at random, and each head is taught by the caption's vector of the same "
            "head; leave `batches` and `narrow_target` out"
        )
    return [f"stage {stage.name!r}: {problem}" for problem in problems]


def run_problems(tree: Mapping[str, Any]) -> list[str]:
    """What stages, student and pictures contradict each other in.

    Args:
        tree: a configuration as plain values. Some may be missing or wrong: what hangs on them is passed over, since
            the fields' own checks name them.
    """
    student, listed = _section(tree.get("student")), tree.get("stages")
    stages = [_section(stage) for stage in listed] if isinstance(listed, list) else []
    widths, heads = _widths(student.get("heads")), [_widths(stage.get("heads")) for stage in stages]
    names = [name for stage in stages if isinstance(name := stage.get("name"), str)]
    problems = [f"stage name {name!r} is used twice" for name in sorted({n for n in names if names.count(n) > 1})]

    reading = [found for stage, found in zip(stages, heads, strict=True) if stage.get("vision") is None]
    if widths and stages and None not in heads and student.get("head_type", "independent") == "independent":
        idle = [width for width in widths if not any(width in found for found in reading if found)]
        if idle:
            problems.append(f"student.heads {idle} stand in no stage's heads: they would stay random")
    seeing = [stage.get("name") for stage in stages if stage.get("vision") is not None]
    if seeing and student and (student.get("vision") is None or tree.get("images") is None):
        problems.append(f"stage {seeing[0]!r} learns from pictures: it needs `student.vision` and `images`")
    if stages and not seeing and tree.get("images") is not None:
        problems.append("`images` are given, but no stage learns from pictures: give one `vision`, or leave images out")
    for stage, found in zip(stages, heads, strict=True):
        if not widths or found is None:
            continue
        if missing := [width for width in found if width not in widths]:
            problems.append(f"stage {stage.get('name')!r} uses heads {missing}; the student has {widths}")
        if stage.get("narrow_target") == "self" and widths[0] not in found:
            problems.append(
                f"stage {stage.get('name')!r}: narrow_target 'self' needs the widest head, {widths[0]}, among its heads"
            )
    for role, prompt in _section(student.get("prompts")).items():
        if isinstance(prompt, str) and (problem := prompt_problem(prompt)):
            problems.append(f"student.prompts.{role}: {problem}")
    return problems


def prompt_problem(prompt: str) -> str | None:
    """Why a student cannot have a prompt: sentence-transformers knows prefixes alone, so ``{text}`` may only end it."""
    prefix, _, rest = prompt.partition("{text}")
    if not rest:
        return None
    return (
        f"prompt {prompt!r}: nothing may follow {{text}}, because sentence-transformers can only put a prompt before "
        f"the text; write {prefix + '{text}'!r}"
    )


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _widths(value: Any) -> list[int] | None:
    """Distinct widths, widest first; None for anything else."""
    if not isinstance(value, list) or not value or not all(type(width) is int and width > 0 for width in value):
        return None
    return sorted(value, reverse=True) if len(set(value)) == len(value) else None
