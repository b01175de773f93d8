"""Inner-product search against correctly rounded sums of exact products, on every path of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from jasper_fast.mips import FlatIPIndex, cpu, top_k, topk
from jasper_fast.mips.segment import BIN, Planes, Segment, bin_norms, int8_codes
from jasper_fast.mips.top_k import SCRATCH, search
from jasper_fast.ops import native
from tests.helpers.mips_cases import KINDS, NEVER, check, make, truth

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ALWAYS = {}.fromkeys(cpu.MAX_FEW_QUERIES, 10**6)
needs_extension = pytest.mark.skipif(native.extension_path() is None, reason="the compiled extension is not built")


@contextmanager
def path(few: dict, compiled: bool = True, bf16: bool = False, tile_rows: int = 128) -> Iterator[None]:
    """Force one path through the search."""
    with (
        mock.patch.object(cpu, "MAX_FEW_QUERIES", few),
        mock.patch.multiple(
            top_k,
            TILE_ROWS=tile_rows,
            multiply_in_bf16=lambda: bf16,
            **({} if compiled else {"native": lambda segment: False}),
        ),
    ):
        yield


PATHS = {
    "few": lambda: path(ALWAYS),
    "tiles": lambda: path(NEVER),
    "bf16 tiles": lambda: path(NEVER, bf16=True),
    "plain": lambda: path(NEVER, compiled=False),
}


def segment_of(rows: Tensor, stored: str) -> tuple[Segment, Tensor]:
    """Return the segment and its float64 values."""
    if stored == "int8":
        codes, scales, _ = int8_codes(rows)
        segment = Segment(codes, scales)
        segment.norms = bin_norms(segment)
        return segment, segment.values(0, len(rows), torch.float64)
    segment = Segment(rows.bfloat16() if stored == "bfloat16" else rows)
    segment.norms = bin_norms(segment)
    if stored == "planed":
        segment.planes = Planes.of(rows)
    return segment, segment.rows.double()


@needs_extension
@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    stored=st.sampled_from(["float32", "planed", "bfloat16", "int8"]),
    way=st.sampled_from(sorted(PATHS)),
    precision=st.sampled_from(["certified", "exact"]),
    rows=st.integers(1, 300),
    size=st.integers(1, 5),
    width=st.sampled_from([1, 2, 3, 8, 17, 33, 70]),
    share=st.sampled_from([None, 0.0, 0.02, 0.5, 1.0]),
    masks=st.booleans(),
    seed=st.integers(0, 1 << 16),
    data=st.data(),
)
def test_every_path_gives_the_order_of_fp64(kind, stored, way, precision, rows, size, width, share, masks, seed, data):
    k = data.draw(st.integers(1, rows), label="k")
    split = data.draw(st.integers(1, -(-rows // BIN)), label="first segment in bins") * BIN
    corpus, queries = make(kind, rows, width, seed), make(kind, size, width, seed + 1)
    segment, values = segment_of(corpus, stored)
    segments = [(0, segment.slice(0, split)), *([(split, segment.slice(split, rows))] if split < rows else [])]
    generator = torch.Generator().manual_seed(seed)
    shape = (size, rows) if masks else (rows,)
    valid = None if share is None else torch.rand(shape, generator=generator) < share
    with PATHS[way]():
        scores, ids = search(lambda: segments, rows, queries, k, precision, valid, SCRATCH)
    # int8 values are code · scale, whose products are exact where the float64 of the row is
    true = truth(queries, values)
    scale = (queries.double().norm(dim=1) * values.norm(dim=1).max()).numpy()
    allowed = np.ones((size, rows), bool) if valid is None else np.broadcast_to(valid.numpy(), (size, rows))
    check(scores, ids, true, values, scale, allowed)


@pytest.mark.parametrize("way", sorted(PATHS))
@needs_extension
def test_many_rows_few_of_which_matter(way):
    corpus = torch.nn.functional.normalize(torch.randn(20_000, 24), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(70, 24), dim=1)
    true = queries.double() @ corpus.double().T
    with PATHS[way]():
        for k in (1, 10, 600):
            scores, ids = topk(queries, corpus, k)
            assert torch.equal(ids, true.argsort(dim=1, descending=True)[:, :k])
            assert torch.equal(scores, true.gather(1, ids).float())


@pytest.mark.parametrize("way", sorted(PATHS))
@needs_extension
def test_the_largest_codes_overflow_nothing(way):
    corpus = torch.ones(100, 5000)
    corpus[77] += 2.0**-20
    segment, _ = segment_of(corpus, "planed")
    with PATHS[way]():
        scores, ids = search(lambda: [(0, segment)], 100, torch.ones(4, 5000), 3, "certified", None, SCRATCH)
    assert ids.tolist() == [[77, 0, 1]] * 4 and scores[0, 1] == 5000.0


@needs_extension
def test_denormals_of_bfloat16_rows_and_queries_keep_the_order_of_fp64():
    tiny = torch.finfo(torch.bfloat16).tiny  # 2^-126, below which products of pairs read zeros
    corpus = (torch.randn(500, 40, generator=torch.Generator().manual_seed(1)) * tiny).bfloat16()
    corpus[:250] /= 4
    queries = torch.cat((corpus[::60].float(), torch.randn(4, 40) * 2.0**-130, torch.randn(4, 40)))
    index = FlatIPIndex(40, dtype="bfloat16")
    index.add(corpus)
    assert (corpus.abs() < tiny).float().mean() > 0.4
    for k in (1, 9, 500):
        true, numbers = index.search(queries, k, precision="exact")
        scores, ids = index.search(queries, k)
        assert torch.equal(ids, numbers) and torch.equal(scores, true)


@pytest.mark.parametrize("isa", ["generic", "avx512vnni"])
@needs_extension
def test_the_loops_for_other_processors_give_the_same(isa):
    program = (
        "from tests.mips import test_mips as t\n"
        "t.test_every_path_gives_the_order_of_fp64()\n"
        "[t.test_many_rows_few_of_which_matter(way) for way in t.PATHS]\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"JASPER_FAST_ISA": isa, "PYTHONPATH": str(root)}
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_low_precision_alone_is_wrong_and_the_certificate_repairs_it():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=generator)
    corpus = base + 1e-3 * torch.randn(2000, 64, generator=generator)  # bf16 and int8 cannot tell these apart
    index = FlatIPIndex(64, dtype="float32")
    index.add(corpus)
    true = (base.double()[None] @ corpus.double().T).argsort(dim=1, descending=True)[:, :20]
    _, fast = index.search(base[None], 20, precision="fast")
    _, certified = index.search(base[None], 20)
    if native.extension_path() is not None:
        assert not torch.equal(fast, true)
    assert torch.equal(certified, true)


@needs_extension
@pytest.mark.parametrize("way", sorted(PATHS))
def test_a_corrupted_bound_is_caught_and_the_query_redone(way):
    corpus = torch.randn(500, 32)
    segment = Segment(corpus)
    segment.norms = bin_norms(segment) * 1e-9
    queries = torch.randn(3, 32)
    with PATHS[way](), pytest.warns(RuntimeWarning, match="of 3 queries were redone in fp64"):
        _, ids = search(lambda: [(0, segment)], 500, queries, 5, "certified", None, SCRATCH)
    assert torch.equal(ids, (queries.double() @ corpus.double().T).argsort(dim=1, descending=True)[:, :5])


def test_a_product_that_is_less_exact_than_it_claims_is_caught(monkeypatch):
    real = torch.mm

    def sloppy(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return out.copy_(real(a.bfloat16().float(), b))

    corpus, queries = torch.randn(1000, 48), torch.randn(20, 48)
    expected = (queries.double() @ corpus.double().T).argsort(dim=1, descending=True)[:, :10]
    monkeypatch.setattr(torch, "mm", sloppy)
    if native.extension_path() is None:
        pytest.skip("only the compiled path calls torch.mm")
    with pytest.warns(RuntimeWarning, match="redone in fp64"):
        _, ids = topk(queries, corpus, 10)
    assert torch.equal(ids, expected)


def test_a_lower_matmul_precision_widens_the_bound_instead_of_breaking_it():
    corpus, queries = torch.randn(1000, 48), torch.randn(20, 48)
    expected = topk(queries, corpus, 10, precision="exact")[1]
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(topk(queries, corpus, 10)[1], expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_precision_that_torch_refuses_to_tell_counts_as_low(monkeypatch):
    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    corpus, queries = torch.randn(1000, 48), torch.randn(20, 48)
    expected = topk(queries, corpus, 10, precision="exact")[1]
    plain = cpu._product_rounding(corpus, torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert plain == 0.0 < cpu._product_rounding(corpus, torch.float32)
    assert torch.equal(topk(queries, corpus, 10)[1], expected)


@pytest.mark.parametrize("precision", ["certified", "exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_precisions(dtype, precision):
    corpus, queries = torch.randn(700, 19).to(dtype), torch.randn(9, 19).to(dtype)
    scores, ids = topk(queries, corpus, 7, precision=precision)
    true = queries.double() @ corpus.double().T
    assert scores.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, true.argsort(dim=1, descending=True)[:, :7])


def test_numpy_in_numpy_out_and_every_layout(tmp_path):
    corpus, queries = np.random.default_rng(0).standard_normal((2, 300, 12), dtype=np.float32)
    expected = np.argsort(-(queries.astype(np.float64) @ corpus.T.astype(np.float64)), axis=1)[:, :5]
    np.save(tmp_path / "corpus.npy", corpus)
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    layouts = (corpus, np.asfortranarray(corpus), corpus[::-1][::-1], mapped, np.repeat(corpus, 2, axis=0)[::2])
    for layout in layouts:
        scores, ids = topk(queries, layout, 5)
        assert isinstance(scores, np.ndarray) and scores.dtype == np.float32 and ids.dtype == np.int64
        assert np.array_equal(ids, expected)
    scores, ids = topk(torch.from_numpy(queries), corpus, 5)
    assert isinstance(ids, Tensor) and np.array_equal(ids.numpy(), expected)
    scores, ids = topk(queries.astype(np.float64), corpus, 5)
    assert np.array_equal(ids, expected)


def test_a_small_scratch_changes_nothing():
    corpus, queries = torch.randn(1000, 16).half(), torch.randn(40, 16)
    expected = topk(queries, corpus, 30, precision="exact")
    for precision in ("certified", "exact"):
        scores, ids = topk(queries, corpus, 30, precision=precision, scratch=20_000)
        assert torch.equal(ids, expected[1]) and torch.equal(scores, expected[0])


def test_an_id_filter_is_a_mask_by_number():
    corpus, queries = torch.randn(200, 8), torch.randn(4, 8)
    wanted = np.array([3, 77, 150])
    mask = torch.zeros(200, dtype=torch.bool)
    mask[wanted] = True
    expected = topk(queries, corpus, 5, valid=mask)
    got = topk(queries, corpus, 5, valid=wanted)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert (got[1][:, 3:] == -1).all()


@pytest.mark.parametrize("none", [[], (), np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64)])
def test_a_filter_that_leaves_no_row_finds_none(none):
    scores, ids = topk(torch.randn(4, 8), torch.randn(200, 8), 5, valid=none)
    assert (ids == -1).all() and (scores == -torch.inf).all()


def test_no_queries_is_no_error():
    scores, ids = topk(torch.empty(0, 4), torch.randn(10, 4), 3)
    assert scores.shape == ids.shape == (0, 3)


def test_wrong_arguments_are_reported():
    corpus, queries = torch.randn(70, 4), torch.randn(3, 4)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1; got {k}"):
            topk(queries, corpus, k)
    with pytest.raises(TypeError, match="70 zeros and ones.*give it as bool"):
        topk(queries, corpus, 1, valid=torch.randint(0, 2, (70,)))
    with pytest.raises(TypeError, match="valid of 2 dimensions must be bool, got int64"):
        topk(queries, corpus, 1, valid=torch.randint(0, 2, (3, 70)))
    with pytest.raises(TypeError, match="corpus must be one of .* got float64: convert"):
        topk(queries, corpus.double(), 1)
    with pytest.raises(TypeError, match="k must be a whole number"):
        topk(queries, corpus, 1.5)
    with pytest.raises(ValueError, match="queries have width 3 and the corpus 4"):
        topk(queries[:, :3], corpus, 1)
    with pytest.raises(ValueError, match=r"queries must have the shape \(rows, width\), got \(4,\)"):
        topk(queries[0], corpus, 1)
    with pytest.raises(TypeError, match="corpus must be one of float32, bfloat16, float16; got float64"):
        topk(queries, corpus.double(), 1)
    with pytest.raises(TypeError, match="must be a torch tensor or a numpy array, got list"):
        topk([[1.0]], corpus, 1)
    with pytest.raises(TypeError, match="must hold floats, got int64"):
        topk(np.ones((2, 4), dtype=np.int64), corpus, 1)
    with pytest.raises(ValueError, match="precision must be one of 'certified', 'exact', 'fast', got 'best'"):
        topk(queries, corpus, 1, precision="best")
    with pytest.raises(ValueError, match=r"valid must have the shape \(70,\) or \(3, 70\), got \(69,\)"):
        topk(queries, corpus, 1, valid=torch.ones(69, dtype=torch.bool))
    with pytest.raises(TypeError, match="valid must be bool, or row numbers, got float32"):
        topk(queries, corpus, 1, valid=torch.ones(70))
    for wrong in (70, -1):
        with pytest.raises(ValueError, match=f"valid: row {wrong} is not in a corpus of 70 rows"):
            topk(queries, corpus, 1, valid=torch.tensor([3, wrong]))
    with pytest.raises(ValueError, match="valid: row 18446744073709551615 is not in a corpus of 70 rows"):
        topk(queries, corpus, 1, valid=np.array([2**64 - 1], dtype=np.uint64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [1, 30])
def test_rows_that_are_not_finite_are_named(bad, size):
    corpus, queries = torch.randn(200, 4), torch.randn(size, 4)
    corpus[133, 2] = bad
    for precision in ("certified", "exact", "fast"):
        with pytest.raises(ValueError, match="corpus: row 133 holds NaN or infinity"):
            topk(queries, corpus, 2, precision=precision)
    queries[-1, 0] = bad
    with pytest.raises(ValueError, match=f"queries: row {size - 1} holds NaN or infinity"):
        topk(queries, torch.randn(5, 4), 2)


def test_without_the_extension_the_results_are_the_same(monkeypatch):
    corpus, queries = torch.randn(900, 11), torch.randn(6, 11)
    expected = topk(queries, corpus, 12)
    monkeypatch.setattr(native, "_PATH", None)
    scores, ids = topk(queries, corpus, 12)
    assert torch.equal(scores, expected[0]) and torch.equal(ids, expected[1])
