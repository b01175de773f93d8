"""Load sentence-transformers models with checks, and encode as stock encode_query and encode_document do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.models.backbone import ensure_pad_token, position_limit, position_table
from jasper_fast.models.hub import PROMPTS, prompt_of, read_settings
from jasper_fast.models.loading import check_tokenizer, load_checked
from jasper_fast.models.probes import LONG, SHORT, Batching, explain_failures, explain_text_failures, find_batching
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


ROLES = ("query", "document")
CLASSIFIER = "ForSequenceClassification"  # end of the class of cross-encoders and classifiers in transformers
TOKENIZED_AT_ONCE = 512  # texts per call of the tokenizer
OTHER_MODEL_FIX = "choose another model, or the version of transformers that it was saved with"


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
        device: torch device name. None is the GPU, or the CPU if there is no GPU.
        revision: branch, tag or commit on the hub. None is the default branch.
        trust_remote_code: permission to run the model's custom code.
        dtype: dtype of the weights. None keeps the saved one.

    Raises:
        JasperError: files are missing, weights do not match, or the tokenizer or a length belongs to another model.
        Exception: one of `jasper_fast.models.hub.CANNOT_LOAD`, raised by the libraries.
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
    _check_kind(where, revision, name)
    for module in transformers_of(model):
        if module.tokenizer is not None:
            check_tokenizer(module.tokenizer, module.model, name)
            ensure_pad_token(module.tokenizer, module.model, name)
            _check_length(module, name)
    _report_ignored_prompt(model.prompts, name)
    _report_similarity(model.similarity_fn_name, name)
    return model


def transformers_of(model: SentenceTransformer, role: str | None = None) -> Iterator[Any]:
    """Yield the Transformer modules of a model, or its ONNX graph. Those inside its Routers are included.

    Args:
        model: sentence-transformers model.
        role: "query" or "document", for the modules that encode such texts. None is all modules.
    """
    from sentence_transformers.base.modules import Transformer

    from jasper_fast.models.graph_module import GraphModule

    parts = (
        model.modules() if role is None else (part for module in role_modules(model, role) for part in module.modules())
    )
    yield from (module for module in parts if isinstance(module, (Transformer, GraphModule)))


def role_modules(model: SentenceTransformer, role: str) -> list[Any]:
    """List the modules that encode queries or documents, in order. A Router is replaced by the modules of its route.

    Args:
        model: sentence-transformers model.
        role: "query" or "document", the task of stock ``encode_query`` or ``encode_document``.

    Raises:
        JasperError: a Router has no route for the role.
    """
    return list(_resolved(model, role))


def _resolved(modules: Iterable[Any], role: str) -> Iterator[Any]:
    from sentence_transformers.base.modules import Router

    for module in modules:
        if not isinstance(module, Router):
            yield module
            continue
        mapped = (
            module.route_mappings.get(key) for key in ((role, "text"), (role, None), (None, "text"), (None, None))
        )
        named = (name for name in (role, "text") if name in module.sub_modules)
        route = next(filter(None, (*mapped, *named)), None)
        if route is None:
            known = ", ".join(module.sub_modules)
            raise JasperError(
                f"the model does not encode a {role}: its Router has the routes {known}. Fix: choose another model"
            )
        yield from _resolved(module.sub_modules[route], role)


def roles_differ(model: SentenceTransformer) -> bool:
    """Return True if a model encodes queries and documents with different modules, as an asymmetric one does."""
    queries, documents = (role_modules(model, role) for role in ROLES)
    return [id(module) for module in queries] != [id(module) for module in documents]


def encode_role(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: str,
    prompt: str,
    batch_size: int = 32,
    batching: Batching = "padded",
) -> Tensor:
    """Encode texts as stock ``encode_query`` or ``encode_document`` does with a prompt.

    Args:
        model: sentence-transformers model. Its Routers get the role as their task.
        texts: n texts.
        role: "query" or "document".
        prompt: prefix of each text. "" adds no prefix.
        batch_size: texts per forward pass.
        batching: result of `model_batching`. "equal lengths" avoids all padding.

    Returns:
        (n, D) float embeddings on the model's device, in the order of the texts.
    """
    inputs = list(texts)
    options: dict[str, Any] = {"prompt": prompt, "task": role, "convert_to_tensor": True, "show_progress_bar": False}
    if batching == "padded":
        return model.encode(inputs, batch_size=batch_size, **options)
    vectors: list[Tensor] = [torch.empty(0)] * len(inputs)
    for batch in length_batches(token_lengths(model, inputs, role, prompt), batch_size):
        same = [inputs[i] for i in batch]
        with explain_text_failures(same):
            encoded = model.encode(same, batch_size=len(batch), **options)
        for position, vector in zip(batch, encoded, strict=True):
            vectors[position] = vector
    return torch.stack(vectors) if vectors else torch.empty(0)


def length_batches(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield batches of at most ``size`` texts with equal lengths, as positions (b,) int64, longest first."""
    for length in np.unique(lengths)[::-1]:
        same = np.flatnonzero(lengths == length)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def token_lengths(model: SentenceTransformer, texts: Sequence[str], role: str, prompt: str) -> np.ndarray:
    """Count each text's tokens after truncation, prompt included, (n,) int64.

    A model without an attention mask, such as a static embedding, gets the numbers of characters.
    """
    counts: list[int] = []
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        chunk = list(texts[start : start + TOKENIZED_AT_ONCE])
        features = model.preprocess(chunk, prompt=prompt, task=role)
        mask = features.get("attention_mask")
        counts += mask.sum(dim=1).tolist() if mask is not None else [len(prompt) + len(text) for text in chunk]
    return np.array(counts, dtype=np.int64)


