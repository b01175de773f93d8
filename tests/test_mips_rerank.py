"""What the search does on a GPU before and after its scan, interpreted where there is none: against plain torch.

Nothing of what lies beyond the counts may matter: `_poisoned_memory` fills it.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from mips_cases import KINDS, make
from test_mips_device import DEVICE, GPU, STORED, _poisoned_memory, on_gpu, piece_of, through_kernels  # noqa: F401
from torch import Tensor

from jasper_fast.mips import FlatIPIndex, device, settle, topk
from jasper_fast.mips import sample as sample_module
from jasper_fast.mips import search as search_module
from jasper_fast.mips.pieces import BIN, Piece
from jasper_fast.mips.sample import sample, short_norms
from jasper_fast.mips.scan import Queries, bounds
from jasper_fast.mips.search import SCRATCH, search
from jasper_fast.mips.state import State

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

from jasper_fast.kernels import mips as kernels  # noqa: E402
from jasper_fast.kernels import mips_finish, mips_start  # noqa: E402
from jasper_fast.kernels.mips_finish import Collected  # noqa: E402

NAMES = ("counts", "cutoffs", "broken", "missed")


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch):
    """The interpreter takes its time for each; no result depends on how many products a program makes."""
    if not GPU:
        monkeypatch.setattr(kernels, "PAIRS", 256)


def collected(
    piece: Piece, queries: Queries, wanted: int, capacity: int, valid: Tensor | None = None, proven: bool = True
) -> Collected:
    """As by a scan that each query's ``wanted`` best lower bounds set the threshold of, in random order."""
    asked, scale, limits = device.operands(piece, piece.rows, queries, proven)
    factor = asked.double() if scale is None else asked.double() * scale.double()[:, None]
    scores = (factor @ piece.values(0, len(piece), torch.float64).T).float()
    norms = short_norms(piece)
    error = norms[torch.arange(len(piece), device=DEVICE) // BIN] * limits[0][:, None] + limits[1][:, None]
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    there = min(wanted, len(piece))
    thresholds = (scores - error).topk(there, dim=1).values[:, -1].contiguous()
    reach = (scores + error >= thresholds[:, None]) & (scores > -torch.inf)
    found, rows = (torch.empty(len(queries), capacity, dtype=t, device=DEVICE) for t in (torch.float32, torch.int32))
    for q in range(len(queries)):
        own = reach[q].nonzero()[:, 0]
        own = own[torch.randperm(len(own)).to(DEVICE)][:capacity]
        found[q, : len(own)], rows[q, : len(own)] = scores[q, own], own.int()
    return Collected(reach.sum(dim=1).int(), found, rows, thresholds, norms, limits)


def states(size: int, k: int) -> tuple[State, State]:
    return State(size, k, torch.device(DEVICE)), State(size, k, torch.device(DEVICE))


def both(found: Collected, piece: Piece, first_id: int, queries: Queries, pair: tuple[State, State], proven=True):
    """The kernels and torch leave the same; returns what is left, sorted."""
    settle.settle(found, piece, first_id, queries, pair[0], proven)
    settle.settle_in_torch(found, piece, first_id, queries, pair[1], proven)
    for name in NAMES:
        assert torch.equal(getattr(pair[0], name), getattr(pair[1], name)), name
    scores, ids = pair[0].turned()
    for other in (State.sorted(pair[0]), State.sorted(pair[1]), pair[1].turned()):
        assert torch.equal(scores, other[0]) and torch.equal(ids, other[1])
    return scores, ids


def best(piece: list[tuple[int, Piece]], queries: Queries, k: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best of all rows' fp64 products, ties by the lower id; −inf and −1 where there are fewer."""
    size = len(queries)
    scores, ids = [], []
    for first, part in piece:
        query = torch.arange(size, device=DEVICE).repeat_interleave(len(part))
        row = torch.arange(len(part), device=DEVICE).repeat(size)
        own = part.scales if part.rows.dtype == torch.int8 else None
        true = kernels.rescore(queries.exact, part.rows, own, query, row).view(size, len(part))
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
        piece, _ = piece_of(make(kind, rows, 17, rows), stored)
        parts.append((first, piece))
        both(collected(piece, queries, k + 4, 1024), piece, first, queries, pair)
    scores, ids = pair[0].turned()
    # Rows that nothing can tell apart, or beside others so large that bounds tell nothing.
    done = ~pair[0].missed
    assert done.all() or kind in ("near-tied", "mixed scales")
    expected = best(parts, queries, k, None)
    assert torch.equal(scores[done], expected[0][done]) and torch.equal(ids[done], expected[1][done])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", ["duplicated", "grid", "constant", "zeros"])
def test_ties_are_broken_by_the_lower_id(kind, stored):
    """Also between pieces: the earlier one's rows come first, whichever was searched first."""
    queries = Queries.of(make(kind, 2, 70, 5).to(DEVICE))
    pair, parts = states(2, 7), []
    for first, rows in ((64, 64), (0, 64)):
        piece, _ = piece_of(make(kind, rows, 70, 9), stored)
        parts.insert(0, (first, piece))
        both(collected(piece, queries, 7, 1024), piece, first, queries, pair)
    assert not pair[0].missed.any()
    expected = best(parts, queries, 7, None)
    found = pair[0].turned()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("share", [0.0, 0.005, 0.1])
@pytest.mark.parametrize("stored", STORED)
def test_fewer_valid_rows_than_k(stored, share):
    piece, _ = piece_of(torch.randn(640, 32), stored)
    queries, pair = Queries.of(torch.randn(4, 32, device=DEVICE)), states(4, 10)
    valid = torch.rand(4, 640, device=DEVICE) < share
    found = collected(piece, queries, 12, 1024, valid)
    scores, ids = both(found, piece, 0, queries, pair)
    expected = best([(0, piece)], queries, 10, valid)
    assert torch.equal(scores, expected[0]) and torch.equal(ids, expected[1])


@pytest.mark.parametrize("stored", STORED)
def test_fast_takes_scores_as_they_are(stored):
    piece, _ = piece_of(torch.randn(500, 32), stored)
    queries, pair = Queries.of(torch.randn(4, 32, device=DEVICE)), states(4, 10)
    for first in (0, 500):
        found = collected(piece, queries, 15, 1024, proven=False)
        scores, ids = both(found, piece, first, queries, pair, proven=False)
    assert torch.equal(scores.float().double(), scores)
    assert torch.equal(ids[:, ::2] + 500, ids[:, 1::2])  # the same rows twice


@pytest.mark.parametrize("programs", [1, 1 << 20])
@pytest.mark.parametrize("k, capacity", [(1, 1024), (130, 1024), (80, 2048), (60, 4096), (40, 8192)])
def test_many_candidates(k, capacity, programs, monkeypatch):
    """However many programs share a query, and however many rows a program holds."""
    monkeypatch.setattr(mips_finish, "FILL", programs)
    piece, _ = piece_of(torch.randn(2 * k + 100, 8), "float32")
    queries, pair = Queries.of(torch.randn(2, 8, device=DEVICE)), states(2, k)
    for first in (0, 10_000):
        scores, ids = both(collected(piece, queries, k + 30, capacity), piece, first, queries, pair)
    expected = best([(0, piece), (10_000, piece)], queries, k, None)
    assert torch.equal(scores, expected[0]) and torch.equal(ids, expected[1]) and not pair[0].missed.any()


def equal_rows(rows: int, capacity: int, k: int) -> tuple[Piece, Queries, Collected]:
    """None of them can be left out."""
    piece, _ = piece_of(torch.full((rows, 16), 0.25), "float32")
    queries = Queries.of(torch.randn(2, 16, device=DEVICE))
    return piece, queries, collected(piece, queries, k, capacity)


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize("rows, capacity, fits", [(72, 1024, True), (73, 1024, False), (60, 60, True), (61, 60, False)])
def test_what_finds_no_room_is_missed_and_changes_nothing(rows, capacity, fits, proven):
    """Of k = 4, 72 rows may be rescored; and none if more were collected than there was room for."""
    before, queries, found = equal_rows(10, 1024, 4)
    pair = states(2, 4)
    both(found, before, 1000, queries, pair, proven)
    held = pair[0].turned()
    piece, _, found = equal_rows(rows, capacity, 4)
    found = collected(piece, queries, 4, capacity)
    after = both(found, piece, 0, queries, pair, proven)
    assert pair[0].missed.tolist() == [not fits] * 2
    assert torch.equal(after[1], held[1]) != fits
    if fits:
        assert after[1].tolist() == [[0, 1, 2, 3]] * 2


def test_a_threshold_that_was_too_high_is_noticed():
    piece, _ = piece_of(torch.randn(500, 32), "float32")
    queries, pair = Queries.of(torch.randn(4, 32, device=DEVICE)), states(4, 10)
    both(collected(piece, queries, 5, 1024), piece, 0, queries, pair)
    assert pair[0].missed.all() and not pair[0].counts.any()


def test_earlier_results_are_a_cutoff():
    """A query that holds k better rows already keeps none of these, and has missed nothing."""
    piece, _ = piece_of(torch.rand(200, 32), "float32")
    weak, _ = piece_of(torch.rand(200, 32) - 100, "float32")
    queries, pair = Queries.of(torch.rand(3, 32, device=DEVICE) + 0.1), states(3, 6)
    held = both(collected(piece, queries, 9, 1024), piece, 0, queries, pair)
    found = collected(weak, queries, 9, 1024)
    known = settle.just_below(pair[0].cutoffs)
    none = torch.zeros_like(found.counts)
    found = Collected(none, found.scores.fill_(torch.nan), found.rows.fill_(99), known, found.norms, found.limits)
    after = both(found, weak, 200, queries, pair)
    assert torch.equal(held[0], after[0]) and torch.equal(held[1], after[1]) and not pair[0].missed.any()


@pytest.mark.parametrize("stored", STORED)
def test_a_planted_error_is_seen(stored):
    piece, _ = piece_of(torch.randn(500, 32), stored)
    queries, pair = Queries.of(torch.randn(4, 32, device=DEVICE)), states(4, 10)
    found = collected(piece, queries, 15, 1024)
    best_place = found.scores[2, : int(found.counts[2])].argmax()
    found.scores[2, best_place] += 3 * found.norms.max() * found.limits[0][2]
    both(found, piece, 0, queries, pair)
    assert pair[0].broken.tolist() == [False, False, True, False]


@pytest.mark.parametrize("width", [1, 70, 128, 300, 1000])
@pytest.mark.parametrize("stored", STORED)
def test_the_order_of_a_sum_depends_on_the_width_alone(stored, width):
    """Alone, among others, and as one of a query's candidates: the same bits."""
    piece, values = piece_of(torch.randn(100, width), stored)
    queries = Queries.of(torch.randn(2, width, dtype=torch.float64, device=DEVICE))
    own = piece.scales if stored == "int8" else None
    row = torch.arange(100, device=DEVICE).repeat(2)
    query = torch.arange(2, device=DEVICE).repeat_interleave(100)
    true = kernels.rescore(queries.exact, piece.rows, own, query, row)
    alone = [kernels.rescore(queries.exact, piece.rows, own, query[i : i + 1], row[i : i + 1]) for i in (0, 7, 150)]
    assert torch.equal(torch.cat(alone), true[[0, 7, 150]])
    pair = states(2, 100)
    settle.settle(collected(piece, queries, 100, 1024), piece, 0, queries, pair[0], True)
    scores, ids = pair[0].turned()
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
            expected = torch.maximum(lower.topk(rank, dim=1).values[:, -1], settle.just_below(cutoffs))
            found, counts = mips_start.thresholds(lower, rank, cutoffs)
            assert torch.equal(found, expected) and not counts.any() and counts.dtype == torch.int32


def test_cutoffs_are_rounded_down():
    """As torch does it: to what lies below the nearest float32."""
    cutoffs = [0.0, -0.0, 1.0, -1.0, 1 + 2.0**-30, 1e-42, -1e-42, 1e-300, -1e-300, 1e37, -1e37, -torch.inf, 0.1, -0.1]
    cutoffs = torch.tensor(cutoffs, dtype=torch.float64, device=DEVICE)
    lower = torch.full((len(cutoffs), 1), -torch.inf, device=DEVICE)
    found, _ = mips_start.thresholds(lower, 1, cutoffs)
    assert torch.equal(found, settle.just_below(cutoffs))
    assert (found.double() < cutoffs).logical_or_(cutoffs == -torch.inf).all()


@pytest.mark.parametrize("width", [1, 17, 512, 700])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.int8, pytest.param(torch.bfloat16, marks=on_gpu)]
)
def test_queries_are_rounded_and_bounded(dtype, width):
    given = torch.randn(9, width, dtype=torch.float64, device=DEVICE)
    given[1] = 0
    queries = Queries.of(given)
    asked, scales, (relative, absolute) = mips_start.operands(queries.exact, dtype, 1e-4, 1e-30, True)
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
    _, _, limits = mips_start.operands(queries.exact, dtype, 1e-4, 1e-30, False)
    assert not torch.cat(limits).any()


