"""Check that a pruned vocabulary still covers the languages of some texts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import numpy as np

from jasper_fast.exporting.vocabulary import Vocabulary
from jasper_fast.utils.errors import JasperError

WORD = re.compile(r"[^\W\d_]+")
FEWEST_WORDS = 20  # of a script; fewer are names and quotations
MOST_CHANGED = 1 / 3  # of the words of a script. English texts of another subject change about a tenth.


def changed_words(vocabulary: Vocabulary, kept: np.ndarray, texts: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Count the words of some texts whose tokens are not all kept, by script.

    Args:
        vocabulary: the whole tokenizer.
        kept: (k,) numbers of the kept tokens.
        texts: the texts.

    Returns:
        {script: (changed words, all words)}, with Unicode's names of scripts, such as LATIN or CYRILLIC.
    """
    words = Counter(word for text in texts for word in WORD.findall(text))
    is_kept = np.zeros(len(vocabulary.tokens), bool)
    is_kept[kept] = True
    changed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    # Most tokenizers have other tokens for a word after a space.
    for (word, count), numbers in zip(words.items(), vocabulary.encode(f" {word}" for word in words), strict=True):
        script = unicodedata.name(word[0], "OTHER").split()[0]
        total[script] += count
        changed[script] += count * (not is_kept[numbers].all())
    return {script: (changed[script], total[script]) for script in total}


def check_coverage(vocabulary: Vocabulary, kept: np.ndarray, texts: Iterable[str], name: str) -> None:
    """Raise if a pruned vocabulary has lost a language or script of some texts.

    Args:
        vocabulary: the whole tokenizer.
        kept: (k,) numbers of the kept tokens.
        texts: texts that the model will be used or evaluated on.
        name: name of the texts in the message.

    Raises:
        JasperError: over a third of the words of a script have other tokens than before.
    """
    for script, (changed, total) in changed_words(vocabulary, kept, texts).items():
        if total >= FEWEST_WORDS and changed > MOST_CHANGED * total:
            raise JasperError(
                f"{name}: the pruned vocabulary of {len(kept):,} tokens has lost words in {script} letters (got "
                f"{changed / total:.0%} of {total:,} words with other tokens, expected at most {MOST_CHANGED:.0%}). "
                "Fix: add texts of this language to --vocabulary, or allow more tokens with a larger --max-mb"
            )
