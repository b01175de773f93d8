"""The whole configuration, and the rules across its sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    model_validator,
)

from jasper_fast.config.data import DataConfig, EvalConfig, ImagesConfig
from jasper_fast.config.loss_weights import LossesConfig
from jasper_fast.config.losses import LOSSES, titles
from jasper_fast.config.models import StudentConfig, TeacherConfig, prompt_problem
from jasper_fast.config.stage import StageConfig
from jasper_fast.config.types import (
    Positive,
    PositiveInt,
    Section,
    Seed,
)
from jasper_fast.utils.errors import JasperError

DEFAULT_KEEP = 2  # checkpoints


class ParallelConfig(Section):
    """Training with several processes, started by torchrun.

    Results differ from one process by rounding only.
    """

    mode: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, gradients and optimizer state are sharded
    timeout: Positive = 600.0  # seconds to wait for a missing rank before the run ends


class LogConfig(Section):
    """Log and experiment trackers.

    ``log.jsonl`` always has every step.
    """

    every: PositiveInt = 10  # steps between printed lines, which are at least 2 s apart, and between values in trackers
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []  # each must be installed
    project: str = "jasper_fast"  # project name in Weights & Biases and trackio


class CheckpointConfig(Section):
    """Checkpoints, from which the same command resumes the run."""

    every: PositiveInt = 100  # steps between checkpoints; the end of a stage is always saved
    # number of checkpoints to keep; with the default, a finished run keeps only its newest
    keep: Annotated[int, Field(ge=2, strict=True)] = DEFAULT_KEEP


class Config(Section):
    """Configuration of a whole run.

    ``--print-config`` prints every field.
    """

    # name of the run, whose folder is `runs/NAME`; left out: the name of the file, else of the folder given by `--out`
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    seed: Seed = 0  # seed of new weights, batches and dropout
    # minutes of training, pooling included: one factor scales the steps of all stages without own `minutes`
    minutes: Positive | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on devices where it is fast
    student: StudentConfig
    teachers: list[TeacherConfig] = Field(min_length=1)
    data: DataConfig
    images: ImagesConfig | None = None
    evaluate: list[EvalConfig] = []
    stages: list[StageConfig] = Field(min_length=1)
    losses: LossesConfig = LossesConfig()
    # after training, refit each head in closed form, if held-out documents then keep more of the teacher's neighbours
    refit: bool = True
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines about what was chosen for the user when the configuration was loaded. They are not stored."""
        return self._notes

    def with_notes(self, notes: Sequence[str]) -> Config:
        """Return the configuration with more notes."""
        config = self.model_copy()
        config._notes = (*self._notes, *notes)
        return config

    @model_validator(mode="before")
    @classmethod
    def _whole_texts(cls, tree: Any) -> Any:
        """Turn cutting and shuffling off for precomputed vectors, which exist for whole texts, unless they are set."""
        teachers = tree.get("teachers") if isinstance(tree, Mapping) else None
        precomputed = isinstance(teachers, list) and any(_section(t).get("vectors") is not None for t in teachers)
        if not precomputed or not isinstance(tree.get("data"), Mapping):
            return tree
        return {**tree, "data": {"cut_share": 0.0, "shuffle_share": 0.0, **tree["data"]}}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if problems := run_problems(self.model_dump()):
            raise ValueError("\n".join(problems))
        return self


def reduced_width(config: Config, teachers: Sequence[int]) -> int | None:
    """Return the width to which wider teacher embeddings are reduced, or None if they are used as they are.

    They are reduced to the student's widest head if one of its losses needs equal widths.

    Args:
        config: the run's configuration.
        teachers: width of each teacher's embeddings.
    """
    widest = config.student.heads[0]
    return widest if trained_in_teacher_space(config) and sum(teachers) > widest else None


