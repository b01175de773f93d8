"""Batches are a pure function of (seed, step)."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from jasper_fast.training.neighbours import Graph, cached_graph, neighbour_graph
from jasper_fast.training.sampler import neighbour_batches, permutation, random_batches


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


@pytest.mark.parametrize(("device", "threads"), [("cpu", {"MainThread"}), ("cuda", {"batches_0"})])
def test_batches_come_in_order_and_only_a_gpu_has_them_prepared_by_a_thread(device, threads):
    from jasper_fast.training.data import Batch
    from jasper_fast.training.prefetch import batches_of

    by = set()

    def prepare(step):
        by.add(threading.current_thread().name)
        if step == 9:
            raise ValueError("no step 9")
        return Batch(np.array([step]), torch.zeros(1, 1), None, None, 0, 0, -1.0)

    found = list(batches_of(prepare, 3, 8, torch.device(device)))
    assert [(step, *batch.rows) for step, batch in found] == [(step, step) for step in range(3, 8)] and by == threads
    assert all(batch.wait >= 0 for _, batch in found)
    with pytest.raises(ValueError, match="no step 9"):
        list(batches_of(prepare, 7, 12, torch.device(device)))


def test_too_few_rows():
    with pytest.raises(ValueError, match="cannot be drawn from 9 rows"):
        random_batches(9, 10, 0, 0)


def test_a_stage_may_draw_from_short_texts_only(tmp_path, tiny_bert, tiny_texts):
    from datasets import Dataset

    from jasper_fast.config.load import load_config
    from jasper_fast.training.data import TrainingData
    from jasper_fast.training.preflight import check_sizes
    from jasper_fast.training.sampler import batch_plan
    from jasper_fast.utils.errors import ConfigError, JasperError
    from tests.helpers.runs import settings

    texts = Dataset.from_dict({"text": ["ä" * (1 + i % 20) for i in range(100)]})
    tree = settings(tmp_path, tiny_bert)
    tree["stages"][0] |= {"max_chars": 5, "texts": 60, "batch_size": 5}
    config = load_config(tree)
    check_sizes(config, TrainingData(texts))
    plan = batch_plan(config, 0, texts, None, print)
    epoch = np.concatenate([plan(step) for step in range(3)])
    assert sorted(epoch) == [i for i in range(60) if i % 20 < 5]
    tree["stages"][0] |= {"batch_size": 16}
    with pytest.raises(JasperError, match="a batch of 16 from 15 texts of up to 5 characters"):
        check_sizes(load_config(tree), TrainingData(texts))
    tree["stages"][0] |= {"batches": "neighbours"}
    with pytest.raises(ConfigError, match="max_chars is for random batches of texts"):
        load_config(tree)


def test_neighbour_graph_is_the_brute_force_one():
    vectors = torch.nn.functional.normalize(torch.randn(333, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    graph = neighbour_graph(lambda rows: vectors[rows].numpy(), 333, 5, duplicate=0.0, block=100).nearest
    scores = vectors.double() @ vectors.double().T
    scores.fill_diagonal_(9.0)
    assert np.array_equal(graph, scores.argsort(dim=1, descending=True)[:, :5].numpy())


def cosines(n=300, d=6, seed=0):
    return torch.nn.functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1
    ).numpy()


def test_near_duplicates_count_once_in_a_neighbourhood():
    vectors = cosines(60)
    vectors = np.concatenate([vectors, vectors[:20], vectors[:20]])  # three copies of the first twenty
    graph = neighbour_graph(lambda rows: vectors[rows], 100, 5, block=32)
    assert np.array_equal(graph.copies[:20], graph.copies[60:80]) and np.array_equal(
        graph.copies[:20], graph.copies[80:]
    )
    assert len(np.unique(graph.copies)) == 60
    assert graph.nearest[:, 0].tolist() == list(range(100))
    groups = graph.copies[graph.nearest]
    assert (graph.nearest >= 0).all() and all(len(set(row)) == 5 for row in groups.tolist())
    assert np.array_equal(groups[:20, 1:], groups[60:80, 1:])


def test_what_is_near_depends_on_how_far_texts_are_apart():
    vectors = cosines(60)
    cone = torch.nn.functional.normalize(torch.from_numpy(vectors) + 20 * torch.eye(6)[0], dim=1).numpy()
    assert (cone @ cone.T).min() > 0.98  # as embeddings of some teachers
    graph = neighbour_graph(lambda rows: cone[rows], 60, 5)
    plain = neighbour_graph(lambda rows: vectors[rows], 60, 5)
    assert len(np.unique(graph.copies)) > 50 and len(np.unique(plain.copies)) == 60


def test_where_only_duplicates_are_near_nothing_is():
    vectors = np.zeros((50, 3), dtype=np.float32)
    vectors[:, 0] = 1.0
    graph = neighbour_graph(lambda rows: vectors[rows], 50, 4, block=16)
    assert graph.nearest[:, 0].tolist() == list(range(50)) and (graph.nearest[:, 1:] == -1).all()
    with pytest.raises(ValueError, match="of 50 texts only 1 differ"):
        neighbour_batches(graph, 8, 0, 0)


def test_a_corpus_smaller_than_the_neighbourhood():
    with pytest.raises(ValueError, match="a neighbourhood of 5 needs at least 5 rows, got 4"):
        neighbour_graph(lambda rows: cosines()[rows], 4, 5)


def ring(n, k, step=1):
    return Graph(
        np.stack([(np.arange(k) * step + i) % n for i in range(n)]).astype(np.int32), np.arange(n, dtype=np.int32)
    )


def test_neighbour_batches_hold_distinct_rows_and_whole_neighbourhoods():
    graph = ring(200, 4, step=10)
    plan = neighbour_batches(graph, 32, seed=0, stage=0)
    for step in (0, 1, 24, 25, 77):
        rows = plan(step)
        assert len(rows) == 32 == len(set(rows.tolist())) and rows.dtype == np.int64
        permutation.cache_clear()
        assert np.array_equal(neighbour_batches(graph, 32, seed=0, stage=0)(step), rows)
        assert np.array_equal(rows[:4], graph.nearest[rows[0]])
    assert not np.array_equal(plan(0), plan(25)) and not np.array_equal(plan(0), plan(1))


def test_every_row_is_a_seed_once_in_an_epoch():
    plan = neighbour_batches(ring(96, 1), 8, seed=1, stage=0)  # each its own neighbourhood
    assert sorted(np.concatenate([plan(step) for step in range(12)])) == list(range(96))


def test_a_share_of_the_batch_is_random():
    graph = ring(1000, 5)
    rows = neighbour_batches(graph, 40, seed=0, stage=0, random_share=0.5)(3)
    assert len(set(rows.tolist())) == 40
    in_runs = sum((row + 1) % 1000 in set(rows.tolist()) for row in rows.tolist())
    assert 16 <= in_runs <= 22  # four groups of five
    with pytest.raises(ValueError, match="holds no neighbourhood of 5"):
        neighbour_batches(graph, 40, 0, 0, random_share=0.9)


def test_a_batch_holds_one_of_near_duplicates_and_no_missing_neighbour():
    graph = ring(100, 4)
    copies = np.arange(100) // 2  # 0 and 1 are near-duplicates, 2 and 3, …
    nearest = np.where(np.arange(4) == 2, -1, graph.nearest)
    for step in range(20):
        rows = neighbour_batches(Graph(nearest, copies), 48, seed=5, stage=1)(step)
        assert len(rows) == 48 == len(set(copies[rows].tolist())) and rows.min() >= 0


def test_neighbour_batches_of_identical_neighbourhoods_are_filled_up():
    nearest = np.stack([np.array([i, 0]) for i in range(40)]).astype(np.int32)
    rows = neighbour_batches(Graph(nearest, np.arange(40)), 40, seed=0, stage=0)(3)
    assert sorted(rows.tolist()) == list(range(40))


class Vectors:
    """Teachers' vectors in memory."""

    def __init__(self, vectors, fingerprint="a"):
        self.vectors, self.fingerprint, self.reads = torch.from_numpy(vectors), fingerprint, 0

    def read(self, rows):
        self.reads += len(rows)
        return self.vectors[rows]


