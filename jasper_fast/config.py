"""The run as data: what is trained on what, by whom, in which stages.

A configuration is a YAML file or the name of a recipe that ships in ``jasper_fast/recipes``; ``--key.sub value``
overrides single fields. Every problem is reported at once, before anything is loaded.
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

from jasper_fast.config_checks import run_problems, stage_problems
from jasper_fast.config_overrides import CONFIG_FILES, override, override_pairs
from jasper_fast.config_problems import Problem, as_argument, leaves, problems_of, takes_list
from jasper_fast.config_text import dump_yaml, read_yaml
from jasper_fast.config_types import (
    ByHead,
    NotNegative,
    Number,
    Part,
    Positive,
    PositiveInt,
    Section,
    Seed,
    Share,
    Width,
    number,
)
from jasper_fast.errors import ConfigError
from jasper_fast.loss_config import LossesConfig, LossWeights
from jasper_fast.loss_table import TEMPERATURE

DEFAULT_RECIPE = "minilm-docstrings"


class Prompts(Section):
    """Prompts put before each query or document. ``{text}`` marks where the text goes. Without it, the text follows."""

    query: str = ""  # prompt of queries
    document: str = ""  # prompt of documents


class TeacherPrompts(Section):
    """Prompts of a teacher. A missing field means the model's own prompt. An empty string disables it."""

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
    max_length: PositiveInt = 512  # tokens per text; the rest is not read
    dense: str | None = None  # folder of the Dense head to use inside the model, e.g. 2_Dense_8192 (Stella)
    truncate_dim: PositiveInt | None = None  # keep only the first coordinates (Matryoshka teachers)
    batch_tokens: PositiveInt = 8192  # tokens per forward pass, padding included
    trust_remote_code: bool = False  # permission to run code that the model brings

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.model is None) == (self.vectors is None):
            raise ValueError("give either `model` (a teacher to run) or `vectors` (a file of ready vectors)")
        if self.vectors is not None and self.dense is not None:
            raise ValueError("`dense` chooses a head of a `model`; ready `vectors` have none")
        return self


class VisionConfig(Section):
    """Vision tower of the student. Its tokens, resampled, enter the text encoder as input embeddings."""

    model: str | None = None  # Hugging Face vision tower of a fixed image size, SigLIP first
    tower: dict[str, Number] | None = None  # fields of a SiglipVisionConfig: a tower trained from scratch
    revision: str | None = None  # branch, tag or commit on the model hub
    image_tokens: PositiveInt = 300  # input embeddings that the text encoder gets for one image
    start_token: str = "<|image_start|>"  # token before an image; added if the tokenizer lacks it
    end_token: str = "<|image_end|>"  # token after an image; added if the tokenizer lacks it
    trust_remote_code: bool = False  # permission to run code that the tower brings

    @model_validator(mode="after")
    def _one_origin(self) -> VisionConfig:
        if (self.model is None) == (self.tower is None):
            raise ValueError("give either `model` (a tower to load) or `tower` (its size, to start from scratch)")
        if self.start_token == self.end_token:
            raise ValueError("start_token and end_token must differ")
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
    max_length: PositiveInt = 512  # tokens per text; the rest is not read
    bidirectional: bool = True  # decoder models lose their causal mask
    prompts: Prompts = Prompts()
    vector_dropout: Part = 0.0  # dropout on the pooled state
    trust_remote_code: bool = False  # permission to run code that the model brings
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
    role: Literal["query", "document"] = "document"  # decides the prompts
    limit: PositiveInt | None = None  # largest number of texts, drawn by the seed
    variants: Annotated[int, Field(ge=0, strict=True)] = 0  # additional copies of each text, with words exchanged
    revision: str | None = None  # branch, tag or commit of a `datasets` name


class DataConfig(Section):
    """The training texts and their treatment (arXiv 2412.19048, section on data)."""

    sources: list[SourceConfig] = Field(min_length=1)
    cut_share: Share = 0.3  # fraction of documents that are cut into pieces
    cut_sentences: tuple[PositiveInt, PositiveInt] = (1, 10)  # sentences per piece: smallest and largest number
    shuffle_share: Share = 0.0008  # fraction of texts whose words are shuffled
    min_chars: PositiveInt = 2  # shorter texts are left out
    limit: PositiveInt | None = None  # largest number of texts in total, drawn by the seed
    seed: Seed = 0  # seed of draws, cuts and order; independent of the run's seed, so that runs use the same texts
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
    # images kept from training, together with all that have the same captions or pixels
    held_out: Annotated[int, Field(ge=0, strict=True)] = 0
    max_bad: Annotated[int, Field(ge=0, strict=True)] = 100  # broken images that are left out; more of them end the run
    seed: Seed = 0  # seed of the held-out images


