"""Searches over the two planes of codes: every row's bounds, hard corpora, and planted faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jasper_fast.mips import FlatIPIndex, cpu, top_k
from jasper_fast.mips.cpu import Queries
from jasper_fast.mips.segment import BIN, STEP_BYTES, STEP_DIMS, Planes, Segment, bin_norms
from jasper_fast.mips.top_k import SCRATCH, search
from jasper_fast.mips.topk_state import TopKState
from jasper_fast.ops import native
from tests.helpers.mips_cases import check, make, truth
from tests.mips.test_mips_filters import test_few_valid_rows_have_the_same_scores_for_any_number_of_queries

pytest.importorskip("hypothesis")
pytestmark = pytest.mark.skipif(native.extension_path() is None, reason="the compiled extension is not built")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

scan = top_k._scan
KINDS = (
    "normal", "duplicated", "near-tied", "huge", "tiny", "mixed scales", "negative", "constant", "zeros", "grid",
    "one-hot", "heavy-tailed", "clusters", "halfway",
)  # fmt: skip
ISAS = ("avx512vnni", "avx512", "avx2", "generic")


def corpus_of(kind: str, rows: int, width: int, seed: int) -> Tensor:
    """Return rows that `make` knows, or rows that are hard for codes of few bits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    if kind == "one-hot":
        return (
            torch.nn.functional.one_hot(torch.randint(0, width, (rows,), generator=generator), width).float() + 1e-3 * x
        )
    if kind == "heavy-tailed":
        return x / torch.rand(rows, width, generator=generator).clamp(min=1e-6)
    if kind == "clusters":
        return x[torch.randint(0, 3, (rows,), generator=generator) % rows] + 1e-4 * x
    if kind == "halfway":  # between two codes, where they round by the most, and all to one side
        return (
            torch.cat((torch.ones(rows, 1), (torch.randint(0, 16, (rows, width), generator=generator) - 8) / 8), 1)[
                :, :width
            ].contiguous()
            + 2.0**-12
        )
    return make(kind, rows, width, seed)


def segment_of(rows: Tensor) -> Segment:
    segment = Segment(rows, planes=Planes.of(rows))
    segment.norms = bin_norms(segment)
    return segment