def model_batching(model: SentenceTransformer, name: str, prompts: Mapping[str, str | None] | None = None) -> Batching:
    """Find the kind of batches in which a model's embeddings do not depend on other texts, for both roles.

    Args:
        model: sentence-transformers model.
        name: model, for messages.
        prompts: prefixes by role. None is the model's prompts.

    Returns:
        "padded", or "equal lengths" for a model whose batches must not be padded.

    Raises:
        JasperError: embeddings depend on other texts in every batch, the model cannot encode a short text, or queries
            and documents differ in width.
    """
    architecture = " and ".join(type(module.model).__name__ for module in transformers_of(model)) or "the model"
    widths: dict[str, int] = {}
    batchings = set()
    for role in ROLES:
        prompt = prompt_of(model.prompts if prompts is None else prompts, role)

        def encode(texts: list[str], role: str = role, prompt: str = prompt) -> Tensor:
            vectors = encode_role(model, texts, role, prompt)
            widths[role] = vectors.shape[1]
            return vectors

        with explain_failures(name, architecture, OTHER_MODEL_FIX):
            _check_text_fits(model, role, prompt, name)
            batchings.add(find_batching(encode, name))
    if len(set(widths.values())) > 1:
        raise JasperError(
            f"{name}: embeddings of queries and documents differ in width (got "
            f"{widths['query']} and {widths['document']}). Fix: choose a model whose routes share a width"
        )
    return "equal lengths" if "equal lengths" in batchings else "padded"


def limit_length(model: SentenceTransformer, max_length: int) -> int:
    """Truncate texts at ``max_length`` tokens, or at the limit of each part of the model if that is lower.

    Returns:
        The largest resulting limit of a part, in tokens.
    """
    return _limit(transformers_of(model), max_length)


def _limit(modules: Iterable[Any], max_length: int) -> int:
    lengths = []
    for module in modules:
        bounds = (max_length, module.max_seq_length, position_limit(module.model))
        module.max_seq_length = min(int(bound) for bound in bounds if bound)
        for role in ("query_length", "document_length"):  # per-role lengths
            if getattr(module, role, None):
                setattr(module, role, min(getattr(module, role), module.max_seq_length))
        lengths.append(module.max_seq_length)
    return max(lengths, default=max_length)


def set_length(model: SentenceTransformer, tokens: int, name: str) -> None:
    """Truncate texts at ``tokens`` tokens.

    In a model that encodes queries and documents with different modules, this is the length of documents. Its queries
    keep their length.

    Raises:
        JasperError: a part of the model has fewer positions.
    """
    modules = list(transformers_of(model, "document" if roles_differ(model) else None))
    for module in modules:
        limit = position_limit(module.model)
        if limit is not None and tokens > limit:
            raise JasperError(
                f"{name}: max length {tokens} is beyond the model's {limit} positions. Fix: set at most {limit}"
            )
        module.max_seq_length = tokens
    _limit(modules, tokens)


