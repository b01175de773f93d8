"""Count the texts that are longer than a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.models.backbone import position_limit
from jasper_fast.models.student import Student

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 2000  # texts to tokenize
FEWEST_WHOLE = 20  # held-out documents from which the fraction of long documents is stated
SAMPLE_FOR_LENGTH = 500  # texts to tokenize for a proposed length
MOST = 0.95  # fraction of texts that a proposed length reads whole
LONGEST = 8192  # tokens; no longer length is proposed
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
    return sum(count > max_length for count in _token_counts(texts, tokenizer, max_length, prefix)) / len(texts)


def length_for_most(
    texts: Sequence[str], tokenizer: Any, max_length: int, limit: int | None, prefix: str = ""
) -> int | None:
    """Return a length that reads 95 % of the texts whole, or as much as possible, as a multiple of 64 tokens.

    Args:
        texts: N texts, of which a sample is tokenized.
        tokenizer: tokenizer of transformers.
        max_length: number of tokens that is read now.
        limit: the largest possible length. None: 8,192 tokens.
        prefix: the prompt before each text.

    Returns:
        The number of tokens, or None if nothing above ``max_length`` is possible.
    """
    limit = min(limit or LONGEST, LONGEST)
    sample = texts[:: -(-len(texts) // SAMPLE_FOR_LENGTH)] if texts else [""]
    counts = _token_counts(sample, tokenizer, limit, prefix)
    most = int(np.quantile(counts, MOST, method="higher"))
    length = min(64 * -(-max(most, max_length + 1) // 64), limit)
    return length if length > max_length else None


def positions_of(model: Any) -> int | None:
    """Return the largest length that all text encoders in a sentence-transformers model can read, None if unlimited."""
    encoders = [
        module for module in model.modules() if hasattr(module, "config") and hasattr(module, "get_input_embeddings")
    ]
    limits = [limit for encoder in encoders if (limit := position_limit(encoder)) is not None]
    return min(limits, default=None)


def _token_counts(texts: Sequence[str], tokenizer: Any, longest: int, prefix: str) -> list[int]:
    """Count the tokens of texts. Counts above ``longest`` may be too low."""
    characters = CHARACTERS_PER_TOKEN * (longest + 1)
    cut = [prefix + text[:characters] for text in texts]
    # Without truncation the tokenizer warns of texts beyond the model's length. This is what is counted here.
    token_ids = tokenizer(cut, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [len(ids) for ids in token_ids]


def sample_evenly(texts: Dataset, number: int = SAMPLE) -> list[str]:
    """Return at most ``number`` texts, evenly spaced over the column ``text``."""
    rows = np.unique(np.linspace(0, len(texts) - 1, min(number, len(texts))).astype(np.int64))
    return list(texts[rows.tolist()]["text"]) if len(texts) else []


def describe_lengths(
    texts: Dataset, held_out: Dataset, student: Student, max_length: int, keys: Sequence[str] = ()
) -> str:
    """Describe how many texts are longer than the student reads in training.

    Args:
        texts: the training texts, a dataset with a column ``text``.
        held_out: the held-out documents, which are not cut, with such a column.
        student: the student, for its tokenizer and prompt.
        max_length: number of tokens that training reads.
        keys: dotted keys of the configuration that limit the length, to propose a larger one. Empty: none is proposed.

    Returns:
        A clause, such as "13 % longer than 256 tokens (the rest of these is not read; --student.max_length 512 reads
        more)".
    """
    prefix = student.prefixes["document"]
    trained = fraction_longer(sample_evenly(texts), student.tokenizer, max_length, prefix)
    whole = 0.0
    if len(held_out) >= FEWEST_WHOLE:
        whole = fraction_longer(sample_evenly(held_out), student.tokenizer, max_length, prefix)
    if not trained and not whole:
        return f"none longer than {max_length} tokens"
    of_whole = f", {percent(whole)} of whole documents" if whole > trained else ""
    longer = sample_evenly(held_out if whole > trained else texts)
    length = length_for_most(longer, student.tokenizer, max_length, position_limit(student.encoder), prefix)
    options = " ".join(f"--{key} {length}" for key in keys) if length is not None else ""
    more = f"; {options} reads more" if options else ""
    return f"{percent(trained)} longer than {max_length} tokens{of_whole} (the rest of these is not read{more})"


def percent(fraction: float) -> str:
    """Format a fraction in per cent, such as "13 %". It never reads as zero if it is not."""
    return "under 1 %" if 0 < fraction < 0.01 else f"{100 * fraction:.0f} %"
