"""The search on a GPU before and after its scan, interpreted without a GPU, against plain torch.

Memory beyond the counts must not matter, and `_poisoned_memory` fills it.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from jasper_fast.mips import FlatIPIndex, cuda, rerank, threshold, top_k, topk
from jasper_fast.mips.cpu import Queries, bounds
from jasper_fast.mips.segment import BIN, Segment, set_norms
from jasper_fast.mips.threshold import float32_norms, sample
from jasper_fast.mips.top_k import SCRATCH, search
from jasper_fast.mips.topk_state import TopKState
from tests.helpers.mips_cases import KINDS, make

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

from jasper_fast.kernels import mips_epilogue, mips_prologue, mips_rescore  # noqa: E402
from jasper_fast.kernels.mips_epilogue import Collected  # noqa: E402
from tests.helpers.mips_kernels import COMPILED, DEVICE, STORED, _poisoned_memory, on_gpu, segment_of, through_kernels  # noqa: E402, F401

NAMES = ("counts", "cutoffs", "broken", "missed")


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch):
    """The interpreter is slow for each program. No result depends on the number of products per program."""
    if not COMPILED:
        monkeypatch.setattr(mips_rescore, "PAIRS", 256)


def collected(
    segment: Segment, queries: Queries, wanted: int, capacity: int, valid: Tensor | None = None, proven: bool = True
) -> Collected:
    """Collect rows as a scan with thresholds at each query's ``wanted``-th best lower bound, in random order."""
    asked, scale, limits = cuda.operands(segment, segment.rows, queries, proven)
    factor = asked.double() if scale is None else asked.double() * scale.double()[:, None]
    scores = (factor @ segment.values(0, len(segment), torch.float64).T).float()
    norms = float32_norms(segment)
    error = norms[torch.arange(len(segment), device=DEVICE) // BIN] * limits[0][:, None] + limits[1][:, None]
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    there = min(wanted, len(segment))
    thresholds = (scores - error).topk(there, dim=1).values[:, -1].contiguous()
    reach = (scores + error >= thresholds[:, None]) & (scores > -torch.inf)
    found, rows = (torch.empty(len(queries), capacity, dtype=t, device=DEVICE) for t in (torch.float32, torch.int32))
    for q in range(len(queries)):
        own = reach[q].nonzero()[:, 0]
        own = own[torch.randperm(len(own)).to(DEVICE)][:capacity]
        found[q, : len(own)], rows[q, : len(own)] = scores[q, own], own.int()
    return Collected(reach.sum(dim=1).int(), found, rows, thresholds, norms, limits, thresholds)


def states(size: int, k: int) -> tuple[TopKState, TopKState]:
    return TopKState(size, k, torch.device(DEVICE)), TopKState(size, k, torch.device(DEVICE))


def both(
    found: Collected, segment: Segment, first_id: int, queries: Queries, pair: tuple[TopKState, TopKState], proven=True
):
    """Check that the kernels and torch leave the same state, and return it sorted."""
    again = rerank.rerank(found, segment, first_id, queries, pair[0], proven)
    assert torch.equal(again, rerank.rerank_in_torch(found, segment, first_id, queries, pair[1], proven))
    assert (again < torch.inf).logical_or(~pair[0].missed).all()
    for name in NAMES:
        assert torch.equal(getattr(pair[0], name), getattr(pair[1], name)), name
    scores, ids = pair[0].reversed()
    for other in (TopKState.sorted(pair[0]), TopKState.sorted(pair[1]), pair[1].reversed()):
        assert torch.equal(scores, other[0]) and torch.equal(ids, other[1])
    return scores, ids


def best(segment: list[tuple[int, Segment]], queries: Queries, k: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the k best fp64 products of all rows, ties by the lower id, padded with −inf and −1."""
    size = len(queries)
    scores, ids = [], []
    for first, part in segment:
        query = torch.arange(size, device=DEVICE).repeat_interleave(len(part))
        row = torch.arange(len(part), device=DEVICE).repeat(size)
        own = part.scales if part.rows.dtype == torch.int8 else None
        true = mips_rescore.rescore(queries.exact, part.rows, own, query, row).view(size, len(part))
        scores.append(true if valid is None else true.masked_fill(~valid[..., : len(part)], -torch.inf))
        ids.append(row.view(size, len(part)) + first)
    order = torch.cat(scores, 1).sort(dim=1, descending=True, stable=True)
    number = torch.cat(ids, 1).gather(1, order.indices)[:, :k]
    return order.values[:, :k], number.masked_fill(order.values[:, :k] == -torch.inf, -1)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("duplicated", "grid", "constant", "zeros")])
def test_two_pieces_leave_the_best_of_both(kind, stored, k):
    if stored == "float16" and kind in ("huge", "tiny", "mixed scales"):
        pytest.skip("float16 cannot hold them")
    queries = Queries.of(make(kind, 3, 17, 5).to(DEVICE))
    pair, parts = states(3, k), []
    for first, rows in ((0, 300), (2**33, 200)):
        segment, _ = segment_of(make(kind, rows, 17, rows), stored)
        parts.append((first, segment))
        both(collected(segment, queries, k + 4, 1024), segment, first, queries, pair)
    scores, ids = pair[0].reversed()
    # Exceptions: indistinguishable rows, and rows so much smaller than others that bounds do not separate them.
    done = ~pair[0].missed
    assert done.all() or kind in ("near-tied", "mixed scales")
    expected = best(parts, queries, k, None)
    assert torch.equal(scores[done], expected[0][done]) and torch.equal(ids[done], expected[1][done])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", ["duplicated", "grid", "constant", "zeros"])
def test_ties_are_broken_by_the_lower_id(kind, stored):
    """Rows of the earlier segment come first, in any order of search."""
    queries = Queries.of(make(kind, 2, 70, 5).to(DEVICE))
    pair, parts = states(2, 7), []
    for first, rows in ((64, 64), (0, 64)):
        segment, _ = segment_of(make(kind, rows, 70, 9), stored)
        parts.insert(0, (first, segment))
        both(collected(segment, queries, 7, 1024), segment, first, queries, pair)
    assert not pair[0].missed.any()
    expected = best(parts, queries, 7, None)
    found = pair[0].reversed()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("share", [0.0, 0.005, 0.1])
@pytest.mark.parametrize("stored", STORED)
def test_fewer_valid_rows_than_k(stored, share):
    segment, _ = segment_of(torch.randn(640, 32), stored)
    queries, pair = Queries.of(torch.randn(4, 32, device=DEVICE)), states(4, 10)
    valid = torch.rand(4, 640, device=DEVICE) < share
    found = collected(segment, queries, 12, 1024, valid)
    scores, ids = both(found, segment, 0, queries, pair)
    expected = best([(0, segment)], queries, 10, valid)
    assert torch.equal(scores, expected[0]) and torch.equal(ids, expected[1])


@pytest.mark.parametrize("stored", STORED)
def test_fast_takes_scores_as_they_are(stored):
    segment, _ = segment_of(torch.randn(500, 32), stored)
    queries, pair = Queries.of(torch.randn(4, 32, device=DEVICE)), states(4, 10)
    for first in (0, 500):
        found = collected(segment, queries, 15, 1024, proven=False)
        scores, ids = both(found, segment, first, queries, pair, proven=False)
    assert torch.equal(scores.float().double(), scores)
    assert torch.equal(ids[:, ::2] + 500, ids[:, 1::2])  # the same rows twice


@pytest.mark.parametrize("programs", [1, 1 << 20])
@pytest.mark.parametrize("k, capacity", [(1, 1024), (130, 1024), (80, 2048), (60, 4096), (40, 8192)])
def test_many_candidates(k, capacity, programs, monkeypatch):
    """With any number of programs for a query, and of rows in a program."""
    monkeypatch.setattr(mips_epilogue, "TARGET_PROGRAMS", programs)
    segment, _ = segment_of(torch.randn(2 * k + 100, 8), "float32")
    queries, pair = Queries.of(torch.randn(2, 8, device=DEVICE)), states(2, k)
    for first in (0, 10_000):
        scores, ids = both(collected(segment, queries, k + 30, capacity), segment, first, queries, pair)
    expected = best([(0, segment), (10_000, segment)], queries, k, None)
    assert torch.equal(scores, expected[0]) and torch.equal(ids, expected[1]) and not pair[0].missed.any()


def equal_rows(rows: int, capacity: int, k: int) -> tuple[Segment, Queries, Collected]:
    """Return rows none of which can be skipped."""
    segment, _ = segment_of(torch.full((rows, 16), 0.25), "float32")
    queries = Queries.of(torch.randn(2, 16, device=DEVICE))
    return segment, queries, collected(segment, queries, k, capacity)


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize("rows, capacity, fits", [(72, 1024, True), (73, 1024, False), (60, 60, True), (61, 60, False)])
def test_queries_beyond_the_capacity_are_missed_and_change_nothing(rows, capacity, fits, proven):
    """For k = 4, 72 rows may be rescored. None are if more were collected than the capacity."""
    before, queries, found = equal_rows(10, 1024, 4)
    pair = states(2, 4)
    both(found, before, 1000, queries, pair, proven)
    held = pair[0].reversed()
    segment, _, found = equal_rows(rows, capacity, 4)
    found = collected(segment, queries, 4, capacity)
    after = both(found, segment, 0, queries, pair, proven)
    assert pair[0].missed.tolist() == [not fits] * 2
    assert torch.equal(after[1], held[1]) != fits
    if fits:
        assert after[1].tolist() == [[0, 1, 2, 3]] * 2


def test_a_threshold_that_was_too_high_is_noticed():
    segment, _ = segment_of(torch.randn(500, 32), "float32")
    queries, pair = Queries.of(torch.randn(4, 32, device=DEVICE)), states(4, 10)
    both(collected(segment, queries, 5, 1024), segment, 0, queries, pair)
    assert pair[0].missed.all() and not pair[0].counts.any()


def test_earlier_results_are_a_cutoff():
    """A query that already has k better rows keeps none of these and is complete."""
    segment, _ = segment_of(torch.rand(200, 32), "float32")
    weak, _ = segment_of(torch.rand(200, 32) - 100, "float32")
    queries, pair = Queries.of(torch.rand(3, 32, device=DEVICE) + 0.1), states(3, 6)
    held = both(collected(segment, queries, 9, 1024), segment, 0, queries, pair)
    found = collected(weak, queries, 9, 1024)
    known = rerank.just_below(pair[0].cutoffs)
    found.scores.fill_(torch.nan), found.rows.fill_(99)
    found = replace(found, counts=torch.zeros_like(found.counts), thresholds=known, spares=known)
    after = both(found, weak, 200, queries, pair)
    assert torch.equal(held[0], after[0]) and torch.equal(held[1], after[1]) and not pair[0].missed.any()


@pytest.mark.parametrize("stored", STORED)
def test_a_planted_error_is_seen(stored):
    segment, _ = segment_of(torch.randn(500, 32), stored)
    queries, pair = Queries.of(torch.randn(4, 32, device=DEVICE)), states(4, 10)
    found = collected(segment, queries, 15, 1024)
    best_place = found.scores[2, : int(found.counts[2])].argmax()
    found.scores[2, best_place] += 3 * found.norms.max() * found.limits[0][2]
    both(found, segment, 0, queries, pair)
    assert pair[0].broken.tolist() == [False, False, True, False]


@pytest.mark.parametrize("width", [1, 70, 128, 300, 1000])
@pytest.mark.parametrize("stored", STORED)
def test_the_order_of_a_sum_depends_on_the_width_alone(stored, width):
    """A row alone, among others, and as one of a query's candidates has the same bits."""
    segment, values = segment_of(torch.randn(100, width), stored)
    queries = Queries.of(torch.randn(2, width, dtype=torch.float64, device=DEVICE))
    own = segment.scales if stored == "int8" else None
    row = torch.arange(100, device=DEVICE).repeat(2)
    query = torch.arange(2, device=DEVICE).repeat_interleave(100)
    true = mips_rescore.rescore(queries.exact, segment.rows, own, query, row)
    alone = [
        mips_rescore.rescore(queries.exact, segment.rows, own, query[i : i + 1], row[i : i + 1]) for i in (0, 7, 150)
    ]
    assert torch.equal(torch.cat(alone), true[[0, 7, 150]])
    pair = states(2, 100)
    rerank.rerank(collected(segment, queries, 100, 1024), segment, 0, queries, pair[0], True)
    scores, ids = pair[0].reversed()
    assert torch.equal(scores, true.view(2, 100).gather(1, ids))
    torch.testing.assert_close(true.view(2, 100).cpu(), queries.exact.cpu() @ values.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bins", [1, 30, 64, 65, 1500, 5000])
def test_thresholds(bins):
    lower = torch.randn(6, bins, device=DEVICE)
    lower[1] = -lower[1].abs()
    lower[2, torch.rand(bins) < 0.7] = -torch.inf
    lower[3] = 0.25
    lower[4] = torch.where(lower[4] > 0, 0.0, -0.0)
    lower[5] *= 1e36
    cutoffs = torch.full((6,), -torch.inf, dtype=torch.float64, device=DEVICE)
    for rank in {1, -(-bins // 2), bins}:
        for cutoff in (-torch.inf, 0.5, -1.0):
            cutoffs[:3] = cutoff
            expected = torch.maximum(lower.topk(rank, dim=1).values[:, -1], rerank.just_below(cutoffs))
            found, other, *counts = mips_prologue.thresholds(lower, (rank, 1), cutoffs)
            assert torch.equal(found, expected)
            assert torch.equal(other, torch.maximum(lower.amax(dim=1), rerank.just_below(cutoffs)))
            assert all(not count.any() and count.dtype == torch.int32 and len(count) == 6 for count in counts)


def test_cutoffs_are_rounded_down():
    """They become the float32 below the nearest, as in torch."""
    cutoffs = [0.0, -0.0, 1.0, -1.0, 1 + 2.0**-30, 1e-42, -1e-42, 1e-300, -1e-300, 1e37, -1e37, -torch.inf, 0.1, -0.1]
    cutoffs = torch.tensor(cutoffs, dtype=torch.float64, device=DEVICE)
    lower = torch.full((len(cutoffs), 1), -torch.inf, device=DEVICE)
    found, *_ = mips_prologue.thresholds(lower, (1, 1), cutoffs)
    assert torch.equal(found, rerank.just_below(cutoffs))
    assert (found.double() < cutoffs).logical_or_(cutoffs == -torch.inf).all()


@pytest.mark.parametrize("width", [1, 17, 512, 700])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.int8, pytest.param(torch.bfloat16, marks=on_gpu)]
)
def test_queries_are_rounded_and_bounded(dtype, width):
    given = torch.randn(9, width, dtype=torch.float64, device=DEVICE)
    given[1] = 0
    queries = Queries.of(given)
    asked, scales, (relative, absolute) = mips_prologue.operands(queries.exact, dtype, 1e-4, 1e-30)
    if dtype == torch.int8:
        wanted = (queries.exact.abs().amax(dim=1) / 127).float()
        wanted[1] = 1
        assert torch.equal(scales, wanted)
        codes = (queries.exact / scales.double()[:, None]).round().clamp(-127, 127)
        assert torch.equal(asked, codes.to(torch.int8))
        scanned = codes * scales.double()[:, None]
    else:
        assert scales is None and torch.equal(asked, queries.scan.to(dtype))
        scanned = asked.double()
    least = bounds(scanned, queries, 1e-4)[:, 0]
    assert (relative.double() >= least).all() and (relative.double() <= least * (1 + 4e-6)).all()
    assert (absolute.double() >= 1e-30).all() and (absolute <= 1.00001e-30).all()


def test_the_order_of_scores_that_need_no_proof_has_no_errors():
    segment, _ = segment_of(torch.randn(70, 17), "float32")
    queries = Queries.of(torch.randn(3, 17, device=DEVICE))
    for proven in (True, False):
        _, _, limits = cuda.operands(segment, segment.rows, queries, proven)
        assert bool(torch.cat(limits).any()) == proven


def lasting(rows: int, width: int) -> tuple[Segment, Tensor]:
    segment, values = segment_of(torch.randn(rows, width), "float32")
    segment.persistent = True
    return segment, values


def test_a_sample_is_drawn_once(monkeypatch):
    drawn = mock.Mock(side_effect=threshold._random_rows)
    monkeypatch.setattr(threshold, "_random_rows", drawn)
    segment, _ = lasting(6400, 8)
    scanned = segment.rows
    first = sample(segment, scanned, 32)
    assert sample(segment, scanned, 32) is first and drawn.call_count == 1
    assert torch.equal(first.rows, scanned[first.numbers]) and torch.equal(
        first.numbers // 32, torch.arange(200).to(DEVICE)
    )
    assert torch.equal(first.norms, float32_norms(segment)[first.numbers // BIN])
    assert (float32_norms(segment).double() >= segment.norms).all() and float32_norms(segment) is float32_norms(segment)
    sample(segment, scanned, 8), sample(segment, scanned, 8)  # too large to stay with an index
    assert drawn.call_count == 3
    segment.persistent = False  # a search's own segment goes with it
    sample(segment, scanned, 8), sample(segment, scanned, 8)
    assert drawn.call_count == 4
    kept = [value for value, _ in segment.derived.values() if isinstance(value, threshold.Sample)]
    assert {len(value.numbers) for value in kept} == {200, 800}
    assert not segment.slice(0, 640).derived


def test_a_new_look_at_a_corpus_forgets_its_samples():
    """New norms and new rows discard the old samples."""
    segment, _ = lasting(640, 8)
    float32_norms(segment)
    set_norms(segment, segment.norms * 2, 0)
    assert torch.equal(float32_norms(segment).double(), (segment.norms * (1 + 2.0**-23)).float().double())
    index = FlatIPIndex(8, dtype="float32", device=DEVICE)
    index.add(torch.randn(100, 8))
    (_, first), (_, same) = *index.segments(), *index.segments()
    assert same is first and first.persistent
    index.add(torch.randn(1, 8))
    ((_, grown),) = index.segments()
    assert grown is not first and len(grown) == 101 and not grown.derived


def test_an_index_that_grows_is_searched_as_it_is():
    """Longer rows fill a started bin, so neither old norms nor old samples may be used."""
    index = FlatIPIndex(16, dtype="int8", device=DEVICE)
    corpus, queries = torch.randn(7000, 16), torch.randn(2, 16)
    corpus[5110:] *= 50
    plan = cuda.Plan(16, 4, 1024)
    with through_kernels(), mock.patch.object(cuda, "plan", lambda rows, k, size: plan):
        for start, stop in ((0, 5110), (5110, 5130), (5130, 7000)):
            index.add(corpus[start:stop])
            whole = FlatIPIndex(16, dtype="int8", device=DEVICE)
            whole.add(corpus[:stop])
            expected = whole.search(queries, 3, precision="exact")
            for _ in range(2):
                scores, ids = index.search(queries, 3)
                assert torch.equal(ids, expected[1]) and torch.equal(scores, expected[0])


def test_an_overwritten_buffer_is_read_again(monkeypatch):
    corpus, queries = torch.randn(6000, 16), torch.randn(2, 16)
    corpus[3000:] *= 40
    expected = topk(queries, corpus, 3, precision="exact")
    buffer = torch.zeros(1500, 16, device=DEVICE)

    def chunks(rows, step, on):
        for start in range(0, len(rows), 1500):
            buffer.copy_(rows[start : start + 1500])
            yield start, buffer

    monkeypatch.setattr(top_k, "chunks", chunks)
    monkeypatch.setattr(cuda, "plan", lambda rows, k, size: cuda.Plan(16, 4, 1024))
    with through_kernels():
        scores, ids = topk(queries.to(DEVICE), corpus.T.contiguous().T.to(DEVICE), 3)  # in segments: not contiguous
    assert torch.equal(ids.cpu(), expected[1]) and torch.equal(scores.cpu(), expected[0])


def test_a_repeated_row_is_returned_twice():
    """No search does this, but every place must be written."""
    segment, _ = segment_of(torch.randn(300, 16), "float32")
    queries, pair = Queries.of(torch.randn(2, 16, device=DEVICE)), states(2, 6)
    for _ in range(2):
        scores, ids = both(collected(segment, queries, 9, 1024), segment, 0, queries, pair)
    assert torch.equal(ids[:, ::2], ids[:, 1::2]) and not pair[0].missed.any()


def test_the_largest_blocks_are_those_that_are_asked_for():
    assert mips_epilogue.BLOCKS[-1] == rerank.MAX_KERNEL_CANDIDATES and mips_prologue.BLOCKS[-1] == cuda.MAX_KERNEL_BINS


def test_more_bins_than_a_program_holds_go_through_torch(monkeypatch):
    lower, state = torch.randn(3, 100, device=DEVICE), states(3, 2)[0]
    state.cutoffs[1] = 10
    chosen = cuda.Plan(16, 7, 1024)
    assert chosen.spare_rank == 14
    expected = cuda._thresholds(lower, chosen, state)
    monkeypatch.setattr(cuda, "MAX_KERNEL_BINS", 64)
    for own, other in zip(cuda._thresholds(lower, chosen, state), expected, strict=True):
        assert torch.equal(own, other) and own.dtype == other.dtype


@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("size", [1, 3000])
def test_the_same_bits_every_time(dtype, size):
    """Rows are collected in another order each time. The same holds for reranking in torch."""
    corpus, queries = torch.randn(100_000, 256), torch.randn(size, 256).cuda()
    corpus[50_000:] = corpus[:50_000]
    index = FlatIPIndex(256, dtype=dtype, device="cuda")
    index.add(corpus)
    for k in (1, 16, 100):
        scores, ids = index.search(queries, k)
        assert (ids[:, : k // 2 * 2 : 2] < 50_000).all() and (ids[:, 1::2] >= 50_000).all()
        for _ in range(3):
            again = index.search(queries, k)
            assert torch.equal(again[0], scores) and torch.equal(again[1], ids)
        with mock.patch.object(rerank, "MAX_KERNEL_CANDIDATES", 0):
            again = index.search(queries, k)
        assert torch.equal(again[0], scores) and torch.equal(again[1], ids)


def test_more_candidates_than_a_program_holds_go_through_torch(monkeypatch):
    corpus, queries = torch.randn(1300, 16), torch.randn(2, 16)
    segment, values = segment_of(corpus, "float32")
    monkeypatch.setattr(rerank, "MAX_KERNEL_CANDIDATES", 512)
    used = mock.Mock(side_effect=rerank.rerank_in_torch)
    monkeypatch.setattr(rerank, "rerank_in_torch", used)
    with through_kernels():
        _, ids = search(lambda: [(0, segment)], 1300, queries.to(DEVICE), 20, "certified", None, SCRATCH)
    assert used.called
    assert torch.equal(ids.cpu(), (queries.double() @ values.T).argsort(dim=1, descending=True)[:, :20])
