"""The training benchmark at small size: its sides take the same texts, and what is measured runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench.common.budget import Budget
from bench.train import cuda as _train_cuda
from bench.train.baselines import WARM_UP, length_grouped
from bench.train.cpu import Texts, on_cpu, small_student
from bench.train.cuda import stage_one


def test_grouping_by_length_takes_the_same_texts_after_the_warm_up():
    lengths = np.random.default_rng(0).integers(1, 99, 6 * 4).tolist()
    order = length_grouped(lengths, 4)
    assert order[: WARM_UP * 4] == list(range(WARM_UP * 4)) and sorted(order) == list(range(24))
    groups = [sorted(lengths[row] for row in order[at : at + 4]) for at in range(WARM_UP * 4, 24, 4)]
    assert sum(groups, []) != sorted(sum(groups, [])) and sum(sorted(groups), []) == sorted(sum(groups, []))


def test_stage_one_is_faster_on_states_that_are_kept():
    texts = Texts([" ".join(["7"] * 32)] * 64)
    found = stage_one(small_student([32]), texts, torch.device("cpu"), "fp32", plain_texts=24)
    assert found["ratio"] == found["plain_s_per_text"] / found["cached_s_per_text"] > 1 and found["texts"] == 64


def test_the_gpu_benchmark_measures_what_its_targets_name(monkeypatch, capsys):
    """Here on a CPU, with a small student."""
    monkeypatch.setattr(
        _train_cuda, "CONFIGURATIONS", {**_train_cuda.CONFIGURATIONS, "neither": (4, 2, {"micro_batch": 4})}
    )
    kept = []
    cpu = torch.device("cpu")
    found = _train_cuda.measure(small_student([32, 16]), cpu, 160, 8, lambda found: kept.append(json.dumps(found)))
    every = found["configurations"]
    assert (
        len(kept) == len(every) == 4
        and json.loads(kept[-1]) == found
        and len(json.loads(kept[0])["configurations"]) == 1
    )
    assert not any("error" in own for own in every.values())
    cached = every["cached, checkpointed"]
    assert cached["tokens"] == 160 * 8 and cached["steps"] == 1 and every["neither"]["tokens"] == 2 * 4 * 8
    assert [(target["what"], target["met"]) for target in cached["targets"]] == [
        ("% MFU", False),
        ("% of the step is the loss", False),
        ("GB at most in use", None),
    ]
    assert every["stage 1"]["targets"][0]["value"] == every["stage 1"]["ratio"]
    assert "target: not measured GB at most in use" in capsys.readouterr().out


def test_the_gpu_benchmark_goes_on_after_an_error_and_keeps_to_its_budget(monkeypatch):
    student = small_student([16])

    def fails(*options, **more):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(_train_cuda, "_loop", fails)
    monkeypatch.setattr(_train_cuda, "stage_one", lambda *options: {"ratio": 3.0})
    found = _train_cuda.measure(student, torch.device("cpu"), 8, 8)["configurations"]
    assert [own.get("error") for own in found.values()] == ["out of memory"] * 3 + [None]
    found = _train_cuda.measure(student, torch.device("cpu"), 8, 8, budget=Budget(0))["configurations"]
    assert {own["error"] for own in found.values()} == {"left out: the budget of 0 s is spent"}


@pytest.mark.soak
def test_all_sides_take_the_same_texts():
    sides = on_cpu(batch=4, length=16, layers=1, steps=2)["sides"]
    assert len(sides) == 4 and len({side["tokens"] for side in sides.values()}) == 1
