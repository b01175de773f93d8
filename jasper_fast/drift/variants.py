"""Embeddings of a sentence-transformers model with changed settings: prompts, routes, pooling, head and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.drift.side import NO_PROMPTS, Prompts
from jasper_fast.exporting.golden import ROLES, Text, by_role
from jasper_fast.models.backbone import position_limit
from jasper_fast.models.embedder import role_heads
from jasper_fast.models.hub import prompt_of
from jasper_fast.models.sentence_transformer import role_modules, transformers_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH = 8
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
OWN_ROUTES = {role: role for role in ROLES}
SWAPPED = dict(zip(ROLES, reversed(ROLES), strict=True))
BLOCKS = {"Q8_0": (32, 127), "MatMulNBits": (128, 128)}  # int8 forms of GGUF and ONNX: weights with one scale, steps
ROUNDINGS = ("channel", "tensor", *BLOCKS)  # forms of int8 weights


@dataclass(frozen=True)
class Setting:
    """Settings of a model. None keeps the model's own.

    Args:
        prompts: prefixes by role.
        routes: role whose modules encode the texts of a role.
        pooling: pooling mode.
        head: False to leave out Dense modules.
        width: width of another head of a Router.
        first: numbers to keep of each embedding.
        length: tokens after which texts are truncated.
        rounding: one of ``ROUNDINGS``, to compute linear layers with int8 weights, one text at a time. Weights that
            share a scale are a "channel" (a row), a "tensor" or a block. With blocks, inputs and heads stay float32.
    """

    prompts: Prompts | None = None
    routes: Mapping[str, str] = field(default_factory=lambda: OWN_ROUTES)
    pooling: str | None = None
    head: bool = True
    width: int | None = None
    first: int | None = None
    length: int | None = None
    rounding: str | None = None


class Variants:
    """A model whose settings can be changed for some texts. The model itself stays as it is.

    Args:
        model: sentence-transformers model.
        width: head of a Router that counts as the model's own. None is the default head.
    """

    def __init__(self, model: SentenceTransformer, width: int | None = None) -> None:
        self.model = model
        self.prompts = {role: prompt_of(model.prompts, role) for role in ROLES}
        chain = role_modules(model, "document")
        pooling = next((module for module in chain if type(module).__name__ == "Pooling"), None)
        mode = getattr(pooling, "pooling_mode", None)
        self.pooling: str | None = mode if isinstance(mode, str) else None
        self.modules = [type(module).__name__ for module in chain]
        self.has_head = "Dense" in self.modules
        self.asymmetric = [*map(id, chain)] != [*map(id, role_modules(model, "query"))]
        lengths = [module.max_seq_length for module in transformers_of(model) if module.max_seq_length]
        self.max_tokens: int | None = min(lengths, default=None)
        self._heads = role_heads(model)
        self.width = width if width in self.widths else max(self.widths, default=None)
        self._states: dict[Any, list[dict[str, Any]]] = {}

    @property
    def widths(self) -> list[int]:
        """Widths of the heads of a Router, widest first. [] without one."""
        return sorted(self._heads[1]["document"], reverse=True)

    def accepts(self, length: int) -> bool:
        """Return True if the model has positions for texts of a length in tokens."""
        limits = (position_limit(module.model) for module in transformers_of(self.model))
        return length > 2 and all(limit is None or length <= limit for limit in limits)

    def embed(self, texts: Sequence[Text], setting: Setting) -> np.ndarray:
        """Embed texts with changed settings, (n, D) float64, as the modules give them.

        Args:
            texts: n texts with roles.
            setting: the settings.
        """
        prompts = self.prompts if setting.prompts is None else setting.prompts

        def encode(group: list[str], role: str) -> np.ndarray:
            return self._encode(group, setting.routes[role], prompts[role], setting)

        return by_role(texts, encode)[:, : setting.first]

    @torch.no_grad()
    def _encode(self, texts: list[str], route: str, prompt: str, setting: Setting) -> np.ndarray:
        modules = self._modules(route, setting.width or self.width)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: dict[int, Tensor] = {}
        size = BATCH if setting.rounding is None else 1  # scales of inputs depend on the batch
        with _int8_weights(modules, setting.rounding):
            states = self._token_states(tuple(texts[i] for i in order), route, prompt, setting, size)
            for batch, state in enumerate(states):
                features = dict(state)
                for module in modules[1:]:
                    features = _step(module, setting)(features)
                for i, row in zip(order[batch * size :], features["sentence_embedding"], strict=False):
                    rows[i] = row
        return torch.stack([rows[i] for i in range(len(texts))]).double().cpu().numpy()

    def _token_states(
        self, texts: tuple[str, ...], route: str, prompt: str, setting: Setting, size: int
    ) -> list[dict[str, Any]]:
        """Return the features after the first module, batch by batch. Other poolings and heads reuse them."""
        key = (texts, route, prompt, setting.length, setting.rounding)
        if key in self._states:
            return self._states[key]
        with _length(self.model, route, setting.length):
            batches = (list(texts[start : start + size]) for start in range(0, len(texts), size))
            states = [self._first_module(batch, route, prompt) for batch in batches]
        if len(texts) <= BATCH:  # a few texts, on which many settings are tried
            self._states[key] = states
        return states

    def _first_module(self, texts: list[str], route: str, prompt: str) -> dict[str, Any]:
        features = self.model.preprocess(texts, prompt=prompt, task=route)
        moved = {
            key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in features.items()
        }
        return dict(role_modules(self.model, route)[0](moved))

    def _modules(self, route: str, width: int | None) -> list[Any]:
        """Return the modules of a route, with the head of a width in place of the Router's own."""
        if width is None:
            return role_modules(self.model, route)
        position, heads = self._heads
        modules = [*list(self.model)[:position], *heads[route][width], *list(self.model)[position + 1 :]]
        return role_modules(modules, route)


