"""Micro-batches change the cost of a pass, not the embeddings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from jasper_fast.config.models import StudentConfig
from jasper_fast.models.encode import pool_texts, student_encoder
from jasper_fast.models.micro_batches import MicroBatches, cheapest_cuts
from jasper_fast.models.student import Student
from jasper_fast.utils.device import autocast


def cost(lengths, cuts, per_pass):
    return sum(lengths[b - 1] * (b - a) + per_pass for a, b in zip(cuts[:-1], cuts[1:], strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_cuts_are_the_cheapest_of_all(seed):
    lengths = np.sort(np.random.default_rng(seed).integers(1, 60, size=9))
    cuts = cheapest_cuts(lengths, micro_batch=4, per_pass=20)
    assert cuts[0] == 0 and cuts[-1] == 9 and max(np.diff(cuts)) <= 4
    every = ([0, *inner, 9] for k in range(9) for inner in itertools.combinations(range(1, 9), k))
    possible = [c for c in every if max(np.diff(c)) <= 4]
    assert cost(lengths, cuts, 20) == min(cost(lengths, c, 20) for c in possible)


@pytest.mark.parametrize(("micro_batch", "budget"), [(32, None), (5, None), (32, 200), (1, None)])
def test_few_shapes_repeat(micro_batch, budget):
    """Check that sizes and padded lengths come from short lists, and that a part keeps its limits."""
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(50):
        texts = [[1] * int(length) for length in rng.integers(1, 129, size=33)]
        parts = MicroBatches.of(texts, micro_batch, budget, few_shapes=True)
        assert sum(map(len, parts.token_ids)) == 33
        lengths = [-(-max(map(len, part)) // 8) * 8 for part in parts.token_ids]
        sizes = [len(part) for part in parts.token_ids]
        assert max(sizes) <= micro_batch and set(sizes) <= {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}
        assert budget is None or all(n * size <= budget or size == 1 for n, size in zip(lengths, sizes, strict=True))
        assert parts.padded == sum(n * size for n, size in zip(lengths, sizes, strict=True))
        shapes |= {n * size for n, size in zip(lengths, sizes, strict=True)}
    assert len(shapes) <= 100


def test_one_long_text_does_not_pad_the_short_ones():
    parts = MicroBatches.of([[1] * 10] * 31 + [[1] * 256], micro_batch=32)
    assert parts.padded == parts.tokens == 31 * 10 + 256
    assert len(parts.token_ids) == 2


def test_the_longest_texts_come_first():
    """Check that passes shrink, so that freed memory is large enough for the next pass."""
    parts = MicroBatches.of([[1] * n for n in (3, 9, 1, 7, 5)], micro_batch=2)
    lengths = [len(ids) for part in parts.token_ids for ids in part]
    assert lengths == [9, 7, 5, 3, 1]
    assert [lengths[place] for place in parts.inverse] == [3, 9, 1, 7, 5]
    assert parts.order.tolist() == [1, 3, 4, 0, 2]


@pytest.fixture(scope="module")
def student(tiny_bert):
    return Student.build(StudentConfig(model=str(tiny_bert), heads=[16, 8], max_length=40))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_on_a_cpu_pads_to_few_lengths(student, tiny_texts, precision, monkeypatch):
    lengths, encoder = [], student.encoder.forward
    monkeypatch.setattr(
        student.encoder, "forward", lambda **inputs: lengths.append(inputs["input_ids"].shape) or encoder(**inputs)
    )
    ids = [student.tokenize(tiny_texts[:1])[0][:n] for n in (3, 8, 9, 11)] + [[5] * 38]  # the longest text has 40
    for part in ([0, 1], [2], [3], [4]):
        with torch.no_grad(), autocast(torch.device("cpu"), precision):
            student.pool([ids[i] for i in part])
    assert [shape[1] for shape in lengths] == ([8, 9, 11, 38] if precision == "fp32" else [8, 16, 16, 40])
    monkeypatch.setattr(student, "max_length", 38)  # the encoder may not read more
    with torch.no_grad(), autocast(torch.device("cpu"), precision):
        student.pool([ids[4]])
    assert lengths[-1] == (1, 38)


def test_micro_batches_give_what_one_batch_gives(student, tiny_texts):
    texts = tiny_texts[:23]
    ids = student.tokenize(texts)
    whole = student.pool(ids)
    device = torch.device("cpu")
    for micro_batch in (1, 4, 23, 64):
        torch.testing.assert_close(MicroBatches.of(ids, micro_batch).pool(student, device, "fp32"), whole)
    chunks = list(pool_texts(student, texts, ["document"] * 23, 40, device, "fp32", chunk=10))
    assert [len(c) for c in chunks] == [10, 10, 3]
    torch.testing.assert_close(torch.from_numpy(np.concatenate(chunks)), whole.detach())


def test_each_text_is_encoded_once_for_all_widths(student, tiny_texts, monkeypatch):
    read = []
    tokenize = student.tokenize
    monkeypatch.setattr(student, "tokenize", lambda texts, *a: read.extend(texts) or tokenize(texts, *a))
    embeddings = student_encoder(student, [16, 8], 40, torch.device("cpu"), "fp32")(tiny_texts[:5], "query")
    assert {w: v.shape for w, v in embeddings.items()} == {16: (5, 16), 8: (5, 8)}
    assert all(np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-6) for v in embeddings.values())
    assert len(read) == 5
    raw = student_encoder(student, None, 40, torch.device("cpu"), "fp32")(tiny_texts[:5], "query")
    assert list(raw) == [32]
