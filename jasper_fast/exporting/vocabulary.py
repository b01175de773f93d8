"""Prune a tokenizer to the tokens that a corpus and its language need.

Special tokens, and all characters and bytes that have a token, are kept. So every text that could be encoded still can.
A text whose tokens were all kept has the same tokens as before, with new numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from jasper_fast.utils.errors import JasperError

TOKENIZER_FILE = "tokenizer.json"
WORDPIECE, BPE, UNIGRAM = "WordPiece", "BPE", "Unigram"
AT_ONCE = 1000  # texts per call of the tokenizer
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")  # room for tokens of later training, which no text contains
# Weight of the tokenizer's own order against the corpus. With 10,000 tokens chosen by docstrings, seven other
# corpora lose 15.6 % of their tokens with 0, 11.5 % with 0.3 and 11.8 % with 0.5.
PRIOR = 0.3


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a fast tokenizer.

    Args:
        data: content of ``tokenizer.json``.
        tokens: the tokens by number. None: no token has this number.
        extra: numbers that must be kept besides those that the tokenizer itself needs.
    """

    data: dict[str, Any]
    tokens: list[str | None]
    extra: frozenset[int] = frozenset()

    @property
    def kind(self) -> str:
        """The algorithm: WordPiece, BPE or Unigram."""
        return self.data["model"]["type"]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Numbers of the tokens."""
        return {token: number for number, token in enumerate(self.tokens) if token is not None}

    @cached_property
    def required(self) -> np.ndarray:
        """(v,) bool, the tokens that are always kept."""
        model = self.data["model"]
        named = {self.ids.get(model.get("unk_token") or ""), *(token["id"] for token in self.data["added_tokens"])}
        if self.kind == UNIGRAM:
            scores = [score for _, score in model["vocab"]]
            named |= {model.get("unk_id"), int(np.argmin(scores))}  # the lowest score gives that of unknown characters
        kept = np.array([number in named or number in self.extra or self._is_basic(number) for number in self._numbers])
        for number in np.flatnonzero(kept).tolist():
            kept[self._merged_from(number)] = True
        return kept

    @property
    def _numbers(self) -> range:
        return range(len(self.tokens))

    def _is_basic(self, number: int) -> bool:
        """Return whether a token is a character or byte, or has a character that no token stores alone."""
        token = self.tokens[number]
        if token is None or UNUSED.fullmatch(token):
            return False
        parts = self.characters(token)
        return len(parts) <= 1 or BYTE.fullmatch(token) is not None or any(part not in self.ids for part in parts)

    def characters(self, token: str) -> list[str]:
        """Split a token into the tokens of its characters, as the algorithm starts: "##ab" is "##a", "##b"."""
        model = self.data["model"]
        prefix = model.get("continuing_subword_prefix") or ""
        suffix = (model.get("end_of_word_suffix") or "") if self.kind == BPE else ""
        inside, at_end = bool(prefix) and token.startswith(prefix), bool(suffix) and token.endswith(suffix)
        letters = list(token.removeprefix(prefix).removesuffix(suffix) if at_end else token.removeprefix(prefix))
        parts = [letter if place == 0 and not inside else prefix + letter for place, letter in enumerate(letters)]
        return [*parts[:-1], parts[-1] + suffix] if parts and at_end else parts

    def need(self, counts: np.ndarray) -> np.ndarray:
        """Return how much each token is needed: special tokens 1, others their smoothed frequency, unused ones 0.

        The frequency in the corpus is mixed with one that falls with the number of the token, as in Zipf's law.
        Tokenizers are mostly numbered by the frequency in their own training texts. So general words are kept that a
        small corpus does not have.

        Args:
            counts: (v,) integers, occurrences of each token in the corpus.

        Returns:
            (v,) float64.
        """
        used = np.array([token is not None and not UNUSED.fullmatch(token) for token in self.tokens])
        free = used & ~self.required
        prior = np.zeros(len(counts))
        prior[free] = 1 / np.arange(1, free.sum() + 1)
        need = (1 - PRIOR) * counts / max(counts.sum(), 1) + PRIOR * prior / max(prior.sum(), 1)
        need[[token["id"] for token in self.data["added_tokens"]]] = 1
        return np.where(used, need, 0)

    def order(self, counts: np.ndarray) -> np.ndarray:
        """Return the tokens from the most to the least needed, required ones first.

        A BPE token comes after the tokens that it is merged from.

        Args:
            counts: (v,) integers, occurrences of each token in the corpus.

        Returns:
            (n,) int64 numbers, without those that no text contains.
        """
        need = self.need(counts)
        found = dict.fromkeys(np.flatnonzero(self.required).tolist())
        for number in np.argsort(-need, kind="stable")[: np.count_nonzero(need)].tolist():
            found.update(dict.fromkeys([*self._merged_from(number), number]))
        return np.fromiter(found, np.int64, len(found))

    def _merged_from(self, number: int) -> list[int]:
        """Return the tokens that BPE makes on the way to a token, in their order. Other algorithms need none."""
        if self.kind != BPE:
            return []
        token = self.tokens[number]
        parts, made = self.characters(token or ""), []
        while len(parts) > 1:
            pairs = [self._ranks.get(pair, len(self._ranks)) for pair in zip(parts, parts[1:], strict=False)]
            place = int(np.argmin(pairs))
            if pairs[place] == len(self._ranks):
                return []  # no merges lead to it, so it is only found as a whole word
            parts[place : place + 2] = [self._joined(*parts[place : place + 2])]
            made.append(self.ids[parts[place]])
        return made

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(_pairs(self.data["model"]["merges"]))}

    def _joined(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.data["model"].get("continuing_subword_prefix") or "")

    def pruned(self, kept: np.ndarray) -> Vocabulary:
        """Return the tokenizer with some tokens, numbered in the old order.

        Args:
            kept: (k,) sorted old numbers, a prefix of ``order`` or more.
        """
        data, numbers = copy.deepcopy(self.data), {int(old): new for new, old in enumerate(kept)}
        model = data["model"]
        if self.kind == UNIGRAM:
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in numbers]
            model["unk_id"] = numbers.get(model.get("unk_id"))
        else:
            pairs = {token: numbers[number] for token, number in model["vocab"].items() if number in numbers}
            model["vocab"] = dict(sorted(pairs.items(), key=lambda pair: pair[1]))
        if self.kind == BPE:
            model["merges"] = [
                list(pair) for pair in _pairs(model["merges"]) if {*pair, self._joined(*pair)} <= model["vocab"].keys()
            ]
        for token in data["added_tokens"]:
            token["id"] = numbers[token["id"]]
        _renumber(data.get("post_processor"), numbers)
        if data.get("padding"):
            data["padding"]["pad_id"] = numbers[data["padding"]["pad_id"]]
        return Vocabulary(data, [self.tokens[number] for number in kept])

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the numbers of each text's tokens, without special tokens and without a limit."""
        for some in _batches(texts):
            yield from (one.ids for one in self._tokenizer.encode_batch(some, add_special_tokens=False))

    @cached_property
    def _tokenizer(self) -> Any:
        import json

        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(json.dumps(self.data))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def count(self, texts: Iterable[str]) -> np.ndarray:
        """Return the occurrences of each token in some texts, (v,) int64."""
        counts = np.zeros(len(self.tokens), np.int64)
        for some in _batches(self.encode(texts)):
            numbers = np.fromiter((number for one in some for number in one), np.int64)
            counts += np.bincount(numbers, minlength=len(counts))
        return counts