def _step(module: Any, setting: Setting) -> Any:
    """Return a module, changed by a setting, as a function of features."""
    name = type(module).__name__
    if name == "Dense" and not setting.head:
        return lambda features: features
    if name == "Pooling" and setting.pooling is not None:
        return type(module)(module.embedding_dimension, setting.pooling, include_prompt=module.include_prompt)
    return module


@contextmanager
def _length(model: SentenceTransformer, route: str, length: int | None) -> Iterator[None]:
    """Truncate texts of a role at another length in the block."""
    changed = [] if length is None else [(module, module.max_seq_length) for module in transformers_of(model, route)]
    try:
        for module, _ in changed:
            module.max_seq_length = length
        yield
    finally:
        for module, before in changed:
            module.max_seq_length = before


@contextmanager
def _int8_weights(modules: Sequence[Any], rounding: str | None) -> Iterator[None]:
    """Compute linear layers with int8 weights in the block. The weights themselves stay."""
    changed = modules[:1] if rounding in BLOCKS else modules
    parts = [part for module in changed for part in module.modules() if isinstance(part, nn.Linear)]
    with ExitStack() as stack:
        for part in parts if rounding is not None else []:
            stack.callback(part.__dict__.pop, "forward", None)
            part.forward = _int8_linear(part, str(rounding))  # type: ignore[method-assign, assignment]
        yield


def _int8_linear(linear: nn.Linear, rounding: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        inputs = x if rounding in BLOCKS else rounded_input(x)
        return F.linear(inputs, rounded(linear.weight, rounding), linear.bias)

    return forward


def rounded(weight: Tensor, rounding: str) -> Tensor:
    """Round a weight (out, in) to int8 and back.

    Args:
        weight: the weight.
        rounding: the values that share a scale: "tensor", "channel" (a row), or a name in ``BLOCKS``.
    """
    if rounding in BLOCKS:
        size, steps = BLOCKS[rounding]
        return torch.cat(
            [_round(part, part.abs().amax(dim=1, keepdim=True), steps) for part in weight.split(size, 1)], 1
        )
    return _round(weight, weight.abs().amax() if rounding == "tensor" else weight.abs().amax(dim=1, keepdim=True), 127)


def _round(weight: Tensor, largest: Tensor, steps: int) -> Tensor:
    scale = (largest / steps).clamp(min=1e-12)
    return (weight / scale).round() * scale


def rounded_input(x: Tensor) -> Tensor:
    """Round inputs to 8 bits with one scale and zero point, as dynamic quantization of onnxruntime does."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def prompt_variants(own: Prompts, known: Sequence[Prompts]) -> list[Prompts]:
    """Return prompts to try in place of a model's own, without repetitions: none, others', known ones, and twice.

    Args:
        own: prompts of the model by role.
        known: prompts of the other side, and common ones.
    """
    query, document = own["query"], own["document"]
    tried = [NO_PROMPTS, *({"query": both, "document": both} for both in (query, document))]
    tried += [*known, {role: 2 * own[role] for role in ROLES}]
    unique = {tuple(prompts[role] for role in ROLES): prompts for prompts in tried}
    unique.pop((query, document), None)
    unique.pop((document, query), None)  # the roles swapped
    return list(unique.values())
