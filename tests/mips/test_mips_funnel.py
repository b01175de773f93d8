"""The funnel against full-width search, and the exports against the index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jasper_fast.mips import FlatIPIndex, SignIndex
from jasper_fast.mips.exports import to_dataset, to_faiss, to_parquet
from jasper_fast.mips.funnel import funnel, funnel_recall
from jasper_fast.utils.errors import JasperError


def filled(vectors: torch.Tensor, dtype: str) -> FlatIPIndex:
    index = FlatIPIndex(vectors.shape[1], dtype=dtype)
    index.add(vectors)
    return index


def test_a_funnel_ranks_its_shortlist_by_the_wide_vectors():
    wide, queries = torch.randn(600, 32), torch.randn(9, 32)
    index, narrow = filled(wide, "float32"), filled(wide[:, :8], "int8")
    scores, ids = funnel(queries[:, :8], queries, narrow, index, 5, shortlist=40)
    _, chosen = narrow.search(queries[:, :8], 40, precision="fast")
    true = queries.double() @ wide.double().T
    for q in range(9):
        among = chosen[q].sort().values
        expected = among[true[q][among].argsort(descending=True, stable=True)][:5]
        assert torch.equal(ids[q], expected)
    assert torch.allclose(scores.double(), true.gather(1, ids), rtol=1e-7)
    full = index.search(queries, 5)[1]
    by_hand = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ids.tolist(), full.tolist(), strict=True)])
    assert 0 < by_hand < 1 and funnel_recall(ids, queries, index) == pytest.approx(by_hand)
    everything = funnel(queries[:, :8].numpy(), queries.numpy(), narrow, index, 5, shortlist=600)
    assert isinstance(everything[1], np.ndarray) and np.array_equal(everything[1], full.numpy())
    assert funnel_recall(everything[1], queries.numpy(), index) == 1.0


def test_the_recall_of_fewer_rows_than_asked_for_is_that_of_the_rows_there_are():
    wide, queries = torch.randn(5, 8), torch.randn(3, 8)
    index = filled(wide, "float32")
    _, ids = funnel(queries[:, :4], queries, filled(wide[:, :4], "int8"), index, 10, shortlist=20)
    assert ids.shape == (3, 10) and (ids[:, 5:] == -1).all()
    assert funnel_recall(ids, queries, index) == 1.0
    assert funnel_recall(ids.masked_fill(ids == ids[:, :1], -1), queries, index) == pytest.approx(0.8)
    assert funnel_recall(torch.full((3, 10), -1), queries, FlatIPIndex(8)) == 1.0


def test_a_funnel_whose_parts_do_not_fit_is_refused():
    a, b = filled(torch.randn(50, 8), "int8"), filled(torch.randn(51, 32), "float32")
    with pytest.raises(ValueError, match="narrow index holds 50 rows and the wide one 51"):
        funnel(torch.randn(1, 8), torch.randn(1, 32), a, b, 5, shortlist=10)
    b = filled(torch.randn(50, 32), "float32")
    with pytest.raises(ValueError, match="k must be from 1 to the shortlist's length, 10; got 11"):
        funnel(torch.randn(1, 8), torch.randn(1, 32), a, b, 11, shortlist=10)
    with pytest.raises(ValueError, match="1 narrow queries and 2 wide ones"):
        funnel(torch.randn(1, 8), torch.randn(2, 32), a, b, 5, shortlist=10)
    with pytest.raises(ValueError, match="wide_queries have width 31, the wide index 32"):
        funnel(torch.randn(1, 8), torch.randn(1, 31), a, b, 5, shortlist=10)
    with pytest.raises(ValueError, match="wide_queries: row 0 holds NaN"):
        funnel(torch.randn(1, 8), torch.full((1, 32), torch.nan), a, b, 5, shortlist=10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_exports_hold_the_stored_vectors(dtype, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    index = filled(torch.randn(9000, 6), dtype)
    texts = [f"text {i}" for i in range(9000)]
    to_parquet(index, tmp_path / "out", {"text": texts})
    table = pq.read_table(tmp_path / "out" / "vectors.parquet")
    assert table.column_names == ["id", "vector", "text"] and table["text"].to_pylist() == texts
    assert table["id"].to_pylist() == list(range(9000))
    vectors = np.stack(table["vector"].to_numpy())
    for i in (0, 8191, 8192, 8999):
        assert np.array_equal(vectors[i], index.reconstruct(i).numpy())
    dataset = to_dataset(index, {"text": texts})
    assert dataset[8999]["text"] == "text 8999" and dataset[8999]["vector"] == vectors[8999].tolist()
    with pytest.raises(ValueError, match="'text' has 3 values for 9000 rows"):
        to_parquet(index, tmp_path / "other", {"text": texts[:3]})
    with pytest.raises(JasperError, match="exists already"):
        to_parquet(index, tmp_path / "out")
    with pytest.raises(JasperError, match="the index is empty"):
        to_parquet(FlatIPIndex(3), tmp_path / "empty")


def test_the_faiss_index_finds_the_same():
    pytest.importorskip("faiss")
    index, queries = filled(torch.randn(500, 16), "float32"), torch.randn(4, 16)
    scores, ids = to_faiss(index).search(queries.numpy(), 7)
    assert np.array_equal(ids, index.search(queries, 7)[1].numpy())


@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_sign_patterns_are_found_in_order(width):
    corpus, queries = torch.randn(5000, width).round(), torch.randn(6, width)
    index = SignIndex(width)
    index.add(corpus[:4100])
    index.add(corpus[4100:].double().numpy())
    signs = torch.where(corpus > 0, 1, -1) @ torch.where(queries > 0, 1, -1).T  # (N, Q)
    for k in (1, 30, 5000):
        scores, ids = index.search(queries, k)
        assert torch.equal(ids, signs.T.argsort(dim=1, descending=True, stable=True)[:, :k])
        assert torch.equal(scores, signs.T.gather(1, ids).float())
    few = SignIndex(width, scratch=1)
    few.add(corpus)
    again = few.search(queries.numpy(), 30)
    assert isinstance(again[1], np.ndarray) and np.array_equal(again[1], index.search(queries, 30)[1].numpy())


def test_a_binary_shortlist_is_ranked_by_the_wide_vectors():
    centres = torch.randn(40, 64)
    wide = torch.nn.functional.normalize(centres[torch.randint(0, 40, (2000,))] + 0.5 * torch.randn(2000, 64), dim=1)
    queries = torch.nn.functional.normalize(centres[:9] + 0.5 * torch.randn(9, 64), dim=1)
    index, narrow = filled(wide, "float32"), SignIndex(32)
    narrow.add(wide[:, :32])
    recalls = []
    for length in (5, 200, 2000):
        scores, ids = funnel(queries[:, :32], queries, narrow, index, 5, shortlist=length)
        true = queries.double() @ wide.double().T
        assert torch.allclose(scores.double(), true.gather(1, ids), rtol=1e-7)
        recalls.append(funnel_recall(ids, queries, index))
    assert recalls[0] < recalls[1] <= recalls[2] == 1.0 and recalls[1] > 0.7


def test_wrong_patterns_are_refused():
    index = SignIndex(8)
    assert index.search(torch.randn(1, 8), 1)[1].tolist() == [[-1]]
    with pytest.raises(ValueError, match="x: row 1 holds NaN"):
        index.add(torch.tensor([[1.0] * 8, [torch.nan] * 8]))
    assert len(index) == 0
    index.add(torch.randn(3, 8))
    scores, ids = index.search(torch.randn(1, 8), 4)
    assert sorted(ids[0].tolist()) == [-1, 0, 1, 2] and scores[0, 3] == -torch.inf
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        index.search(torch.randn(1, 8), 0)
    with pytest.raises(ValueError, match="q has width 7, the index 8"):
        index.search(torch.randn(1, 7), 1)
    with pytest.raises(ValueError, match="dim must be a whole number"):
        SignIndex(0)
