"""The student: a Hugging Face text encoder, mean pooling over its tokens, and one linear head per width.

The encoder's own dropout is switched off. Teacher vectors are deterministic targets, the paper's dropout acts on the
pooled vector, and without it a forward pass is a function of the weights and the text alone.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config import StudentConfig
from jasper_fast.errors import JasperError

FINAL_NORM = re.compile(r"norm|ln_f|final_(layer_?)?norm")  # what architectures call the norm after their last layer


class Student(nn.Module):
    """A text encoder with heads; parameters are named ``encoder.…`` and ``heads.<width>.weight|bias``.

    Args:
        encoder: a Hugging Face model that returns ``last_hidden_state`` (B, L, H).
        tokenizer: its tokenizer; it must be able to pad.
        config: widths, prompts, lengths and dropout.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, config: StudentConfig) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.tokenizer = tokenizer
        self.config = config
        self.widths = list(config.heads)  # widest first
        self.max_length: int = config.max_length  # tokens
        self.prefixes = {
            "query": prompt_prefix(config.prompts.query),
            "document": prompt_prefix(config.prompts.document),
        }
        self._layers = layer_list(encoder)
        owned = self.widths if config.head_type == "independent" else self.widths[:1]
        self.heads = nn.ModuleDict({str(width): nn.Linear(self.hidden_size, width) for width in owned})

    @classmethod
    def build(cls, config: StudentConfig) -> Student:
        """Load the encoder and its tokenizer, keep the chosen layers, and make new heads from torch's current seed.

        Weights are float32. Heads depend on the seed alone, not on what loading drew.

        Raises:
            JasperError: the model cannot be found or used as asked; the message says what to type.
        """
        for prompt in (config.prompts.query, config.prompts.document):
            prompt_prefix(prompt)  # refuses before anything is loaded
        with torch.random.fork_rng(devices=[]):
            encoder, tokenizer = load_encoder(config)
            if config.layers is not None:
                encoder = keep_layers(encoder, config.layers)
            if config.bidirectional:
                make_bidirectional(encoder)
        check_max_length(encoder, config.max_length)
        tokenizer.model_max_length = config.max_length
        encoder.train()  # from_pretrained gives evaluation mode, which would switch gradient checkpointing off
        return cls(encoder, tokenizer, config)

    @property
    def hidden_size(self) -> int:
        return int(self.encoder.config.hidden_size)

    @property
    def num_layers(self) -> int:
        return len(self._named_layers()[1])

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(
        self, texts: Sequence[str], roles: str | Sequence[str] = "document", max_length: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text with its role's prompt and special tokens, cut to ``max_length``, without padding.

        Args:
            texts: N texts.
            roles: "query" or "document", one for all or one per text.
            max_length: tokens, special ones included; None: the student's.
        """
        each = itertools.repeat(roles, len(texts)) if isinstance(roles, str) else roles
        prompted = [self.prefixes[role] + text for role, text in zip(each, texts, strict=True)]
        if not prompted:
            return []
        encoded = self.tokenizer(
            prompted, truncation=True, max_length=max_length or self.max_length, return_attention_mask=False
        )
        # A tokenizer without special tokens makes nothing of an empty text; one token keeps its mean defined.
        return [ids or [self.tokenizer.pad_token_id] for ids in encoded["input_ids"]]

    def pool(self, token_ids: Sequence[Sequence[int]], device: torch.device | str | None = None) -> Tensor:
        """Encode one micro-batch and average the token states of each text, prompt and special tokens included.

        Args:
            token_ids: B lists of ids, none empty; padded here on the right to the longest of them.
            device: where the encoder is; None: asked of the parameters.

        Returns:
            (B, H) float32, whatever autocast the caller set.
        """
        device = torch.device(device) if device is not None else self.device
        ids, mask = pad(token_ids, self.tokenizer.pad_token_id)
        ids = ids.to(device, non_blocking=True)
        if mask is None:  # nothing is padded: no mask to build, and attention takes its fastest path
            states = self.encoder(input_ids=ids).last_hidden_state  # (B, L, H)
            return states.float().mean(dim=1)  # (B, H)
        mask = mask.to(device, non_blocking=True)
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # (B, L, H)
        share = mask / mask.sum(dim=1, keepdim=True)  # (B, L): each token's share of its text's mean
        with torch.autocast(device.type, enabled=False):
            return torch.bmm(share.unsqueeze(1), states.float()).squeeze(1)  # (B, H)

    def project(self, pooled: Tensor, widths: Iterable[int] | None = None) -> dict[int, Tensor]:
        """The heads' vectors, not normalised. In training one dropout mask on the pooled vector serves all heads.

        Args:
            pooled: (B, H) float32.
            widths: which heads; None: all.

        Returns:
            {width: (B, width) float32}, in the order asked for.

        Raises:
            ValueError: the vectors are not H wide, or there is no such head.
        """
        if pooled.ndim != 2 or pooled.shape[1] != self.hidden_size:
            raise ValueError(f"expected pooled vectors of shape (B, {self.hidden_size}), got {tuple(pooled.shape)}")
        wanted = self.widths if widths is None else list(widths)
        unknown = [width for width in wanted if width not in self.widths]
        if unknown:
            raise ValueError(f"no heads of width {unknown}; the student has {self.widths}")
        pooled = F.dropout(pooled, self.config.vector_dropout, self.training)
        if self.config.head_type == "prefix":
            widest = self.heads[str(self.widths[0])](pooled).float()
            return {width: widest[:, :width] for width in wanted}
        return {width: self.heads[str(width)](pooled).float() for width in wanted}

    def head(self, width: int) -> tuple[Tensor, Tensor]:
        """Weight (width, H) and bias (width,) of the linear map to one width, detached."""
        linear: Any = self.heads[str(width if self.config.head_type == "independent" else self.widths[0])]
        return linear.weight.detach()[:width], linear.bias.detach()[:width]

    def layer_parameters(self, last_n: int) -> list[str]:
        """Names of the parameters of the last ``last_n`` encoder layers, and of a norm that follows the last one.

        Raises:
            JasperError: there are fewer layers than that.
        """
        path, layers = self._named_layers()
        if last_n > len(layers):
            raise JasperError(f"last_layers is {last_n}, but the student has {len(layers)} layers; give at most that")
        if last_n <= 0:
            return []
        parent, _, _ = path.rpartition(".")
        kept = [f"{path}.{i}." for i in range(len(layers) - last_n, len(layers))]
        kept += [
            f"{parent}.{name}." if parent else f"{name}."
            for name, _ in self.encoder.get_submodule(parent).named_children()
            if FINAL_NORM.fullmatch(name)
        ]
        return [f"encoder.{name}" for name, _ in self.encoder.named_parameters() if name.startswith(tuple(kept))]

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute the encoder's layers in the backward pass instead of keeping their activations, or stop doing so.

        Raises:
            JasperError: the architecture does not support it.
        """
        if on and not self.encoder.supports_gradient_checkpointing:
            raise JasperError(
                f"{type(self.encoder).__name__} does not support gradient checkpointing; "
                "set gradient_checkpointing: false and lower micro_batch instead"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new names for these calls are not in every 5.x
            if on:
                self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                # Hugging Face makes the embeddings' output ask for a gradient, for the sake of adapters. Here it
                # would build a graph through every frozen layer.
                self.encoder.disable_input_require_grads()
            elif self.encoder.supports_gradient_checkpointing:
                self.encoder.gradient_checkpointing_disable()

    def _named_layers(self) -> tuple[str, nn.ModuleList]:
        if self._layers is None:
            raise JasperError(_no_layers(self.encoder))
        return self._layers, self.encoder.get_submodule(self._layers)


def prompt_prefix(prompt: str) -> str:
    """What stands before the text. ``{text}`` may only end a prompt: sentence-transformers knows prefixes alone.

    Raises:
        JasperError: something follows ``{text}``, or it stands there twice.
    """
    prefix, _, rest = prompt.partition("{text}")
    if rest:
        raise JasperError(
            f"prompt {prompt!r}: nothing may follow {{text}}, because sentence-transformers can only put a prompt "
            f"before the text; write {prefix + '{text}'!r}"
        )
    return prefix


def pad(token_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Pad lists of ids on the right to the longest.

    Returns:
        ids (B, L) int64, and a mask (B, L) bool that is True on tokens, or None where all are equally long.
    """
    lengths = torch.tensor([len(ids) for ids in token_ids])
    flat = torch.tensor(list(itertools.chain.from_iterable(token_ids)), dtype=torch.long)
    longest = int(lengths.max())
    if int(lengths.min()) == longest:
        return flat.view(len(token_ids), longest), None
    mask = torch.arange(longest) < lengths[:, None]  # (B, L)
    return torch.full(mask.shape, pad_id).masked_scatter_(mask, flat), mask


def load_encoder(config: StudentConfig) -> tuple[Any, Any]:
    """The Hugging Face model (float32, its dropout off, no pooler) and tokenizer that a configuration names.

    Raises:
        JasperError: neither a folder nor a model that can be fetched, or it needs code of its own.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

    from jasper_fast.models import resolve_model

    source = transformer_folder(resolve_model(config.model))
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        settings = AutoConfig.from_pretrained(source, **options)
        switch_dropout_off(settings)
        if hasattr(settings, "use_cache"):
            settings.use_cache = False  # a cache of keys and values is for generating text
        factory = AutoModelForTextEncoding if getattr(settings, "is_encoder_decoder", False) else AutoModel
        encoder = factory.from_pretrained(source, config=settings, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise JasperError(_cannot_load(config, source, error)) from error
    if not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise JasperError(f"{config.model}: {type(encoder).__name__} has no `hidden_size`; choose a text encoder")
    drop_pooler(encoder)
    if was_lowercased(source):
        lowercase(tokenizer)
    give_pad_token(tokenizer, encoder, config.model)
    tokenizer.padding_side = "right"
    return encoder, tokenizer


def transformer_folder(source: str) -> str:
    """The folder of the transformer inside a sentence-transformers folder; anything else comes back unchanged."""
    modules = Path(source) / "modules.json"
    if not modules.is_file():
        return source
    for module in json.loads(modules.read_text(encoding="utf-8")):
        if module["type"].rpartition(".")[2] == "Transformer":
            return str(Path(source) / module["path"]) if module["path"] else source
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
    """Remove BERT's pooler: mean pooling never uses it, so it would be saved and counted but not trained."""
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None


def was_lowercased(source: str) -> bool:
    """Whether a sentence-transformers folder asks for lower-casing beside its tokenizer."""
    settings = Path(source) / "sentence_bert_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case"))


def lowercase(tokenizer: Any) -> None:
    """Make lower-casing part of the tokenizer itself, so that it is saved with it."""
    from tokenizers import normalizers

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
                f"the tokenizer of {name} has no padding, end-of-text or unknown token; set one in its "
                'tokenizer_config.json, e.g. "pad_token": "<|endoftext|>"'
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
        raise JasperError(_no_layers(encoder))
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
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(settings, name, [value[i] for i in chosen])  # e.g. layer_types: sliding or full attention
    position = {str(old): str(new) for new, old in enumerate(chosen)}
    weights = {}
    for name, value in encoder.state_dict().items():
        if name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            if index not in position:
                continue
            name = f"{path}.{position[index]}.{rest}"
        weights[name] = value
    shorter = type(encoder)(settings)
    drop_pooler(shorter)
    try:
        shorter.load_state_dict(weights)
    except RuntimeError as error:
        raise JasperError(
            f"layers {chosen} of {type(encoder).__name__} cannot stand alone, because its layers are built differently "
            f"by position (often the first one must be layer 0): {error}"
        ) from error
    return shorter


def make_bidirectional(encoder: Any) -> None:
    """Take the causal mask from a decoder through its configuration, which sentence-transformers honours on loading.

    Raises:
        JasperError: the architecture keeps its causal mask nevertheless.
    """
    if sees_later_tokens(encoder):
        return
    encoder.config.is_causal = False
    if not sees_later_tokens(encoder):
        raise JasperError(
            f"{type(encoder).__name__} cannot be made bidirectional: it does not honour `is_causal: false` in its "
            "configuration; set student.bidirectional: false, or choose another model (Qwen2, Qwen3, Llama, Mistral "
            "and Gemma can)"
        )


@torch.no_grad()
def sees_later_tokens(encoder: Any) -> bool:
    """Whether another last token changes the state of the first, as it does without a causal mask."""
    training = encoder.training
    encoder.eval()
    size = encoder.get_input_embeddings().num_embeddings
    ids = torch.arange(size // 2, size // 2 + 4).remainder(size).repeat(2, 1)  # (2, 4)
    ids[1, -1] = (size // 2 + 5) % size
    first = encoder(input_ids=ids.to(encoder.device)).last_hidden_state[:, 0]  # (2, H)
    encoder.train(training)
    return not torch.equal(first[0], first[1])


def check_max_length(encoder: Any, max_length: int) -> None:
    """Refuse texts longer than the encoder has positions for.

    Raises:
        JasperError: says the largest length possible.
    """
    limit = getattr(encoder.config, "max_position_embeddings", None)
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from after the padding index
            limit = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    if isinstance(limit, int) and 0 < limit < max_length:
        raise JasperError(
            f"student.max_length is {max_length}, but the model has {limit} positions; give at most {limit}"
        )


def _no_layers(encoder: nn.Module) -> str:
    return (
        f"{type(encoder).__name__} has no single list of {getattr(encoder.config, 'num_hidden_layers', '?')} layers "
        "(some architectures share one layer's weights); leave student.layers empty and name parameters in `train`"
    )


def _cannot_load(config: StudentConfig, source: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            f"{config.model} brings code of its own, which is not run unless asked for: "
            "read it, then set student.trust_remote_code: true"
        )
    if Path(source).is_dir():
        return f"{source} could not be loaded as a Hugging Face text encoder: {reason}"
    return (
        f"the model {config.model!r} was not found: it is not a folder here, and could not be fetched ({reason}). Give "
        'a folder, a "package:import_name/folder", or a hub name; where the hub cannot be reached, run '
        f"`hf download {config.model}` where it can and give the folder"
    )
