"""Batches are a pure function of (seed, step)."""

import numpy as np
import pytest
import torch

from jasper_fast.sampler import neighbour_batches, neighbour_graph, permutation, random_batches


def test_an_epoch_deals_every_row_once_and_epochs_differ():
    plan = random_batches(100, 10, seed=3, stage=0)
    first = np.concatenate([plan(step) for step in range(10)])
    second = np.concatenate([plan(step) for step in range(10, 20)])
    assert sorted(first) == list(range(100)) == sorted(second)
    assert list(first) != list(second)


def test_a_step_does_not_depend_on_the_steps_before():
    plan = random_batches(101, 10, seed=3, stage=1)
    expected = plan(37)
    permutation.cache_clear()
    assert np.array_equal(random_batches(101, 10, seed=3, stage=1)(37), expected)
    assert not np.array_equal(random_batches(101, 10, seed=4, stage=1)(37), expected)
    assert not np.array_equal(random_batches(101, 10, seed=3, stage=2)(37), expected)


def test_too_few_rows():
    with pytest.raises(ValueError, match="cannot be drawn from 9 rows"):
        random_batches(9, 10, 0, 0)


def test_neighbour_graph_is_the_brute_force_one():
    vectors = torch.nn.functional.normalize(torch.randn(333, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    graph = neighbour_graph(lambda rows: vectors[rows].numpy(), 333, 5, block=100)
    scores = vectors.double() @ vectors.double().T
    scores.fill_diagonal_(9.0)
    assert np.array_equal(graph, scores.argsort(dim=1, descending=True)[:, :5].numpy())


def test_a_row_comes_first_among_its_duplicates():
    vectors = np.zeros((50, 3), dtype=np.float32)
    vectors[:, 0] = 1.0
    graph = neighbour_graph(lambda rows: vectors[rows], 50, 4, block=16)
    assert graph[:, 0].tolist() == list(range(50))
    assert graph[:3].tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3]] and graph[40].tolist() == [40, 0, 1, 2]


def test_neighbour_batches_hold_distinct_rows_and_whole_neighbourhoods():
    graph = np.stack([(np.arange(4) * 10 + i) % 200 for i in range(200)])  # (200, 4)
    plan = neighbour_batches(graph, 32, seed=0, stage=0)
    for step in (0, 1, 24, 25, 77):
        rows = plan(step)
        assert len(rows) == 32 == len(set(rows.tolist()))
        assert np.array_equal(plan(step), rows)
        assert np.array_equal(rows[:4], graph[rows[0]])


def test_neighbour_batches_of_identical_neighbourhoods_are_filled_up():
    graph = np.stack([np.array([i, (i + 1) % 40]) for i in range(40)])
    graph[:, 1] = 0
    rows = neighbour_batches(graph, 40, seed=0, stage=0)(3)
    assert sorted(rows.tolist()) == list(range(40))
