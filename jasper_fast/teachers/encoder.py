"""Teachers as encoders for evaluation."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jasper_fast.config.models import TeacherConfig
from jasper_fast.models.embedder import EncodeWidths, normalise
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.fingerprint import settings_digest

if TYPE_CHECKING:
    from jasper_fast.teachers.model import Precision


def teacher_encoder(
    configs: Sequence[TeacherConfig], cache: str | Path | None, precision: Precision
) -> EncodeWidths | None:
    """Make an encoder of the target embeddings norm(concat(norm(t_i))) of all teachers.

    The target is that of the paper (section "problem", arXiv 2412.19048).

    Args:
        configs: teachers of the run.
        cache: folder that keeps embeddings of evaluation texts between runs. None keeps none.
        precision: precision of the forward pass, as in the run.

    Returns:
        An encoder of one width. None if a teacher is a file of precomputed embeddings, which cannot encode new texts.
    """
    if not configs or any(config.model is None for config in configs):
        return None
    parts = [_teacher_part(config, cache, precision) for config in configs]

    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        vectors = normalise(np.concatenate([normalise(np.asarray(part(texts, role))) for part in parts], axis=1))
        return {vectors.shape[1]: vectors}

    return encode


def _teacher_part(
    config: TeacherConfig, cache: str | Path | None, precision: Precision
) -> Callable[[list[str], str], np.ndarray]:
    """Make an encoder of one teacher, whose model loads only if the cache lacks embeddings."""
    from jasper_fast.teachers.model import load_teacher

    teacher = functools.cache(lambda: load_teacher(config, precision=precision))

    def encode(texts: list[str], role: str) -> np.ndarray:
        return teacher().encode(texts, role)

    if cache is None:
        return encode
    return cached(encode, _identity(config, precision), cache)


def has_embeddings(config: TeacherConfig, cache: str | Path, precision: Precision, texts: list[str], role: str) -> bool:
    """Return whether the cache has a teacher's embeddings of evaluation texts."""
    return _file(cache, _identity(config, precision), role, texts).is_file()


def _identity(config: TeacherConfig, precision: Precision) -> str:
    from jasper_fast.teachers.model import describe_teacher
    from jasper_fast.utils.device import pick_device, used_precision

    key = describe_teacher(config) | {"precision": used_precision(pick_device(), precision)}
    return json.dumps(key, sort_keys=True)


def _file(folder: str | Path, key: str, role: str, texts: list[str]) -> Path:
    return Path(folder) / f"evaluation-{settings_digest([key, role, texts], size=16)}.npy"


def cached(
    encode: Callable[[list[str], str], np.ndarray], key: str, folder: str | Path
) -> Callable[[list[str], str], np.ndarray]:
    """Cache the embeddings of an encoder on disk.

    Args:
        encode: function from n texts and a role to (n, D) embeddings.
        key: identity of the model.
        folder: folder of the cache, with one .npy file for each key, role and list of texts.

    Returns:
        A function with the arguments of ``encode`` and results in float32.
    """

    def wrapped(texts: list[str], role: str) -> np.ndarray:
        file = _file(folder, key, role, texts)
        if file.is_file():
            return np.load(file)
        vectors = np.ascontiguousarray(encode(texts, role), dtype=np.float32)
        content = io.BytesIO()
        np.save(content, vectors)
        write_atomic(file, content.getvalue())
        return vectors

    return wrapped
