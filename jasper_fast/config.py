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
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from jasper_fast.config_checks import run_problems, stage_problems
from jasper_fast.config_overrides import CONFIG_FILES, override, override_pairs
from jasper_fast.config_problems import Problem, as_argument, leaves, problems_of, takes_list
from jasper_fast.config_text import dump_yaml, read_yaml
from jasper_fast.errors import ConfigError

DEFAULT_RECIPE = "minilm-docstrings"
TEMPERATURE = 0.05


def _number(value: Any) -> Any:
    """Accept a number, also as text, but not true for 1.0."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Number = Annotated[float, BeforeValidator(_number)]
PositiveInt = Annotated[int, Field(gt=0, le=10**12, strict=True)]  # what libraries take
Width = Annotated[int, Field(gt=0, le=10**6, strict=True)]  # of a head: a layer of that width must fit memory
Seed = Annotated[int, Field(ge=0, le=10**9, strict=True)]  # what is made of it with stage and step fits 64 bits
Positive = Annotated[float, Field(gt=0.0), BeforeValidator(_number)]
NotNegative = Annotated[float, Field(ge=0.0), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(_number)]
Part = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(_number)]  # never the whole
# One number, or one for each width. What is wrong is told of the form that was given, not of both.
ByHead = Annotated[
    Annotated[Positive, Tag("one-number")] | Annotated[dict[Annotated[int, Field(gt=0)], Positive], Tag("by-head")],
    Discriminator(lambda given: "by-head" if isinstance(given, dict) else "one-number"),
]


class Section(BaseModel):
    """A section of the YAML file.

    A run resumes under a newer version, whose fields its stored configuration lacks. So the default of a new field must
    mean "as before this field". Otherwise old runs would continue in another way than they began, unnoticed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Prompts(Section):
    """Text put before each query or document. ``{text}`` may stand where the text goes; otherwise the text follows."""

    query: str = ""
    document: str = ""


class TeacherPrompts(Section):
    """The same for a teacher; left out: the model's own prompt for that role. "" is none."""

    query: str | None = None
    document: str | None = None


class TeacherConfig(Section):
    """One teacher: a model to run, or vectors that are ready."""

    model: str | None = None  # name, path, or "package:import_name/folder"
    vectors: str | None = None  # .parquet or .jsonl with `digest` or `text`, or .npy with a row for each text in order
    revision: str | None = None
    prompts: TeacherPrompts = TeacherPrompts()
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"  # auto: the model's own, else mean
    max_length: PositiveInt = 512
    dense: str | None = None  # folder inside the model of the Dense head to use, e.g. 2_Dense_8192 (Stella)
    truncate_dim: PositiveInt | None = None  # keep the first coordinates (Matryoshka teachers)
    batch_tokens: PositiveInt = 8192
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.model is None) == (self.vectors is None):
            raise ValueError("give either `model` (a teacher to run) or `vectors` (a file of ready vectors)")
        if self.vectors is not None and self.dense is not None:
            raise ValueError("`dense` chooses a head of a `model`; ready `vectors` have none")
        return self


class VisionConfig(Section):
    """The student's eyes: a vision tower whose tokens, resampled, enter the text encoder as input embeddings."""

    model: str | None = None  # a Hugging Face vision tower, by name or path; SigLIP and SigLIP 2 first
    tower: dict[str, Number] | None = None  # or a SiglipVisionConfig's fields: a tower from scratch
    revision: str | None = None
    image_tokens: PositiveInt = 300  # what a picture becomes for the text encoder
    start_token: str = "<|image_start|>"  # around the picture's tokens; added where the tokenizer lacks them
    end_token: str = "<|image_end|>"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> VisionConfig:
        if (self.model is None) == (self.tower is None):
            raise ValueError("give either `model` (a tower to load) or `tower` (its size, to start from scratch)")
        if self.start_token == self.end_token:
            raise ValueError("start_token and end_token must differ")
        return self


class StudentConfig(Section):
    """The model that is trained: a text encoder, mean pooling, and linear heads."""

    model: str
    revision: str | None = None
    layers: PositiveInt | list[Annotated[int, Field(ge=0, strict=True)]] | None = None  # first n, or which; None: all
    heads: list[Width] = Field(min_length=1)  # the widest is FC1
    head_type: Literal["independent", "prefix"] = "independent"
    head_init: Literal["random", "identity"] = "random"  # identity: a head starts as the first pooled coordinates
    max_length: PositiveInt = 512
    bidirectional: bool = True  # decoder models lose their causal mask
    prompts: Prompts = Prompts()
    vector_dropout: Part = 0.0
    trust_remote_code: bool = False
    vision: VisionConfig | None = None  # None: it reads text alone

    @field_validator("heads")
    @classmethod
    def _distinct(cls, heads: list[int]) -> list[int]:
        if len(set(heads)) != len(heads):
            raise ValueError(f"head widths must differ, got {heads}")
        return sorted(heads, reverse=True)


