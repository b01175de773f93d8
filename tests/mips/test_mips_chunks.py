"""The search's scan by library products in chunks of rounded scores, and the repair of missed queries.

Few queries take this path here, so that the interpreter is fast.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from jasper_fast.mips import cuda, top_k, topk
from jasper_fast.mips.cpu import Queries
from jasper_fast.mips.segment import BIN
from jasper_fast.mips.topk_state import TopKState
from jasper_fast.ops import products

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

from jasper_fast.kernels import mips, mips_chunks  # noqa: E402
from tests.helpers.mips_kernels import (  # noqa: E402, F401
    DEVICE,
    _poisoned_memory,
    found,
    in_the_order_of_fp64,
    segment_of,
    through_kernels,
)


@pytest.fixture(autouse=True)
def _chunked(monkeypatch):
    """Take chunks of 256 rows for 2 queries, and 128 for more."""
    monkeypatch.setattr(mips_chunks, "MIN_CHUNKED", 2)
    monkeypatch.setattr(mips_chunks, "CHUNK_BYTES", 4096)


@pytest.mark.parametrize(
    "kind, stored, rows, size, width, share, masks, k",
    [
        ("normal", "float32", 700, 3, 17, None, False, 5),
        ("duplicated", "int8", 320, 2, 8, None, False, 5),  # ties
        ("constant", "float32", 200, 2, 3, None, False, 3),
        ("grid", "float16", 300, 3, 2, None, False, 4),
        ("near-tied", "float32", 300, 2, 32, None, False, 3),
        ("huge", "float32", 257, 2, 16, None, False, 4),
        ("tiny", "float32", 257, 2, 16, None, False, 4),
        ("mixed scales", "float32", 300, 2, 16, None, False, 2),
        ("zeros", "float32", 130, 2, 1, None, False, 2),
        ("normal", "int8", 500, 3, 33, 0.3, False, 4),
        ("normal", "float32", 300, 3, 16, 0.02, True, 4),  # fewer valid rows than k
        ("normal", "float32", 300, 2, 16, 0.0, True, 4),
    ],
)
def test_the_order_of_fp64(kind, stored, rows, size, width, share, masks, k):
    in_the_order_of_fp64(kind, stored, rows, size, width, share, masks, False, 3, k, -(-rows // BIN) // 2)


@pytest.mark.parametrize("rows, size, bytes_of_chunk", [(128, 2, 4096), (129, 3, 1), (640, 9, 1 << 20), (65, 2, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_cover_all_rows(rows, size, bytes_of_chunk, dtype, monkeypatch):
    monkeypatch.setattr(mips_chunks, "CHUNK_BYTES", bytes_of_chunk)
    corpus, queries = torch.randn(rows, 16).to(DEVICE, dtype), torch.randn(size, 16).to(DEVICE, torch.bfloat16)
    expected = corpus.bfloat16().double() @ queries.double().T
    chunks = [(first, scores.double()) for first, scores in mips_chunks.chunks(corpus, queries)]
    assert [first for first, _ in chunks] == list(range(0, rows, max(128, min(rows, len(chunks[0][1])))))
    off = (torch.cat([scores for _, scores in chunks]) - expected).abs()
    assert bool((off <= expected.abs() * mips.ROUNDING + 1e-5).all())


def test_products_are_added_in_float32(monkeypatch):
    """The setting is changed only for the products, and restored after an error."""
    settings, seen, plain = torch.backends.cuda.matmul, [], torch.mm

    def product(*factors, **options):
        seen.append(settings.allow_bf16_reduced_precision_reduction)
        return plain(*factors, **options)

    monkeypatch.setattr(torch, "mm", product)
    before = settings.allow_bf16_reduced_precision_reduction
    corpus, queries = torch.randn(300, 16, dtype=torch.bfloat16), torch.randn(2, 16, dtype=torch.bfloat16)
    for _ in mips_chunks.chunks(corpus, queries):
        assert settings.allow_bf16_reduced_precision_reduction == before and not products._lock.locked()
    assert seen == [False, False]
    with pytest.raises(RuntimeError), products.bfloat16_sums_in_float32():
        raise RuntimeError
    assert settings.allow_bf16_reduced_precision_reduction == before and not products._lock.locked()


def test_rounded_scores_are_within_their_errors(monkeypatch):
    """Without their part for rounding, scores break the errors, and the search notices it."""
    corpus, queries = torch.randn(400, 256), torch.randn(3, 256)
    corpus[7] = queries[0] * 3
    segment, values = segment_of(corpus, "bfloat16")
    expected = (queries.double() @ values.T).argsort(dim=1, descending=True)[:, :3]
    with through_kernels():
        assert torch.equal(found([(0, segment)], 400, queries, 3)[1], expected)
        plain = cuda.operands
        monkeypatch.setattr(mips, "ROUNDING", 0.0)
        monkeypatch.setattr(cuda, "operands", lambda *a: (*(b := plain(*a))[:2], tuple(x * 1e-3 for x in b[2])))
        with pytest.warns(RuntimeWarning, match="redone in fp64"):
            assert torch.equal(found([(0, segment)], 400, queries, 3)[1], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_and_queries_are_rejected(bad):
    corpus, queries = torch.randn(300, 16, device=DEVICE), torch.randn(3, 16, device=DEVICE)
    broken = corpus.clone()
    broken[200, 3] = bad
    with through_kernels(), pytest.raises(ValueError, match="row 200 holds NaN or infinity"):
        topk(queries, broken, 3)
    queries[1, 2] = bad
    with through_kernels(), pytest.raises(ValueError, match="queries"):
        topk(queries, corpus, 3)


@pytest.mark.parametrize("chunked", [True, False], ids=["chunks", "registers"])
@pytest.mark.parametrize(
    "chosen, why",
    [(cuda.Plan(2, 1, 1024), "too few rows"), (cuda.Plan(1, 60, 256), "more rows than the capacity")],
    ids=["few", "many"],
)
def test_missed_queries_are_repaired_in_the_same_chain(chosen, why, chunked, monkeypatch):
    """Their thresholds come from the sample or from the rows that were collected, and nothing is searched again."""
    monkeypatch.setattr(mips_chunks, "MIN_CHUNKED", 2 if chunked else 99)
    monkeypatch.setattr(cuda, "MAX_REPAIRED", 4)
    monkeypatch.setattr(cuda.Plan, "spare_rank", property(lambda self: 6))
    corpus, queries = torch.randn(1024, 16), torch.randn(3, 16)
    segment, values = segment_of(corpus, "float32")
    monkeypatch.setattr(cuda, "plan", lambda rows, k, size: chosen)
    first = mock.Mock(side_effect=cuda._repair)
    monkeypatch.setattr(cuda, "_repair", first)
    with through_kernels(), mock.patch.object(top_k, "_search_again", side_effect=AssertionError("redone")):
        scores, ids = found([(0, segment)], 1024, queries, 6)
    assert (first.call_args.args[5] < torch.inf).all(), why
    true = queries.double() @ values.T
    assert torch.equal(ids, true.argsort(dim=1, descending=True)[:, :6])
    torch.testing.assert_close(scores, true.gather(1, ids).float(), rtol=1e-6, atol=1e-6)


def test_queries_beyond_the_repair_are_searched_again(monkeypatch):
    monkeypatch.setattr(cuda, "MAX_REPAIRED", 2)
    monkeypatch.setattr(cuda.Plan, "spare_rank", property(lambda self: 12))
    monkeypatch.setattr(cuda, "plan", lambda rows, k, size: cuda.Plan(2, 1, 1024))
    again = mock.Mock(side_effect=top_k._search_again)
    monkeypatch.setattr(top_k, "_search_again", again)
    corpus, queries = torch.randn(1024, 16), torch.randn(5, 16)
    segment, values = segment_of(corpus, "float32")
    valid = torch.rand(5, 1024) < 0.8
    with through_kernels():
        _, ids = found([(0, segment)], 1024, queries, 6, valid)
    assert again.call_args.args[4].tolist() == [2, 3, 4]
    true = (queries.double() @ values.T).masked_fill(~valid, -torch.inf)
    assert torch.equal(ids, true.argsort(dim=1, descending=True)[:, :6])


def test_a_repair_leaves_complete_queries_as_they_are():
    """One query of three has too many equal rows for the first scan, and the others are done."""
    corpus, queries = torch.randn(640, 16), torch.randn(3, 16, device=DEVICE)
    segment, _ = segment_of(corpus, "float32")
    asked, state = Queries.of(queries), TopKState(3, 4, torch.device(DEVICE))
    with through_kernels():
        cuda.search_cuda(segment, segment.rows, 0, asked, torch.empty(0, device=DEVICE), state, True)
        assert not state.missed.any()
        before = {name: getattr(state, name).clone() for name in ("best", "counts", "cutoffs", "broken")}
        scan = cuda.scan_of(segment, segment.rows, asked, None, True, True)
        thresholds = torch.full((3,), torch.inf, device=DEVICE)
        counts = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        thresholds[1] = -torch.inf  # collects everything again: each row twice in its results
        cuda._repair(scan, segment, 1000, asked, state, thresholds, counts, 1024, True)
    assert not state.missed.any()
    for name, own in before.items():
        assert torch.equal(getattr(state, name)[[0, 2]], own[[0, 2]]), name
    ids = state.sorted()[1][1]
    assert torch.equal(ids[::2] + 1000, ids[1::2])


def test_the_rank_of_a_repair_nearly_fills_the_capacity():
    for rows, k, size in ((1_000_000, 100, 4096), (1_000_000, 10, 1), (65_536, 16, 8192), (64_000, 1000, 100)):
        chosen = cuda.plan(rows, k, size)
        assert chosen.rank <= chosen.spare_rank <= 2 * chosen.rank
        assert chosen.step == 1 or chosen.step * chosen.spare_rank <= max(chosen.capacity, chosen.step * chosen.rank)
        assert chosen.step > 1 or chosen.spare_rank == chosen.rank
