"""Build encoders for evaluation: functions (texts, role) -> {width: unit embeddings} of models and of teachers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_fast.models.hub import CANNOT_LOAD, CUSTOM_CODE, prompt_of, resolve_model
from jasper_fast.models.sentence_transformer import ROLES, encode_role, load_stock, model_batching, set_length
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


ROLE_WIDTH = re.compile(r"(query|document)-([1-9][0-9]*)")  # route and task of an asymmetric model
EncodeWidths = Callable[[list[str], str], Mapping[int, np.ndarray]]


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Normalise rows to unit length, (n, D) float32. A zero row stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def load_model(
    name: str, max_length: int | None = None, device: str | None = None, *, trust_remote_code: bool = False
) -> SentenceTransformer:
    """Load a model for evaluation or search.

    Args:
        name: folder of a model or of a run, hub name, or ``package:import_name/folder``.
        max_length: tokens after which texts are truncated. None keeps the model's limit. In an asymmetric model, it is
            the length of documents, and queries keep their own.
        device: torch device name. None is the GPU, or the CPU if there is no GPU.
        trust_remote_code: permission to run the model's custom code.

    Raises:
        JasperError: the model is missing, damaged or incomplete, needs custom code that is not allowed, or has fewer
            positions than ``max_length``.
    """
    path = Path(resolve_model(name))
    if path.is_dir() and not any((path / file).is_file() for file in ("modules.json", "config.json")):
        raise JasperError(
            f"{name}: the folder holds no model (expected modules.json or config.json). Fix: finish the run, or give "
            "the folder of a model"
        )
    try:
        where = str(path) if path.exists() else resolve_model(name)
        model = load_stock(name, where, device=device, trust_remote_code=trust_remote_code)
    except CANNOT_LOAD as error:
        if "trust_remote_code" in str(error):
            problem = CUSTOM_CODE
        elif path.exists():
            problem = f"the model cannot be loaded ({first_line(error)}). Fix: copy or save the model again"
        else:
            problem = f"no such model on this machine or its hub ({first_line(error)}). Fix: check the name"
        raise JasperError(f"{name}: {problem}") from error
    if max_length is not None:
        set_length(model, max_length, name)
    return model


def routes(model: SentenceTransformer) -> tuple[int, dict[int, Any]]:
    """Find a model's Router of widths.

    Returns:
        Position of the Router among the modules, and its heads by width, those of documents in an asymmetric model.
        Without a Router: number of modules, {}.
    """
    position, heads = role_heads(model)
    return position, heads["document"]


def role_heads(model: SentenceTransformer) -> tuple[int, dict[str, dict[int, Any]]]:
    """Find a model's Router of widths, with its heads for queries and for documents.

    The routes of a symmetric model are widths, such as "64", which both roles share. Those of an asymmetric model have
    the role too, such as "query-64".

    Returns:
        Position of the Router among the modules, and its heads by role and width. Without a Router: number of modules,
        {"query": {}, "document": {}}.
    """
    from sentence_transformers.base.modules import Router

    for position, module in enumerate(model):
        if not isinstance(module, Router):
            continue
        if all(_is_head(name, head) for name, head in module.sub_modules.items()):
            shared = {int(name): head for name, head in module.sub_modules.items()}
            return position, dict.fromkeys(ROLES, shared)
        parts = {name: ROLE_WIDTH.fullmatch(name) for name in module.sub_modules}
        if all(parts.values()):
            heads: dict[str, dict[int, Any]] = {role: {} for role in ROLES}
            for name, found in parts.items():
                heads[found[1]][int(found[2])] = module.sub_modules[name]  # type: ignore[index]
            return position, heads
    return len(model), {role: {} for role in ROLES}


def model_widths(model: SentenceTransformer) -> list[int]:
    """Return the widths of a model's heads, widest first. Without a Router of widths, it is the model's width."""
    _, heads = routes(model)
    return sorted(heads, reverse=True) or [int(model.get_embedding_dimension() or 0)]


def _is_head(name: str, route: Any) -> bool:
    """Return True if a route's name is its output width."""
    width = getattr(route[-1], "get_embedding_dimension", lambda: None)()
    return name.isdigit() and width == int(name)


