"""Embeddings of the texts of an adaptation: by a model or from precomputed vectors, through the teachers' cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.config.models import TeacherConfig
from jasper_fast.config.run import Config
from jasper_fast.data.listing import user_path
from jasper_fast.models.embedder import load_model
from jasper_fast.models.loading import without_bars
from jasper_fast.models.sentence_transformer import set_length, transformers_of
from jasper_fast.teachers.base import teacher_type
from jasper_fast.teachers.cache import TeacherEmbeddings
from jasper_fast.teachers.label import ensure_teachers, print_error, teacher_caches
from jasper_fast.teachers.opening import embedding_width, open_all
from jasper_fast.teachers.precomputed import PrecomputedEmbeddings
from jasper_fast.teachers.reuse import CacheReuse, text_keys
from jasper_fast.utils.atomic import locked, publish_dir
from jasper_fast.utils.fingerprint import settings_digest

if TYPE_CHECKING:
    from datasets import Dataset

VECTOR_FILES = (".npy", ".parquet", ".jsonl")
MODEL_FILES = ("modules.json", "config.json", "model/modules.json")


@dataclass(frozen=True)
class Vectors:
    """Embeddings of the texts of a corpus by one model, read from its cache.

    Args:
        cached: the embeddings, memory-mapped.
    """

    cached: TeacherEmbeddings

    @property
    def width(self) -> int:
        """Coordinates of an embedding."""
        return self.cached.width

    def read(self, rows: range) -> np.ndarray:
        """Return consecutive rows, (n, width) float32 unit rows."""
        return self.cached.read(np.arange(rows.start, rows.stop)).numpy()


def embed(config: Config, model: TeacherConfig, texts: Dataset, called: str = "teacher") -> Vectors:
    """Return the embeddings of texts, and compute those that no cache has.

    Args:
        config: configuration with the precision, the sources of the texts and the cache.
        model: the model or the precomputed vectors.
        texts: texts with columns ``text``, ``role`` and ``digest``.
        called: what messages call the model.

    Raises:
        JasperError: the model or a file cannot be used, or an embedding is missing, not finite or zero.
    """
    alone = config.model_copy(update={"teachers": [model], "stages": []})  # no loss compares widths here
    return Vectors(ensure_teachers(alone, texts, called=called))


def checked_width(config: Config, model: TeacherConfig, texts: Dataset) -> int:
    """Return the width of a model's embeddings after the checks that `embed` makes before it encodes.

    Args:
        config: as for `embed`.
        model: the model or the precomputed vectors.
        texts: the texts to embed.

    Raises:
        JasperError: as for `embed`.
    """
    alone = config.model_copy(update={"teachers": [model], "stages": []})
    (cache,) = teacher_caches(alone, texts)
    opened = open_all(alone, [cache], texts, (0, 1), None, print_error)
    return embedding_width(cache, lambda: opened[cache.fingerprint])


def unread(config: Config, model: TeacherConfig, texts: Dataset) -> float:
    """Return the fraction of texts that a model must encode, because no cache has their embeddings.

    Args:
        config: as for `embed`.
        model: the model. Of precomputed vectors, all count as read.
        texts: the texts to embed.

    Raises:
        JasperError: the model does not exist.
    """
    if model.model is None:
        return 0.0
    alone = config.model_copy(update={"teachers": [model], "stages": []})
    (cache,) = teacher_caches(alone, texts)
    missing = [cache.span(shard) for shard in range(cache.shards) if not cache.has(shard)]
    found = CacheReuse(cache, text_keys(texts) if missing else None).found
    count = sum(stop - start - (int(found[start:stop].sum())) for start, stop in missing)
    return count / len(texts)


def identity(model: TeacherConfig) -> dict[str, Any]:
    """Return what determines a model's embeddings. Of precomputed vectors it is only that they are.

    Files of vectors grow with the documents, so their names and sizes say nothing about their model.

    Raises:
        JasperError: the model does not exist.
    """
    if model.vectors is not None:
        return {"vectors": True, "truncate_dim": model.truncate_dim}
    return teacher_type(model).describe(model)


def fixed_identity(model: TeacherConfig) -> dict[str, Any]:
    """Return the identity of a model without the name of its folder, since a digest of the folder is in it.

    Args:
        model: the model or precomputed vectors.
    """
    found = identity(model)
    return {key: value for key, value in found.items() if key != "model" or "sha256:" not in str(found["revision"])}


def is_vectors(name: str) -> bool:
    """Return whether the argument ``--teacher`` names precomputed vectors: a file, or a folder without a model."""
    path = user_path(name)
    if name.lower().endswith(VECTOR_FILES):
        return True
    return path.is_dir() and not any((path / file).is_file() for file in MODEL_FILES)


def vectors_config(name: str, config: Config) -> TeacherConfig:
    """Return the settings of precomputed vectors. Rows without a key belong to the documents in their order.

    Args:
        name: file or folder.
        config: configuration with the sources of the texts and the cache.

    Raises:
        JasperError: the files are missing or unreadable, or their number of rows is not that of the documents.
    """
    found = TeacherConfig(vectors=name)
    cache = Path(config.data.cache).expanduser()
    opened = PrecomputedEmbeddings.open(found, None, cache, config.precision, config.data)
    if opened.key is not None:
        return found
    by_source = TeacherConfig(vectors=name, order="source")
    PrecomputedEmbeddings.open(by_source, None, cache, config.precision, config.data)
    return by_source


def with_length(model: TeacherConfig, length: int, cache: str) -> TeacherConfig:
    """Return a model that reads texts up to a length. A longer one than its own needs a copy, which the cache keeps.

    Args:
        model: model whose texts are cut at ``model.max_length`` or at its own limit.
        length: tokens.
        cache: folder of the cache.

    Raises:
        JasperError: the model has fewer positions.
    """
    loaded = load_model(str(model.model), trust_remote_code=model.trust_remote_code)
    own = own_length(loaded)
    if own is None or length <= own:
        return model.model_copy(update={"max_length": length})
    set_length(loaded, length, str(model.model))
    key = settings_digest([fixed_identity(model), length])
    folder = Path(cache).expanduser() / f"length-{length}-{key}" / Path(str(model.model)).name
    with locked(folder):
        if not (folder / "modules.json").is_file():
            with publish_dir(folder, replace=True) as temporary, without_bars():
                loaded.save_pretrained(str(temporary), create_model_card=False)
    return model.model_copy(update={"model": str(folder), "max_length": length})


def own_length(model: Any) -> int | None:
    """Return the tokens that a loaded model reads. None: it has no limit."""
    lengths = [module.max_seq_length for module in transformers_of(model) if module.max_seq_length]
    return max(lengths, default=None)
