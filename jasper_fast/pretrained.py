"""A Hugging Face text encoder made ready to be a student: found, loaded, shortened, without causal mask and dropout."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from jasper_fast.config import StudentConfig
from jasper_fast.errors import JasperError
from jasper_fast.loading import check_tokenizer, embedding_rows, load_checked
from jasper_fast.models import CANNOT_LOAD, first_line, resolve_model
from jasper_fast.probes import FAILURES, explained

NOT_PER_LAYER = ("architectures", "token_id", "tokens", "token_ids")  # endings of lists that are as long by chance
POSITION_TABLES = ("position_embeddings", "wpe")  # names that architectures give the table
OTHER_STUDENT = "choose another encoder as student.model (BERT, RoBERTa, MPNet, ModernBERT, Qwen and their kin work)"


def load_encoder(config: StudentConfig) -> tuple[Any, Any]:
    """Load the Hugging Face model (float32, dropout off, no optional pooler) and tokenizer of a configuration.

    Raises:
        JasperError: the model is missing or needs custom code, its weights or tokenizer do not belong to it, or its
            architecture cannot be a student.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = transformer_folder(resolve_model(config.model))
    if (Path(source) / "adapter_config.json").is_file():
        raise JasperError(
            f"{config.model}: the folder holds an adapter (adapter_config.json) beside or instead of a whole model. "
            "Fix: merge it with PEFT's merge_and_unload() and save the result"
        )
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    saved = saved_settings(source)
    try:
        settings = AutoConfig.from_pretrained(source, **saved["config_args"], **options)
        switch_dropout_off(settings)
        if hasattr(settings, "use_cache"):
            settings.use_cache = False  # a cache of keys and values is for generating text
        arguments = options | {key: value for key, value in saved["model_args"].items() if key == "add_pooling_layer"}

        def load(more: dict[str, Any]) -> Any:
            return encoder_factory(settings).from_pretrained(
                source, config=settings, dtype=torch.float32, **arguments, **more
            )

        encoder = load_checked(load, config.model)
        tokenizer = AutoTokenizer.from_pretrained(source, **saved["tokenizer_args"], **options)
    except CANNOT_LOAD as error:
        raise JasperError(_cannot_load(config, source, error)) from error
    if not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise JasperError(f"{config.model}: {type(encoder).__name__} has no `hidden_size`; choose a text encoder")
    drop_pooler(encoder)
    check_tokenizer(tokenizer, encoder, config.model)
    if saved["do_lower_case"]:
        lowercase(tokenizer, config.model)
    give_pad_token(tokenizer, encoder, config.model)
    tokenizer.padding_side = "right"
    return encoder, tokenizer


def encoder_factory(settings: Any) -> Any:
    """The auto class that gives a text encoder alone: T5 and its kin would bring their decoder, with random weights.

    Raises:
        JasperError: transformers has no class for the encoder alone.
    """
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    if type(settings) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    if getattr(settings, "is_encoder_decoder", False):
        raise JasperError(
            f"student.model: {type(settings).__name__} is of an encoder-decoder without an encoder class that can be "
            f"saved alone. Fix: {OTHER_STUDENT}"
        )
    return AutoModel


