"""Section `stages`, and the rules of one stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from jasper_fast.config.loss_weights import LossWeights
from jasper_fast.config.losses import LOSSES, TEMPERATURE, titles
from jasper_fast.config.rank import RankStageConfig
from jasper_fast.config.types import (
    ByHead,
    Fraction,
    FractionBelowOne,
    LayerCount,
    NotNegative,
    Positive,
    PositiveInt,
    Section,
    reject_bool,
)


class AugmentConfig(Section):
    """Random changes to a training image, drawn each time it is used.

    By default there are no changes.
    """

    shift: Annotated[float, Field(ge=0.0, le=0.5), BeforeValidator(reject_bool)] = 0.0  # largest fraction of the side
    scale: FractionBelowOne = 0.0  # factor between 1 - scale and 1 + scale, separately for each axis
    rotate: Annotated[float, Field(ge=0.0, le=180.0), BeforeValidator(reject_bool)] = 0.0  # largest angle in degrees
    flip: bool = False  # mirror half of the images
    mix: NotNegative = 0.0  # mixup with another image of the batch: the parameter a of Beta(a, a)

    @property
    def has_affine(self) -> bool:
        """Return True if shift, scale, rotate or flip is set."""
        return bool(self.shift or self.scale or self.rotate or self.flip)


class VisionStageConfig(Section):
    """Settings of a vision stage (stage 4).

    The paper has neither a contrastive loss nor augmentation.
    """

    contrastive: NotNegative = 0.0  # weight of the contrastive loss between images and captions, in both directions
    among: Literal["batch", "all"] = "batch"  # captions to compare an image with: the batch's, or all
    balance: NotNegative = 0.0  # weight of a term of the contrastive loss that spreads captions over images
    augment: AugmentConfig = AugmentConfig()


class StageConfig(Section):
    """One stage: the parameters to train, heads, losses, batches and number of steps."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]  # name in logs and reports
    # parameters to train: globs over their names; all others are frozen
    train: list[str] = Field(default=[], description="globs over parameter names, e.g. heads.384.*")
    # also train the last n layers of the encoder, or `all`; in vision stages, of the tower
    last_layers: LayerCount = 0
    vision: VisionStageConfig | None = None  # settings of a vision stage, in which only `vision.*` may train
    rank: RankStageConfig | None = None  # settings of a ranking stage, whose batches are queries and documents
    heads: list[PositiveInt] = Field(min_length=1)  # widths of the heads in the losses
    weights: LossWeights = LossWeights()
    narrow_weights: LossWeights | None = None  # weights for all heads but the widest; null: the same weights
    margin: NotNegative = 0.015  # margin of the relative similarity loss
    # temperature of the neighbourhood loss: one number, or one per width (the default for the others)
    temperature: ByHead = TEMPERATURE
    narrow_target: Literal["teacher", "self"] = "teacher"  # self: the student's widest embedding teaches the others
    # principal: narrow heads start at the principal axes of the widest embeddings (frozen encoder only)
    narrow_start: Literal["as_is", "principal"] = "as_is"
    codes: list[Literal["int8", "ubinary"]] = []  # quantized forms of the narrow embeddings to train as well
    codes_weight: Positive = 1.0  # weight of the losses of `codes`
    # texts per optimizer step, all compared by the losses; in ranking stages queries, which come with their documents
    batch_size: PositiveInt = 128
    # too few texts for batch_size, neighbours or principal axes: an error, or adapt: smaller or random batches, as_is
    small_data: Literal["error", "adapt"] = "error"
    steps: Annotated[int, Field(ge=0, le=10**12, strict=True)] = 0  # optimizer steps; 0: `minutes` decides
    minutes: Positive | None = None  # training time of the stage, which sets its steps by the measured speed
    lr: Positive  # peak learning rate
    warmup: Fraction = 0.05  # length of the warm-up, as a fraction of the steps
    # shape of the learning rate after the warm-up; cyclic: it falls linearly to a tenth in each of `cycles`
    schedule: Literal["constant", "linear", "cosine", "cyclic"] = "linear"
    cycles: Annotated[int, Field(ge=1, strict=True)] = 3  # cycles of a cyclic schedule
    # muon: Muon for the matrices of the encoder's layers, AdamW for all other parameters
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: NotNegative = 0.01  # weight decay of the optimizer
    clip: Positive | None = 1.0  # largest gradient norm; null: no clipping
    # decay of the moving average (EMA) of the weights, with which the stage ends; 0: off
    average: FractionBelowOne = 0.0
    max_length: PositiveInt | None = None  # tokens per text; null: the student's
    micro_batch: PositiveInt = 32  # texts per forward pass; the loss uses the whole batch
    micro_tokens: PositiveInt | None = None  # largest number of tokens per forward pass, padding included
    # encode the batch twice and keep the graph of one micro-batch: for batches that do not fit in memory
    gradient_caching: bool = False
    # recompute layers in the backward pass: true for all, or how many
    gradient_checkpointing: Annotated[bool, Field(strict=True)] | PositiveInt = False
    activation_offload: bool = False  # keep a GPU's activations in host memory
    batches: Literal["random", "neighbours"] = "random"  # neighbours: groups of the teacher's nearest neighbours
    neighbours: Annotated[int, Field(ge=2, strict=True)] = 8  # texts per group of such a batch
    random_share: FractionBelowOne = 0.0  # fraction of such a batch that is drawn at random
    texts: PositiveInt | None = None  # only the first n training texts
    max_chars: PositiveInt | None = None  # only texts of at most this many characters

    @model_validator(mode="after")
    def _check_combinations(self) -> StageConfig:
        if problems := stage_problems(self):
            raise ValueError("\n".join(problems))
        return self


