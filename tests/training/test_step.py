"""Gradient caching gives the gradient of the plain batch, in the memory of a micro-batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jasper_fast.config.models import StudentConfig
from jasper_fast.config.run import Config
from jasper_fast.config.stage import StageConfig
from jasper_fast.models.micro_batches import MicroBatches, cheapest_cuts
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch
from jasper_fast.training.offload import Offload
from jasper_fast.training.parameters import set_trained
from jasper_fast.training.stages.base import trained_names
from jasper_fast.training.stages.losses import StageLoss
from jasper_fast.training.step import StepTimer, dropout_mask, take_gradients
from jasper_fast.utils.errors import JasperError

CPU = torch.device("cpu")
WEIGHTS = {"cosine": 10.0, "similarity": 200.0, "relative_similarity": 20.0, "neighbourhood": 1.0}


def stage(**given) -> StageConfig:
    base = {"name": "s", "train": ["*"], "heads": [24, 8], "weights": WEIGHTS, "batch_size": 23, "steps": 1, "lr": 1e-3}
    return StageConfig.model_validate(base | given)


def gradients(
    model: Path, texts: list[str], dtype: torch.dtype, settings: StageConfig, dropout: float = 0.2, noise: float = 0.0
):
    """Losses and every trained parameter's gradient of one step."""
    torch.manual_seed(3)
    student = Student.build(StudentConfig(model=str(model), heads=[24, 8], max_length=32)).to(dtype).train()
    for module in student.modules():  # an encoder with dropout
        if noise and isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, noise))
    set_trained(student, trained_names(student, settings))
    student.set_gradient_checkpointing(settings.gradient_checkpointing)
    torch.manual_seed(5)
    teacher = torch.nn.functional.normalize(torch.randn(len(texts), 24, dtype=dtype), dim=1)
    micro = MicroBatches.of(student.tokenize(texts), settings.micro_batch, settings.micro_tokens)
    batch = Batch(np.arange(len(texts)), teacher, micro, None, micro.tokens, micro.padded, 0.0)
    keep = dropout_mask(dropout, (0, 0, 0), slice(None), len(texts), student.hidden_size, CPU)
    output, _ = take_gradients(student, batch, settings, StageLoss(settings, 24), CPU, "fp32", keep)
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return output, found, torch.rand(3)


