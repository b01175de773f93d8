"""Texts that are longer than a model reads are counted with its tokenizer, and described."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset

from jasper_fast.models.lengths import describe_lengths, fraction_longer, length_for_most, sample_evenly


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert)


def test_the_fraction_is_that_of_the_tokens(tokenizer, tiny_texts):
    lengths = [len(tokenizer(text)["input_ids"]) for text in tiny_texts]
    for limit in (1, min(lengths), sorted(lengths)[len(lengths) // 2], max(lengths)):
        assert fraction_longer(tiny_texts, tokenizer, limit) == sum(n > limit for n in lengths) / len(lengths)
    assert fraction_longer([], tokenizer, 8) == 0.0
    prompt = "a prompt of some words "
    assert fraction_longer(tiny_texts, tokenizer, max(lengths), prompt) > 0.0


def test_a_book_is_not_tokenized_whole(tokenizer):
    seen = []

    def spy(texts, **options):
        seen.extend(map(len, texts))
        return tokenizer(texts, **options)

    assert fraction_longer(["word " * 100_000], spy, 16) == 1.0 and seen == [64 * 17]


def test_a_sample_spans_all_texts():
    texts = Dataset.from_dict({"text": [str(i) for i in range(100)]})
    assert sample_evenly(texts, 3) == ["0", "49", "99"] and len(sample_evenly(texts, 1000)) == 100
    assert sample_evenly(texts.select([])) == []


@pytest.mark.parametrize(
    ("long_texts", "long_documents", "clause"),
    [
        (0, 0, "none longer than 16 tokens"),
        (25, 0, "25 % longer than 16 tokens (the rest of these is not read)"),
        (0, 10, "0 % longer than 16 tokens, 50 % of whole documents (the rest of these is not read)"),
        (10, 5, "10 % longer than 16 tokens, 25 % of whole documents (the rest of these is not read)"),
    ],
)
def test_the_clause(long_texts, long_documents, clause, tokenizer):
    def texts(long, number):
        return Dataset.from_dict({"text": ["a b"] * (number - long) + ["a b " * 20] * long})

    encoder = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64), named_modules=list)
    student = SimpleNamespace(tokenizer=tokenizer, prefixes={"document": ""}, encoder=encoder)
    assert describe_lengths(texts(long_texts, 100), texts(long_documents, 20), student, 16) == clause
    keys = ["student.max_length", "teachers.*.max_length"]
    proposed = describe_lengths(texts(long_texts, 100), texts(long_documents, 20), student, 16, keys)
    more = "; --student.max_length 64 --teachers.*.max_length 64 reads more)"
    assert proposed == clause.replace(" is not read)", f" is not read{more}")


@pytest.mark.parametrize(
    ("words", "now", "limit", "length"),
    [
        ([10] * 99 + [900], 8, 512, 64),  # one long text in a hundred changes nothing
        ([100] * 10, 64, 512, 128),
        ([600] * 10, 128, 512, 512),
        ([600] * 10, 512, 512, None),
        ([600] * 10, 512, None, 640),
    ],
)
def test_the_proposed_length_reads_most_texts(words, now, limit, length):
    def tokenizer(texts, **options):
        return {"input_ids": [text.split() for text in texts]}

    assert length_for_most(["a " * count for count in words], tokenizer, now, limit) == length