def trained_in_teacher_space(config: Config) -> bool:
    """Return whether a stage trains the student's widest embeddings to equal the teachers', possibly reduced ones."""
    widest = config.student.heads[0]
    return any(
        stage.vision is None and widest in stage.heads and any(loss.equal_widths for loss in stage.weights.weighted())
        for stage in config.stages
    )


def check_losses(config: Config, teachers: Sequence[int]) -> None:
    """Reject losses that would be left out because they need equal widths, and heads that no loss trains.

    Teachers wider than the widest head are reduced to its width; see `reduced_width`.

    Args:
        config: the run's configuration.
        teachers: width of each teacher's embeddings.

    Raises:
        JasperError: the first problem found.
    """
    widest, target = config.student.heads[0], reduced_width(config, teachers) or sum(teachers)
    for stage in config.stages:
        if stage.vision is not None:  # each head is taught by its own width
            continue
        pointwise = [loss for loss in stage.weights.weighted() if loss.equal_widths]
        if widest in stage.heads and pointwise and widest != target:
            widths = " + ".join(map(str, teachers)) + (f" = {target}" if len(teachers) > 1 else "")
            zero = " and ".join(f"weights.{loss.name}: 0" for loss in pointwise)
            raise JasperError(
                f"stage {stage.name!r} has a {titles(pointwise)} loss, which needs equal widths (got FC1, the "
                f"student's widest head, {widest} wide and the teachers' embeddings {widths}). Fix: let student.heads "
                f"begin with {target} or less, add a teacher, or set the stage's {zero}"
            )
        for width in stage.heads if stage.rank is None else []:  # ranking trains heads of any width
            weights = stage.weights if width == widest else stage.narrow_weights or stage.weights
            against = widest if stage.narrow_target == "self" and width != widest else target
            if not weights.compares_texts(stage.batch_size) and width != against:
                comparing = titles([loss for loss in LOSSES if not loss.equal_widths])
                raise JasperError(
                    f"stage {stage.name!r} would leave its head {width} untrained: its target is {against} wide, which "
                    f"leaves out losses that need equal widths, and no other loss learns from {stage.batch_size} "
                    f"texts. Fix: give narrow_weights a {comparing} loss, or leave the head out"
                )


def run_problems(tree: Mapping[str, Any]) -> list[str]:
    """List the contradictions between stages, student and images.

    Args:
        tree: configuration as plain values. A missing or invalid value is skipped here, because the checks of the
            field report it.
    """
    student, listed = _section(tree.get("student")), tree.get("stages")
    stages = [_section(stage) for stage in listed] if isinstance(listed, list) else []
    return [
        *_name_problems(stages),
        *_minutes_problems(tree.get("minutes"), stages),
        *_untrained_heads(student, stages),
        *_image_problems(tree, student, stages),
        *_head_problems(student, stages),
        *_prompt_problems(student),
    ]


def _name_problems(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for stage in stages if isinstance(name := stage.get("name"), str)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    return [f"stage name {name!r} is used twice. Fix: rename one stage" for name in repeated]


def _minutes_problems(minutes: Any, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Report a budget of the run that no stage can follow, or that the stages' own budgets exceed."""
    own = [stage.get("minutes") for stage in stages]
    if (
        not isinstance(minutes, (int, float))
        or not own
        or not all(isinstance(m, (int, float, type(None))) for m in own)
    ):
        return []
    fixed = sum(m for m in own if m is not None)
    if None not in own:
        return ["minutes has no stage to scale: all stages have own `minutes`. Fix: leave the run's minutes out"]
    if fixed >= minutes:
        return [
            f"minutes {minutes:g} leaves no time beside the stages' own {fixed:g} minutes. Fix: raise minutes above "
            f"{fixed:g}"
        ]
    return []


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


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _widths(value: Any) -> list[int] | None:
    """Return distinct widths, widest first, or None for anything else."""
    if not isinstance(value, list) or not value or not all(type(width) is int and width > 0 for width in value):
        return None
    return sorted(value, reverse=True) if len(set(value)) == len(value) else None
