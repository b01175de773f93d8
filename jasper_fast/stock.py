"""sentence-transformers models: loaded with checks, and called as stock encode_query and encode_document."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.errors import JasperError
from jasper_fast.loading import check_tokenizer, load_checked
from jasper_fast.models import PROMPTS, prompt_of, settings_of
from jasper_fast.pretrained import give_pad_token, position_limit, position_table
from jasper_fast.probes import LONG, SHORT, Batching, explained, find_batching

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ROLES = ("query", "document")
TOKENIZED_AT_ONCE = 512  # texts whose lengths are counted in one call
OTHER_MODEL = "choose another model, or the version of transformers that it was saved with"


def load_stock(
    name: str,
    where: str,
    *,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> SentenceTransformer:
    """Load a sentence-transformers model, or a plain encoder with mean pooling, in evaluation mode.

    Args:
        name: model, for messages.
        where: folder or hub name.
        device: torch name; None takes the best there is.
        revision: branch, tag or commit on the hub.
        trust_remote_code: permission to run code that the model brings.
        dtype: weights' dtype; None keeps the saved one.

    Raises:
        JasperError: files are missing, weights do not match, or the tokenizer or a length belongs to another model.
        Exception: one of `jasper_fast.models.CANNOT_LOAD`, raised by the libraries.
    """
    from sentence_transformers import SentenceTransformer

    _check_modules_file(name, where)
    weights = {} if dtype is None else {"dtype": dtype}

    def load(more: dict[str, Any]) -> SentenceTransformer:
        return SentenceTransformer(
            where,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            model_kwargs={**weights, **more},
        )

    model = load_checked(load, name).eval()
    kind = _kind(where, revision)
    if kind != "SentenceTransformer":
        raise JasperError(
            f"{name}: the model is a {kind}, whose modules would be left out (expected a SentenceTransformer). "
            "Fix: choose a model that gives one embedding per text"
        )
    for module in transformers_of(model):
        if module.tokenizer is not None:
            check_tokenizer(module.tokenizer, module.model, name)
            give_pad_token(module.tokenizer, module.model, name)
            _check_length(module, name)
    _report_ignored_prompt(model.prompts, name)
    if model.similarity_fn_name not in (None, "cosine"):
        print(
            f"note: {name} was made for {model.similarity_fn_name} scores; here it is compared by cosine",
            file=sys.stderr,
        )
    return model


def transformers_of(model: SentenceTransformer) -> Iterator[Any]:
    """Yield the Transformer modules of a model, those inside its Routers included."""
    from sentence_transformers.base.modules import Transformer

    yield from (module for module in model.modules() if isinstance(module, Transformer))


def encode_role(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: str,
    prompt: str,
    batch_size: int = 32,
    batching: Batching = "padded",
) -> Tensor:
    """Encode texts as stock ``encode_query`` or ``encode_document`` does with that prompt, (n, D).

    Args:
        model: any sentence-transformers model; its Routers see the role as their task.
        texts: n texts.
        role: "query" or "document".
        prompt: prefix of each text; "" for none.
        batch_size: texts per forward pass.
        batching: as from `model_batching`; "equal lengths" avoids all padding.
    """
    given = list(texts)
    options: dict[str, Any] = {"prompt": prompt, "task": role, "convert_to_tensor": True, "show_progress_bar": False}
    if batching == "padded":
        return model.encode(given, batch_size=batch_size, **options)
    vectors: list[Tensor] = [torch.empty(0)] * len(given)
    for batch in length_batches(token_lengths(model, given, role, prompt), batch_size):
        found = model.encode([given[i] for i in batch], batch_size=len(batch), **options)
        for at, vector in zip(batch, found, strict=True):
            vectors[at] = vector
    return torch.stack(vectors) if vectors else torch.empty(0)


def length_batches(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield positions of at most ``size`` texts of one length each, longest first."""
    for length in np.unique(lengths)[::-1]:
        same = np.flatnonzero(lengths == length)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def token_lengths(model: SentenceTransformer, texts: Sequence[str], role: str, prompt: str) -> np.ndarray:
    """Count each text's tokens after truncation, prompt included, (n,) int64; characters for a model without tokens."""
    counts: list[int] = []
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        chunk = list(texts[start : start + TOKENIZED_AT_ONCE])
        features = model.preprocess(chunk, prompt=prompt, task=role)
        mask = features.get("attention_mask")
        counts += mask.sum(dim=1).tolist() if mask is not None else [len(prompt) + len(text) for text in chunk]
    return np.array(counts, dtype=np.int64)