def _check_text_fits(model: SentenceTransformer, role: str, prompt: str, name: str) -> None:
    """Reject a maximum length that the prompt and special tokens fill, so that all texts get the same embedding.

    Raises:
        JasperError: two different texts have the same tokens.
    """
    features = model.preprocess([SHORT, LONG], prompt=prompt, task=role)
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if mask is not None and torch.equal(ids[0], ids[1]) and torch.equal(mask[0], mask[1]):
        raise JasperError(
            f"{name}: the {role} prompt ({prompt!r}) and special tokens fill the maximum length of "
            f"{int(mask[0].sum())} tokens. Fix: raise max_length, or shorten the prompt"
        )


def check_embeds(where: str, name: str, revision: str | None = None) -> None:
    """Reject models that give no embedding per text. Nothing is loaded or downloaded.

    A plain encoder that was saved as a classifier can be a student's beginning, but embeds nothing as it is.

    Args:
        where: folder or hub name. Of a hub name, only files that were downloaded are read.
        name: model, for messages.
        revision: branch, tag or commit on the hub. None is the default branch.

    Raises:
        JasperError: the model is of another class of sentence-transformers, or a cross-encoder or classifier.
    """
    _check_kind(where, revision, name)
    folder = _local_folder(where, revision)
    if folder is None or (folder / "modules.json").is_file():
        return
    architectures = read_settings(str(folder), None, "config.json").get("architectures") or []
    classifier = next((one for one in architectures if str(one).endswith(CLASSIFIER)), None)
    if classifier is not None:
        raise JasperError(
            f"{name}: the model is a {classifier}, a cross-encoder or classifier, which scores texts (expected a model "
            "with one embedding per text). Fix: choose an embedding model, such as all-MiniLM-L6-v2"
        )


def _check_kind(where: str, revision: str | None, name: str) -> None:
    """Reject models of another class of sentence-transformers, such as a CrossEncoder."""
    folder = _local_folder(where, revision)
    settings = read_settings(str(folder), None, PROMPTS) if folder is not None else {}
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise JasperError(
            f"{name}: the model is a {kind}, whose modules would not be loaded (expected a SentenceTransformer). Fix: "
            "choose a model that gives one embedding per text"
        )


def _local_folder(where: str, revision: str | None) -> Path | None:
    """Return the folder of a model on this machine, without the network. None: it was not downloaded yet."""
    from huggingface_hub import try_to_load_from_cache

    if Path(where).is_dir():
        return Path(where)
    name = where if "/" in where else f"sentence-transformers/{where}"
    cached = (try_to_load_from_cache(name, file, revision=revision) for file in (PROMPTS, "config.json"))
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def _check_modules_file(name: str, where: str) -> None:
    """Reject a sentence-transformers folder without modules.json, which would silently load with mean pooling."""
    folder = Path(where)
    parts = sorted(path.name for path in folder.glob("[0-9]_[A-Z]*") if path.is_dir()) if folder.is_dir() else []
    if parts and not (folder / "modules.json").is_file():
        raise JasperError(
            f"{name}: modules.json is missing, but the folder has parts of a sentence-transformers model "
            f"({', '.join(parts)}). Fix: copy the whole folder again"
        )


def _check_length(module: Any, name: str) -> None:
    """Cap a default length at the position table, and reject a saved length beyond it."""
    table, saved = position_table(module.model), module.max_seq_length
    if table is None or not saved or saved <= table:
        return
    if saved != getattr(module.model.config, "max_position_embeddings", None):  # else sentence-transformers' own cap
        raise JasperError(
            f"{name}: max_seq_length exceeds the position table (got {saved} tokens, expected at most {table}). Fix: "
            f"lower max_seq_length in sentence_bert_config.json to {table}"
        )
    module.max_seq_length = table


def _report_ignored_prompt(prompts: Mapping[str, str | None], name: str) -> None:
    """Print a note about a document prompt under a name that sentence-transformers ignores."""
    ignored = next((key for key in ("passage", "corpus") if prompts.get(key)), None)
    if ignored is not None and not prompts.get("document"):
        print(
            f"note: {name} has a prompt {ignored!r} ({prompts[ignored]!r}), which encode_document does not use. To use "
            "it, set it as the model's `document` prompt, or as prompts.document of a teacher",
            file=sys.stderr,
        )


def _report_similarity(similarity: str | None, name: str) -> None:
    if similarity not in (None, "cosine"):
        print(f"note: {name} was trained for {similarity} scores. It is compared by cosine here", file=sys.stderr)