def test_a_graph_is_kept_and_one_of_other_vectors_is_built_again(tmp_path):
    told = []
    teachers = Vectors(cosines())
    first = cached_graph(tmp_path, teachers, 300, 4, told.append)
    assert told == ["finding the 3 nearest neighbours of 300 texts by the teachers' embeddings"]
    reads = teachers.reads
    again = cached_graph(tmp_path, teachers, 300, 4, told.append)
    assert len(told) == 1 and teachers.reads < reads + 100 and np.array_equal(again.nearest, first.nearest)

    other = cached_graph(tmp_path, Vectors(cosines(seed=1)), 300, 4, told.append)  # says it is the same teacher
    assert "is a graph of something else (other vectors). Building it again" in told[1]
    assert np.array_equal(other.nearest, neighbour_graph(lambda rows: cosines(seed=1)[rows], 300, 4).nearest)
    assert not np.array_equal(other.nearest, first.nearest)

    (folder,) = tmp_path.glob("neighbours-*")
    (folder / "graph.json").write_text("{")
    cached_graph(tmp_path, teachers, 300, 4, told.append)
    assert "something else" in told[3]


def test_runs_that_share_a_cache_find_the_neighbours_once(tmp_path, monkeypatch):
    import threading
    import time

    import jasper_fast.training.neighbours as module

    built, found, honest = [], [], module.neighbour_graph

    def slowly(*given):
        built.append(given)
        time.sleep(0.3)
        return honest(*given)

    monkeypatch.setattr(module, "neighbour_graph", slowly)
    teachers = Vectors(cosines())
    runs = [
        threading.Thread(target=lambda: found.append(cached_graph(tmp_path, teachers, 300, 4, lambda line: None)))
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(built) == 1 and len(found) == 3
    assert all(np.array_equal(graph.nearest, found[0].nearest) for graph in found)
