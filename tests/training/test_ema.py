"""Moving average of the weights.

Whole runs with an average are in test_train.py, test_ranks.py and test_vision_stage.py. They test that a stage ends in
it, and that restarts, ranks and shards keep it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jasper_fast.training.ema import load_ema, track_ema


def steps(optimizer, parameters, count, idle=()):
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = None if any(parameter is one for one in idle) else torch.randn_like(parameter)
        optimizer.step()
        yield [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("fused", [True, False])
def test_the_average_by_hand(fused):
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    track_ema(optimizer, 0.8)
    expected = None
    for n, now in enumerate(steps(optimizer, parameters, 60), 1):
        stays = min(0.8, n / (n + 9))
        expected = now if n == 1 else [stays * e + (1 - stays) * w for e, w in zip(expected, now, strict=True)]
    last = [p.detach().clone() for p in parameters]
    load_ema(optimizer)
    for parameter, wanted, newest in zip(parameters, expected, last, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted)
        assert not torch.allclose(parameter, newest, atol=1e-3)


def test_a_restored_optimiser_goes_on_with_it():
    torch.manual_seed(1)
    ends = []
    for stop in (None, 7):
        torch.manual_seed(2)
        parameters = [nn.Parameter(torch.randn(3, 2))]
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        track_ema(optimizer, 0.9)
        for n, _ in enumerate(steps(optimizer, parameters, 20), 1):
            if n == stop:
                again = torch.optim.AdamW(parameters, lr=0.1)
                track_ema(again, 0.9)
                again.load_state_dict(optimizer.state_dict())
                for _ in steps(again, parameters, 20 - n):
                    pass
                optimizer = again
                break
        load_ema(optimizer)
        ends.append(parameters[0].detach().clone())
    assert torch.equal(*ends)


def test_what_no_gradient_reaches_stays_and_without_an_average_nothing_moves():
    used, idle = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    before = idle.detach().clone()
    optimizer = torch.optim.AdamW([used, idle], lr=0.1)
    track_ema(optimizer, 0.5)
    list(steps(optimizer, [used, idle], 5, idle=[idle]))
    load_ema(optimizer)
    assert torch.equal(idle, before)
    plain = torch.optim.AdamW([used], lr=0.1)
    list(steps(plain, [used], 2))
    newest = used.detach().clone()
    load_ema(plain)
    assert torch.equal(used, newest)