def transformer_folder(source: str) -> str:
    """The folder of the transformer inside a sentence-transformers folder; anything else comes back unchanged.

    Raises:
        JasperError: the list of modules is damaged, or none of them is a transformer.
    """
    modules = Path(source) / "modules.json"
    if not modules.is_file():
        return source
    try:
        listed = [(module["type"], module["path"]) for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JasperError(f"{modules} is damaged ({error}); copy or download the model again") from error
    for kind, path in listed:
        if kind.rpartition(".")[2] == "Transformer":
            return str(Path(source) / path) if path else source
    raise JasperError(
        f"{source} is a sentence-transformers model without a transformer (static or bag-of-words embeddings); "
        "choose one that has a transformer"
    )


def switch_dropout_off(settings: Any) -> None:
    """Set every dropout probability of a Hugging Face configuration to 0."""
    for name, value in settings.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(settings, name, 0.0)


def drop_pooler(encoder: Any) -> None:
    """Remove a pooler where the architecture allows it. Mean pooling never uses it, so it would never be trained."""
    optional = "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters
    if optional and isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None


def saved_settings(source: str) -> dict[str, Any]:
    """What a sentence-transformers folder asks of its transformer, under any name that stock reads it by.

    Returns:
        ``config_args``, ``model_args``, ``tokenizer_args`` (dicts) and ``do_lower_case``.

    Raises:
        JasperError: the settings are damaged.
    """
    from sentence_transformers.base.modules import Transformer

    found: dict[str, Any] = {}
    if Path(source).is_dir():
        try:
            found = Transformer.load_config(source)
        except CANNOT_LOAD as error:
            raise JasperError(
                f"{source}: its settings are damaged ({first_line(error)}). Fix: copy it again"
            ) from error
    new_names = {"config_args": "config_kwargs", "model_args": "model_kwargs", "tokenizer_args": "processor_kwargs"}
    given = {old: {**(found.get(old) or {}), **(found.get(new) or {})} for old, new in new_names.items()}
    for options in given.values():
        for name in ("trust_remote_code", "revision"):  # the configuration decides these
            options.pop(name, None)
    return {**given, "do_lower_case": bool(found.get("do_lower_case"))}


def lowercase(tokenizer: Any, name: str) -> None:
    """Make lower-casing part of the tokenizer itself, so that it is saved with it.

    Raises:
        JasperError: a tokenizer in pure Python, which has no place for it.
    """
    from tokenizers import normalizers

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise JasperError(
            f"{name}: do_lower_case is not possible with {type(tokenizer).__name__}, a tokenizer in pure Python. Fix: "
            "choose a model with a fast tokenizer (tokenizer.json)"
        )
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Lowercase()] + ([backend.normalizer] if backend.normalizer is not None else [])
    backend.normalizer = normalizers.Sequence(steps)


def give_pad_token(tokenizer: Any, encoder: Any, name: str) -> None:
    """Let a tokenizer without a padding token pad with its end-of-text (or unknown) token; no embedding is added.

    Raises:
        JasperError: it has none of them.
    """
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise JasperError(
                f"{name}: its tokenizer has no padding, end-of-text or unknown token, so texts cannot be batched. Fix: "
                'set one in tokenizer_config.json, e.g. "pad_token": "<|endoftext|>"'
            )
        tokenizer.pad_token = substitute
    encoder.config.pad_token_id = tokenizer.pad_token_id


