"""Configuration of a run: models, data, losses, stages and logging.

A configuration is a YAML file, or the name of a recipe in ``jasper_fast/recipes``. Arguments such as
``--stages.0.lr 1e-4`` override single fields. All problems are reported at once, before anything is loaded.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from jasper_fast.config_checks import run_problems
from jasper_fast.config_overrides import CONFIG_FILES, override, override_pairs
from jasper_fast.config_problems import Problem, as_argument, leaves, problems_of, takes_list
from jasper_fast.config_text import dump_yaml, read_yaml
from jasper_fast.config_types import (
    ByHead,
    Fraction,
    FractionBelowOne,
    NotNegative,
    Number,
    Positive,
    PositiveInt,
    Section,
    Seed,
    Width,
    reject_bool,
)
from jasper_fast.errors import ConfigError
from jasper_fast.loss_config import LossesConfig, LossWeights
from jasper_fast.loss_table import LOSSES, TEMPERATURE, titles

DEFAULT_RECIPE = "minilm-docstrings"


class Prompts(Section):
    """Prompts put before each query or document.

    ``{text}`` marks where the text goes. Without it, the text follows the prompt.
    """

    query: str = ""  # prompt of queries
    document: str = ""  # prompt of documents


class TeacherPrompts(Section):
    """Prompts of a teacher.

    A missing field means the model's own prompt. An empty string disables it.
    """

    query: str | None = None  # prompt of queries
    document: str | None = None  # prompt of documents


class TeacherConfig(Section):
    """One teacher: a model to run, or a file of precomputed embeddings."""

    model: str | None = None  # hub name, path, or `package:import_name/folder`
    # .parquet or .jsonl file with a `digest` or `text` column, .npy file with one row per text in order, or a folder
    vectors: str | None = None
    revision: str | None = None  # branch, tag or commit on the model hub
    prompts: TeacherPrompts = TeacherPrompts()
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"  # auto: the model's setting, or mean if it has none
    max_length: PositiveInt = 512  # tokens per text; longer texts are truncated
    dense: str | None = None  # folder of the Dense head to use inside the model, e.g. 2_Dense_8192 (Stella)
    truncate_dim: PositiveInt | None = None  # keep only the first coordinates (Matryoshka teachers)
    batch_tokens: PositiveInt = 8192  # tokens per forward pass, padding included
    trust_remote_code: bool = False  # permission to run code that comes with the model

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.model is None) == (self.vectors is None):
            raise ValueError(
                "expected exactly one of `model` and `vectors`. "
                "Fix: give either `model` (a teacher to run) or `vectors` (precomputed embeddings)"
            )
        if self.vectors is not None and self.dense is not None:
            raise ValueError(
                "`dense` chooses a head of a `model`, and precomputed `vectors` have no heads. Fix: leave `dense` out"
            )
        return self


class VisionConfig(Section):
    """Vision tower of the student.

    The tower's tokens are resampled and enter the text encoder as input embeddings.
    """

    model: str | None = None  # Hugging Face vision tower with a fixed image size, e.g. SigLIP
    tower: dict[str, Number] | None = None  # fields of a SiglipVisionConfig, for a tower trained from scratch
    revision: str | None = None  # branch, tag or commit on the model hub
    image_tokens: PositiveInt = 300  # input embeddings per image for the text encoder
    start_token: str = "<|image_start|>"  # token before an image; added if the tokenizer lacks it
    end_token: str = "<|image_end|>"  # token after an image; added if the tokenizer lacks it
    trust_remote_code: bool = False  # permission to run code that comes with the tower

    @model_validator(mode="after")
    def _one_origin(self) -> VisionConfig:
        if (self.model is None) == (self.tower is None):
            raise ValueError(
                "expected exactly one of `model` and `tower`. "
                "Fix: give either `model` (a tower to load) or `tower` (the size of a tower to train from scratch)"
            )
        if self.start_token == self.end_token:
            raise ValueError(f"start_token and end_token must differ (got {self.start_token!r} twice). Fix: change one")
        return self


class StudentConfig(Section):
    """Model to train: a text encoder, mean pooling, and one linear head per width."""

    model: str  # Hugging Face text encoder: hub name, path, or `package:import_name/folder`
    revision: str | None = None  # branch, tag or commit on the model hub
    # layers to keep: the first n, or a list of indices from 0; null keeps all
    layers: PositiveInt | list[Annotated[int, Field(ge=0, strict=True)]] | None = None
    heads: list[Width] = Field(min_length=1)  # widths of the embeddings; the widest is the default of the export
    # independent: one linear layer per width; prefix: the first rows of the widest head
    head_type: Literal["independent", "prefix"] = "independent"
    head_init: Literal["random", "identity"] = "random"  # identity: a head starts as the first pooled coordinates
    max_length: PositiveInt = 512  # tokens per text; longer texts are truncated
    bidirectional: bool = True  # remove the causal mask of decoder models
    prompts: Prompts = Prompts()
    vector_dropout: FractionBelowOne = 0.0  # dropout on the pooled state
    trust_remote_code: bool = False  # permission to run code that comes with the model
    vision: VisionConfig | None = None  # vision tower; null: the student reads text only

    @field_validator("heads")
    @classmethod
    def _distinct(cls, heads: list[int]) -> list[int]:
        if len(set(heads)) != len(heads):
            raise ValueError(f"head widths must differ, got {heads}")
        return sorted(heads, reverse=True)


class SourceConfig(Section):
    """One source of training texts."""

    # a file or folder (.jsonl, .csv, .tsv, .txt, .parquet; also .gz, .bz2, .xz, .zst), a `datasets` name, `docstrings`
    # or `glyphs`
    path: str
    config: str | None = None  # configuration name of a `datasets` name
    split: str = "train"  # split of a `datasets` name
    columns: list[str] = Field(default=["text"], min_length=1)  # columns to read; a list in a cell gives several texts
    join: bool = False  # true: the columns make one text; false: each column is a separate text
    role: Literal["query", "document"] = "document"  # selects the prompt
    limit: PositiveInt | None = None  # largest number of texts, drawn by the seed
    variants: Annotated[int, Field(ge=0, strict=True)] = 0  # additional copies of each text, with replaced words
    revision: str | None = None  # branch, tag or commit of a `datasets` name


class DataConfig(Section):
    """Training texts and their augmentation (arXiv 2412.19048, section on data)."""

    sources: list[SourceConfig] = Field(min_length=1)
    cut_share: Fraction = 0.3  # fraction of documents that are cut into pieces
    cut_sentences: tuple[PositiveInt, PositiveInt] = (1, 10)  # sentences per piece: smallest and largest number
    shuffle_share: Fraction = 0.0008  # fraction of texts whose words are shuffled
    min_chars: PositiveInt = 2  # shorter texts are left out
    limit: PositiveInt | None = None  # largest number of texts in total, drawn by the seed
    seed: Seed = 0  # seed of draws, cuts and order; separate from the run's seed, so that runs use the same texts
    cache: str = "cache"  # folder of texts and teacher embeddings, used by all runs
    cache_dtype: Literal["float16", "int8"] = "float16"  # storage of teacher embeddings

    @field_validator("cut_sentences")
    @classmethod
    def _ordered(cls, span: tuple[int, int]) -> tuple[int, int]:
        if span[0] > span[1]:
            raise ValueError(f"the first number must not exceed the second, got {list(span)}")
        return span


class ImageSourceConfig(Section):
    """One source of images with captions."""

    # `glyphs`, a folder or .zip of images, WebDataset .tar files, .parquet files, a folder that `datasets` saved, or a
    # `datasets` name
    path: str
    captions: str | None = None  # JSONL file of a folder or zip, with one row per image or caption
    image_column: str = "image"  # column with the file name or the image
    # columns with captions; a list in a cell gives several
    caption_columns: list[str] = Field(default=["caption"], min_length=1)
    config: str | None = None  # configuration name of a `datasets` name
    split: str = "train"  # split of a `datasets` name
    revision: str | None = None  # branch, tag or commit of a `datasets` name
    limit: PositiveInt | None = None  # the first n images only
    font: str = "DejaVuSans"  # font of the glyphs: the file name of any font that matplotlib ships
    # hold out none of these images; leave out those with the caption or pixels of a held-out one
    train_only: bool = False


class ImagesConfig(Section):
    """Images of vision stages, and how many are held out for evaluation."""

    sources: list[ImageSourceConfig] = Field(min_length=1)
    # images held out from training, together with all images that have the same caption or pixels
    held_out: Annotated[int, Field(ge=0, strict=True)] = 0
    max_bad: Annotated[int, Field(ge=0, strict=True)] = 100  # broken images to skip before the run ends with an error
    seed: Seed = 0  # seed of the held-out images


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
    def moved(self) -> bool:
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


class EvalConfig(Section):
    """One evaluation set: a BEIR folder, a similarity TSV, a classification folder, or the built-in docstrings."""

    path: str  # folder or file, or `docstrings`; its content decides the kind
    name: str | None = None  # name in logs and reports; default: the name of the folder or file
    limit: PositiveInt | None = None  # largest number of queries or pairs
    # allow training on the documents of a retrieval set, never on its queries; the report says so
    transductive: bool = False


class StageConfig(Section):
    """One stage: the parameters to train, heads, losses, batches and number of steps."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]  # name in logs and reports
    # parameters to train: globs over their names; all others are frozen
    train: list[str] = Field(default=[], description="globs over parameter names, e.g. heads.384.*")
    # also train the last n layers of the encoder; in vision stages, of the tower
    last_layers: Annotated[int, Field(ge=0, strict=True)] = 0
    vision: VisionStageConfig | None = None  # settings of a vision stage, in which only `vision.*` may train
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
    batch_size: PositiveInt = 128  # texts per optimizer step, all compared by the losses
    steps: PositiveInt  # optimizer steps
    lr: Positive  # peak learning rate
    warmup: Fraction = 0.05  # length of the warm-up, as a fraction of the steps
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # shape of the learning rate after the warm-up
    weight_decay: NotNegative = 0.01  # weight decay of AdamW
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
    def _possible(self) -> StageConfig:
        if problems := stage_problems(self):
            raise ValueError("\n".join(problems))
        return self


