"""Parameters of a stage: which ones train, and the check that the others do not change."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator

import torch

from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import local_part
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import Content, content_digest


def text_parameters(student: Student, stage: StageConfig) -> list[str]:
    """Return the names of the parameters that a text stage trains, in the model's order.

    Heads that the stage does not use are left out even if a glob matches them: no loss would reach them. So is the
    vision tower.

    Raises:
        JasperError: a glob matches no parameter, the student has fewer layers than ``last_layers``, or nothing is left.
    """
    chosen = _matched_names(student, stage)
    last_layers = student.num_layers if stage.last_layers == "all" else stage.last_layers
    if last_layers > student.num_layers:
        raise JasperError(
            f"stage {stage.name!r}: last_layers {last_layers}, but the student has {student.num_layers} layers"
        )
    if last_layers:
        chosen.update(student.layer_parameters(last_layers))
    used = {str(width) for width in stage.heads}
    independent = len(student.heads) > 1  # prefix heads are parts of the widest one
    idle = [f"heads.{width}." for width in student.heads if independent and width not in used]
    idle.append("vision.")
    names = [name for name in _names(student) if name in chosen and not name.startswith(tuple(idle))]
    if not names:
        raise JasperError(f"stage {stage.name!r}: the parameters it names belong only to heads that it does not use")
    return names


def tower_parameters(student: Student, stage: StageConfig) -> list[str]:
    """Return the names of the parameters that a vision stage trains, in the model's order.

    The captions' embeddings are computed once, so the text side must stay frozen.

    Raises:
        JasperError: a glob matches no parameter, or one of the text side.
    """
    chosen = _matched_names(student, stage)
    text = [name for name in _names(student) if name in chosen and not name.startswith("vision.")]
    if text:
        raise JasperError(
            f"stage {stage.name!r} learns from images while the text side is frozen, but would train {text[0]!r}. "
            'Fix: use train: ["vision.tower.*"] (and "vision.marks" for the embeddings around an image)'
        )
    tower = student.vision_tower
    last_layers = tower.num_layers if stage.last_layers == "all" else stage.last_layers
    last = set(tower.layer_parameters(last_layers)) if last_layers else set()
    return [name for name in _names(student) if name in last or name in chosen]


def _names(student: Student) -> list[str]:
    return [name for name, _ in student.named_parameters()]


def _matched_names(student: Student, stage: StageConfig) -> set[str]:
    """Return the names that the globs of ``train`` match."""
    every = _names(student)
    chosen: set[str] = set()
    for glob in stage.train:
        matches = fnmatch.filter(every, glob)
        if not matches:
            raise JasperError(
                f"stage {stage.name!r}: `train` glob {glob!r} matches no parameter; names look like "
                f"{every[0]!r} and {every[-1]!r} (`--dry-run` lists them)"
            )
        chosen.update(matches)
    return chosen


def set_trained(student: Student, names: Iterable[str]) -> None:
    """Let exactly the given parameters require a gradient."""
    trained = set(names)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.grad = None


def frozen_digest(student: Student) -> str:
    """Return a digest of every frozen weight; of sharded weights, only this rank's part."""

    def parts() -> Iterator[Content]:
        for name, parameter in student.named_parameters():
            if not parameter.requires_grad:
                yield name
                part = local_part(parameter.detach())
                yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return content_digest(parts())


def check_frozen(student: Student, stage: StageConfig, before: str) -> None:
    """Check that no frozen weight changed in a stage.

    Args:
        student: the student after the stage.
        stage: the stage, for the message.
        before: :func:`frozen_digest` before the stage.

    Raises:
        JasperError: one changed.
    """
    if frozen_digest(student) != before:
        raise JasperError(f"stage {stage.name!r}: a frozen weight changed; this is a bug, please report it")
