"""Encoders for evaluation: one function (texts, role) -> {width: unit vectors}, for models and for teachers."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_fast.config import TeacherConfig
from jasper_fast.errors import JasperError
from jasper_fast.files import write_atomic
from jasper_fast.models import CANNOT_LOAD, OWN_CODE, first_line, prompt_of, resolve_model
from jasper_fast.stock import encode_role, load_stock, model_batching, set_length

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from jasper_fast.teachers import Precision

EncodeWidths = Callable[[list[str], str], Mapping[int, np.ndarray]]


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their length, (n, D) float32; a zero row stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def load_model(
    name: str, max_length: int | None = None, device: str | None = None, *, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A model by run folder, path, name, or ``package:import_name/folder``.

    Args:
        name: a run folder stands for its ``model`` folder.
        max_length: tokens; None keeps the model's own.
        device: as torch names it; None takes the best there is.
        trust_remote_code: whether code that the model brings may run.

    Raises:
        JasperError: the model is missing, damaged or incomplete, brings custom code that was not allowed, or has
            fewer positions than ``max_length``.
    """
    path = Path(resolve_model(name))
    if path.is_dir() and not any((path / file).is_file() for file in ("modules.json", "config.json")):
        raise JasperError(f"{name}: the folder holds no model (modules.json or config.json); is the run finished?")
    try:
        where = str(path) if path.exists() else resolve_model(name)
        model = load_stock(name, where, device=device, trust_remote_code=trust_remote_code)
    except CANNOT_LOAD as error:
        if "trust_remote_code" in str(error):
            told = OWN_CODE
        elif path.exists():
            told = (
                f"it cannot be loaded ({first_line(error)}); where one of its files is damaged, make or copy it again"
            )
        else:
            told = f"no such model on this machine or its hub ({first_line(error)})"
        raise JasperError(f"{name}: {told}") from error
    if max_length is not None:
        set_length(model, max_length, name)
    return model


def routes(model: SentenceTransformer) -> tuple[int, dict[int, Any]]:
    """Where a model's Router of widths stands among its modules, and its heads: (position, {width: head}).

    A model without one gives (number of modules, {}).
    """
    from sentence_transformers.base.modules import Router

    for position, module in enumerate(model):
        if isinstance(module, Router) and all(_is_head(name, head) for name, head in module.sub_modules.items()):
            return position, {int(name): head for name, head in module.sub_modules.items()}
    return len(model), {}


def _is_head(name: str, route: Any) -> bool:
    """Tell whether a route is named after the width that it gives."""
    given = getattr(route[-1], "get_embedding_dimension", lambda: None)()
    return name.isdigit() and given == int(name)


def flat_model(model: SentenceTransformer, width: int | None) -> SentenceTransformer:
    """The model with one head in the Router's place, sharing its weights; None takes the widest.

    Raises:
        JasperError: the model has no such width.
    """
    from sentence_transformers import SentenceTransformer

    position, heads = routes(model)
    own = model.get_embedding_dimension()
    if not heads:
        if width not in (None, own):
            raise JasperError(f"the model is {own} wide and has no head of width {width}")
        return model
    width = width if width is not None else max(heads)
    if width not in heads:
        raise JasperError(f"the model has no head of width {width}; it has {', '.join(map(str, sorted(heads)))}")
    modules = [*list(model)[:position], *heads[width], *list(model)[position + 1 :]]
    flat = SentenceTransformer(
        modules=modules, prompts=dict(model.prompts), device=str(model.device), truncate_dim=model.truncate_dim
    )
    return flat.eval()


def model_encoder(
    model: SentenceTransformer, widths: Sequence[int] | None = None, batch_size: int = 32, name: str = "the model"
) -> EncodeWidths:
    """Make an encoder of a sentence-transformers model that reads each text once for all widths.

    Queries and documents get the embeddings of stock ``encode_query`` and ``encode_document``, in any batch.

    Args:
        model: with a Router of heads each width is a head; without one, a narrower width is the first coordinates.
        widths: which; None takes all heads, or the model's own width.
        batch_size: texts per forward pass.
        name: model, for messages.

    Raises:
        JasperError: the model has no such width, or its embeddings depend on other texts in every batch.
    """
    from sentence_transformers import SentenceTransformer

    position, heads = routes(model)
    own = max(heads) if heads else int(model.get_embedding_dimension() or 0)
    wanted = sorted(set(widths), reverse=True) if widths else sorted(heads, reverse=True) or [own]
    missing = [w for w in wanted if (w not in heads if heads else w > own)]
    if missing:
        has = f"heads of width {', '.join(map(str, sorted(heads)))}" if heads else f"{own} coordinates"
        raise JasperError(f"the model has no width {', '.join(map(str, missing))}; it has {has}")
    # the modules before the Router are what costs: they run once per text, as a model of their own
    stem = SentenceTransformer(modules=list(model)[:position], device=str(model.device)) if heads else model
    tail = list(model)[position + 1 :]
    batching = model_batching(model, name)

    @torch.inference_mode()
    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        features = encode_role(stem, texts, role, prompt_of(model.prompts, role), batch_size, batching)
        if not heads:
            vectors = features.float().cpu().numpy()
            return {w: normalise(vectors[:, :w]) for w in wanted}
        found = {}
        for width in wanted:
            state = {"sentence_embedding": features}
            for module in [*heads[width], *tail]:
                state = module(state)
            found[width] = normalise(state["sentence_embedding"].float().cpu().numpy())
        return found

    stem.eval()
    return encode


def teacher_encoder(
    configs: Sequence[TeacherConfig], cache: str | Path | None, precision: Precision
) -> EncodeWidths | None:
    """The target space for new texts: norm(concat(norm(t_i))) of all teachers (PAPER: problem, arXiv 2412.19048).

    Args:
        configs: the run's teachers.
        cache: where vectors of evaluation texts are kept between runs; None keeps none.
        precision: of the forward pass, as the run's.

    Returns:
        an encoder of one width, or None where a teacher is a file of ready vectors, which cannot read new texts.
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
    """One teacher, loaded only when vectors are asked for that the cache does not hold."""
    from jasper_fast.encode import pick_device, used_precision
    from jasper_fast.teachers import describe_teacher, load_teacher

    teacher = functools.cache(lambda: load_teacher(config, precision=precision))

    def encode(texts: list[str], role: str) -> np.ndarray:
        return teacher().encode(texts, role)

    if cache is None:
        return encode
    key = describe_teacher(config) | {"precision": used_precision(pick_device(), precision)}
    return cached(encode, json.dumps(key, sort_keys=True), cache)


def cached(
    encode: Callable[[list[str], str], np.ndarray], key: str, folder: str | Path
) -> Callable[[list[str], str], np.ndarray]:
    """Keep what ``encode`` gives in ``folder``, by the model's ``key``, the role and the texts."""

    def wrapped(texts: list[str], role: str) -> np.ndarray:
        digest = hashlib.blake2b(json.dumps([key, role, texts]).encode(), digest_size=16).hexdigest()
        file = Path(folder) / f"evaluation-{digest}.npy"
        if file.is_file():
            return np.load(file)
        vectors = np.ascontiguousarray(encode(texts, role), dtype=np.float32)
        content = io.BytesIO()
        np.save(content, vectors)
        write_atomic(file, content.getvalue())
        return vectors

    return wrapped