def stage_problems(stage: StageConfig) -> list[str]:
    """List the contradictions between the fields of a stage."""
    problems = [*_batch_problems(stage), *_loss_problems(stage)]
    if stage.vision is not None:
        problems += _vision_problems(stage, stage.vision)
    return [f"stage {stage.name!r}: {problem}" for problem in problems]


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
    if stage.max_chars is not None and (stage.batches != "random" or stage.vision is not None):
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
    contrastive = stage.vision is not None and stage.vision.contrastive and size > 1
    for name, weights in {"weights": stage.weights, "narrow_weights": narrow}.items():
        if not weights.learns(size) and not contrastive:
            least = ", ".join(f"{loss.title} {loss.rows}" for loss in LOSSES)
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

    every: PositiveInt = 10  # steps between printed lines
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []  # each must be installed
    project: str = "jasper_fast"  # project name in Weights & Biases and trackio


class CheckpointConfig(Section):
    """Checkpoints, from which the same command resumes the run."""

    every: PositiveInt = 100  # steps between checkpoints; the end of a stage is always saved
    keep: Annotated[int, Field(ge=2, strict=True)] = 2  # number of checkpoints to keep


class Config(Section):
    """Configuration of a whole run.

    ``--print-config`` prints every field.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]  # name of the run, whose folder is `runs/NAME`
    seed: Seed = 0  # seed of new weights, batches and dropout
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on devices where it is fast
    student: StudentConfig
    teachers: list[TeacherConfig] = Field(min_length=1)
    data: DataConfig
    images: ImagesConfig | None = None
    evaluate: list[EvalConfig] = []
    stages: list[StageConfig] = Field(min_length=1)
    losses: LossesConfig = LossesConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if problems := run_problems(self.model_dump()):
            raise ValueError("\n".join(problems))
        return self


def recipe_names() -> list[str]:
    """List the recipes that ship with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in (files("jasper_fast") / "recipes").iterdir() if p.name.endswith(".yaml")
    )


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[tuple[str, Any]] = ()
) -> Config:
    """Read and validate a configuration.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        overrides: pairs of dotted key and value, e.g. ``("stages.0.lr", 1e-4)``. A value that is text is parsed as
            YAML.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is impossible. The message lists all of them,
            each with its key.
    """
    return _load(source, overrides, [])