def model_batching(model: SentenceTransformer, name: str, prompts: Mapping[str, str | None] | None = None) -> Batching:
    """Find the batches in which a model's embeddings do not depend on other texts, for both roles.

    Args:
        model: any sentence-transformers model.
        name: model, for messages.
        prompts: prefixes by role; None: the model's own.

    Raises:
        JasperError: there are none, the model cannot encode a short text, or queries and documents differ in width.
    """
    architecture = " and ".join(type(module.model).__name__ for module in transformers_of(model)) or "the model"
    widths: dict[str, int] = {}
    found = set()
    for role in ROLES:
        prompt = prompt_of(model.prompts if prompts is None else prompts, role)

        def encode(texts: list[str], role: str = role, prompt: str = prompt) -> Tensor:
            vectors = encode_role(model, texts, role, prompt)
            widths[role] = vectors.shape[1]
            return vectors

        with explained(name, architecture, OTHER_MODEL):
            _check_room(model, role, prompt, name)
            found.add(find_batching(encode, name))
    if len(set(widths.values())) > 1:
        raise JasperError(
            f"{name}: queries and documents cannot be compared, their embeddings differ in width (got "
            f"{widths['query']} and {widths['document']}). Fix: choose a model whose routes share a width"
        )
    return "equal lengths" if "equal lengths" in found else "padded"


def limit_length(model: SentenceTransformer, wanted: int) -> int:
    """Truncate texts at ``wanted`` tokens, or at what each part of the model allows if that is less.

    Returns:
        the largest number of tokens that a part reads.
    """
    lengths = []
    for module in transformers_of(model):
        bounds = (wanted, module.max_seq_length, position_limit(module.model))
        module.max_seq_length = min(int(bound) for bound in bounds if bound)
        for role in ("query_length", "document_length"):  # per-role lengths
            if getattr(module, role, None):
                setattr(module, role, min(getattr(module, role), module.max_seq_length))
        lengths.append(module.max_seq_length)
    return max(lengths, default=wanted)


def set_length(model: SentenceTransformer, tokens: int, name: str) -> None:
    """Truncate texts at ``tokens`` tokens.

    Raises:
        JasperError: a part of the model has fewer positions.
    """
    for module in transformers_of(model):
        limit = position_limit(module.model)
        if limit is not None and tokens > limit:
            raise JasperError(
                f"{name}: max length {tokens} is beyond the model's {limit} positions. Fix: give at most {limit}"
            )
        module.max_seq_length = tokens
    limit_length(model, tokens)


def _check_room(model: SentenceTransformer, role: str, prompt: str, name: str) -> None:
    """Reject a length that the prompt and special tokens fill: all texts would have one embedding.

    Raises:
        JasperError: two different texts have the same tokens.
    """
    features = model.preprocess([SHORT, LONG], prompt=prompt, task=role)
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if mask is not None and torch.equal(ids[0], ids[1]) and torch.equal(mask[0], mask[1]):
        raise JasperError(
            f"{name}: no room for a text within its maximum length of {int(mask[0].sum())} tokens (the {role} prompt "
            f"is {prompt!r}). Fix: raise max_length, or shorten the prompt"
        )


def _kind(where: str, revision: str | None) -> str:
    """The class that a loaded model was saved by; hub files are in the cache by now, so the network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    folder: Path | None = Path(where)
    if not Path(where).is_dir():
        name = where if "/" in where else f"sentence-transformers/{where}"
        found = try_to_load_from_cache(name, PROMPTS, revision=revision)
        folder = Path(found).parent if isinstance(found, str) else None
    settings = settings_of(str(folder), None, PROMPTS) if folder is not None else {}
    return settings.get("model_type", "SentenceTransformer")


def _check_modules_file(name: str, where: str) -> None:
    """Reject a sentence-transformers folder that lost its list of modules: it would load with mean pooling alone."""
    folder = Path(where)
    parts = sorted(path.name for path in folder.glob("[0-9]_[A-Z]*") if path.is_dir()) if folder.is_dir() else []
    if parts and not (folder / "modules.json").is_file():
        raise JasperError(
            f"{name}: modules.json is missing, but the folder has parts of a sentence-transformers model "
            f"({', '.join(parts)}). Fix: copy the whole folder again"
        )


def _check_length(module: Any, name: str) -> None:
    """Cap a length that nobody chose at the position table, and reject a saved one beyond it."""
    table, saved = position_table(module.model), module.max_seq_length
    if table is None or not saved or saved <= table:
        return
    if saved != getattr(module.model.config, "max_position_embeddings", None):  # else sentence-transformers' own cap
        raise JasperError(
            f"{name}: its settings ask for max_seq_length {saved}, but the position table ends at {table} tokens. Fix: "
            f"set max_seq_length to at most {table} in sentence_bert_config.json"
        )
    module.max_seq_length = table


def _report_ignored_prompt(prompts: Mapping[str, str | None], name: str) -> None:
    """Mention a document prompt under a name that sentence-transformers does not use for documents."""
    other = next((key for key in ("passage", "corpus") if prompts.get(key)), None)
    if other is not None and not prompts.get("document"):
        print(
            f"note: {name} has a prompt {other!r} ({prompts[other]!r}), which encode_document does not use. To use it, "
            "set it as the model's `document` prompt, or as prompts.document of a teacher",
            file=sys.stderr,
        )
