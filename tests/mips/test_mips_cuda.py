"""The search's GPU kernels, interpreted without a GPU, against correctly rounded sums of exact products."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from jasper_fast.mips import FlatIPIndex, cuda, top_k, topk
from jasper_fast.mips import segment as segments
from jasper_fast.mips.cpu import Queries
from jasper_fast.mips.prefetch import chunks
from jasper_fast.mips.segment import BIN, Segment, bin_norms
from jasper_fast.mips.topk_state import TopKState
from tests.helpers.mips_cases import KINDS

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

from jasper_fast.kernels import mips as kernels  # noqa: E402
from jasper_fast.kernels.mips import ROUNDING  # noqa: E402
from jasper_fast.kernels.mips_chunks import chunked  # noqa: E402
from jasper_fast.kernels.mips_rescore import rescore  # noqa: E402
from tests.helpers.mips_kernels import (  # noqa: E402, F401
    DEVICE,
    GPU,
    SHARES,
    STORED,
    WIDTHS,
    _poisoned_memory,
    found,
    has_tensor_maps,
    in_the_order_of_fp64,
    on_gpu,
    segment_of,
    through_kernels,
)


@on_gpu
@pytest.mark.parametrize("seed", range(60))
def test_the_order_of_fp64_of_drawn_cases(seed):
    """Cases of test_kernel_properties.py without hypothesis, which a GPU machine may lack, and longer corpora."""
    draw = random.Random(seed)
    rows = draw.choice((draw.randint(64, 400), draw.randint(400, 3000)))
    stored = draw.choice(("float32", "float16", "int8", "bfloat16"))
    k = draw.randint(1, draw.choice((-(-rows // 64), min(rows, 400))))
    bins = draw.randint(1, -(-rows // BIN))
    in_the_order_of_fp64(
        draw.choice(KINDS), stored, rows, draw.choice((1, 2, 3, 12)), draw.choice(WIDTHS), draw.choice(SHARES),
        draw.random() < 0.5, False, seed, k, bins,
    )  # fmt: skip


@pytest.mark.parametrize(
    "stored, order",
    [("float32", "random"), ("float32", "ascending"), ("float32", "clustered"), ("int8", "random"),
     pytest.param("bfloat16", "clustered", marks=on_gpu)],
)  # fmt: skip
def test_a_sample_sets_the_threshold(stored, order):
    """The sample is drawn by rows at random, for any order of the corpus."""
    corpus, queries = torch.randn(6000, 16), torch.randn(3, 16)
    if order == "ascending":
        corpus = corpus[(corpus @ queries[0]).argsort()]
    elif order == "clustered":
        corpus = (torch.randn(60, 16).repeat_interleave(100, 0) + 0.1 * corpus)[:6000]
    segment, values = segment_of(corpus, stored)
    assert cuda.plan(6000, 3, 3).step > 1
    with through_kernels(), mock.patch.object(top_k, "_search_again", side_effect=AssertionError("redone")):
        scores, ids = found([(0, segment)], 6000, queries, 3)
        fast = found([(0, segment)], 6000, queries, 3, precision="fast") if stored == "int8" else (scores, ids)
    true = queries.double() @ values.T
    assert torch.equal(ids, true.argsort(dim=1, descending=True)[:, :3])
    torch.testing.assert_close(scores, true.gather(1, ids).float(), rtol=1e-6, atol=1e-6)
    recall = np.mean([len(set(a) & set(b)) / 3 for a, b in zip(ids.tolist(), fast[1].tolist(), strict=True)])
    assert recall > 0.5


def test_many_queries_scan_rounded_scores_and_the_certificate_repairs_it():
    base = torch.randn(16)
    corpus = base + 1e-3 * torch.randn(256, 16)  # sixteen bits cannot tell these apart
    queries = (base + 0.01 * torch.randn(70, 16)).contiguous()
    segment, values = segment_of(corpus, "float32")
    true = (queries.double() @ values.T).argsort(dim=1, descending=True)[:, :4]
    with through_kernels():
        _, rounded = (queries.bfloat16() @ corpus.bfloat16().T).topk(4)
        _, certified = found([(0, segment)], 256, queries, 4)
        _, fast = found([(0, segment)], 256, queries, 4, precision="fast")
    assert not torch.equal(rounded, true)
    assert torch.equal(certified, true) and torch.equal(fast, true)


def test_a_corrupted_bound_is_caught_and_the_query_redone():
    corpus, queries = torch.randn(500, 32), torch.randn(3, 32)
    segment, values = segment_of(corpus, "float16")
    assert segment.norms is not None
    segment.norms = segment.norms * 1e-9
    with through_kernels(), pytest.warns(RuntimeWarning, match="of 3 queries were redone in fp64"):
        _, ids = found([(0, segment)], 500, queries, 5)
    assert torch.equal(ids, (queries.double() @ values.T).argsort(dim=1, descending=True)[:, :5])


@pytest.mark.parametrize("rank, capacity", [(1, 1024), (60, 22)])
def test_a_wrong_guess_is_detected_and_redone(rank, capacity, monkeypatch):
    """One threshold is so high that fewer than k rows reach it, and one so low that rows exceed the capacity, also
    those of the repair."""
    corpus, queries = torch.randn(4096, 16), torch.randn(2, 16)
    segment, values = segment_of(corpus, "float32")
    monkeypatch.setattr(cuda, "plan", lambda rows, k, size: cuda.Plan(1, rank, capacity))
    again = mock.Mock(side_effect=top_k._search_again)
    monkeypatch.setattr(top_k, "_search_again", again)
    with through_kernels():
        _, ids = found([(0, segment)], 4096, queries, 20)
    assert torch.equal(ids, (queries.double() @ values.T).argsort(dim=1, descending=True)[:, :20])
    assert again.call_count == 1 and len(again.call_args.args[4]) == 2


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("size", [3, 20, 150])
def test_the_kernels_one_by_one(stored, size, descriptors):
    """Every place of all tiles and ragged edges is written, and rows beyond the capacity are counted."""
    if descriptors and not has_tensor_maps():
        pytest.skip("tensor descriptors need Hopper")
    rows, width = (5000 if GPU else 300), 48
    segment, values = segment_of(torch.randn(rows, width), stored)
    queries = Queries.of(torch.randn(size, width).to(DEVICE))
    valid = torch.rand(rows, device=DEVICE) < 0.9
    valid[64:128] = False
    many = chunked(size)
    asked, scale, limits = cuda.operands(segment, segment.rows, queries, True, many)
    scales = (segment.scales if stored == "int8" else None, scale)
    assert (scale is not None) == (stored == "int8" and not many)
    norms = segment.norms.float()
    scan = kernels.Scan(segment.rows, asked, scales, valid, norms, limits, descriptors)
    lower = kernels.lower_bounds(scan).cpu().double()
    true = (queries.exact.cpu() @ values.T).masked_fill(~valid.cpu(), -torch.inf)
    best = torch.stack(
        [segments.bin_maxima(torch.nn.functional.pad(row, (0, -rows % 64), value=-torch.inf)) for row in true]
    )
    error = (norms[:, None].cpu() * limits[0].cpu() + limits[1].cpu()).T.double()
    if many:  # scores of at most |q| times the bin's norm are rounded
        error = error + norms.cpu().double() * queries.exact.norm(dim=1).cpu()[:, None] * 1.02 * ROUNDING
    assert (lower[:, 1] == -torch.inf).all() and (lower <= best).all()
    assert (best - lower)[:, [0, 2, 3]].le(2 * error[:, [0, 2, 3]]).all()
    threshold = true.topk(20, dim=1).values[:, -1].float().to(DEVICE)
    counts = torch.zeros(size, dtype=torch.int32, device=DEVICE)
    scores, numbers = kernels.collect(scan, threshold, counts, 64)
    for q in range(size):
        count = min(int(counts[q]), 64)
        got = numbers[q, :count].tolist()
        sure = (true[q] > threshold[q].item() + 1e-9).nonzero()[:, 0].tolist()
        assert len(set(got)) == count and (counts[q] > 64 or set(sure) <= set(got))
        spread = error[q][torch.tensor(got) // BIN]
        assert ((scores[q, :count].cpu() - true[q][got]).abs() <= spread).all()
        assert (scores[q, count:].isnan()).all()
    everything = torch.full_like(threshold, -torch.inf)
    counts.zero_()
    kernels.collect(scan, everything, counts, 16)
    assert (counts == valid.sum()).all()
    query, row = torch.arange(size, device=DEVICE), torch.arange(size, device=DEVICE) % 7 - 1
    exact = rescore(queries.exact, segment.rows, scales[0], query, row).cpu()
    assert torch.equal(exact == -torch.inf, row.cpu() == -1)
    wanted = (queries.exact.cpu() @ values.T)[query.cpu(), row.cpu()]
    torch.testing.assert_close(exact[row.cpu() >= 0], wanted[row.cpu() >= 0], rtol=1e-13, atol=1e-13)


def test_a_small_scratch_changes_nothing():
    corpus, queries = torch.randn(4500, 16), torch.randn(2, 16)
    expected = topk(queries, corpus, 3, precision="exact")
    with through_kernels():
        scores, ids = topk(queries.to(DEVICE), corpus.to(DEVICE), 3, scratch=20_000)
    assert torch.equal(ids.cpu(), expected[1]) and torch.equal(scores.cpu(), expected[0])


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [1, 16, 50, 3000])
def test_on_a_gpu(dtype, size):
    corpus, queries = torch.randn(200_000, 384), torch.randn(size, 384)
    index = FlatIPIndex(384, dtype=dtype, device="cuda")
    index.add(corpus)
    for k in (1, 10, 100, 1000):
        scores, ids = index.search(queries.cuda(), k)
        values = torch.cat([segment.values(0, len(segment), torch.float64) for _, segment in index.segments()])
        for part in range(0, size, 500):
            true = queries[part : part + 500].cuda().double() @ values.T
            best = true.topk(k, dim=1).values
            torch.testing.assert_close(true.gather(1, ids[part : part + 500]), best, rtol=0, atol=1e-10)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_two_gpus_share_the_segments(dtype, monkeypatch):
    monkeypatch.setattr("jasper_fast.mips.growing.SEGMENT_BYTES", 1)  # small segments
    corpus, queries = torch.randn(30_000, 48), torch.randn(40, 48)
    alone = FlatIPIndex(48, dtype=dtype, device="cuda:0")
    shared = FlatIPIndex(48, dtype=dtype, device=["cuda:0", "cuda:1"])
    for start in range(0, len(corpus), 10_000):
        for index in (alone, shared):
            index.add(corpus[start : start + 10_000])
    assert {segment.rows.device.index for _, segment in shared.segments()} == {0, 1}
    for size in (1, 40):
        expected, found = alone.search(queries[:size], 10), shared.search(queries[:size], 10)
        assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])
    scores, ids = topk(queries.to("cuda:1"), corpus.to("cuda:1"), 10)
    expected = topk(queries, corpus, 10)
    assert ids.device == torch.device("cuda:1") and torch.equal(ids.cpu(), expected[1])


@on_gpu
@pytest.mark.parametrize("k", [10, 200, 300])
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("proven", [False, True])
def test_the_device_is_waited_for_once(k, lasting, proven):
    """With a cached sample, a sample drawn again, and no sample."""
    corpus, queries = torch.randn(100_000, 128, device="cuda"), torch.randn(500, 128, device="cuda")
    segment = Segment(corpus.bfloat16(), persistent=lasting)
    segment.norms = bin_norms(segment)
    asked, state = Queries.of(queries), TopKState(500, k, corpus.device)
    cuda.search_cuda(segment, segment.rows, 0, asked, torch.empty(0, device="cuda"), state, proven)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.search_cuda(segment, segment.rows, 0, asked, torch.empty(0, device="cuda"), state, proven)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_corpus_on_the_host_is_streamed():
    corpus, queries = torch.randn(300_000, 64), torch.randn(40, 64)
    expected = topk(queries, corpus, 10)
    scores, ids = topk(queries.cuda(), corpus.numpy(), 10, scratch=8 << 20)
    assert torch.equal(ids.cpu(), expected[1]) and torch.equal(scores.cpu(), expected[0])


@on_gpu
def test_a_stream_that_breaks_off_leaves_its_memory_to_the_copy(monkeypatch):
    plain, kept = Tensor.record_stream, []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: (kept.append(self), plain(self, stream)))
    parts = chunks(torch.randn(1000, 8), 64, torch.device("cuda"))
    next(parts)
    parts.close()
    assert [tuple(buffer.shape) for buffer in kept] == [(64, 8)] * 2