def lasting(rows: int, width: int) -> tuple[Piece, Tensor]:
    piece, values = piece_of(torch.randn(rows, width), "float32")
    piece.lasting = True
    return piece, values


def test_a_sample_is_drawn_once(monkeypatch):
    drawn = mock.Mock(side_effect=sample_module._drawn)
    monkeypatch.setattr(sample_module, "_drawn", drawn)
    piece, _ = lasting(6400, 8)
    plane = piece.rows
    first = sample(piece, plane, 32)
    assert sample(piece, plane, 32) is first and drawn.call_count == 1
    assert torch.equal(first.plane, plane[first.numbers]) and torch.equal(
        first.numbers // 32, torch.arange(200).to(DEVICE)
    )
    assert torch.equal(first.norms, short_norms(piece)[first.numbers // BIN])
    assert (short_norms(piece).double() >= piece.norms).all() and short_norms(piece) is short_norms(piece)
    sample(piece, plane, 8), sample(piece, plane, 8)  # too large to stay with an index
    assert drawn.call_count == 3
    piece.lasting = False  # a search's own piece goes with it
    sample(piece, plane, 8), sample(piece, plane, 8)
    assert drawn.call_count == 4
    kept = [value for value, _ in piece.derived.values() if isinstance(value, sample_module.Sample)]
    assert {len(value.numbers) for value in kept} == {200, 800}
    assert not piece.slice(0, 640).derived


def test_a_new_look_at_a_corpus_forgets_its_samples():
    """Norms that are set anew, and rows that come, leave nothing of the old."""
    piece, _ = lasting(640, 8)
    short_norms(piece)
    search_module._check(piece, piece.norms * 2, 0)
    assert torch.equal(short_norms(piece).double(), (piece.norms * (1 + 2.0**-23)).float().double())
    index = FlatIPIndex(8, dtype="float32", device=DEVICE)
    index.add(torch.randn(100, 8))
    (_, first), (_, same) = *index.pieces(), *index.pieces()
    assert same is first and first.lasting
    index.add(torch.randn(1, 8))
    ((_, grown),) = index.pieces()
    assert grown is not first and len(grown) == 101 and not grown.derived


def test_an_index_that_grows_is_searched_as_it_is():
    """Rows of greater norm come into a bin that was begun: neither norms nor samples of the old may be used."""
    index = FlatIPIndex(16, dtype="int8", device=DEVICE)
    corpus, queries = torch.randn(7000, 16), torch.randn(2, 16)
    corpus[5110:] *= 50
    plan = device.Plan(16, 4, 1024)
    with through_kernels(), mock.patch.object(device, "plan", lambda rows, k, size: plan):
        for start, stop in ((0, 5110), (5110, 5130), (5130, 7000)):
            index.add(corpus[start:stop])
            whole = FlatIPIndex(16, dtype="int8", device=DEVICE)
            whole.add(corpus[:stop])
            expected = whole.search(queries, 3, precision="exact")
            for _ in range(2):
                scores, ids = index.search(queries, 3)
                assert torch.equal(ids, expected[1]) and torch.equal(scores, expected[0])


def test_a_buffer_that_is_overwritten_is_looked_at_anew(monkeypatch):
    corpus, queries = torch.randn(6000, 16), torch.randn(2, 16)
    corpus[3000:] *= 40
    expected = topk(queries, corpus, 3, precision="exact")
    buffer = torch.zeros(1500, 16, device=DEVICE)

    def chunks(rows, step, on):
        for start in range(0, len(rows), 1500):
            buffer.copy_(rows[start : start + 1500])
            yield start, buffer

    monkeypatch.setattr(search_module, "chunks", chunks)
    monkeypatch.setattr(device, "plan", lambda rows, k, size: device.Plan(16, 4, 1024))
    with through_kernels():
        scores, ids = topk(queries.to(DEVICE), corpus.T.contiguous().T.to(DEVICE), 3)  # in pieces: not contiguous
    assert torch.equal(ids.cpu(), expected[1]) and torch.equal(scores.cpu(), expected[0])


def test_a_row_that_comes_twice_is_there_twice():
    """Which no search does, but no place may be left as it was."""
    piece, _ = piece_of(torch.randn(300, 16), "float32")
    queries, pair = Queries.of(torch.randn(2, 16, device=DEVICE)), states(2, 6)
    for _ in range(2):
        scores, ids = both(collected(piece, queries, 9, 1024), piece, 0, queries, pair)
    assert torch.equal(ids[:, ::2], ids[:, 1::2]) and not pair[0].missed.any()


def test_the_largest_blocks_are_those_that_are_asked_for():
    assert mips_finish.BLOCKS[-1] == settle.MOST and mips_start.BLOCKS[-1] == device.MOST_BINS


def test_more_bins_than_a_program_holds_go_through_torch(monkeypatch):
    lower, state = torch.randn(3, 100, device=DEVICE), states(3, 2)[0]
    state.cutoffs[1] = 10
    expected = device._thresholds(lower, 7, state)
    monkeypatch.setattr(device, "MOST_BINS", 64)
    found = device._thresholds(lower, 7, state)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[1].dtype == expected[1].dtype


@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("size", [1, 3000])
def test_the_same_bits_every_time(dtype, size):
    """Though rows are collected in another order each time; also as torch finishes it."""
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
        with mock.patch.object(settle, "MOST", 0):
            again = index.search(queries, k)
        assert torch.equal(again[0], scores) and torch.equal(again[1], ids)


def test_more_candidates_than_a_program_holds_go_through_torch(monkeypatch):
    corpus, queries = torch.randn(1300, 16), torch.randn(2, 16)
    piece, values = piece_of(corpus, "float32")
    monkeypatch.setattr(settle, "MOST", 512)
    used = mock.Mock(side_effect=settle.settle_in_torch)
    monkeypatch.setattr(settle, "settle_in_torch", used)
    with through_kernels():
        _, ids = search(lambda: [(0, piece)], 1300, queries.to(DEVICE), 20, "certified", None, SCRATCH)
    assert used.called
    assert torch.equal(ids.cpu(), (queries.double() @ values.T).argsort(dim=1, descending=True)[:, :20])