def load_arguments(
    source: str | Path | Mapping[str, Any] | None, arguments: Sequence[str], options: Sequence[str] = ()
) -> Config:
    """Read and validate a configuration with overrides from a command line.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        arguments: ``--key.sub value`` pairs.
        options: names of the command's other options, which are proposed for a misspelt key.

    Raises:
        ConfigError: as in :func:`load_config`. Problems of the arguments are listed separately from those of the file.
    """
    return _load(source, *override_pairs(arguments), options)


def stored_config(tree: dict[str, Any], where: str) -> Config:
    """Load a configuration that a run stored, in this version or an older one.

    A missing field has its default.

    Args:
        tree: dumped configuration, or the part of it that determines the results.
        where: place of the configuration in messages.

    Raises:
        ConfigError: a field is unknown in this version, or a value is rejected.
    """
    config, problems = _validate(tree)
    if config is None:
        raise ConfigError([problem.line for problem in problems], where)
    return config


def _load(
    source: Any, overrides: Sequence[tuple[str, Any]], problems: list[str], options: Sequence[str] | None = None
) -> Config:
    """Read and validate a configuration with overrides.

    Args:
        source: path of a YAML file, recipe name, or mapping. None means the default recipe.
        overrides: pairs of dotted key and value.
        problems: problems of the overrides that are known already.
        options: names of the command's other options. None means that the overrides come from Python.
    """
    tree, where = _read(source)
    file_tree, override_problems = copy.deepcopy(tree), list(problems)
    for key, value in overrides:
        override(tree, key, value, override_problems, partial(takes_list, Config))
    config, all_problems = _validate(tree)
    if config is not None and not override_problems:
        return config
    file_problems = _validate(file_tree)[1] if overrides else all_problems
    for problem in all_problems:
        if problem not in file_problems:
            override_problems.append(problem.line if options is None else as_argument(Config, problem, options))
    remaining = [problem.line for problem in all_problems if problem in file_problems]
    raise ConfigError(override_problems, "the overrides" if options is None else "the command line", {where: remaining})


