"""Run short forward passes on loading: a model runs, gives finite embeddings, and ignores padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

Encode = Callable[[list[str]], Tensor]  # texts -> (n, D) embeddings, all in one batch
Batching = Literal["padded", "equal lengths"]  # batches in which a text has the same embedding as alone

SHORT = "seven"
LONGEST = "the water ran past the old road and nobody knew how far it would go. " * 60  # to be truncated by the model
LONG = "the water of the seven rivers ran past the old road, and nobody knew how far it would go that year"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative to the embedding's length
HALF_TOLERANCE = 5e-2  # for 16-bit weights, whose kernels depend on the batch shape
# Exceptions that encoders raise if they are built or called in an unsupported way.
ENCODER_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)


@contextmanager
def explain_failures(name: str, architecture: str, fix: str) -> Iterator[None]:
    """Convert an encoder's exception in the block to an error with the model, its architecture and a fix.

    Args:
        name: model, for messages.
        architecture: class of the encoder, for messages.
        fix: suggestion for the user.

    Raises:
        JasperError: the encoder failed in the block.
    """
    try:
        yield
    except ENCODER_ERRORS as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise JasperError(f"{name}: {architecture} cannot encode a short text ({reason}). Fix: {fix}") from error


@contextmanager
def explain_text_failures(texts: Sequence[str]) -> Iterator[None]:
    """Convert an encoder's exception in the block to an error with the first text of the batch and a fix.

    Some encoders fail on very short texts, such as CANINE below four tokens.

    Args:
        texts: the batch.

    Raises:
        JasperError: the encoder failed in the block, other than for lack of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ENCODER_ERRORS as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise JasperError(
            f"the model cannot encode a text such as {texts[0][:50]!r} ({reason}). Fix: leave out texts as short as "
            "this, or choose another model"
        ) from error


@torch.no_grad()
def find_batching(encode: Encode, name: str) -> Batching:
    """Compare the embedding of a text alone with its embedding next to a longer text.

    Args:
        encode: function that runs the model on n texts in one batch, in evaluation mode and without autocast. It
            returns (n, D) float.
        name: model, for messages.

    Returns:
        "padded" for a model that honours the attention mask, "equal lengths" for one whose batches must not be padded.

    Raises:
        JasperError: an embedding is not finite, or depends on other texts even without padding.
    """
    longest = encode([LONGEST])[0]
    alone = encode([SHORT])[0]
    if not bool(alone.isfinite().all()):
        raise JasperError(f"{name}: its embeddings are not finite. Fix: copy the model again, or use fp32 weights")
    if not _same(longest, encode([LONGEST])[0]):
        raise JasperError(
            f"{name}: a long text's embedding depends on the texts encoded before it, as with BigBird's block-sparse "
            'attention. Fix: set "attention_type": "original_full" in config.json, or choose another model'
        )
    padded, _ = encode([SHORT, LONG])
    if _same(alone, padded):
        return "padded"
    equal, _ = encode([SHORT, SHORT])
    if _same(alone, equal):
        return "equal lengths"
    raise JasperError(
        f"{name}: a text's embedding depends on the other texts of its batch (got a difference of "
        f"{_distance(alone, equal):.3f} of its length, expected none). Fix: choose another model"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return _distance(a, b) <= TOLERANCE.get(a.dtype, HALF_TOLERANCE)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the length of the difference relative to the length of ``a``."""
    return float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-12))