def unpacked(codes: Tensor, bits: int, width: int) -> Tensor:
    """Return codes of some bits, which are in blocks of 16 bytes or fewer, as (N, D) float64."""
    values = []
    for part in codes.split(16, 1):
        values += [part >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.cat(values, 1)[:, :width].double()


def decoded(planes: Planes, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return what the coarse codes and the 7-bit codes stand for, (N, D) float64 each."""
    steps = planes.coarse.shape[1] // STEP_BYTES
    pieces = planes.coarse.view(-1, steps, BIN, STEP_DIMS // 2).transpose(1, 2)
    coarse = torch.stack((pieces & 15, pieces >> 4), dim=3).flatten(2).flatten(0, 1)[:rows, :width].double()
    pairs = -(-width // 4)
    fine = 2 * unpacked(planes.fine[:, :pairs], 2, width) + unpacked(planes.fine[:, pairs:], 1, width)
    scales = planes.coarse_scales.flatten()[:rows, None].double()
    return scales * (2 * coarse - 15), planes.fine_scales[:, None].double() * (2 * (8 * coarse + fine) - 127)


def rotated(rows: Tensor) -> Tensor:
    """Return (N, D) float32 rows rotated in float64 and rounded, as codes of rotated rows stand for them."""
    values, width = rows.double(), rows.shape[1]
    size = 1 << width.bit_length() - 1
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    starts = ((0, 2654435761), (width - size, 2246822519)) if size < width else ((0, 2654435761),)
    for start, factor in starts:
        signs = 1 - 2 * ((torch.arange(width) * factor & 0xFFFFFFFF) >> 31)
        values = values * signs
        values[:, start : start + size] = values[:, start : start + size] @ matrix / size**0.5
    return values.float()


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 150),
    width=st.sampled_from([1, 2, 7, 8, 9, 33, 130]),
    seed=st.integers(0, 1 << 16),
)
def test_the_errors_of_codes_are_measured(kind, rows, width, seed):
    corpus = corpus_of(kind, rows, width, seed)
    planes = Planes.of(corpus)
    assert planes is not None
    coarse, whole = decoded(planes, rows, width)
    exact = (rotated(corpus) if planes.rotated.item() else corpus).double()
    largest = exact.norm(dim=1)
    # The rotation here differs from the compiled one by the order of summation.
    slack = (2.0**-24 * largest + width * 2.0**-149) * planes.rotated.item()
    errors = (exact - coarse).norm(dim=1)
    stored = planes.coarse_errors.flatten()[:rows].double()
    assert (errors <= stored + slack).all() and (stored <= errors * (1 + 1e-6) + 1e-44 + slack).all()
    along = ((exact - coarse) * torch.nn.functional.normalize(coarse, dim=1)).sum(dim=1).abs()
    assert (along <= 2.0**-23 * largest + width * 2.0**-125).all()  # the error is orthogonal to the codes
    fine_errors, fine_stored = (exact - whole).norm(dim=1), planes.fine_errors.double()
    assert (fine_errors <= fine_stored + slack).all()
    assert (fine_stored <= fine_errors * (1 + 1e-6) + 1e-44 + slack).all()
    along = ((exact - whole) * torch.nn.functional.normalize(whole, dim=1)).sum(dim=1).abs()
    assert (along <= 2.0**-23 * largest + width * 2.0**-125).all()
    for bin_number in range(len(planes.residuals)):
        own = slice(bin_number * BIN, (bin_number + 1) * BIN)
        assert torch.maximum(stored, fine_stored)[own].max() == planes.residuals[bin_number]


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 400),
    size=st.integers(1, 9),
    width=st.sampled_from([1, 2, 3, 8, 17, 33, 70, 140]),
    share=st.sampled_from([None, 0.0, 0.02, 0.5, 1.0]),
    masks=st.booleans(),
    small=st.booleans(),
    seed=st.integers(0, 1 << 16),
    data=st.data(),
)
def test_the_order_is_that_of_fp64(kind, rows, size, width, share, masks, small, seed, data):
    k = data.draw(st.integers(1, rows), label="k")
    corpus, queries = corpus_of(kind, rows, width, seed), corpus_of(kind, size, width, seed + 1)
    segment = segment_of(corpus)
    generator = torch.Generator().manual_seed(seed)
    valid = None if share is None else torch.rand((size, rows) if masks else (rows,), generator=generator) < share
    with pytest.MonkeyPatch.context() as patch:
        if small:  # several chunks of rows and groups of queries
            patch.setattr(cpu, "SUMS_AT_ONCE", 1)
            patch.setattr(cpu, "QUERIES_AT_ONCE", 4)
        scores, ids = search(lambda: [(0, segment)], rows, queries, k, "certified", valid, SCRATCH)
    scale = (queries.double().norm(dim=1) * corpus.double().norm(dim=1).max()).numpy()
    mask = torch.ones(size, rows, dtype=torch.bool) if valid is None else valid.expand(size, rows)
    check(scores, ids, truth(queries, corpus), corpus, scale, mask.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 40])
def test_larger_corpora_give_the_same_as_fp64(kind, size, monkeypatch):
    monkeypatch.setattr(cpu, "SUMS_AT_ONCE", 1 << 14)
    corpus, queries = corpus_of(kind, 5000, 96, 1), corpus_of(kind, size, 96, 2)
    segment = segment_of(corpus)
    true = queries.double() @ corpus.double().T
    gap = 1e-12 * (queries.double().norm(dim=1) * corpus.double().norm(dim=1).max())[:, None]
    for k in (1, 10, 300):
        ids = search(lambda: [(0, segment)], 5000, queries, k, "certified", None, SCRATCH)[1]
        assert ((true.gather(1, ids) - true.topk(k, dim=1).values).abs() <= gap).all()
        assert all(len(set(row)) == k for row in ids.tolist())


SOAK_SIZES = (1, 2, 3, 7, 16, 40, 100, 1000)  # queries of one search
SOAK_TURNS = 16


def soak(kind: str, width: int, k: int, seed: int, turns: int, spoil: float = 1.0) -> int:
    """Compare searches with fp64, ties by id included, and return the number of queries."""
    corpus, done = corpus_of(kind, 400, width, seed), 0
    segment = segment_of(corpus)
    assert segment.planes is not None
    for name in ("coarse_errors", "fine_errors", "residuals"):
        getattr(segment.planes, name).mul_(spoil)
    distinct, group = torch.unique(corpus + 0.0, dim=0, return_inverse=True)  # equal rows get equal scores
    longest = corpus.double().norm(dim=1).max()
    for turn in range(turns):
        for size in SOAK_SIZES:
            queries = corpus_of(kind, size, width, 1000 * seed + 10 * turn + size)
            _, ids = search(lambda: [(0, segment)], 400, queries, k, "certified", None, SCRATCH)
            true = (queries.double() @ distinct.double().T)[:, group]
            expected = true.sort(dim=1, descending=True, stable=True).indices[:, :k]
            gap = 1e-12 * (queries.double().norm(dim=1) * longest)[:, None]
            assert ((true.gather(1, ids) - true.gather(1, expected)).abs() <= gap).all()
            for q in (ids != expected).any(dim=1).nonzero()[:, 0].tolist():  # rounded sums are not in the exact order
                one, scale = queries[q : q + 1], gap[q].numpy() * 1e12
                scores, again = search(lambda: [(0, segment)], 400, one, k, "certified", None, SCRATCH)
                check(scores, again, truth(one, corpus), corpus, scale, np.ones((1, 400), dtype=bool))
            done += size
    return done


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_no_query_of_seventy_thousand_is_wrong(kind):
    """Together, a million queries."""
    cases = ((24, 5, 1), (96, 5, 2), (96, 100, 3), (33, 1, 4))
    assert sum(soak(kind, width, k, seed, SOAK_TURNS) for width, k, seed in cases) * len(KINDS) > 1_000_000


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "negative"])
def test_the_soak_detects_a_wrong_bound(kind, monkeypatch):
    monkeypatch.setattr(TopKState, "warn_of_broken", lambda self, stacklevel: False)  # the search's own test
    assert soak(kind, 96, 5, 2, 1) == sum(SOAK_SIZES)
    with pytest.raises(AssertionError):
        soak(kind, 96, 5, 2, 4, spoil=0.01)


def planted(fault: str) -> Segment:
    segment = segment_of(torch.randn(3000, 32, generator=torch.Generator().manual_seed(5)))
    assert segment.planes is not None
    if fault == "coarse errors":
        segment.planes.coarse_errors *= 1e-3
        segment.planes.residuals *= 1e-3
    elif fault == "fine errors":
        segment.planes.fine_errors *= 1e-3
    elif fault == "coarse codes":
        segment.planes.coarse[:, :64] ^= 0x77
    elif fault == "fine codes":
        segment.planes.fine[:, :8] ^= 0xFF
    elif fault == "coarse scales":
        segment.planes.coarse_scales *= 1.5
    elif fault == "fine scales":
        segment.planes.fine_scales *= 1.2
    return segment


@pytest.mark.parametrize(
    "fault", ["coarse errors", "fine errors", "coarse codes", "fine codes", "coarse scales", "fine scales"]
)
@pytest.mark.parametrize("size", [1, 20])
def test_a_planted_fault_is_caught_and_the_query_redone(fault, size):
    segment = planted(fault)
    queries = torch.randint(-127, 128, (size, 32), generator=torch.Generator().manual_seed(6)).float()
    queries[:, 0] = 127  # The codes of such queries are exact, so that their rounding does not hide a fault.
    with pytest.warns(RuntimeWarning, match="queries were redone in fp64"):
        _, ids = search(lambda: [(0, segment)], 3000, queries, 100, "certified", None, SCRATCH)
    expected = (queries.double() @ segment.rows.double().T).argsort(dim=1, descending=True)[:, :100]
    redone = (ids == expected).all(dim=1)
    assert redone.any() if fault.startswith("fine") else redone.all()


@pytest.mark.parametrize(
    ("kind", "expected"), [("normal", False), ("clusters", False), ("one-hot", True), ("heavy-tailed", True)]
)
def test_rows_with_few_large_values_are_rotated(kind, expected):
    corpus = corpus_of(kind, 300, 96, 3)
    planes = Planes.of(corpus)
    assert planes is not None and bool(planes.rotated) == expected
    relative = planes.coarse_errors.flatten()[:300] / corpus.norm(dim=1)
    assert relative.mean() < 0.15


def test_a_saved_index_stays_rotated_and_an_older_one_loads(tmp_path):
    index = FlatIPIndex(33, dtype="float32")
    index.add(corpus_of("one-hot", 500, 33, 3))
    index.save(tmp_path / "index")
    loaded = FlatIPIndex.load(tmp_path / "index")
    queries = torch.randn(5, 33)
    for one in (index, loaded):
        (segment,) = [segment for _, segment in one.segments()]
        assert segment.planes is not None and bool(segment.planes.rotated)
        assert torch.equal(one.search(queries, 20)[1], index.search(queries, 20, precision="exact")[1])
    plain = FlatIPIndex(33, dtype="float32")
    plain.add(torch.randn(500, 33))
    plain.save(tmp_path / "plain")
    file = tmp_path / "plain" / "piece-00000.safetensors"
    older = load_file(file)
    del older["code_rotated"]
    save_file(older, file)
    again = FlatIPIndex.load(tmp_path / "plain", verify=False)
    assert torch.equal(again.search(queries, 20)[1], plain.search(queries, 20)[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 5, 12, 64, 100, 140])
def test_queries_that_read_the_fine_plane_together_find_the_same(kind, width, monkeypatch):
    """So many rows are wanted that 4 bits keep most of them."""
    monkeypatch.setattr(cpu, "SUMS_AT_ONCE", 1 << 12)
    corpus, queries = corpus_of(kind, 1500, width, 1), corpus_of(kind, 7, width, 2)
    valid = torch.rand(1500, generator=torch.Generator().manual_seed(1)) < 0.9
    for mask in (None, valid):
        _, ids = search(lambda: [(0, segment_of(corpus))], 1500, queries, 200, "certified", mask, SCRATCH)
        true = queries.double() @ corpus.double().T
        if mask is not None:
            true[:, ~mask] = -torch.inf
        gap = 1e-12 * (queries.double().norm(dim=1) * corpus.double().norm(dim=1).max())[:, None]
        assert ((true.gather(1, ids) - true.topk(200, dim=1).values).abs() <= gap).all()
        assert all(len(set(row)) == 200 for row in ids.tolist())


def test_few_rows_are_rescored():
    """4-bit codes leave a few rows in a hundred, and 7-bit codes hardly more than k."""
    corpus = torch.nn.functional.normalize(torch.randn(20_000, 256), dim=1)
    queries = torch.nn.functional.normalize(corpus[:8] + 0.05 * torch.randn(8, 256), dim=1)
    state = TopKState(8, 10, corpus.device)
    cpu.search_planes(
        segment_of(corpus), 0, Queries.of(queries), torch.empty(0, dtype=torch.bool), state, True, SCRATCH
    )
    coarse, rescored = state.survivors.unbind(1)
    assert (coarse < 0.2 * len(corpus)).all() and (rescored < 0.02 * len(corpus)).all() and (rescored >= 10).all()


@pytest.mark.parametrize(
    ("kind", "k", "products"), [("normal", 20, False), ("near-tied", 20, False), ("normal", 250, True)]
)
def test_a_sample_of_many_queries_chooses_between_codes_and_products(kind, k, products, monkeypatch):
    corpus = corpus_of(kind, 3000, 64, 1)
    queries = torch.randn(70, 64, generator=torch.Generator().manual_seed(2))
    taken = []
    library = top_k._library
    monkeypatch.setattr(top_k, "_library", lambda *given: taken.append(len(given[2])) or library(*given))
    _, ids = search(lambda: [(0, segment_of(corpus))], 3000, queries, k, "certified", None, SCRATCH)
    true = queries.double() @ corpus.double().T
    assert ((true.gather(1, ids) - true.topk(k, dim=1).values).abs() <= 1e-12 * 64 * true.abs().max()).all()
    state = TopKState(70, k, corpus.device)
    cpu.search_planes(
        segment_of(corpus), 0, Queries.of(queries), torch.empty(0, dtype=torch.bool), state, True, SCRATCH
    )
    coarse, rescored = (state.survivors[: cpu.SAMPLED_QUERIES].double().mean(dim=0) / 3000).tolist()
    few, many = cpu.RESCORED_SHARES
    assert (coarse > cpu.MAX_KEPT_SHARE and few < rescored < many) == products, (coarse, rescored)
    assert taken == ([70 - cpu.SAMPLED_QUERIES] if products else [])


def test_stats_are_those_of_the_last_search():
    index = FlatIPIndex(64, dtype="float32")
    index.add(torch.randn(2000, 64))
    assert index.stats() == {}
    index.search(torch.randn(3, 64), 10)
    stats = index.stats()
    assert (stats["queries"], stats["rows"]) == (3, 2000) and 10 <= stats["rescored"] <= stats["coarse"] < 2000
    index.search(torch.randn(1, 64), 10, precision="exact")
    assert index.stats() == {"queries": 1, "rows": 2000, "coarse": 0.0, "rescored": 0.0}


def test_fast_ranks_by_the_scores_of_7_bits():
    corpus, queries = torch.randn(4000, 64), torch.randn(5, 64)
    segment = segment_of(corpus)
    assert segment.planes is not None
    _, whole = decoded(segment.planes, 4000, 64)
    _, ids = search(lambda: [(0, segment)], 4000, queries, 10, "fast", None, SCRATCH)
    best = (queries.double() @ whole.T).argsort(dim=1, descending=True)[:, :10]
    overlap = (ids[:, :, None] == best[:, None, :]).any(dim=2).double().mean()
    assert overlap > 0.9


def run_here() -> None:
    """Run the tests of this file that compare with fp64, for another instruction set."""
    test_the_errors_of_codes_are_measured()
    test_the_order_is_that_of_fp64()
    test_few_valid_rows_have_the_same_scores_for_any_number_of_queries()
    for kind in KINDS:
        for size in (1, 40):
            test_larger_corpora_give_the_same_as_fp64(kind, size, pytest.MonkeyPatch())
        for width in (5, 12, 100, 140):
            test_queries_that_read_the_fine_plane_together_find_the_same(kind, width, pytest.MonkeyPatch())


@pytest.mark.parametrize("isa", ISAS[1:])
def test_every_instruction_set_gives_the_same(isa):
    root = Path(__file__).parents[2]
    environment = os.environ | {"JASPER_FAST_ISA": isa, "PYTHONPATH": str(root)}
    program = "from tests.mips import test_mips_planes as t\nt.run_here()\n"
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_an_index_over_several_segments_has_planes_in_each():
    index = FlatIPIndex(16, dtype="float32")
    index.add(torch.randn(5000, 16))
    queries = torch.randn(3, 16)
    assert all(segment.planes is not None for _, segment in index.segments())
    for k in (1, 7, 4999):
        assert torch.equal(index.search(queries, k)[1], index.search(queries, k, precision="exact")[1])


@pytest.mark.parametrize("kind", ["normal", "mixed scales", "one-hot"])
def test_taken_rows_keep_codes_and_valid_bounds(kind):
    corpus = corpus_of(kind, 1000, 33, 4)
    planes = Planes.of(corpus)
    assert planes is not None
    for numbers in (torch.arange(3, 1000, 7), torch.tensor([999]), torch.randperm(1000)[:64]):
        taken, fresh = planes.take(numbers), Planes.empty(len(numbers), 33)
        fresh.rotated.copy_(planes.rotated)
        fresh._write(corpus[numbers], 0)
        for got, expected in zip(decoded(taken, len(numbers), 33), decoded(fresh, len(numbers), 33), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(taken.coarse_errors.flatten()[: len(numbers)], fresh.coarse_errors.flatten()[: len(numbers)])
        assert torch.equal(taken.fine_errors, fresh.fine_errors) and torch.equal(taken.residuals, fresh.residuals)
