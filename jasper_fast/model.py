"""The student: a Hugging Face text encoder, mean pooling over its tokens, and one linear head per width.

The encoder's own dropout is switched off. Teacher vectors are deterministic targets, the paper's dropout acts on the
pooled vector, and without it a forward pass is a function of the weights and the text alone.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config import StudentConfig
from jasper_fast.config_checks import prompt_problem
from jasper_fast.errors import JasperError
from jasper_fast.pretrained import (
    OTHER_STUDENT,
    check_max_length,
    keep_layers,
    layer_list,
    load_encoder,
    make_bidirectional,
    no_layers,
    token_type_template,
)
from jasper_fast.probes import LONG, SHORT, explained, find_batching
from jasper_fast.vision import VisionTower

FINAL_NORM = re.compile(r"norm|ln_f|final_(layer_?)?norm")  # what architectures call the norm after their last layer


class Student(nn.Module):
    """A text encoder with heads; parameters are named ``encoder.…`` and ``heads.<width>.weight|bias``.

    With ``vision`` it reads pictures as well; parameters ``vision.tower.…`` and ``vision.marks``.

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
        self.token_types = token_type_template(tokenizer, encoder)
        self._layers = layer_list(encoder)
        owned = self.widths if config.head_type == "independent" else self.widths[:1]
        self.heads = nn.ModuleDict({str(width): nn.Linear(self.hidden_size, width) for width in owned})
        if config.head_init == "identity":  # a student cut out of its teacher is near it from the start
            head: Any
            for head in self.heads.values():
                nn.init.eye_(head.weight)
                nn.init.zeros_(head.bias)
        self.vision: VisionTower | None = None

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
        check_max_length(encoder, config.max_length)
        tokenizer.model_max_length = config.max_length
        encoder.train()  # from_pretrained gives evaluation mode, which would switch gradient checkpointing off
        student = cls(encoder, tokenizer, config)
        student._check_encoder()
        if config.bidirectional and make_bidirectional(encoder):
            student._check_encoder()
        if config.vision is not None:
            student.vision = VisionTower.build(config.vision, encoder, tokenizer)
        return student

    def _check_encoder(self) -> None:
        """Reject an encoder that cannot run, or whose embeddings depend on padding.

        Raises:
            JasperError: either, or embeddings that are not finite.
        """
        name, architecture, training = self.config.model, type(self.encoder).__name__, self.training
        self.eval()
        with torch.random.fork_rng(devices=[]), explained(name, architecture, OTHER_STUDENT):
            batching = find_batching(lambda texts: self.pool(self.tokenize(texts)), name)
        self.train(training)
        for role, prefix in self.prefixes.items():
            first, second = self.tokenize([SHORT, LONG], role)
            if first == second:
                raise JasperError(
                    f"student.max_length: no room for a text within {self.max_length} tokens (the {role} prompt is "
                    f"{prefix!r}). Fix: raise student.max_length, or shorten the prompt"
                )
        if batching != "padded":
            raise JasperError(
                f"{name}: {architecture} does not honour the attention mask, so a text's embedding changes with the "
                f"padding next to it and training would learn the batches. Fix: {OTHER_STUDENT}"
            )

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

    def pool(self, token_ids: Sequence[Sequence[int]] | Tensor, device: torch.device | str | None = None) -> Tensor:
        """Encode one micro-batch and average the token states of each text, prompt and special tokens included.

        Args:
            token_ids: B lists of ids, none empty; padded here on the right to the longest of them. Or pictures,
                (B, 3, side, side) with values 0..255; the marks around a picture's tokens are left out of its mean.
            device: where the encoder is; None: asked of the parameters.

        Returns:
            (B, H) float32, whatever autocast the caller set.
        """
        device = torch.device(device) if device is not None else self.device
        if isinstance(token_ids, Tensor):
            embeddings = self.seeing(token_ids.to(device, non_blocking=True))  # (B, N + 2, H)
            states = self.encoder(inputs_embeds=embeddings).last_hidden_state
            return _at_least_fp32(states[:, 1:-1]).mean(dim=1)  # (B, H)
        ids, mask = pad(token_ids, self.tokenizer.pad_token_id)
        inputs = {"input_ids": ids.to(device, non_blocking=True)}
        if self.token_types is not None:
            types, _ = pad([self.token_types.of(len(row)) for row in token_ids], 0)
            inputs["token_type_ids"] = types.to(device, non_blocking=True)
        if mask is None:  # nothing is padded: no mask to build, and attention takes its fastest path
            states = self.encoder(**inputs).last_hidden_state  # (B, L, H)
            return _at_least_fp32(states).mean(dim=1)  # (B, H)
        mask = mask.to(device, non_blocking=True)
        states = self.encoder(**inputs, attention_mask=mask.long()).last_hidden_state  # (B, L, H)
        states = _at_least_fp32(states)
        share = (mask / mask.sum(dim=1, keepdim=True, dtype=states.dtype)).unsqueeze(1)  # (B, 1, L): of the mean
        with torch.autocast(device.type, enabled=False):
            return torch.bmm(share, states).squeeze(1)  # (B, H)

    def project(
        self, pooled: Tensor, widths: Iterable[int] | None = None, dropout: Tensor | None = None
    ) -> dict[int, Tensor]:
        """The heads' vectors, not normalised. In training one dropout mask on the pooled vector serves all heads.

        Args:
            pooled: (B, H) float32.
            widths: which heads; None: all.
            dropout: (B, H) the mask's factors; None: drawn here.

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
        if dropout is not None:
            pooled = pooled * dropout
        else:
            pooled = F.dropout(pooled, self.config.vector_dropout, self.training)
        if self.config.head_type == "prefix":
            widest = _at_least_fp32(self.heads[str(self.widths[0])](pooled))
            return {width: widest[:, :width] for width in wanted}
        return {width: _at_least_fp32(self.heads[str(width)](pooled)) for width in wanted}

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

    @property
    def seeing(self) -> VisionTower:
        """The vision tower.

        Raises:
            JasperError: the student has none.
        """
        if self.vision is None:
            raise JasperError("this student reads text alone; give it `student.vision` and a vision stage")
        return self.vision

    def set_gradient_checkpointing(self, on: bool | int) -> int:
        """Recompute encoder layers in the backward pass instead of keeping their activations, or stop doing so.

        Args:
            on: True: every layer; a number: so many of the layers that take part in the backward pass, the first ones.

        Returns:
            how many layers will be computed twice.

        Raises:
            JasperError: the architecture does not support it, or has fewer layers.
        """
        if on and not self.encoder.supports_gradient_checkpointing:
            raise JasperError(
                f"{type(self.encoder).__name__} does not support gradient checkpointing; set gradient_checkpointing: "
                "false and save memory with gradient_caching: true and a smaller micro_batch"
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
            if self.vision is not None:
                self.vision.set_gradient_checkpointing(bool(on))
        if not on:
            return 0
        layers = list(self._named_layers()[1])
        lowest = min((i for i, a in enumerate(layers) if any(p.requires_grad for p in a.parameters())), default=0)
        backward = layers[lowest:]
        if on is True:
            return len(backward)
        if on > len(backward) or not all(hasattr(layer, "gradient_checkpointing") for layer in backward):
            raise JasperError(
                f"gradient_checkpointing asks for {on} layers; {len(backward)} take part in the backward pass"
                + ("" if on > len(backward) else f", and {type(self.encoder).__name__} can only checkpoint them all")
                + "; give true or a smaller number"
            )
        for layer in backward[on:]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        return int(on)

    def layers(self) -> list[nn.Module]:
        """The encoder's layers, the first one first."""
        return list(self._named_layers()[1])

    def _named_layers(self) -> tuple[str, nn.ModuleList]:
        if self._layers is None:
            raise JasperError(no_layers(self.encoder))
        return self._layers, self.encoder.get_submodule(self._layers)


def _at_least_fp32(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def prompt_prefix(prompt: str) -> str:
    """What stands before the text. ``{text}`` may only end a prompt: sentence-transformers knows prefixes alone.

    Raises:
        JasperError: something follows ``{text}``, or it stands there twice.
    """
    if problem := prompt_problem(prompt):
        raise JasperError(problem)
    return prompt.partition("{text}")[0]


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