def read_vocabulary(data: dict[str, Any], where: str, extra: Iterable[int] = ()) -> Vocabulary:
    """Check the content of a ``tokenizer.json``.

    Args:
        data: content of the file.
        where: folder of the tokenizer, for messages.
        extra: numbers of tokens that the model's settings name.

    Raises:
        JasperError: the tokenizer has an algorithm whose tokens cannot be removed, or a WordPiece tokenizer has no
            token for a character of its words.
    """
    model = data.get("model", {})
    kind = model.get("type")
    if kind not in (WORDPIECE, BPE, UNIGRAM):
        raise JasperError(
            f"{where}: tokens of this tokenizer cannot be removed (got the type {kind}, expected WordPiece, BPE or "
            "Unigram). Fix: export without --vocabulary"
        )
    pairs = enumerate(entry[0] for entry in model["vocab"]) if kind == UNIGRAM else _swapped(model["vocab"])
    named = {**dict(pairs), **{token["id"]: token["content"] for token in data["added_tokens"]}}
    tokens = [named.get(number) for number in range(max(named) + 1)]
    vocabulary = Vocabulary(data, tokens, frozenset(extra))
    if kind == WORDPIECE:
        _check_characters(vocabulary, where)
    return vocabulary


def _check_characters(vocabulary: Vocabulary, where: str) -> None:
    """Raise if a character of a word has no token. WordPiece could then find no token in the middle of a word."""
    added = {vocabulary.data["model"]["unk_token"], *(token["content"] for token in vocabulary.data["added_tokens"])}
    words = (token for token in vocabulary.ids if token not in added and not UNUSED.fullmatch(token))
    missing = {part for token in words for part in vocabulary.characters(token)} - vocabulary.ids.keys()
    if missing:
        listed = ", ".join(sorted(missing)[:5])
        raise JasperError(
            f"{where}: {len(missing)} characters have no token, so words could become unknown (got no "
            f"token for {listed}). Fix: export without --vocabulary"
        )


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(islice(items, AT_ONCE)):
        yield some


def _swapped(numbers: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    return ((number, token) for token, number in numbers.items())


def _pairs(merges: Sequence[str | Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Yield the merges of a BPE tokenizer, which are pairs or texts with a space."""
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _renumber(processor: dict[str, Any] | None, numbers: Mapping[int, int]) -> None:
    """Give the special tokens of a post-processor their new numbers, in place."""
    if processor is None:
        return
    for inner in processor.get("processors", []):
        _renumber(inner, numbers)
    special = processor.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else []:
        token["ids"] = [numbers[number] for number in token["ids"]]
    for name in ("sep", "cls"):  # of the processors of BERT and RoBERTa
        if name in processor:
            token, number = processor[name]
            processor[name] = [token, numbers[number]]