def stage_problems(stage: StageConfig) -> list[str]:
    """List the contradictions between the fields of a stage."""
    problems = [*_length_problems(stage), *_batch_problems(stage), *_loss_problems(stage)]
    if stage.vision is not None:
        problems += _vision_problems(stage, stage.vision)
    if stage.rank is not None:
        problems += _rank_problems(stage)
    return [f"stage {stage.name!r}: {problem}" for problem in problems]


def _length_problems(stage: StageConfig) -> list[str]:
    """List problems of the number of steps: either `steps` or `minutes` sets it."""
    if not stage.steps and stage.minutes is None:
        return ["neither `steps` nor `minutes` is given. Fix: give steps of 1 or more, or minutes"]
    if stage.steps and stage.minutes is not None:
        return [f"steps {stage.steps} and minutes {stage.minutes:g} are both given. Fix: set steps: 0, or no minutes"]
    if stage.schedule == "cyclic" and 0 < stage.steps < stage.cycles:
        return [
            f"{stage.cycles} cycles do not fit into {stage.steps} steps. Fix: lower cycles to {stage.steps} or less"
        ]
    return []


def _batch_problems(stage: StageConfig) -> list[str]:
    """List problems of the trained parameters, texts, batches and heads of a stage."""
    problems = []
    size = stage.batch_size
    mined = round((1.0 - stage.random_share) * size)  # texts
    if not stage.train and not stage.last_layers:
        problems.append("it trains nothing. Fix: give `train` (globs) or `last_layers`")
    if stage.batches == "neighbours" and not stage.random_share and mined % stage.neighbours:
        problems.append(
            f"batch_size {size} is not a multiple of neighbours {stage.neighbours}. "
            f"Fix: set batch_size to {max(1, size // stage.neighbours) * stage.neighbours}"
        )
    elif stage.batches == "neighbours" and mined < stage.neighbours:
        problems.append(
            f"random_share {stage.random_share} leaves {mined} of {size} texts for groups of {stage.neighbours} "
            "neighbours. Fix: lower random_share"
        )
    if isinstance(stage.temperature, dict) and (unknown := sorted(set(stage.temperature) - set(stage.heads))):
        problems.append(
            f"temperature has widths {unknown}, which the stage's heads {stage.heads} lack. Fix: remove these widths"
        )
    if stage.texts is not None and stage.texts < size:
        problems.append(f"texts {stage.texts} is less than batch_size {size}. Fix: raise texts to {size} or more")
    texts_alone = stage.vision is None and stage.rank is None
    if stage.max_chars is not None and (stage.batches != "random" or not texts_alone):
        problems.append("max_chars is for random batches of texts only. Fix: leave max_chars out")
    if len(set(stage.heads)) != len(stage.heads):
        problems.append(f"heads {stage.heads} have a width twice. Fix: list each width once")
    return problems


def _loss_problems(stage: StageConfig) -> list[str]:
    """List problems of the loss weights of a stage."""
    problems = []
    size, narrow = stage.batch_size, stage.narrow_weights or stage.weights
    if stage.codes and all(loss.equal_widths for loss in narrow.weighted()):
        comparing = titles([loss for loss in LOSSES if not loss.equal_widths])
        problems.append(
            f"codes are trained by the narrow heads' {comparing} loss, and all of them have weight 0. "
            "Fix: give one of them a weight"
        )
    contrastive = stage.rank is not None or (stage.vision is not None and stage.vision.contrastive and size > 1)
    for name, weights in {"weights": stage.weights, "narrow_weights": narrow}.items():
        if not weights.has_gradient(size) and not contrastive:
            least = ", ".join(f"{loss.title} {loss.min_rows}" for loss in LOSSES)
            problems.append(
                f"nothing can be learnt by its `{name}` from a batch of {size} (fewest texts of each loss: {least}). "
                "Fix: raise batch_size, or give a weight to a loss that needs fewer texts"
            )
            break  # without narrow weights both are the same
    return problems


def _vision_problems(stage: StageConfig, vision: VisionStageConfig) -> list[str]:
    """List problems of a vision stage."""
    problems = []
    if vision.among == "all" and not vision.contrastive:
        problems.append("vision.among needs the contrastive loss, which has weight 0. Fix: set it to batch")
    if vision.balance and not (vision.contrastive and stage.batch_size > 1):
        problems.append(
            "vision.balance is part of the contrastive loss, which has weight 0 or a batch of 1. Fix: leave it out, or "
            "give vision.contrastive a weight and raise batch_size"
        )
    if stage.codes or stage.narrow_start != "as_is":
        problems.append("codes and narrow_start are for text stages. Fix: leave them out here")
    if stage.batches != "random" or stage.narrow_target != "teacher":
        problems.append(
            "a vision stage draws random batches, and its target for each head is the caption's embedding of that "
            "head. Fix: leave `batches` and `narrow_target` out"
        )
    return problems


def _rank_problems(stage: StageConfig) -> list[str]:
    """List problems of a ranking stage."""
    problems = []
    if stage.vision is not None:
        problems.append("`rank` and `vision` are two kinds of stages. Fix: make two stages")
    if stage.batches != "random" or stage.narrow_start != "as_is":
        problems.append(
            "a ranking stage draws random queries, with their nearest documents, and narrow heads start as they are. "
            "Fix: leave `batches` and `narrow_start` out"
        )
    return problems