class AugmentConfig(Section):
    """Random changes to a training image, drawn each time it is used. By default there are no changes."""

    shift: Annotated[float, Field(ge=0.0, le=0.5), BeforeValidator(number)] = 0.0  # largest fraction of the side
    scale: Part = 0.0  # factor between 1 - scale and 1 + scale, separately for each axis
    rotate: Annotated[float, Field(ge=0.0, le=180.0), BeforeValidator(number)] = 0.0  # largest angle in degrees
    flip: bool = False  # mirror half of the images
    mix: NotNegative = 0.0  # mixup with another image of the batch: the parameter a of Beta(a, a)

    @property
    def moved(self) -> bool:
        """Whether pictures are seen through affine maps."""
        return bool(self.shift or self.scale or self.rotate or self.flip)


class VisionStageConfig(Section):
    """Settings of a vision stage (stage 4). The paper has neither a contrastive loss nor augmentation."""

    contrastive: NotNegative = 0.0  # weight of the contrastive loss between images and captions, in both directions
    among: Literal["batch", "all"] = "batch"  # captions that an image is compared with: the batch's, or all
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
    heads: list[PositiveInt] = Field(min_length=1)  # widths that the losses see
    weights: LossWeights = LossWeights()
    narrow_weights: LossWeights | None = None  # weights for all heads but the widest; null: the same weights
    margin: NotNegative = 0.015  # margin of the relative similarity loss
    # of the neighbourhood loss: one number, or a number per width (the others have the default)
    temperature: ByHead = TEMPERATURE
    narrow_target: Literal["teacher", "self"] = "teacher"  # self: the student's widest embedding teaches the others
    # principal: narrow heads start at the principal axes of the widest embeddings (frozen encoder only)
    narrow_start: Literal["as_is", "principal"] = "as_is"
    codes: list[Literal["int8", "ubinary"]] = []  # quantized forms of the embeddings that the narrow losses train too
    codes_weight: Positive = 1.0  # weight of the losses of `codes`
    batch_size: PositiveInt = 128  # texts that the losses compare
    steps: PositiveInt  # optimizer steps
    lr: Positive  # peak learning rate
    warmup: Share = 0.05  # fraction of the steps
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # learning rate after the warm-up
    weight_decay: NotNegative = 0.01  # weight decay of AdamW
    clip: Positive | None = 1.0  # largest gradient norm; null: no clipping
    average: Part = 0.0  # decay of the weights' moving average in which the stage ends; 0: off
    max_length: PositiveInt | None = None  # tokens per text; null: the student's
    micro_batch: PositiveInt = 32  # texts per forward pass; the loss sees the whole batch
    micro_tokens: PositiveInt | None = None  # largest number of tokens per forward pass, padding included
    # encode the batch twice and keep the graph of one micro-batch: for batches that do not fit in memory
    gradient_caching: bool = False
    # recompute layers in the backward pass: true for all, or how many
    gradient_checkpointing: Annotated[bool, Field(strict=True)] | PositiveInt = False
    activation_offload: bool = False  # keep a GPU's activations in host memory
    batches: Literal["random", "neighbours"] = "random"  # neighbours: groups of the teacher's nearest neighbours
    neighbours: Annotated[int, Field(ge=2, strict=True)] = 8  # texts per group of such a batch
    random_share: Part = 0.0  # fraction of such a batch that is drawn at random
    texts: PositiveInt | None = None  # only the first n training texts
    max_chars: PositiveInt | None = None  # only texts of at most this many characters

    @model_validator(mode="after")
    def _possible(self) -> StageConfig:
        if problems := stage_problems(self):
            raise ValueError("\n".join(problems))
        return self


class ParallelConfig(Section):
    """How several processes, started by torchrun, train together. Results change by rounding only."""

    mode: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, gradients and optimizer state are sharded
    timeout: Positive = 600.0  # seconds to wait for a missing rank before the run ends


class LogConfig(Section):
    """Log and experiment trackers. ``log.jsonl`` always has every step."""

    every: PositiveInt = 10  # steps between printed lines
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []  # each must be installed
    project: str = "jasper_fast"  # project name in Weights & Biases and trackio


class CheckpointConfig(Section):
    """Checkpoints, from which the same command resumes."""

    every: PositiveInt = 100  # steps between checkpoints; the end of a stage is always saved
    keep: Annotated[int, Field(ge=2, strict=True)] = 2  # checkpoints that are kept


