"""Rewrite the token table of a model folder for a pruned tokenizer, and store weights as float16."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from jasper_fast.exporting.vocabulary import TOKENIZER_FILE, Vocabulary, read_vocabulary
from jasper_fast.models.folder import read_json, write_json
from jasper_fast.models.loading import embedding_rows, has_padding_offset, without_bars
from jasper_fast.models.sentence_transformer import transformers_of
from jasper_fast.utils.atomic import write_text
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Other files with the same tokens. Readers prefer tokenizer.json, and old copies would contradict it.
OTHER_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "*.model")
HALF_LIMIT = float(torch.finfo(torch.float16).max)


def folder_vocabulary(folder: Path, model: SentenceTransformer) -> Vocabulary:
    """Read the tokenizer of a flat model folder.

    Args:
        folder: flat sentence-transformers folder.
        model: the same folder, loaded.

    Raises:
        JasperError: the folder has no ``tokenizer.json``, its tokens cannot be removed, or the model has no table of
            token embeddings.
    """
    (module,) = transformers_of(model)
    if not (folder / TOKENIZER_FILE).is_file() or embedding_rows(module.model) is None:
        raise JasperError(
            f"{folder.name}: only fast tokenizers can be pruned (got no {TOKENIZER_FILE}, or no table of token "
            "embeddings). Fix: export without --vocabulary"
        )
    extra = _numbers_in(read_json(folder / "config.json"))
    if has_padding_offset(module.model):  # positions start after the padding number, so it must not change
        extra |= set(range(int(module.model.config.pad_token_id) + 1))
    vocabulary = read_vocabulary(read_json(folder / TOKENIZER_FILE), folder.name, extra)
    prompts = {number for ids in vocabulary.encode(model.prompts.values()) for number in ids}
    return replace(vocabulary, extra=vocabulary.extra | prompts)


def prune_table(folder: Path, kept: np.ndarray, model: SentenceTransformer) -> None:
    """Write the weights of a flat model with fewer rows in the token table.

    Args:
        folder: unpublished copy of the model's folder.
        kept: (k,) sorted numbers of the rows to keep.
        model: the whole model. It stays as it is.
    """
    (module,) = transformers_of(model)
    encoder = module.model
    table = encoder.get_input_embeddings()
    rows = table.weight.detach()[torch.from_numpy(kept).to(table.weight.device)]
    try:
        encoder.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=False))
        with without_bars():
            encoder.save_pretrained(folder)
    finally:
        encoder.set_input_embeddings(table)


def prune_settings(folder: Path, vocabulary: Vocabulary, kept: np.ndarray) -> None:
    """Write the pruned tokenizer of a model folder, and the new numbers of tokens in its settings.

    Args:
        folder: unpublished copy of the folder that ``vocabulary`` was read from.
        vocabulary: the whole tokenizer.
        kept: (k,) sorted numbers of the tokens to keep.
    """
    numbers = {int(old): new for new, old in enumerate(kept)}
    config = read_json(folder / "config.json")
    _renumber_settings(config, numbers)
    write_json(folder / "config.json", config)
    write_compact(folder / TOKENIZER_FILE, vocabulary.pruned(kept).data)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "added_tokens_decoder" in (content := read_json(settings)):
        named = content["added_tokens_decoder"]
        content["added_tokens_decoder"] = {str(numbers[int(old)]): token for old, token in named.items()}
        write_json(settings, content)
    for pattern in OTHER_VOCABULARIES:
        for file in folder.glob(pattern):
            file.unlink()


def write_compact(path: Path, content: Any) -> None:
    """Write JSON without white space, which is a third of a tokenizer's size."""
    write_text(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")))


def halve_weights(folder: Path) -> None:
    """Store all float32 weights of a model folder as float16.

    ``config.json`` keeps its dtype, float32. Readers convert the weights to it, so they compute in float32 and return
    float32 embeddings.

    Raises:
        JasperError: a weight is larger than float16 can store.
    """
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32:
                if float(tensor.abs().max()) > HALF_LIMIT:
                    raise JasperError(
                        f"{file.name}: float16 cannot store the weight {name} (got {float(tensor.abs().max()):.3g}, "
                        f"expected at most {HALF_LIMIT:.0f}). Fix: export without --weights fp16"
                    )
                tensors[name] = tensor.half()
        save_file(tensors, file, metadata={"format": "pt"})


def folder_bytes(folder: Path) -> int:
    """Return the size of all files of a folder in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _token_settings(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the settings of a model that hold numbers of tokens, as a dictionary and its key."""
    for key, value in config.items():
        if key.endswith("_token_id") and isinstance(value, int | list):
            yield config, key
        elif isinstance(value, dict):
            yield from _token_settings(value)


def _numbers_in(config: dict[str, Any]) -> set[int]:
    """Return the numbers of tokens that a model's settings hold."""
    values = [settings[key] for settings, key in _token_settings(config)]
    return {number for value in values for number in (value if isinstance(value, list) else [value])}


def _renumber_settings(config: dict[str, Any], numbers: Mapping[int, int]) -> None:
    """Give a model's settings the new numbers of tokens, in place. None replaces numbers without a token."""
    for settings, key in _token_settings(config):
        value = settings[key]
        settings[key] = [numbers.get(one) for one in value] if isinstance(value, list) else numbers.get(value)
    for settings in (config, config.get("text_config", {})):
        if "vocab_size" in settings:
            settings["vocab_size"] = len(numbers)