class SourceConfig(Section):
    """One source of training texts."""

    path: str  # "docstrings", a file or folder (.jsonl, .csv, .tsv, .txt, .parquet; .gz …), or a `datasets` name
    config: str | None = None  # the `datasets` configuration name
    split: str = "train"
    columns: list[str] = Field(default=["text"], min_length=1)  # a list in the only column: each item is a text
    join: bool = False  # True: the columns make one text; False: each column is a text of its own
    role: Literal["query", "document"] = "document"
    limit: PositiveInt | None = None  # at most so many texts, drawn by the seed
    variants: Annotated[int, Field(ge=0, strict=True)] = 0  # so many more of each text, with words exchanged
    revision: str | None = None


class DataConfig(Section):
    """The training texts and their treatment (arXiv 2412.19048, section on data)."""

    sources: list[SourceConfig] = Field(min_length=1)
    cut_share: Share = 0.3  # share of documents cut into pieces
    cut_sentences: tuple[PositiveInt, PositiveInt] = (1, 10)  # sentences per piece, from .. to
    shuffle_share: Share = 0.0008  # share of texts whose words are shuffled
    min_chars: PositiveInt = 2
    limit: PositiveInt | None = None  # at most so many texts in total, drawn by the seed
    seed: Seed = 0  # of draws, cuts and order; runs of other seeds share the texts
    cache: str = "cache"  # folder for texts and teacher vectors, shared by runs
    cache_dtype: Literal["float16", "int8"] = "float16"

    @field_validator("cut_sentences")
    @classmethod
    def _ordered(cls, span: tuple[int, int]) -> tuple[int, int]:
        if span[0] > span[1]:
            raise ValueError(f"the first number must not exceed the second, got {list(span)}")
        return span


class ImageSourceConfig(Section):
    """One source of pictures with captions."""

    # "glyphs", a folder or .zip of pictures, .tar file(s) of WebDataset, .parquet file(s), a folder that `datasets`
    # saved, or a `datasets` name
    path: str
    captions: str | None = None  # for a folder or zip: the JSONL[.gz] with a row per picture or caption
    image_column: str = "image"  # there, or in the dataset: the file's name or the picture
    caption_columns: list[str] = Field(
        default=["caption"], min_length=1
    )  # each a caption of its own; lists give several
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: PositiveInt | None = None  # the first so many pictures
    font: str = "DejaVuSans"  # of the glyphs: any that matplotlib ships, by its file's name
    train_only: bool = False  # none is held out; those that share a caption or pixels with a held-out one are left out


class ImagesConfig(Section):
    """The pictures of vision stages, and the part that is kept from training to judge by."""

    sources: list[ImageSourceConfig] = Field(min_length=1)
    held_out: Annotated[int, Field(ge=0, strict=True)] = 0  # pictures; with all that share their captions or pixels
    max_bad: Annotated[int, Field(ge=0, strict=True)] = 100  # pictures that may be left out because they are broken
    seed: Seed = 0  # of what is held out


class AugmentConfig(Section):
    """Other views of a training picture, drawn anew each time it is seen. All zero: none."""

    shift: Annotated[float, Field(ge=0.0, le=0.5), BeforeValidator(_number)] = 0.0  # of the side, at most
    scale: Part = 0.0  # by a factor from 1 - scale to 1 + scale, each axis alone
    rotate: Annotated[float, Field(ge=0.0, le=180.0), BeforeValidator(_number)] = 0.0  # degrees, at most, either way
    flip: bool = False  # left to right, every other time
    mix: NotNegative = 0.0  # a of Beta(a, a): which share of each picture is another one of the batch, laid over it

    @property
    def moved(self) -> bool:
        """Whether pictures are seen through affine maps."""
        return bool(self.shift or self.scale or self.rotate or self.flip)


class VisionStageConfig(Section):
    """What a vision stage (the paper's stage 4) has beside the others. The contrastive term and views are ours."""

    contrastive: NotNegative = 0.0  # weight of: each picture finds its caption, and each caption its picture
    among: Literal["batch", "all"] = "batch"  # where a picture finds it: the batch's captions, or all of the stage's
    balance: NotNegative = 0.0  # weight, within the contrastive term, of: captions are spread evenly over pictures
    augment: AugmentConfig = AugmentConfig()