def _validate(tree: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Return the configuration, or None and all its problems."""
    try:
        return Config.model_validate(tree), []
    except ValidationError as error:
        return None, problems_of(Config, tree, error, run_problems)


def dump_config(config: Config) -> str:
    """Format the resolved configuration as YAML, with every field."""
    return dump_yaml(config.model_dump(mode="json"))


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the fields in which two dumped configurations differ, as lines ``key: old -> new``."""
    a, b = dict(leaves(old)), dict(leaves(new))
    return [f"{k}: {a.get(k, '(absent)')!r} -> {b.get(k, '(absent)')!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), "the given configuration"
    name = str(source) if source is not None else DEFAULT_RECIPE
    if name in recipe_names():
        where = f"recipe {name}"
        return read_yaml(files("jasper_fast") / "recipes" / f"{name}.yaml", where), where
    if not os.path.exists(name):  # also False for an invalid file name
        raise ConfigError([_no_such_file(name)], "--config")
    return read_yaml(Path(name), name), name


def _no_such_file(name: str) -> str:
    """Describe a missing configuration, and propose the file or recipe with the most similar name."""
    with suppress(OSError, ValueError):
        neighbours = [str(file) for file in Path(name).parent.iterdir() if file.name.endswith(CONFIG_FILES)]
        if near := difflib.get_close_matches(name.removesuffix(".yaml"), recipe_names(), n=1, cutoff=0.8):
            return f"{name!r} is neither a file nor a recipe; did you mean `{near[0]}`?"
        if near := difflib.get_close_matches(name, neighbours, n=1, cutoff=0.8):
            return f"{name!r} is neither a file nor a recipe; did you mean `{near[0]}`?"
    return f"{name!r} is neither a file nor a recipe. Fix: give a file, or one of {', '.join(recipe_names())}"
