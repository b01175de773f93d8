"""Hugging Face text encoders prepared as students: loading, layer choice, causal mask, padding and positions."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from jasper_fast.config.models import StudentConfig
from jasper_fast.models.attention import use_fast_gradient
from jasper_fast.models.hub import CANNOT_LOAD, resolve_model
from jasper_fast.models.loading import check_tokenizer, embedding_rows, load_checked
from jasper_fast.models.probes import explain_failures
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

POSITION_TABLES = ("position_embeddings", "wpe")  # endings of the position table's name
OTHER_STUDENT_FIX = "choose another encoder as student.model (BERT, RoBERTa, MPNet, ModernBERT and Qwen work)"


def load_encoder(config: StudentConfig) -> tuple[Any, Any]:
    """Load the Hugging Face model and tokenizer of a configuration.

    Weights are float32. Dropout is off, and an optional pooler is removed.

    Args:
        config: the ``student`` section of a configuration.

    Returns:
        The model and its tokenizer, which pads on the right.

    Raises:
        JasperError: The model is missing or needs custom code, its weights or tokenizer do not belong to it, or its
            architecture cannot be a student.
    """
    source = transformer_folder(resolve_model(config.model))
    if (Path(source) / "adapter_config.json").is_file():
        raise JasperError(
            f"{config.model}: the folder holds an adapter (adapter_config.json), not a whole model alone. Fix: merge "
            "it with PEFT's merge_and_unload() and save the result"
        )
    saved = saved_settings(source)
    encoder, tokenizer = _load_files(config, source, saved)
    if not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise JasperError(f"{config.model}: {type(encoder).__name__} has no `hidden_size`. Fix: choose a text encoder")
    drop_pooler(encoder)
    use_fast_gradient(encoder)
    check_tokenizer(tokenizer, encoder, config.model)
    if saved["do_lower_case"]:
        lowercase(tokenizer, config.model)
    ensure_pad_token(tokenizer, encoder, config.model)
    tokenizer.padding_side = "right"
    return encoder, tokenizer


def _load_files(config: StudentConfig, source: str, saved: dict[str, Any]) -> tuple[Any, Any]:
    """Load the model and tokenizer of a folder or hub name with its saved settings."""
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        settings = AutoConfig.from_pretrained(source, **saved["config_args"], **options)
        disable_dropout(settings)
        if hasattr(settings, "use_cache"):
            settings.use_cache = False  # the key-value cache is for generating text
        arguments = options | {key: value for key, value in saved["model_args"].items() if key == "add_pooling_layer"}

        def load(more: dict[str, Any]) -> Any:
            return encoder_factory(settings).from_pretrained(
                source, config=settings, dtype=torch.float32, **arguments, **more
            )

        encoder = load_checked(load, config.model)
        return encoder, AutoTokenizer.from_pretrained(source, **saved["tokenizer_args"], **options)
    except CANNOT_LOAD as error:
        raise JasperError(_cannot_load(config, source, error)) from error


def encoder_factory(settings: Any) -> Any:
    """Return the auto class that loads a text encoder alone.

    ``AutoModel`` would load T5 and similar models with their decoder, and with random weights for it.

    Args:
        settings: Hugging Face configuration of the model.

    Raises:
        JasperError: transformers has no class for the encoder alone.
    """
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    if type(settings) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    if getattr(settings, "is_encoder_decoder", False):
        raise JasperError(
            f"student.model: {type(settings).__name__} belongs to an encoder-decoder model whose encoder cannot be "
            f"saved alone. Fix: {OTHER_STUDENT_FIX}"
        )
    return AutoModel


def transformer_folder(source: str) -> str:
    """Return the transformer's folder inside a sentence-transformers folder, or any other source unchanged.

    Args:
        source: model folder or hub name.

    Raises:
        JasperError: The list of modules is damaged, or none of them is a transformer.
    """
    modules = Path(source) / "modules.json"
    if not modules.is_file():
        return source
    try:
        listed = [(module["type"], module["path"]) for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JasperError(f"{modules} is damaged ({error}). Fix: copy or download the model again") from error
    for kind, path in listed:
        if kind.rpartition(".")[2] == "Transformer":
            return str(Path(source) / path) if path else source
    if any(kind.rpartition(".")[2] == "Router" for kind, _ in listed):
        raise JasperError(
            f"{source}: its Router holds several encoders, and a student has one. Fix: choose a model with one, "
            "such as the folder `symmetric` of an adapted model"
        )
    raise JasperError(
        f"{source}: a sentence-transformers model without a transformer (static or bag-of-words embeddings). "
        "Fix: choose one that has a transformer"
    )


def disable_dropout(settings: Any) -> None:
    """Set every dropout probability of a Hugging Face configuration to 0."""
    for name, value in settings.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(settings, name, 0.0)


def drop_pooler(encoder: Any) -> None:
    """Remove the pooler if the architecture allows it. Mean pooling does not use it, so it would never be trained."""
    optional = "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters
    if optional and isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None


def saved_settings(source: str) -> dict[str, Any]:
    """Read the transformer settings of a sentence-transformers folder, under old or new field names.

    Args:
        source: model folder or hub name. A hub name has no such settings.

    Returns:
        ``config_args``, ``model_args``, ``tokenizer_args`` (dicts) and ``do_lower_case`` (bool).

    Raises:
        JasperError: The settings are damaged.
    """
    from sentence_transformers.base.modules import Transformer

    stored: dict[str, Any] = {}
    if Path(source).is_dir():
        try:
            stored = Transformer.load_config(source)
        except CANNOT_LOAD as error:
            raise JasperError(
                f"{source}: its settings are damaged ({first_line(error)}). Fix: copy it again"
            ) from error
    new_names = {"config_args": "config_kwargs", "model_args": "model_kwargs", "tokenizer_args": "processor_kwargs"}
    arguments = {old: {**(stored.get(old) or {}), **(stored.get(new) or {})} for old, new in new_names.items()}
    for options in arguments.values():
        for name in ("trust_remote_code", "revision"):  # the run's configuration decides these
            options.pop(name, None)
    return {**arguments, "do_lower_case": bool(stored.get("do_lower_case"))}


def lowercase(tokenizer: Any, name: str) -> None:
    """Add lower-casing to the tokenizer itself, so that it is saved with it.

    Args:
        tokenizer: Hugging Face tokenizer.
        name: model, for messages.

    Raises:
        JasperError: The tokenizer is written in pure Python and has no normalizer.
    """
    from tokenizers import normalizers

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise JasperError(
            f"{name}: do_lower_case does not work with {type(tokenizer).__name__}, a tokenizer in pure Python. Fix: "
            "choose a model with a fast tokenizer (tokenizer.json)"
        )
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Lowercase()] + ([backend.normalizer] if backend.normalizer is not None else [])
    backend.normalizer = normalizers.Sequence(steps)


def ensure_pad_token(tokenizer: Any, encoder: Any, name: str) -> None:
    """Let a tokenizer without a padding token pad with its end-of-text or unknown token.

    No embedding is added. The encoder's configuration gets the same padding id.

    Args:
        tokenizer: Hugging Face tokenizer.
        encoder: Hugging Face model.
        name: model, for messages.

    Raises:
        JasperError: The tokenizer has none of these tokens.
    """
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise JasperError(
                f"{name}: texts cannot be batched, because its tokenizer has no padding, end-of-text or unknown token. "
                'Fix: set one in tokenizer_config.json, e.g. "pad_token": "<|endoftext|>"'
            )
        tokenizer.pad_token = substitute
    encoder.config.pad_token_id = tokenizer.pad_token_id


def make_bidirectional(encoder: Any) -> bool:
    """Remove a decoder's causal mask through its configuration, which sentence-transformers honours on loading.

    Returns:
        True if the encoder had a causal mask.

    Raises:
        JasperError: The architecture keeps its causal mask.
    """
    with torch.random.fork_rng(devices=[]):
        causal = not is_bidirectional(encoder)
    if not causal:
        return False
    encoder.config.is_causal = False
    if not is_bidirectional(encoder):
        raise JasperError(
            f"student.bidirectional: {type(encoder).__name__} does not honour `is_causal: false` in its configuration. "
            "Fix: set student.bidirectional: false, or choose another model (Qwen2, Qwen3, Llama, Mistral and Gemma "
            "can be bidirectional)"
        )
    return True


@torch.no_grad()
def is_bidirectional(encoder: Any) -> bool:
    """Return True if the last token changes the state of the first, which a causal mask prevents."""
    training = encoder.training
    encoder.eval()
    size = embedding_rows(encoder) or 256
    ids = torch.arange(size // 2, size // 2 + 4).remainder(size).repeat(2, 1)  # (2, 4)
    ids[1, -1] = (size // 2 + 5) % size
    with explain_failures("student.model", type(encoder).__name__, OTHER_STUDENT_FIX):
        first = encoder(input_ids=ids.to(encoder.device)).last_hidden_state[:, 0]  # (2, H)
    encoder.train(training)
    return not torch.equal(first[0], first[1])


def check_max_length(encoder: Any, max_length: int, key: str = "student.max_length") -> None:
    """Reject a maximum length beyond the encoder's positions.

    Args:
        encoder: Hugging Face model.
        max_length: maximum length in tokens.
        key: configuration field of the length, for messages.

    Raises:
        JasperError: The encoder has fewer positions. The message gives the largest possible length.
    """
    limit = position_limit(encoder)
    if limit is not None and limit < max_length:
        raise JasperError(f"{key} is {max_length}, but the model has {limit} positions. Fix: give at most {limit}")


def position_limit(encoder: Any) -> int | None:
    """Return the maximum number of tokens of an encoder, or None if it has no limit."""
    limit = position_table(encoder) or getattr(encoder.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def position_table(encoder: Any) -> int | None:
    """Return the number of tokens that the learned position table covers, or None without such a table."""
    rows = None
    for name, module in encoder.named_modules():
        if name.endswith(POSITION_TABLES) and isinstance(module, nn.Embedding):
            # RoBERTa and similar models start positions after the padding index.
            rows = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return rows


def token_type_template(tokenizer: Any, encoder: Any) -> TokenTypes | None:
    """Find the token types that a tokenizer gives a single text, or None if they are all 0 or unused.

    Args:
        tokenizer: Hugging Face tokenizer.
        encoder: Hugging Face model.

    Raises:
        JasperError: The types depend on the text.
    """
    accepted = "token_type_ids" in inspect.signature(encoder.forward).parameters
    if not accepted or "token_type_ids" not in getattr(tokenizer, "model_input_names", ()):
        return None
    probes = ["one", "one two three", "a b c d e f g h", ""]
    encoded = tokenizer(probes, return_token_type_ids=True, return_special_tokens_mask=True)
    types, special = encoded["token_type_ids"], encoded["special_tokens_mask"]
    if not any(map(any, types)):
        return None
    inner = [position for position, is_special in enumerate(special[0]) if not is_special] or [0]
    template = TokenTypes(types[0][: inner[0]], types[0][inner[0]], types[0][inner[-1] + 1 :])
    if any(template.of(len(row)) != row for row in types):
        raise JasperError(
            f"student.model: {type(tokenizer).__name__} gives token types that depend on the text (got {types[1]}). "
            "Fix: remove token_type_ids from model_input_names in tokenizer_config.json, or choose another model"
        )
    return template


class TokenTypes(NamedTuple):
    """Token types of the special tokens before a text, of the text's tokens, and of the special tokens after it."""

    before: list[int]
    text: int
    after: list[int]

    def of(self, length: int) -> list[int]:
        """Return the types of a text of ``length`` tokens, special tokens included."""
        inner = length - len(self.before) - len(self.after)
        return self.before + [self.text] * inner + self.after


def _cannot_load(config: StudentConfig, source: str, error: Exception) -> str:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            f"{config.model}: the model needs its own code, which does not run by default. Fix: read the code, then "
            "set student.trust_remote_code: true"
        )
    if Path(source).is_dir():
        return (
            f"{source} could not be loaded as a Hugging Face text encoder ({reason}). Fix: if a file is damaged, copy "
            "or download the model again"
        )
    return (
        f"student.model: the model {config.model!r} was not found. It is not a local folder and could not be fetched "
        f'({reason}). Fix: give a folder, a "package:import_name/folder", or a hub name. Without access to the hub, '
        f"run `hf download {config.model}` on another machine and give the folder"
    )
