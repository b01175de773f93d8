"""On CPUs, attention computes its gradient in fp32, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch

from jasper_fast.config.models import StudentConfig
from jasper_fast.models.attention import FAST_GRADIENT
from jasper_fast.models.student import Student
from jasper_fast.utils.device import autocast

CPU = torch.device("cpu")


@pytest.fixture(params=["tiny_bert", "tiny_qwen2"])
def student(request):
    folder = request.getfixturevalue(request.param)
    return Student.build(StudentConfig(model=str(folder), heads=[16], max_length=40))


@pytest.fixture
def kernel_dtypes(monkeypatch):
    """Return the dtypes of the queries that PyTorch's kernel gets, as a list that grows."""
    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, *args, **options):
        with_autocast = torch.is_autocast_enabled("cpu")  # autocast would cast the query to bf16
        seen.append(torch.bfloat16 if with_autocast else query.dtype)
        return kernel(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


def pooled(student, texts, precision):
    with autocast(CPU, precision):
        return student.pool(student.tokenize(texts))


@pytest.mark.parametrize("texts", [3, 1], ids=["padded", "without a mask"])
def test_only_gradients_are_computed_in_fp32(student, tiny_texts, kernel_dtypes, texts):
    texts = tiny_texts[:texts]
    with torch.no_grad():
        pooled(student, texts, "bf16")
    assert set(kernel_dtypes) == {torch.bfloat16}
    kernel_dtypes.clear()
    pooled(student, texts, "bf16")
    assert set(kernel_dtypes) == {torch.float32}


def test_states_and_gradients_are_as_close_to_fp32_as_those_of_plain_attention(student, tiny_texts):
    def run(name, precision):
        student.encoder.set_attn_implementation(name)
        student.zero_grad()
        states = pooled(student, tiny_texts[:7], precision)
        states.square().sum().backward()
        return [states.detach(), *(p.grad.clone() for p in student.encoder.parameters() if p.grad is not None)]

    reference, plain = run("sdpa", "fp32"), run("sdpa", "bf16")
    assert len(reference) > 20
    for same, exact in zip(run(FAST_GRADIENT, "fp32"), reference, strict=True):
        assert torch.equal(same, exact)
    errors = [[(part - exact).norm() for part, exact in zip(parts, reference, strict=True)] for parts in
              (run(FAST_GRADIENT, "bf16"), plain)]  # fmt: skip
    scale = [exact.norm() for exact in reference]
    for ours, theirs, size in zip(*errors, scale, strict=True):
        assert ours <= 1.25 * theirs + 4e-3 * size


def test_gradient_checkpointing_sees_the_same_attention(student, tiny_texts):
    def gradients():
        student.zero_grad()
        pooled(student, tiny_texts[:5], "bf16").sum().backward()
        return [p.grad.clone() for p in student.encoder.parameters() if p.grad is not None]

    plain = gradients()
    student.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    for again, once in zip(gradients(), plain, strict=True):
        assert torch.equal(again, once)


def test_saved_students_name_no_attention_of_ours(student, tmp_path):
    assert student.encoder.config._attn_implementation == FAST_GRADIENT
    student.encoder.save_pretrained(tmp_path)
    assert FAST_GRADIENT not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_attention_of_its_own_stays(tiny_bert, monkeypatch):
    """A model that does not ask transformers for its attention function cannot be given another."""
    from transformers import BertModel

    monkeypatch.setattr(BertModel, "_can_set_attn_implementation", classmethod(lambda cls: False))
    student = Student.build(StudentConfig(model=str(tiny_bert), heads=[16], max_length=40))
    assert student.encoder.config._attn_implementation == "sdpa"
