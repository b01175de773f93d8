"""Count the texts that are longer than a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.models.student import Student

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 2000  # texts to tokenize
FEWEST_WHOLE = 20  # held-out documents from which the fraction of long documents is stated
CHARACTERS_PER_TOKEN = 64  # a text is cut after this many characters per token, as a book would take long


def fraction_longer(texts: Sequence[str], tokenizer: Any, max_length: int, prefix: str = "") -> float:
    """Return the fraction of texts with more than ``max_length`` tokens.

    Args:
        texts: N texts. All are tokenized, so give a sample of many.
        tokenizer: tokenizer of transformers.
        max_length: number of tokens that a model reads, special tokens included.
        prefix: the prompt before each text.

    Returns:
        A fraction from 0 to 1. It is 0 for no texts.

    Example:
        >>> fraction_longer(["short", "a much longer text"], tokenizer, max_length=4)
        0.5
    """
    if not texts:
        return 0.0
    longest = CHARACTERS_PER_TOKEN * (max_length + 1)
    cut = [prefix + text[:longest] for text in texts]
    # Without truncation the tokenizer warns of texts beyond the model's length. This is what is counted here.
    token_ids = tokenizer(cut, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    return sum(len(ids) > max_length for ids in token_ids) / len(texts)


def sample_evenly(texts: Dataset, number: int = SAMPLE) -> list[str]:
    """Return at most ``number`` texts, evenly spaced over the column ``text``."""
    rows = np.unique(np.linspace(0, len(texts) - 1, min(number, len(texts))).astype(np.int64))
    return list(texts[rows.tolist()]["text"]) if len(texts) else []


def describe_lengths(texts: Dataset, held_out: Dataset, student: Student, max_length: int) -> str:
    """Describe how many texts are longer than the student reads in training.

    Args:
        texts: the training texts, a dataset with a column ``text``.
        held_out: the held-out documents, which are not cut, with such a column.
        student: the student, for its tokenizer and prompt.
        max_length: number of tokens that training reads.

    Returns:
        A clause, such as "13 % longer than 256 tokens (the rest of these is not read)".
    """
    prefix = student.prefixes["document"]
    trained = fraction_longer(sample_evenly(texts), student.tokenizer, max_length, prefix)
    whole = 0.0
    if len(held_out) >= FEWEST_WHOLE:
        whole = fraction_longer(sample_evenly(held_out), student.tokenizer, max_length, prefix)
    if not trained and not whole:
        return f"none longer than {max_length} tokens"
    of_whole = f", {percent(whole)} of whole documents" if whole > trained else ""
    return f"{percent(trained)} longer than {max_length} tokens{of_whole} (the rest of these is not read)"


def percent(fraction: float) -> str:
    """Format a fraction in per cent, such as "13 %". It never reads as zero if it is not."""
    return "under 1 %" if 0 < fraction < 0.01 else f"{100 * fraction:.0f} %"