class Config(Section):
    """A whole run. ``--print-config`` prints every field."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]  # names the folder of the run: `runs/NAME`
    seed: Seed = 0  # seed of new weights, batches and dropout
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on devices that are fast at it
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
    """Names of the recipes that ship in the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in (files("jasper_fast") / "recipes").iterdir() if p.name.endswith(".yaml")
    )


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[tuple[str, Any]] = ()
) -> Config:
    """Read a configuration and check all of it.

    Args:
        source: a YAML file, a recipe name, a mapping, or None for the embedded default recipe.
        overrides: (dotted key, value) pairs, e.g. ``("stages.0.lr", 1e-4)``; values that are text are read as YAML.

    Raises:
        ConfigError: every unknown key, wrong type and impossible value at once, each with its key.
    """
    return _load(source, overrides, [])


def load_arguments(
    source: str | Path | Mapping[str, Any] | None, arguments: Sequence[str], options: Sequence[str] = ()
) -> Config:
    """Read a configuration as :func:`load_config` does, with overrides as a command line has them.

    Args:
        source: as there.
        arguments: ``--key.sub value`` pairs.
        options: names of the command's own options, which a misspelt key may mean.

    Raises:
        ConfigError: every problem at once, those of the arguments apart from those of the file.
    """
    return _load(source, *override_pairs(arguments), options)


def stored_config(tree: dict[str, Any], where: str) -> Config:
    """Load a configuration that a run stored, in this version or an older one: a missing field has its default.

    Args:
        tree: a dumped configuration, or the part of it that decides.
        where: its place in messages.

    Raises:
        ConfigError: this version does not know a field or rejects a value.
    """
    config, problems = _validate(tree)
    if config is None:
        raise ConfigError([problem.line for problem in problems], where)
    return config


def _load(
    source: Any, overrides: Sequence[tuple[str, Any]], problems: list[str], options: Sequence[str] | None = None
) -> Config:
    """Read a configuration, with overrides of a command line that has ``options``, or of Python if that is None."""
    tree, where = _read(source)
    file, wrong = copy.deepcopy(tree), list(problems)
    for key, value in overrides:
        override(tree, key, value, wrong, partial(takes_list, Config))
    config, found = _validate(tree)
    if config is not None and not wrong:
        return config
    of_file = _validate(file)[1] if overrides else found  # what is wrong without the overrides as well
    for problem in found:
        if problem not in of_file:
            wrong.append(problem.line if options is None else as_argument(Config, problem, options))
    rest = [problem.line for problem in found if problem in of_file]
    raise ConfigError(wrong, "the overrides" if options is None else "the command line", {where: rest})


def _validate(tree: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Return the configuration, or all that is wrong with it."""
    try:
        return Config.model_validate(tree), []
    except ValidationError as error:
        return None, problems_of(Config, tree, error)


def dump_config(config: Config) -> str:
    """Write the resolved configuration as YAML, with every field."""
    return dump_yaml(config.model_dump(mode="json"))


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return lines ``key: old -> new`` for every field in which two dumped configurations differ."""
    a, b = dict(leaves(old)), dict(leaves(new))
    return [f"{k}: {a.get(k, '(absent)')!r} -> {b.get(k, '(absent)')!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), "the given configuration"
    name = str(source) if source is not None else DEFAULT_RECIPE
    if name in recipe_names():
        where = f"recipe {name}"
        return read_yaml(files("jasper_fast") / "recipes" / f"{name}.yaml", where), where
    if not os.path.exists(name):  # False as well for what can be no name
        raise ConfigError([_no_such_file(name)], "--config")
    return read_yaml(Path(name), name), name


def _no_such_file(name: str) -> str:
    """Describe a configuration that does not exist, with the file or recipe that was probably meant."""
    with suppress(OSError, ValueError):
        beside = [str(file) for file in Path(name).parent.iterdir() if file.name.endswith(CONFIG_FILES)]
        if near := difflib.get_close_matches(name.removesuffix(".yaml"), recipe_names(), n=1, cutoff=0.8):
            return f"{name!r} is neither a file nor a recipe; did you mean `{near[0]}`?"
        if near := difflib.get_close_matches(name, beside, n=1, cutoff=0.8):
            return f"{name!r} is neither a file nor a recipe; did you mean `{near[0]}`?"
    return f"{name!r} is neither a file nor a recipe; recipes: {', '.join(recipe_names())}"
