"""Searches of few rows: masks, a mask per query, and lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jasper_fast.mips import FlatIPIndex, filters, growing, top_k, topk
from jasper_fast.mips.cpu import Queries
from jasper_fast.mips.segment import Segment
from jasper_fast.mips.top_k import SCRATCH
from jasper_fast.ops import native

pytestmark = pytest.mark.skipif(native.extension_path() is None, reason="the compiled extension is not built")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [1, 5, filters.ROW_QUERIES + 12])
def test_a_filter_of_few_rows_searches_these_alone(dtype, size, monkeypatch):
    monkeypatch.setattr(growing, "SEGMENT_BYTES", 0)  # segments of 4096 rows
    rows = torch.randn(9000, 24, generator=torch.Generator().manual_seed(1))
    rows[8000] = rows[50]  # equal scores
    index = FlatIPIndex(24, dtype=dtype)
    index.add(rows)
    queries = torch.randn(size, 24, generator=torch.Generator().manual_seed(2))
    stored = torch.cat([segment.values(0, len(segment), torch.float64) for _, segment in index.segments()])
    mask = torch.rand(9000, generator=torch.Generator().manual_seed(3)) < 0.02
    mask[[50, 8000]] = True
    chosen = mask.nonzero()[:, 0]
    shuffled = chosen[torch.randperm(len(chosen))].repeat(2)
    true = queries.double() @ stored[chosen].T
    monkeypatch.setattr(top_k, "_scan", lambda *given: pytest.fail("all rows were scanned"))
    for k in (1, 20, 400):
        for valid in (mask, chosen, mask.numpy(), shuffled.tolist()):
            scores, ids = index.search(queries, k, valid=valid)
            found = min(k, len(chosen))
            assert (ids[:, found:] == -1).all() and (scores[:, found:] == -torch.inf).all()
            order = true.argsort(dim=1, descending=True, stable=True)[:, :found]
            assert torch.equal(ids[:, :found], chosen[order])
            assert torch.equal(scores[:, :found], true.gather(1, order).float())
    for none in (torch.zeros(9000, dtype=torch.bool), []):
        assert (index.search(queries, 3, valid=none)[1] == -1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_query_may_have_few_rows_of_its_own(dtype, monkeypatch):
    index = FlatIPIndex(24, dtype=dtype)
    index.add(torch.randn(5000, 24))
    queries, masks = torch.randn(7, 24), torch.rand(7, 5000) < 0.02
    masks[3] = False
    expected = index.search(queries, 9, valid=masks, precision="exact")
    monkeypatch.setattr(top_k, "_scan", lambda *given: pytest.fail("all rows were scanned"))
    assert all(map(torch.equal, index.search(queries, 9, valid=masks), expected))
    assert (expected[1][3] == -1).all() and not (expected[1][2] == -1).any()


@pytest.mark.parametrize("size", [1, 20])
@pytest.mark.parametrize("begin", [0, 37, 4900])
def test_neighbouring_rows_are_scanned_by_their_codes(size, begin, monkeypatch):
    """Bins without valid rows are left out. What their products would be must not matter."""
    monkeypatch.setattr(filters, "MAX_READ_TOGETHER", 0)
    rows, queries = torch.randn(5000, 24), torch.randn(size, 24)
    rows[: begin or 1] *= 100
    index = FlatIPIndex(24, dtype="float32")
    index.add(rows)
    chosen = torch.arange(begin, min(begin + 200, 5000))
    mask = torch.zeros(5000, dtype=torch.bool)
    mask[chosen] = True
    true = queries.double() @ rows[chosen].double().T
    for k in (1, 30, 300):
        found = min(k, len(chosen))
        for valid in (mask, chosen, mask.expand(size, 5000)):
            ids = index.search(queries, k, valid=valid)[1]
            assert torch.equal(ids[:, :found], chosen[true.argsort(dim=1, descending=True)[:, :found]])
            assert (ids[:, found:] == -1).all()
            assert index.stats()["coarse"] > 0


def test_few_valid_rows_have_the_same_scores_for_any_number_of_queries():
    generator = torch.Generator().manual_seed(5)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for width in (1, 3, 31, 100, 384):
            rows = (torch.randn(50, width, generator=generator) * 20).to(dtype)
            scales = torch.rand(50, generator=generator) if dtype == torch.int8 else torch.empty(0)
            segment = Segment(rows, scales, None)
            queries = Queries.of(torch.randn(9, width, generator=generator))
            together = filters.search_rows([(0, segment)], [torch.arange(50)], queries, 50, True, SCRATCH).sorted()
            for q in range(9):
                own = queries.take(slice(q, q + 1))
                alone = filters.search_rows([(0, segment)], [torch.arange(50)], own, 50, True, SCRATCH)
                assert torch.equal(alone.sorted()[0][0], together[0][q])
                assert torch.equal(alone.sorted()[1][0], together[1][q])
            true = queries.exact @ segment.values(0, 50, torch.float64).T
            assert torch.allclose(together[0], true.gather(1, together[1]), rtol=0, atol=1e-9)


def test_given_ids_may_come_in_any_order_and_more_than_once():
    index = FlatIPIndex(8, dtype="float32")
    ids = torch.randperm(3000) * 3
    index.add(torch.randn(3000, 8), ids)
    wanted = ids[torch.randperm(3000)[:40]]
    query = torch.randn(2, 8)
    expected = index.search(query, 5, valid=torch.isin(ids, wanted))
    for given in (wanted, torch.cat((wanted, wanted)).numpy(), wanted.tolist()):
        assert all(map(torch.equal, index.search(query, 5, valid=given), expected))
    with pytest.raises(ValueError, match="ids: 1 is not in this index"):
        index.search(query, 5, valid=[3, 1])


def test_a_row_that_is_not_finite_is_an_error_if_it_may_be_returned():
    corpus, queries = torch.randn(5000, 8), torch.randn(2, 8)
    corpus[4000, 2] = torch.nan
    with pytest.raises(ValueError, match="corpus: row 4000 holds NaN or infinity"):
        topk(queries, corpus, 3, valid=[17, 4000])
    true = queries.double() @ corpus[[17, 90]].double().T
    ids = topk(queries, corpus, 3, valid=[17, 90])[1]
    assert torch.equal(ids[:, :2], torch.tensor([17, 90])[true.argsort(dim=1, descending=True)])


@pytest.mark.parametrize("power", [-1074, -1030, -900, 0, 900, 1023])
def test_scaled_queries_are_those_of_torch(power):
    queries = torch.tensor([[1.0, -0.75, 0.1], [0.5, 0.25, -1.0], [0.0, -0.0, 0.0]], dtype=torch.float64)
    queries = torch.ldexp(queries, torch.tensor(power))
    _, exponents = np.frexp(queries.abs().amax(dim=1).numpy())
    scaled = Queries.of(queries)
    assert scaled.exponents.tolist() == exponents.tolist()
    assert torch.equal(scaled.exact, torch.from_numpy(np.ldexp(queries.numpy(), -exponents[:, None])))
    assert torch.equal(scaled.scan, scaled.exact.float())
    assert scaled.largest_norm() == pytest.approx(float(scaled.exact.norm(dim=1).max()))


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_a_bound_that_is_too_small_is_found_among_few_rows(size):
    index = FlatIPIndex(40, dtype="float32")
    rows, queries = torch.randn(3000, 40), torch.randn(size, 40)
    index.add(rows)
    mask = torch.rand(3000) < 0.03
    expected = index.search(queries, 7, valid=mask)
    for _, segment in index.segments():
        assert segment.norms is not None
        segment.norms *= 1e-9
    with pytest.warns(RuntimeWarning, match=f"{size} of {size} queries were redone in fp64"):
        found = index.search(queries, 7, valid=mask)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_few_rows_of_any_magnitude_are_in_the_order_of_fp64(dtype):
    """Scores of some rows overflow float32, and others are denormal."""
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(4000, 17, generator=generator)
    rows[:3000] *= torch.logspace(-40, 38, 3000)[:, None].clamp(max=1e37)
    rows[3000] = 0
    index = FlatIPIndex(17, dtype=dtype)
    index.add(rows)
    stored = torch.cat([segment.values(0, len(segment), torch.float64) for _, segment in index.segments()])
    for size in (1, 2, 3, 30):
        queries = torch.randn(size, 17, generator=generator) * 1e3
        queries[-1] = 0
        for begin in (0, 1400, 2970):
            chosen = torch.arange(begin, begin + 90, 2)
            true = queries.double() @ stored[chosen].T
            for k in (1, 12, 45):
                ids = index.search(queries, k, valid=chosen)[1]
                got = queries.double()[:, None] @ stored[ids].transpose(1, 2)
                gap = 1e-12 * queries.double().norm(dim=1, keepdim=True) * stored[chosen].norm(dim=1).max()
                assert ((got[:, 0] - true.topk(k, dim=1).values).abs() <= gap).all()
                assert torch.equal(ids[-1], chosen[:k])  # all scores are equal
