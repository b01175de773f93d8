"""Sections `data`, `images` and `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from jasper_fast.config.types import (
    Fraction,
    PositiveInt,
    Section,
    Seed,
)


class SourceConfig(Section):
    """One source of training texts."""

    # a file or folder (.jsonl, .csv, .tsv, .txt, .parquet; also .gz, .bz2, .xz, .zst), a `datasets` name, `docstrings`,
    # `encyclopedia`, `facts` or `glyphs`
    path: str
    config: str | None = None  # configuration name of a `datasets` name
    split: str = "train"  # split of a `datasets` name
    columns: list[str] = Field(default=["text"], min_length=1)  # columns to read; a list in a cell gives several texts
    # true: the columns make one text, separated by line breaks; false: each column is a separate text. The default is
    # false for `docstrings` (summary and body), `encyclopedia` (heading and summary) and `glyphs`
    join: bool = True
    role: Literal["query", "document"] = "document"  # selects the prompt
    id_column: str | None = None  # column with the ids of the documents, which precomputed vectors may be matched by
    limit: PositiveInt | None = None  # largest number of texts, drawn by the seed
    variants: Annotated[int, Field(ge=0, strict=True)] = 0  # additional copies of each text, with replaced words
    revision: str | None = None  # branch, tag or commit of a `datasets` name

    @model_validator(mode="before")
    @classmethod
    def _keep_built_in_columns_apart(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("path") in ("docstrings", "encyclopedia", "glyphs"):
            return {"join": False, **tree}
        return tree


class DataConfig(Section):
    """Training texts and their augmentation (arXiv 2412.19048, section on data)."""

    sources: list[SourceConfig] = Field(min_length=1)
    # fraction of documents that are cut into pieces; default 0 if a teacher has `vectors`
    cut_share: Fraction = 0.3
    cut_sentences: tuple[PositiveInt, PositiveInt] = (1, 10)  # sentences per piece: smallest and largest number
    # fraction of texts whose words are shuffled; default 0 if a teacher has `vectors`
    shuffle_share: Fraction = 0.0008
    # largest number of documents that no training text comes from; at most a tenth of them. The end of a run compares
    # the student with its teacher on these. 0: none
    held_out: Annotated[int, Field(ge=0, strict=True)] = 500
    min_chars: PositiveInt = 2  # shorter texts are left out
    limit: PositiveInt | None = None  # largest number of texts in total, drawn by the seed
    seed: Seed = 0  # seed of draws, cuts and order; separate from the run's seed, so that runs use the same texts
    cache: str = "cache"  # folder of texts and teacher embeddings, used by all runs
    cache_dtype: Literal["float16", "int8"] = "float16"  # storage of teacher embeddings

    @field_validator("cut_sentences")
    @classmethod
    def _check_range(cls, span: tuple[int, int]) -> tuple[int, int]:
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


class EvalConfig(Section):
    """One evaluation set: BEIR folder, similarity TSV, classification folder, docstrings, or pairs of columns."""

    path: str  # folder or file, or `docstrings`; its content decides the kind
    # with `document`: two columns of a file or folder of rows, the question and its answer
    query: str | None = None
    document: str | None = None  # with `query`: the column of the answer
    name: str | None = None  # name in logs and reports; default: the name of the folder or file
    limit: PositiveInt | None = None  # largest number of queries or pairs
    # allow training on the documents of a retrieval set, never on its queries; the report says so
    transductive: bool = False

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if (self.query is None) != (self.document is None):
            given, absent = ("query", "document") if self.document is None else ("document", "query")
            raise ValueError(
                f"`{given}` needs `{absent}` too. Fix: give both columns, e.g. query: title, document: text"
            )
        if self.query is not None and self.query == self.document:
            raise ValueError(f"`query` and `document` name the same column {self.query!r}. Fix: give two columns")
        return self