def flat_model(model: SentenceTransformer, width: int | None) -> SentenceTransformer:
    """Return a model of one width: with one head in place of the Router, or cut to its first coordinates.

    It shares the weights of the original. An asymmetric model keeps a Router, with one head for each role.

    Args:
        model: sentence-transformers model, with or without a Router of heads.
        width: width of the head, or number of coordinates. None is the widest head, or all coordinates.

    Raises:
        JasperError: the model has no such width.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    position, by_role = role_heads(model)
    heads = by_role["document"]
    if not heads:
        return model if width is None else _first_coordinates(model, width)
    width = width if width is not None else max(heads)
    if width not in heads:
        widths = ", ".join(map(str, sorted(heads)))
        raise JasperError(
            f"the model has no head of width {width} (expected one of {widths}). Fix: choose an available width"
        )
    replaced = list(heads[width])
    if by_role["query"] is not heads:
        replaced = [Router({role: list(by_role[role][width]) for role in ROLES}, allow_empty_key=False)]
    modules = [*list(model)[:position], *replaced, *list(model)[position + 1 :]]
    flat = SentenceTransformer(
        modules=modules, prompts=dict(model.prompts), device=str(model.device), truncate_dim=model.truncate_dim
    )
    return flat.eval()


def _first_coordinates(model: SentenceTransformer, width: int) -> SentenceTransformer:
    """Return a model whose embeddings are the first coordinates of another's, normalised again."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    [width] = _chosen_widths(model, {}, [width])
    if width == model.get_embedding_dimension():
        return model
    with model.truncate_sentence_embeddings(None):
        full = int(model.get_embedding_dimension() or 0)
    cut = Dense(full, width, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.eye(width, full))
    modules = [*model, cut, Normalize()]
    return SentenceTransformer(modules=modules, prompts=dict(model.prompts), device=str(model.device)).eval()


def model_encoder(model: SentenceTransformer, widths: Sequence[int] | None = None) -> EncodeWidths:
    """Make an encoder of a sentence-transformers model that encodes each text once for all widths.

    Queries and documents get the embeddings of stock ``encode_query`` and ``encode_document``, in any batch.

    Args:
        model: sentence-transformers model. With a Router of heads, each width is a head. Without one, a narrower width
            is the first coordinates. An asymmetric model has one encoder and its heads for each role.
        widths: widths to return. None is all heads, or the model's width.

    Returns:
        A function from n texts and a role, "query" or "document", to {width: (n, width) float32 unit rows}.

    Raises:
        JasperError: the model has no such width, or its embeddings depend on other texts in every batch.
    """
    from sentence_transformers import SentenceTransformer

    position, heads = role_heads(model)
    chosen_widths = _chosen_widths(model, heads["document"], widths)
    # the modules before the Router are expensive, so they form a separate model that runs once per text
    stem = SentenceTransformer(modules=list(model)[:position], device=str(model.device)) if heads["document"] else model
    tail = list(model)[position + 1 :]
    batching = model_batching(model, "the model")

    @torch.inference_mode()
    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        features = encode_role(stem, texts, role, prompt_of(model.prompts, role), batching=batching)
        if not heads[role]:
            vectors = features.float().cpu().numpy()
            return {width: normalise(vectors[:, :width]) for width in chosen_widths}
        embeddings = {}
        for width in chosen_widths:
            state = {"sentence_embedding": features}
            for module in [*heads[role][width], *tail]:
                state = module(state)
            embeddings[width] = normalise(state["sentence_embedding"].float().cpu().numpy())
        return embeddings

    stem.eval()
    return encode


def document_head(model: SentenceTransformer, width: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return the modules of an asymmetric model that follow its document encoder, as a function of its embeddings.

    Args:
        model: sentence-transformers model with a Router of widths by role.
        width: width of the result.

    Returns:
        A function from (n, d) float32 unit rows to (n, width) float32 unit rows. Coordinates of the encoder beyond
        d count as zero. None: the model has no such head, or the head depends on the length of its input.
    """
    from sentence_transformers.base.modules import Dense

    position, heads = role_heads(model)
    modules = [*heads["document"].get(width, []), *list(model)[position + 1 :]]
    dense = [module for module in modules if isinstance(module, Dense)]
    linear = all(isinstance(part.activation_function, torch.nn.Identity) and part.linear.bias is None for part in dense)
    if width not in heads["document"] or heads["query"] is heads["document"] or not linear:
        return None
    inputs = dense[0].in_features if dense else width

    @torch.inference_mode()
    def project(rows: np.ndarray) -> np.ndarray:
        padded = np.pad(rows, ((0, 0), (0, inputs - rows.shape[1])))
        state = {"sentence_embedding": torch.from_numpy(padded).to(model.device)}
        for module in modules:
            state = module(state)
        return normalise(state["sentence_embedding"].float().cpu().numpy())

    return project


def _chosen_widths(model: SentenceTransformer, heads: dict[int, Any], widths: Sequence[int] | None) -> list[int]:
    """Check the requested widths and return them, widest first. None requests all heads, or the model's width."""
    full = max(heads) if heads else int(model.get_embedding_dimension() or 0)
    chosen = sorted(set(widths), reverse=True) if widths else sorted(heads, reverse=True) or [full]
    missing = [width for width in chosen if (width not in heads if heads else width > full)]
    if missing:
        available = f"one of {', '.join(map(str, sorted(heads)))}" if heads else f"at most {full}"
        got = ", ".join(map(str, missing))
        raise JasperError(f"the model has no width {got} (expected {available}). Fix: choose an available width")
    return chosen