class EvalConfig(Section):
    """One evaluation set: a BEIR folder, a similarity TSV, a classification folder, or the built-in docstrings."""

    path: str
    name: str | None = None
    limit: PositiveInt | None = None
    transductive: bool = False  # a retrieval set's documents may be trained on, its questions never; the report says so


class LossWeights(Section):
    """The paper's weights; a zero leaves a loss out. ``neighbourhood`` is ours, off unless asked for."""

    cosine: NotNegative = 10.0
    similarity: NotNegative = 200.0
    relative_similarity: NotNegative = 20.0
    neighbourhood: NotNegative = 0.0

    @model_validator(mode="after")
    def _some(self) -> LossWeights:
        if not (self.cosine or self.similarity or self.relative_similarity or self.neighbourhood):
            raise ValueError("every loss has weight 0: nothing would be learnt")
        return self

    def compares(self, texts: int) -> bool:
        """Whether a loss that compares texts with each other can learn from a batch of so many."""
        return bool(texts > 1 and self.similarity or texts > 2 and (self.relative_similarity or self.neighbourhood))


class StageConfig(Section):
    """One stage: what trains, which heads and losses, what teaches the narrow heads, and how long."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    train: list[str] = Field(default=[], description="globs over parameter names, e.g. heads.384.*")
    last_layers: Annotated[int, Field(ge=0, strict=True)] = (
        0  # the encoder's (in vision stages the tower's) last n train
    )
    vision: VisionStageConfig | None = None  # given: the stage learns from pictures; only `vision.*` may train
    heads: list[PositiveInt] = Field(min_length=1)
    weights: LossWeights = LossWeights()
    narrow_weights: LossWeights | None = None  # for the heads below FC1; None: the same weights
    margin: NotNegative = 0.015
    # of the neighbourhood loss: one, or by head, where those that are not named have the default
    temperature: ByHead = TEMPERATURE
    narrow_target: Literal["teacher", "self"] = "teacher"  # self: the student's own widest vector
    narrow_start: Literal["as_is", "principal"] = "as_is"  # principal: as full width's principal axes (frozen encoder)
    codes: list[
        Literal["int8", "ubinary"]
    ] = []  # forms of every head's vectors that the narrow heads' losses train too
    codes_weight: Positive = 1.0  # of those losses beside those of the floats
    batch_size: PositiveInt = 128
    steps: PositiveInt
    lr: Positive
    warmup: Share = 0.05  # share of the steps
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    weight_decay: NotNegative = 0.01
    clip: Positive | None = 1.0
    average: Part = 0.0  # above 0: the stage ends in the weights' moving average, of which so much stays at every step
    max_length: PositiveInt | None = None  # tokens; None: the student's
    micro_batch: PositiveInt = 32  # texts per forward pass; the loss sees the whole batch
    micro_tokens: PositiveInt | None = None  # tokens per forward pass at most, padding included
    gradient_caching: bool = False  # batches beyond memory: encode twice, hold the graph of one micro-batch
    gradient_checkpointing: Annotated[bool, Field(strict=True)] | PositiveInt = False  # true: every layer; or how many
    activation_offload: bool = False  # keep what a GPU's backward pass needs, weights aside, in the host's memory
    batches: Literal["random", "neighbours"] = "random"
    neighbours: Annotated[int, Field(ge=2, strict=True)] = 8  # texts per group where batches are "neighbours"
    random_share: Part = 0.0  # of such a batch: texts that are no one's neighbours
    texts: PositiveInt | None = None  # only the first n training texts
    max_chars: PositiveInt | None = None  # of these, only texts of at most so many characters

    @model_validator(mode="after")
    def _possible(self) -> StageConfig:
        if problems := stage_problems(self):
            raise ValueError("\n".join(problems))
        return self


class LossesConfig(Section):
    """Over what the losses compare texts when several processes train."""

    scope: Literal["global", "local"] = "global"  # global: the batch of all ranks; local: each rank's own, the paper's


class ParallelConfig(Section):
    """How several processes, started by torchrun, share the work. None of it touches the numbers beyond rounding."""

    mode: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, gradients and optimiser are sharded over the ranks
    timeout: Positive = 600.0  # seconds after which a rank that does not arrive ends the run


class LogConfig(Section):
    every: PositiveInt = 10  # steps
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    project: str = "jasper_fast"


class CheckpointConfig(Section):
    every: PositiveInt = 100  # steps; a stage's end is always saved
    keep: Annotated[int, Field(ge=2, strict=True)] = 2


class Config(Section):
    """A whole run. The README shows one; ``--print-config`` writes out every field."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    seed: Seed = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast where the device is fast at it
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