def assert_same(a, b, tolerance: float) -> None:
    assert a[1].keys() == b[1].keys() and a[1]
    torch.testing.assert_close(a[0]._asdict(), b[0]._asdict(), rtol=tolerance, atol=0)
    largest = max(float(g.abs().max()) for g in a[1].values())
    for name, gradient in a[1].items():
        torch.testing.assert_close(b[1][name], gradient, rtol=0, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_qwen2"])
@pytest.mark.parametrize(
    "given",
    [
        {"train": ["*"]},
        {"train": ["heads.*"], "last_layers": 1, "gradient_checkpointing": True},
        {"train": ["*"], "narrow_target": "self", "gradient_checkpointing": 1, "activation_offload": True},
    ],
    ids=["all", "last layer, checkpointed", "one layer checkpointed, offloaded"],
)
def test_caching_gives_the_plain_gradient(model, dtype, tolerance, given, request, tiny_texts):
    path, texts = request.getfixturevalue(model), tiny_texts[:23]
    saving = ("gradient_checkpointing", "activation_offload")
    whole = {key: value for key, value in given.items() if key not in saving}
    plain = gradients(path, texts, dtype, stage(micro_batch=23, **whole))
    for cut in ({"micro_batch": 5}, {"micro_tokens": 64}, {"micro_batch": 1}):
        cached = gradients(path, texts, dtype, stage(gradient_caching=True, **cut, **given))
        assert_same(plain, cached, tolerance)


def test_caching_replays_the_encoders_own_random_numbers(tiny_bert, tiny_texts):
    """The same micro-batches, with a graph at once or encoded twice: dropout agrees, and so does what is drawn next."""
    plain, cached, other = (
        gradients(tiny_bert, tiny_texts[:23], torch.float64, stage(micro_batch=5, gradient_caching=on), noise=noise)
        for on, noise in ((False, 0.3), (True, 0.3), (False, 0.0))
    )
    assert_same(plain, cached, 1e-10)
    assert torch.equal(plain[2], cached[2])
    assert not torch.allclose(plain[0].loss, other[0].loss)  # there was dropout


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_caching_of_the_smallest_batches(rows, tiny_bert, tiny_texts):
    settings = {"batch_size": rows, "micro_batch": 1}
    plain = gradients(tiny_bert, tiny_texts[:rows], torch.float64, stage(**settings))
    cached = gradients(tiny_bert, tiny_texts[:rows], torch.float64, stage(gradient_caching=True, **settings))
    assert_same(plain, cached, 1e-10)


def test_caching_holds_the_graph_of_one_micro_batch(tiny_bert, tiny_texts):
    """Bytes that graphs hold at once, counted where autograd saves and frees them."""

    def most(settings: StageConfig) -> int:
        held, peak = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal held, peak
                self.tensor, self.size = tensor, tensor.nbytes
                held += self.size
                peak = max(peak, held)

            def __del__(self):
                nonlocal held
                held -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            gradients(tiny_bert, tiny_texts[: settings.batch_size], torch.float32, settings)
        return peak

    weights = {"cosine": 10.0, "similarity": 0.0, "relative_similarity": 0.0}
    small = most(stage(micro_batch=8, batch_size=16, gradient_caching=True, weights=weights))
    large = most(stage(micro_batch=8, batch_size=128, gradient_caching=True, weights=weights))
    plain = most(stage(micro_batch=8, batch_size=128, weights=weights))
    assert large < 1.3 * small and plain > 4 * large


def test_offloading_leaves_weights_and_copies_each_storage_once():
    """The hooks' choice, which is the same on a CPU."""
    weight = torch.nn.Parameter(torch.randn(8, 8))
    offload = Offload([weight])
    assert offload.pack(weight.T).data_ptr() == weight.data_ptr()

    x = torch.randn(4, 8)
    forms = [x, x.view(8, 4), x.T, x.expand(3, 4, 8)]
    packed = [offload.pack(form) for form in forms]
    assert len({id(copy) for copy, *_ in packed}) == 1 and packed[0][0].content.numel() == x.nbytes
    part = offload.pack(x[:2])
    assert part[0].content.numel() == x[:2].nbytes
    assert all(torch.equal(Offload.unpack(p), form) for p, form in zip([*packed, part], [*forms, x[:2]], strict=True))
    before = x.clone()
    x += 1
    changed = offload.pack(x)
    assert torch.equal(Offload.unpack(changed), x) and torch.equal(Offload.unpack(packed[0]), before)

    gone = [offload.pack(torch.full((4, 8), float(i))) for i in range(50)]  # addresses are used again
    assert [float(Offload.unpack(p)[0, 0]) for p in gone] == list(range(50))
    del packed, part, changed, gone
    assert not offload._copies


@pytest.mark.parametrize("caching", [True, False])
def test_offloading_gives_the_plain_gradient(caching, tiny_bert, tiny_texts, monkeypatch):
    """With the hooks in use on a CPU, where a run leaves them out."""
    stayed = []

    def hooks(on, student, device):
        offload = Offload(student.parameters())

        def pack(tensor):
            packed = offload.pack(tensor)
            stayed.append(isinstance(packed, torch.Tensor))
            return packed

        return torch.autograd.graph.saved_tensors_hooks(pack, Offload.unpack)

    settings = {"micro_batch": 5, "gradient_caching": caching}
    plain = gradients(tiny_bert, tiny_texts[:23], torch.float64, stage(**settings))
    monkeypatch.setattr("jasper_fast.training.step.offload_activations", hooks)
    assert_same(plain, gradients(tiny_bert, tiny_texts[:23], torch.float64, stage(**settings)), 1e-10)
    assert 0.1 < sum(stayed) / len(stayed) < 0.9


def test_gradients_of_two_steps_add_up_only_in_grad(tiny_bert, tiny_texts):
    """A heads-only batch of ready states needs no texts, and caching does not disturb it."""
    settings = stage(train=["heads.*"], gradient_caching=True)
    student = Student.build(StudentConfig(model=str(tiny_bert), heads=[24, 8], max_length=32))
    set_trained(student, trained_names(student, settings))
    batch = Batch(
        np.arange(23), torch.nn.functional.normalize(torch.randn(23, 24)), None, torch.randn(23, 32), 0, 0, 0.0
    )
    shares = StepTimer(CPU)
    take_gradients(student, batch, settings, StageLoss(settings, 24), CPU, "fp32", None, shares)
    assert {n for n, p in student.named_parameters() if p.grad is not None} == {
        f"heads.{w}.{kind}" for w in (24, 8) for kind in ("weight", "bias")
    }
    assert shares.seconds["loss"] > 0


def test_token_budgets_are_kept():
    lengths = np.sort(np.random.default_rng(0).integers(1, 90, 300))
    for budget in (64, 200, 1000):
        cuts = cheapest_cuts(lengths, 32, budget)
        parts = [lengths[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert sum(map(len, parts)) == 300 and max(map(len, parts)) <= 32
        assert all(part.max() * len(part) <= budget or len(part) == 1 for part in parts)
    assert cheapest_cuts(lengths, 32, 10**9) == cheapest_cuts(lengths, 32)


def test_dropout_is_a_function_of_step_and_place_alone():
    whole = dropout_mask(0.25, (1, 2, 3), slice(None), 40, 500, CPU)
    part = dropout_mask(0.25, (1, 2, 3), slice(7, 19), 40, 500, CPU)
    assert torch.equal(whole[7:19], part)
    assert whole.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(float((whole == 0).float().mean()) - 0.25) < 0.01
    for other in ((1, 2, 4), (1, 3, 3), (2, 2, 3)):
        assert not torch.equal(whole, dropout_mask(0.25, other, slice(None), 40, 500, CPU))
    assert dropout_mask(0.0, (1, 2, 3), slice(None), 40, 500, CPU) is None
    largest = Config.model_fields["seed"].metadata
    (seed,) = (bound.le for bound in largest if hasattr(bound, "le"))
    assert dropout_mask(0.25, (seed, 99, 10**6), slice(None), 4, 8, CPU).shape == (4, 8)


def test_checkpointing_counts_layers(tiny_bert):
    student = Student.build(StudentConfig(model=str(tiny_bert), heads=[8], max_length=32))
    assert student.set_gradient_checkpointing(2) == 2
    assert [layer.gradient_checkpointing for layer in student.encoder.encoder.layer] == [True, True, False]
    set_trained(student, student.layer_parameters(1))
    assert student.set_gradient_checkpointing(1) == 1 and student.set_gradient_checkpointing(True) == 1
    assert [layer.gradient_checkpointing for layer in student.encoder.encoder.layer] == [True, True, True]
    with pytest.raises(JasperError, match="asks for 2 layers, but 1 take part"):
        student.set_gradient_checkpointing(2)
    assert student.set_gradient_checkpointing(False) == 0
