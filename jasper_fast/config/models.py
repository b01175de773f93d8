"""Sections `student` and `teachers`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from jasper_fast.config.types import (
    FractionBelowOne,
    Number,
    PositiveInt,
    Section,
    Width,
)


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


TEACHER_KINDS = ("model", "vectors")  # fields of a teacher of which one is given, and selects its type


class TeacherConfig(Section):
    """One teacher: a model to run, or a file of precomputed embeddings."""

    # hub name, path of a folder or an ONNX graph, `package:import_name/folder`, or `bundle:NAME` (`jasper-fast fetch`)
    model: str | None = None
    # .parquet or .jsonl file with a column `digest`, `text` or `id`, .npy file with one row per text, or a folder
    vectors: str | None = None
    # what row i of `vectors` without such a column belongs to: training text i (null, texts) or document i of
    # data.sources (source). A failed check of the order is an error. With `texts` it is a warning
    order: Literal["texts", "source"] | None = None
    revision: str | None = None  # branch, tag or commit on the model hub
    prompts: TeacherPrompts = TeacherPrompts()
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"  # auto: the model's setting, or mean if it has none
    max_length: PositiveInt = 512  # tokens per text; longer texts are truncated
    dense: str | None = None  # folder of the Dense head to use inside the model, e.g. 2_Dense_8192 (Stella)
    truncate_dim: PositiveInt | None = None  # keep only the first coordinates (Matryoshka teachers)
    batch_tokens: PositiveInt = 8192  # tokens per forward pass, padding included
    trust_remote_code: bool = False  # permission to run code that comes with the model

    @model_validator(mode="after")
    def _exactly_one_source(self) -> TeacherConfig:
        if sum(getattr(self, kind) is not None for kind in TEACHER_KINDS) != 1:
            raise ValueError(
                "expected exactly one of `model` and `vectors`. "
                "Fix: give either `model` (a teacher to run) or `vectors` (precomputed embeddings)"
            )
        if self.vectors is not None and self.dense is not None:
            raise ValueError(
                "`dense` chooses a head of a `model`, and precomputed `vectors` have no heads. Fix: leave `dense` out"
            )
        if self.model is not None and self.order is not None:
            raise ValueError("`order` is for precomputed `vectors`, and a `model` reads the texts. Fix: leave it out")
        return self

    @property
    def kind(self) -> str:
        """Field that selects the type of the teacher: ``model`` or ``vectors``."""
        return next(kind for kind in TEACHER_KINDS if getattr(self, kind) is not None)


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
    def _exactly_one_source(self) -> VisionConfig:
        if (self.model is None) == (self.tower is None):
            raise ValueError(
                "expected exactly one of `model` and `tower`. "
                "Fix: give either `model` (a tower to load) or `tower` (the size of a tower to train from scratch)"
            )
        if self.start_token == self.end_token:
            raise ValueError(f"start_token and end_token must differ (got {self.start_token!r} twice). Fix: change one")
        return self


DEFAULT_HEADS = [384, 128, 64]  # the first is the width of all-MiniLM-L6-v2


class StudentConfig(Section):
    """Model to train: a text encoder, mean pooling, and one linear head per width, or no head."""

    model: str  # Hugging Face text encoder: hub name, path, or `package:import_name/folder`
    revision: str | None = None  # branch, tag or commit on the model hub
    # layers to keep: the first n, or a list of indices from 0; null keeps all
    layers: PositiveInt | list[Annotated[int, Field(ge=0, strict=True)]] | None = None
    # widths of the embeddings; the widest is the default of the export, and the teachers' width for the cosine loss
    heads: list[Width] = Field(default=DEFAULT_HEADS, min_length=1)
    # independent: one linear layer per width; prefix: the first rows of the widest head; none: the pooled state;
    # `heads` is the encoder's hidden size
    head_type: Literal["independent", "prefix", "none"] = "independent"
    # identity: a head starts as the first pooled coordinates; model: as the head of `model`, a folder from a run
    head_init: Literal["random", "identity", "model"] = "random"
    max_length: PositiveInt = 512  # tokens per text; longer texts are truncated
    bidirectional: bool = True  # remove the causal mask of decoder models
    prompts: Prompts = Prompts()
    vector_dropout: FractionBelowOne = 0.0  # dropout on the pooled state
    trust_remote_code: bool = False  # permission to run code that comes with the model
    vision: VisionConfig | None = None  # vision tower; null: the student reads text only

    @field_validator("heads")
    @classmethod
    def _unique_widths(cls, heads: list[int]) -> list[int]:
        if len(set(heads)) != len(heads):
            raise ValueError(f"head widths must differ, got {heads}")
        return sorted(heads, reverse=True)

    @model_validator(mode="after")
    def _no_head(self) -> StudentConfig:
        if self.head_type != "none":
            return self
        if len(self.heads) != 1:
            raise ValueError(
                f"head_type none has one width, the encoder's hidden size (got heads {self.heads}). Fix: set heads to "
                "this size alone, for example heads: [384], and export narrow widths with `--form prefix`"
            )
        if self.head_init == "model":
            raise ValueError("head_type none has no head to load. Fix: leave head_init out")
        if self.vision is not None:
            raise ValueError("a vision tower needs a head (got head_type none). Fix: set head_type: independent")
        return self


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
