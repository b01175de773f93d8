"""Pruned tokenizers: what stays encodable, and which texts keep their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jasper_fast.exporting.vocabulary import Vocabulary, read_vocabulary
from jasper_fast.utils.errors import JasperError

OTHER_SCRIPTS = ["ночь и день", "水と火", "नमस्ते", "Straße", "🙂🙃", "\x07\u200b", "naïve café"]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def wordpiece() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)


def byte_level() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def word_end() -> tuple[Tokenizer, trainers.Trainer]:
    """BPE with a mark at the end of words, as in CLIP."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )


def unigram() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


KINDS = {"WordPiece": wordpiece, "BPE": byte_level, "BPE with word ends": word_end, "Unigram": unigram}


@pytest.fixture(scope="module", params=KINDS)
def vocabulary(request: pytest.FixtureRequest, tiny_texts: list[str]) -> Vocabulary:
    build: Callable[[], tuple[Tokenizer, trainers.Trainer]] = KINDS[request.param]
    tokenizer, trainer = build()
    tokenizer.train_from_iterator([*tiny_texts, *OTHER_SCRIPTS[:2]], trainer)
    start, end = ("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[start, end])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")
    return read_vocabulary(json.loads(tokenizer.to_str()), "tiny")


def pieces(vocabulary: Vocabulary, text: str) -> list[str | None]:
    (numbers,) = vocabulary.encode([text])
    return [vocabulary.tokens[number] for number in numbers]


def smaller(vocabulary: Vocabulary, texts: list[str], more: int) -> Vocabulary:
    order = vocabulary.order(vocabulary.count(texts))
    return vocabulary.pruned(np.sort(order[: vocabulary.required.sum() + more]))


def test_texts_of_kept_tokens_keep_their_tokens(vocabulary: Vocabulary, tiny_texts: list[str]) -> None:
    kept = smaller(vocabulary, tiny_texts[:40], 60)
    assert len(kept.tokens) < 0.8 * len(vocabulary.tokens)
    same = changed = 0
    for text in [*tiny_texts, *" ".join(tiny_texts).split(), *OTHER_SCRIPTS]:
        before = pieces(vocabulary, text)
        if set(before) <= set(kept.tokens):
            same += 1
            assert pieces(kept, text) == before
        else:
            changed += 1
            assert "<unk>" not in pieces(kept, text) or "<unk>" in before
    assert same > 20 and changed > 20


@pytest.mark.parametrize("more", [0, 1, 7])
def test_no_text_becomes_unknown(vocabulary: Vocabulary, tiny_texts: list[str], more: int) -> None:
    kept = smaller(vocabulary, tiny_texts[:5], more)
    letters = {letter for token in vocabulary.ids for letter in token}
    generator = np.random.default_rng(0)
    drawn = ["".join(generator.choice(sorted(letters), size=9)) for _ in range(300)]
    for text in [*sorted(letters), *drawn, *vocabulary.ids, *OTHER_SCRIPTS, *tiny_texts]:
        assert pieces(kept, text).count("<unk>") <= pieces(vocabulary, text).count("<unk>"), text


def test_special_tokens_get_their_new_numbers(vocabulary: Vocabulary, tiny_texts: list[str]) -> None:
    kept = smaller(vocabulary, tiny_texts, 30)
    tokenizer = Tokenizer.from_str(json.dumps(kept.data))
    long, short = tokenizer.encode_batch([tiny_texts[0], "a"])
    assert (long.tokens[0], long.tokens[-1]) == ("<s>", "</s>")
    assert short.tokens[-1] == "<pad>" and len(short.ids) == len(long.ids)
    assert tokenizer.get_vocab_size() == len(kept.tokens)
    assert [tokenizer.id_to_token(number) for number in range(len(kept.tokens))] == kept.tokens


def test_the_corpus_decides_first_and_the_order_second(vocabulary: Vocabulary, tiny_texts: list[str]) -> None:
    free = np.flatnonzero(~vocabulary.required)
    counts = np.zeros(len(vocabulary.tokens), np.int64)
    counts[free[-3]] = 1000
    order = vocabulary.order(counts)
    first = order[vocabulary.required.sum() :]
    needed = {free[-3], *(vocabulary.ids[part] for part in [vocabulary.tokens[free[-3]]])}
    assert needed <= set(first[:12])  # with the tokens that BPE merges it from
    rest = [number for number in first.tolist() if number not in set(first[:12].tolist())]
    assert sum(left < right for left, right in zip(rest, rest[1:], strict=False)) > 0.8 * (len(rest) - 1)
    assert sorted(order.tolist()) == sorted(set(order.tolist()))


def test_unused_tokens_are_removed_and_names_in_settings_kept() -> None:
    tokens = {"[UNK]": 0, "[unused1]": 1, "a": 2, "##a": 3, "aa": 4, "aaa": 5}
    model = {"type": "WordPiece", "vocab": tokens, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    vocabulary = read_vocabulary({"model": model, "added_tokens": []}, "mine", extra={5})
    assert vocabulary.order(np.zeros(6, np.int64)).tolist() == [0, 2, 3, 5, 4]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordLevel", "vocab": {"a": 0}}, r"mine: tokens of this .*got the type WordLevel.*Fix: export"),
        (
            {"type": "WordPiece", "vocab": {"a": 0, "ab": 1}, "continuing_subword_prefix": "##", "unk_token": "a"},
            r"mine: 1 characters have no token.*##b.*Fix:",
        ),
    ],
)
def test_tokenizers_that_cannot_be_pruned(model: dict, message: str) -> None:
    with pytest.raises(JasperError, match=message):
        read_vocabulary({"model": model, "added_tokens": []}, "mine")
