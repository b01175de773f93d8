"""The student: a Hugging Face text encoder, mean pooling over its tokens, and one linear head per width or none.

The encoder's dropout is off, because teacher embeddings are deterministic targets. The paper's dropout acts on the
pooled embedding. Without that, a forward pass depends on the weights and the text alone.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config.models import StudentConfig, prompt_problem
from jasper_fast.config.run import Config
from jasper_fast.models.backbone import (
    OTHER_STUDENT_FIX,
    check_max_length,
    load_encoder,
    make_bidirectional,
    token_type_template,
)
from jasper_fast.models.heads import load_heads
from jasper_fast.models.hub import resolve_model
from jasper_fast.models.layers import keep_layers, layer_list, unknown_layers_message
from jasper_fast.models.padding import pad, padded_length
from jasper_fast.models.probes import LONG, SHORT, explain_failures, find_batching
from jasper_fast.models.vision_tower import VisionTower
from jasper_fast.utils.errors import JasperError

FINAL_NORM = re.compile(r"norm|ln_f|final_(layer_?)?norm")  # names of the norm after the last layer


class Student(nn.Module):
    """Text encoder with one linear head per width. With ``head_type: none``, the embedding is the pooled state.

    Parameter names are ``encoder.…`` and ``heads.<width>.weight|bias``. A student with ``vision`` also reads images.
    It also has the parameters ``vision.tower.…`` and ``vision.marks``.

    Args:
        encoder: Hugging Face model that returns ``last_hidden_state`` (B, L, H).
        tokenizer: tokenizer of the encoder, with a padding token.
        config: head widths, prompts, maximum length and dropout.
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
        self.headless = config.head_type == "none"
        if self.headless and self.widths != [self.hidden_size]:
            raise JasperError(
                f"student.heads: without a head, the embedding has the encoder's hidden size (got {self.widths}, "
                f"expected [{self.hidden_size}]). Fix: set student.heads to [{self.hidden_size}]"
            )
        head_widths = {"independent": self.widths, "prefix": self.widths[:1], "none": []}[config.head_type]
        self.heads = nn.ModuleDict({str(width): nn.Linear(self.hidden_size, width) for width in head_widths})
        if config.head_init == "identity":  # a student made of its teacher's layers starts close to the teacher
            head: Any
            for head in self.heads.values():
                nn.init.eye_(head.weight)
                nn.init.zeros_(head.bias)
        self.vision: VisionTower | None = None

    @classmethod
    def build(cls, config: StudentConfig) -> Student:
        """Load the encoder and its tokenizer, keep the configured layers, and initialise the heads.

        Weights are float32. The heads depend on torch's current seed alone, not on random numbers drawn by loading.

        Args:
            config: the ``student`` section of a configuration.

        Raises:
            JasperError: The model is missing, or cannot be used as configured. The message says how to fix it.
        """
        for prompt in (config.prompts.query, config.prompts.document):
            prompt_prefix(prompt)  # rejects a bad prompt before the model is loaded
        with torch.random.fork_rng(devices=[]):
            encoder, tokenizer = load_encoder(config)
            if config.layers is not None:
                encoder = keep_layers(encoder, config.layers)
        check_max_length(encoder, config.max_length)
        tokenizer.model_max_length = config.max_length
        encoder.train()  # from_pretrained sets evaluation mode, which would disable gradient checkpointing
        student = cls(encoder, tokenizer, config)
        if config.head_init == "model":  # a trained student that learns on
            load_heads(student.heads, Path(resolve_model(config.model)))
        student._check_encoder()
        if config.bidirectional and make_bidirectional(encoder):
            student._check_encoder()
        if config.vision is not None:
            student.vision = VisionTower.build(config.vision, encoder, tokenizer)
        return student

    def _check_encoder(self) -> None:
        """Reject an encoder that cannot run, or whose embeddings depend on padding.

        Raises:
            JasperError: The encoder fails, its embeddings depend on padding, or they are not finite.
        """
        name, architecture, training = self.config.model, type(self.encoder).__name__, self.training
        self.eval()
        with torch.random.fork_rng(devices=[]), explain_failures(name, architecture, OTHER_STUDENT_FIX):
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
                f"{name}: {architecture} does not honour the attention mask. A text's embedding would change with the "
                f"padding in its batch. Fix: {OTHER_STUDENT_FIX}"
            )

    @property
    def hidden_size(self) -> int:
        """Width H of the encoder's states."""
        return int(self.encoder.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return len(self._named_layers()[1])

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def tokenize(
        self, texts: Sequence[str], roles: str | Sequence[str] = "document", max_length: int | None = None
    ) -> list[list[int]]:
        """Tokenize texts with their role's prompt and special tokens, truncated but not padded.

        Args:
            texts: N texts.
            roles: "query" or "document", one for all texts or one per text.
            max_length: maximum number of tokens, special tokens included. None means the student's.

        Returns:
            N lists of token ids, none of them empty.
        """
        text_roles = itertools.repeat(roles, len(texts)) if isinstance(roles, str) else roles
        prompted = [self.prefixes[role] + text for role, text in zip(text_roles, texts, strict=True)]
        if not prompted:
            return []
        encoded = self.tokenizer(
            prompted, truncation=True, max_length=max_length or self.max_length, return_attention_mask=False
        )
        # Without special tokens an empty text has no tokens. One padding token keeps its mean defined.
        return [ids or [self.tokenizer.pad_token_id] for ids in encoded["input_ids"]]

    def pool(self, token_ids: Sequence[Sequence[int]] | Tensor, device: torch.device | str | None = None) -> Tensor:
        """Encode one micro-batch and average the token states of each text or image.

        The mean of a text includes its prompt and special tokens. The mean of an image excludes the image-start and
        image-end embeddings.

        Args:
            token_ids: B lists of token ids, none of them empty, or B images (B, 3, side, side) with values 0..255.
            device: device of the encoder. None means the device of the parameters.

        Returns:
            (B, H) float32, also under autocast. float64 weights give float64.

        Raises:
            JasperError: The batch holds images, but the student has no vision tower.
        """
        device = torch.device(device) if device is not None else self.device
        if isinstance(token_ids, Tensor):
            embeddings = self.vision_tower(token_ids.to(device, non_blocking=True))  # (B, N + 2, H)
            states = self.encoder(inputs_embeds=embeddings).last_hidden_state
            return _at_least_fp32(states[:, 1:-1]).mean(dim=1)  # (B, H)
        few_shapes = device.type == "cpu" and torch.is_autocast_enabled("cpu")
        longest = max(map(len, token_ids))
        length = max(longest, min(padded_length(longest, few_shapes), self.max_length))  # the encoder may not read more
        ids, mask = pad(token_ids, self.tokenizer.pad_token_id, length)
        inputs = {"input_ids": ids.to(device, non_blocking=True)}
        if self.token_types is not None:
            types, _ = pad([self.token_types.of(len(row)) for row in token_ids], 0, length)
            inputs["token_type_ids"] = types.to(device, non_blocking=True)
        if mask is None:  # equal lengths: without a mask, attention takes its fastest path
            states = self.encoder(**inputs).last_hidden_state  # (B, L, H)
            return _at_least_fp32(states).mean(dim=1)  # (B, H)
        mask = mask.to(device, non_blocking=True)
        states = self.encoder(**inputs, attention_mask=mask.long()).last_hidden_state  # (B, L, H)
        states = _at_least_fp32(states)
        token_weights = (mask / mask.sum(dim=1, keepdim=True, dtype=states.dtype)).unsqueeze(1)  # (B, 1, L)
        with torch.autocast(device.type, enabled=False):
            return torch.bmm(token_weights, states).squeeze(1)  # (B, H)

    def project(
        self, pooled: Tensor, widths: Iterable[int] | None = None, dropout: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Apply the heads to pooled embeddings, without normalisation.

        In training mode, all heads share one dropout mask on the pooled embedding.

        Args:
            pooled: (B, H) float32.
            widths: widths of the heads to apply. None means all heads.
            dropout: (B, H) factors of the dropout mask. None draws the mask here.

        Returns:
            {width: (B, width) float32}, in the requested order.

        Raises:
            ValueError: The pooled embeddings are not (B, H), or the student has no head of a requested width.
        """
        if pooled.ndim != 2 or pooled.shape[1] != self.hidden_size:
            raise ValueError(
                f"project: wrong shape of pooled embeddings (got {tuple(pooled.shape)}, expected "
                f"(B, {self.hidden_size})). Fix: pass what Student.pool returns"
            )
        requested = self.widths if widths is None else list(widths)
        unknown = [width for width in requested if width not in self.widths]
        if unknown:
            raise ValueError(
                f"project: the student has no heads of width {unknown} (expected some of {self.widths}). "
                "Fix: request widths in student.heads"
            )
        if dropout is not None:
            pooled = pooled * dropout
        else:
            pooled = F.dropout(pooled, self.config.vector_dropout, self.training)
        if self.headless:
            return {width: _at_least_fp32(pooled) for width in requested}
        if self.config.head_type == "prefix":
            widest = _at_least_fp32(self.heads[str(self.widths[0])](pooled))
            return {width: widest[:, :width] for width in requested}
        return {width: _at_least_fp32(self.heads[str(width)](pooled)) for width in requested}

    def head(self, width: int) -> tuple[Tensor, Tensor]:
        """Return the weight (width, H) and bias (width,) of one head, detached."""
        linear: Any = self.heads[str(width if self.config.head_type == "independent" else self.widths[0])]
        return linear.weight.detach()[:width], linear.bias.detach()[:width]

    def layer_parameters(self, last_n: int) -> list[str]:
        """Return the parameter names of the last ``last_n`` encoder layers and of the final norm.

        Args:
            last_n: number of layers.

        Raises:
            JasperError: The encoder has fewer layers, or no single list of layers.
        """
        path, layers = self._named_layers()
        if last_n > len(layers):
            raise JasperError(
                f"last_layers: the student has {len(layers)} layers (got {last_n}). Fix: give at most {len(layers)}"
            )
        if last_n <= 0:
            return []
        parent, _, _ = path.rpartition(".")
        prefixes = [f"{path}.{i}." for i in range(len(layers) - last_n, len(layers))]
        prefixes += [
            f"{parent}.{name}." if parent else f"{name}."
            for name, _ in self.encoder.get_submodule(parent).named_children()
            if FINAL_NORM.fullmatch(name)
        ]
        return [f"encoder.{name}" for name, _ in self.encoder.named_parameters() if name.startswith(tuple(prefixes))]

    @property
    def vision_tower(self) -> VisionTower:
        """The vision tower.

        Raises:
            JasperError: The student has no vision tower.
        """
        if self.vision is None:
            raise JasperError(
                "student.vision: this student reads text alone. Fix: set `student.vision` and add a vision stage"
            )
        return self.vision

    def set_gradient_checkpointing(self, on: bool | int) -> int:
        """Switch gradient checkpointing on or off.

        A checkpointed layer recomputes its activations in the backward pass instead of keeping them.

        Args:
            on: True for every layer, False for none. A number N means the first N layers of the backward pass.

        Returns:
            Number of checkpointed layers.

        Raises:
            JasperError: The architecture does not support checkpointing, or the backward pass has fewer layers.
        """
        if on and not self.encoder.supports_gradient_checkpointing:
            raise JasperError(
                f"gradient_checkpointing: {type(self.encoder).__name__} does not support it. Fix: set "
                "gradient_checkpointing: false, and save memory with gradient_caching: true and a smaller micro_batch"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # not every transformers 5.x has the new names
            if on:
                self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                # Hugging Face makes the embedding output require a gradient, which adapters need. Here that would
                # build a graph through every frozen layer.
                self.encoder.disable_input_require_grads()
            elif self.encoder.supports_gradient_checkpointing:
                self.encoder.gradient_checkpointing_disable()
            if self.vision is not None:
                self.vision.set_gradient_checkpointing(bool(on))
        return self._limit_checkpointing(on) if on else 0

    def _limit_checkpointing(self, on: bool | int) -> int:
        """Switch checkpointing off again for all but the first ``on`` layers of the backward pass."""
        layers = list(self._named_layers()[1])
        lowest = min((i for i, a in enumerate(layers) if any(p.requires_grad for p in a.parameters())), default=0)
        backward = layers[lowest:]
        if on is True:
            return len(backward)
        if on > len(backward) or not all(hasattr(layer, "gradient_checkpointing") for layer in backward):
            raise JasperError(
                f"gradient_checkpointing asks for {on} layers, but {len(backward)} take part in the backward pass"
                + ("" if on > len(backward) else f", and {type(self.encoder).__name__} can only checkpoint all of them")
                + ". Fix: give true"
                + (f" or at most {len(backward)}" if on > len(backward) else "")
            )
        for layer in backward[on:]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        return int(on)

    def layers(self) -> list[nn.Module]:
        """Return the encoder's layers, first to last."""
        return list(self._named_layers()[1])

    def _named_layers(self) -> tuple[str, nn.ModuleList]:
        if self._layers is None:
            raise JasperError(unknown_layers_message(self.encoder))
        return self._layers, self.encoder.get_submodule(self._layers)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def prompt_prefix(prompt: str) -> str:
    """Return the part of a prompt before the text.

    ``{text}`` may only end a prompt, because sentence-transformers supports prefixes alone.

    Args:
        prompt: prefix, or prefix that ends in ``{text}``.

    Raises:
        JasperError: Something follows ``{text}``, or the prompt contains it twice.
    """
    if problem := prompt_problem(prompt):
        raise JasperError(problem)
    return prompt.partition("{text}")[0]


def build_student(config: Config) -> Student:
    """Return the untrained student. Its new heads depend on the seed alone."""
    torch.manual_seed(config.seed)
    return Student.build(config.student)
