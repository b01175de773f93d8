"""Muon together with AdamW, and the cyclic schedule."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import collect, load_optimizer
from jasper_fast.training.ema import load_ema, track_ema
from jasper_fast.training.muon import MuonWithAdamW, hidden_matrices
from jasper_fast.training.optim import learning_rate, make_optimizer
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import losses_in, settings, write_data

MUON = {"optimizer": "muon", "schedule": "cyclic", "cycles": 2, "average": 0.7, "train": ["*"], "heads": [32, 16, 8]}


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 5))], [nn.Parameter(torch.randn(7, 2))]


def step(optimizer, trained, n, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + n)
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_it_takes_the_steps_of_both_optimizers():
    hidden, others = parameters()
    both = MuonWithAdamW(hidden, [{"params": others, "weight_decay": 0.1}], 0.02, 0.05)
    again, rest = parameters()
    muon = torch.optim.Muon(again, lr=0.02, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1, fused=True)
    for n in range(5):
        for optimizer in (both, muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (n + 1)
        step(both, [*hidden, *others], n)
        for parameter, copy in zip([*hidden, *others], [*again, *rest], strict=True):
            copy.grad = parameter.grad.clone()
        muon.step(), adamw.step()
    for parameter, copy in zip([*hidden, *others], [*again, *rest], strict=True):
        assert torch.equal(parameter, copy)


def test_an_update_is_as_large_as_one_of_adamw():
    """The learning rate of one is a learning rate of the other."""
    sizes = []
    for kind in ("muon", "adamw"):
        torch.manual_seed(3)
        weight = nn.Parameter(torch.zeros(64, 48))
        if kind == "muon":
            optimizer = MuonWithAdamW([weight], [], 1e-2, 0.0)
        else:
            optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
        for n in range(20):
            step(optimizer, [weight], n)
        sizes.append(float(weight.detach().norm()))
    assert 0.3 < sizes[0] / sizes[1] < 3.0


@pytest.mark.parametrize("stop", [1, 4])
def test_a_restored_optimizer_goes_on_bit_for_bit(stop):
    ends = []
    for interrupted in (False, True):
        hidden, others = parameters()
        trained = [*hidden, *others]
        optimizer = MuonWithAdamW(hidden, [{"params": others, "weight_decay": 0.1}], 0.02, 0.05)
        track_ema(optimizer, 0.9)
        for n in range(8):
            if interrupted and n == stop:
                state = collect(optimizer.state_dict(), True)
                optimizer = MuonWithAdamW(hidden, [{"params": others, "weight_decay": 0.1}], 0.02, 0.05)
                track_ema(optimizer, 0.9)
                load_optimizer(optimizer, state)
            step(optimizer, trained, n)
        load_ema(optimizer)
        ends.append([p.detach().clone() for p in trained])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_parameter_without_a_gradient_stays_and_closures_are_refused():
    hidden, others = parameters()
    optimizer = MuonWithAdamW(hidden, [{"params": others, "weight_decay": 0.1}], 0.02, 0.05)
    before = [p.detach().clone() for p in (hidden[1], others[0])]
    step(optimizer, hidden[:1], 0)
    assert torch.equal(hidden[1], before[0]) and torch.equal(others[0], before[1])
    assert hidden[1] not in optimizer.state
    with pytest.raises(ValueError, match="got a closure"):
        optimizer.step(lambda: 0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_bert, tiny_texts):
    folder = tmp_path_factory.mktemp("muon")
    write_data(folder, tiny_texts)
    tree = settings(folder, tiny_bert)
    tree["stages"] = [{**tree["stages"][2], **MUON}]
    return folder, tree


def test_only_matrices_of_the_encoders_layers_are_hidden(world):
    from jasper_fast.config.load import load_config
    from jasper_fast.models.student import Student

    _, tree = world
    config = load_config(tree)
    student = Student.build(config.student)
    hidden = hidden_matrices(student)
    names = {name for name, p in student.named_parameters() if any(p is matrix for matrix in hidden)}
    assert names == {
        name
        for name, p in student.named_parameters()
        if ".layer." in name and name.endswith(".weight") and "LayerNorm" not in name
    }
    optimizer = make_optimizer(student, config.stages[0])
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(student.parameters()))
    for parameter in hidden:
        parameter.requires_grad_(False)
    assert isinstance(make_optimizer(student, config.stages[0]), torch.optim.AdamW)


def test_a_run_stopped_and_resumed_is_the_same_bit_for_bit(world, monkeypatch):
    from jasper_fast.train import Stopped, train
    from jasper_fast.training.run import run as module

    folder, tree = world

    @contextmanager
    def after_three_steps():
        asked = iter([False, False, True])
        yield lambda: next(asked, True)

    torch.set_num_threads(1)
    alone = train(tree, out=folder / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(module, "stop_on_signal", after_three_steps)
        with pytest.raises(Stopped):
            train(tree, out=folder / "stopped")
    resumed = train(tree, out=folder / "stopped")
    ours, expected = (
        load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors") for run in (resumed, alone)
    )
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    assert losses_in(resumed) == losses_in(alone)
    rates = [rate for *_, rate in losses_in(alone)]
    assert rates[4] > rates[3] and min(rates) >= 1e-4  # the second cycle begins, and no rate is below a tenth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ["heads.*"]}, "optimizer muon trains matrices of the encoder's layers, and this stage trains none"),
        ({"cycles": 9}, "9 cycles do not fit into 8 steps"),
        ({"optimizer": "sgd"}, "adamw"),
        ({"cycles": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_stages_are_refused(world, tmp_path, change, message):
    from jasper_fast.train import train

    _, tree = world
    with pytest.raises(JasperError, match=message):
        train({**tree, "stages": [{**tree["stages"][0], **change}]}, out=tmp_path / "bad")


def test_sharded_ranks_refuse_muon(world):
    from jasper_fast.config.load import load_config
    from jasper_fast.training.stages.base import build_stage

    _, tree = world
    stage = build_stage(load_config({**tree, "parallel": {"mode": "fsdp"}}), 0)
    assert any("optimizer muon needs whole matrices" in problem for problem in stage.parallel_problems(2))
    assert not any("muon" in problem for problem in stage.parallel_problems(1))


@pytest.mark.parametrize(
    ("steps", "cycles", "warmup"), [(30, 3, 0.0), (31, 3, 0.1), (7, 2, 0.0), (5, 5, 0.0), (4, 1, 0.5)]
)
def test_each_cycle_falls_from_the_peak_to_a_tenth(steps, cycles, warmup):
    stage = StageConfig(
        name="x", train=["*"], heads=[8], lr=2.0, steps=steps, schedule="cyclic", cycles=cycles, warmup=warmup
    )
    rates = [learning_rate(stage, n) for n in range(steps)]
    after = rates[round(warmup * steps) :]
    starts = [n for n, rate in enumerate(after) if n == 0 or rate >= after[n - 1]]
    assert len(starts) == cycles and after[0] == 2.0
    assert all(0.2 < rate <= 2.0 for rate in after)
    for begin, end in zip(starts, [*starts[1:], len(after)], strict=True):
        assert all(a > b for a, b in zip(after[begin:end], after[begin + 1 : end], strict=False))
    if (steps, cycles) == (30, 3):
        assert after[:10] == after[10:20] == after[20:]
        assert after[9] == pytest.approx(2.0 * (1.0 - 0.9 * 0.9))