def layer_list(encoder: nn.Module) -> str | None:
    """The path of the one list of modules that holds the layers, or None where layers are shared or hidden."""
    count = getattr(encoder.config, "num_hidden_layers", None)
    paths = [name for name, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    return outermost[0] if len(outermost) == 1 else None


def keep_layers(encoder: Any, layers: int | Sequence[int]) -> Any:
    """A model of the same architecture with the first ``layers`` layers, or with the ones listed, in that order.

    It is built anew from the shortened configuration, so what is trained is what a saved copy loads as.

    Raises:
        JasperError: there is no such layer, or the architecture does not allow the choice.
    """
    path = layer_list(encoder)
    if path is None:
        raise JasperError(no_layers(encoder))
    total = len(encoder.get_submodule(path))
    chosen = list(range(layers)) if isinstance(layers, int) else list(layers)
    if not chosen or max(chosen) >= total or len(set(chosen)) != len(chosen):
        raise JasperError(
            f"student.layers is {layers}, but the model has {total} layers: give a number from 1 to {total}, "
            f"or distinct indices from 0 to {total - 1}, e.g. {list(range(0, total, 2))}"
        )
    settings = copy.deepcopy(encoder.config)
    settings.num_hidden_layers = len(chosen)
    for name, value in encoder.config.to_dict().items():
        if isinstance(value, list) and len(value) == total and not name.endswith(NOT_PER_LAYER):
            setattr(settings, name, [value[i] for i in chosen])  # e.g. layer_types, attention_window
    position = {str(old): str(new) for new, old in enumerate(chosen)}
    weights = {}
    for name, value in encoder.state_dict().items():
        if name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            if index not in position:
                continue
            name = f"{path}.{position[index]}.{rest}"
        weights[name] = value
    try:
        shorter = type(encoder)(settings)
        drop_pooler(shorter)
        shorter.load_state_dict(weights)
    except FAILURES as error:
        raise JasperError(
            f"student.layers: {type(encoder).__name__} cannot keep layers {chosen} alone, because its layers are built "
            f"differently by position ({first_line(error)}). Fix: begin with layer 0, or leave student.layers out"
        ) from error
    return shorter


def make_bidirectional(encoder: Any) -> bool:
    """Take the causal mask from a decoder through its configuration, which sentence-transformers honours on loading.

    Returns:
        whether there was a mask to take.

    Raises:
        JasperError: the architecture keeps its causal mask nevertheless.
    """
    with torch.random.fork_rng(devices=[]):
        causal = not sees_later_tokens(encoder)
    if not causal:
        return False
    encoder.config.is_causal = False
    if not sees_later_tokens(encoder):
        raise JasperError(
            f"{type(encoder).__name__} cannot be made bidirectional: it does not honour `is_causal: false` in its "
            "configuration; set student.bidirectional: false, or choose another model (Qwen2, Qwen3, Llama, Mistral "
            "and Gemma can)"
        )
    return True


@torch.no_grad()
def sees_later_tokens(encoder: Any) -> bool:
    """Whether another last token changes the state of the first, as it does without a causal mask."""
    training = encoder.training
    encoder.eval()
    size = embedding_rows(encoder) or 256
    ids = torch.arange(size // 2, size // 2 + 4).remainder(size).repeat(2, 1)  # (2, 4)
    ids[1, -1] = (size // 2 + 5) % size
    with explained("student.model", type(encoder).__name__, OTHER_STUDENT):
        first = encoder(input_ids=ids.to(encoder.device)).last_hidden_state[:, 0]  # (2, H)
    encoder.train(training)
    return not torch.equal(first[0], first[1])


def check_max_length(encoder: Any, max_length: int, key: str = "student.max_length") -> None:
    """Refuse texts longer than the encoder has positions for.

    Args:
        key: where the configuration asks for it.

    Raises:
        JasperError: says the largest length possible.
    """
    limit = position_limit(encoder)
    if limit is not None and limit < max_length:
        raise JasperError(f"{key} is {max_length}, but the model has {limit} positions; give at most {limit}")


def position_limit(encoder: Any) -> int | None:
    """How many tokens an encoder has positions for; None where it names no limit."""
    limit = position_table(encoder) or getattr(encoder.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def position_table(encoder: Any) -> int | None:
    """Tokens that an encoder's table of learned positions has rows for; None for an encoder without one."""
    rows = None
    for name, module in encoder.named_modules():
        if name.endswith(POSITION_TABLES) and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from after the padding index
            rows = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return rows


def token_type_template(tokenizer: Any, encoder: Any) -> TokenTypes | None:
    """Find the token types that a tokenizer gives a single text, or None where they are all 0 or not read.

    Raises:
        JasperError: the types are not the same for every text.
    """
    read = "token_type_ids" in inspect.signature(encoder.forward).parameters
    if not read or "token_type_ids" not in getattr(tokenizer, "model_input_names", ()):
        return None
    probes = ["one", "one two three", "a b c d e f g h", ""]
    encoded = tokenizer(probes, return_token_type_ids=True, return_special_tokens_mask=True)
    types, special = encoded["token_type_ids"], encoded["special_tokens_mask"]
    if not any(map(any, types)):
        return None
    inner = [at for at, mark in enumerate(special[0]) if not mark] or [0]
    template = TokenTypes(types[0][: inner[0]], types[0][inner[0]], types[0][inner[-1] + 1 :])
    if any(template.of(len(row)) != row for row in types):
        raise JasperError(
            f"{type(tokenizer).__name__} gives token types that depend on the text ({types[1]}). Fix: remove "
            "token_type_ids from model_input_names in tokenizer_config.json, or choose another student.model"
        )
    return template


class TokenTypes(NamedTuple):
    """Token types of a single text: those of the special tokens before it, of the text, and of those after it."""

    before: list[int]
    text: int
    after: list[int]

    def of(self, length: int) -> list[int]:
        """The types of ``length`` tokens."""
        inner = length - len(self.before) - len(self.after)
        return self.before + [self.text] * inner + self.after


def no_layers(encoder: nn.Module) -> str:
    """Why an encoder's layers cannot be counted, and the mend."""
    return (
        f"{type(encoder).__name__} has no single list of {getattr(encoder.config, 'num_hidden_layers', '?')} layers "
        "(some architectures share one layer's weights); leave student.layers empty and name parameters in `train`"
    )


def _cannot_load(config: StudentConfig, source: str, error: Exception) -> str:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            f"{config.model} brings code of its own, which is not run unless asked for: "
            "read it, then set student.trust_remote_code: true"
        )
    if Path(source).is_dir():
        return (
            f"{source} could not be loaded as a Hugging Face text encoder: {reason}; where a file of it is damaged, "
            "copy or download the model again"
        )
    return (
        f"the model {config.model!r} was not found: it is not a folder here, and could not be fetched ({reason}). Give "
        'a folder, a "package:import_name/folder", or a hub name; where the hub cannot be reached, run '
        f"`hf download {config.model}` where it can and give the folder"
    )
