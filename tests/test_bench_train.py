"""The training benchmark at small size: its sides take the same texts, and what is measured runs."""

import numpy as np
import pytest
import torch

from bench._train_sides import WARM_UP, length_grouped
from bench.train import Texts, on_cpu, small_student, stage_one


def test_grouping_by_length_takes_the_same_texts_after_the_warm_up():
    lengths = np.random.default_rng(0).integers(1, 99, 6 * 4).tolist()
    order = length_grouped(lengths, 4)
    assert order[: WARM_UP * 4] == list(range(WARM_UP * 4)) and sorted(order) == list(range(24))
    groups = [sorted(lengths[row] for row in order[at : at + 4]) for at in range(WARM_UP * 4, 24, 4)]
    assert sum(groups, []) != sorted(sum(groups, [])) and sum(sorted(groups), []) == sorted(sum(groups, []))


def test_stage_one_is_faster_on_states_that_are_kept():
    texts = Texts([" ".join(["7"] * 32)] * 64)
    found = stage_one(small_student([32]), texts, 2, torch.device("cpu"), "fp32")
    assert found["ratio"] == found["plain_s_per_text"] / found["cached_s_per_text"] > 1


@pytest.mark.soak
def test_all_sides_take_the_same_texts():
    sides = on_cpu(batch=4, length=16, layers=1, steps=2)["sides"]
    assert len(sides) == 4 and len({side["tokens"] for side in sides.values()}) == 1
