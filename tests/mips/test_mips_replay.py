"""Searches of few queries as graphs, with a capture that only repeats the launches, as there is no GPU here."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import model
from jasper_fast.mips import FlatIPIndex, cpu, cuda, replay, threshold
from jasper_fast.mips.topk_state import TopKState

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

from triton.runtime.jit import KernelInterface  # noqa: E402

from tests.helpers.mips_kernels import DEVICE, GPU, on_gpu, through_kernels  # noqa: E402


@pytest.fixture
def captures(monkeypatch):
    """Count captures. Without a GPU, a replay launches again, into the memory of the first results."""
    count = []
    plain = replay.capture

    def capture(launch):
        count.append(launch)
        if GPU:
            return plain(launch)
        results = launch()

        def again():
            for own, new in zip(results, launch(), strict=True):
                own.copy_(new)

        return results, again, None

    monkeypatch.setattr(replay, "capture", capture)
    return count


def index_of(rows: int, dtype: str = "int8") -> FlatIPIndex:
    index = FlatIPIndex(8, dtype=dtype, device=DEVICE)
    index.add(torch.randn(rows, 8))
    return index


def check(index: FlatIPIndex, queries: torch.Tensor, k: int, precision="certified") -> None:
    queries = queries.to(DEVICE)
    expected = index.search(queries, k, precision="exact")
    scores, ids = index.search(queries, k, precision=precision)
    assert torch.equal(ids, expected[1]) and torch.equal(scores, expected[0])


def test_the_second_search_is_captured_and_later_ones_are_replayed(captures):
    index = index_of(250)
    with through_kernels():
        for n, captured in enumerate((0, 1, 1)):
            check(index, torch.randn(2, 8) * 10.0**n, 3)
            assert len(captures) == captured
        check(index, torch.randn(1, 8), 3)  # another shape
        assert len(captures) == 1
        held = index.search(torch.ones(2, 8, device=DEVICE), 3)
        copies = [part.clone() for part in held]
        index.search(-torch.ones(2, 8, device=DEVICE), 3)  # does not overwrite results
        assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_added_rows_are_captured_again(captures):
    index = index_of(150)
    with through_kernels():
        for captured in (1, 2):
            for _ in range(2):
                check(index, torch.randn(1, 8), 2)
            assert len(captures) == captured
            index.add(torch.randn(70, 8) * 3)


def test_incomplete_queries_are_searched_without_the_graph(captures, monkeypatch):
    index = FlatIPIndex(8, dtype="int8", device=DEVICE)
    index.add(torch.ones(140, 8))  # more equal rows than may be rescored
    with through_kernels():
        for _ in range(3):
            check(index, torch.ones(1, 8), 2)
    assert len(captures) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_queries_that_no_scan_takes_leave_the_graph(captures, bad):
    index = FlatIPIndex(8, dtype="float32", device=DEVICE)
    index.add(torch.randn(150, 8))
    queries = torch.randn(2, 8, device=DEVICE) * 1e-3
    with through_kernels():
        for _ in range(3):
            index.search(queries, 2)
        queries[1, 3] = bad
        if bad == 1e38:
            check(index, queries, 2)
        else:
            with pytest.raises(ValueError, match="queries"):
                index.search(queries, 2)


@pytest.mark.parametrize("size, options", [(17, {}), (2, {"valid": [5, 7, 9]}), (2, {"precision": "exact"})])
def test_other_searches_are_not_captured(captures, size, options):
    index, queries = index_of(200), torch.randn(size, 8, device=DEVICE)
    with through_kernels():
        for _ in range(2):
            index.search(queries, 2, **options)
    assert not captures


def test_a_capture_that_fails_is_reported_once(monkeypatch):
    def capture(launch):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "capture", capture)
    index, queries = index_of(200), torch.randn(2, 8)
    with through_kernels():
        check(index, queries, 2)
        with pytest.warns(UserWarning, match="not replayed as a CUDA graph: operation not permitted"):
            check(index, queries, 2)
        check(index, queries, 2)


def test_few_graphs_are_kept(captures, monkeypatch):
    monkeypatch.setattr(replay, "MAX_GRAPHS", 2)
    index = index_of(200)
    with through_kernels():
        for k in (1, 2, 3):
            for _ in range(2):
                index.search(torch.ones(1, 8, device=DEVICE), k)
    ((_, segment),) = index.segments()
    assert [key[1] for key in segment.derived["graphs"]] == [2, 3] and len(captures) == 3


def test_what_a_graph_reads_is_prepared_before_it(monkeypatch):
    index = index_of(200)
    ((_, segment),) = index.segments()
    threshold.prepare(segment, cuda.scan_rows(segment), 32)
    assert {"norms", (32, torch.int8)} <= set(segment.derived)


@on_gpu
def test_graphs_on_a_gpu(captures):
    index = FlatIPIndex(64, dtype="bfloat16", device="cuda")
    index.add(torch.randn(100_000, 64))
    for size in (1, 16):
        for _ in range(4):
            queries = torch.randn(size, 64)
            scores, ids = index.search(queries.cuda(), 10)
            expected = index.search(queries.cuda(), 10, precision="exact")
            assert torch.equal(ids, expected[1]) and torch.equal(scores, expected[0])
    assert len(captures) == 2


class Launches(TorchDispatchMode):
    """Count the operations that launch on a GPU, which views and allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function._schema.returns[:1]
        view = result and result[0].alias_info is not None and not result[0].alias_info.is_write
        # A power and a product, or a copy that is filled.
        double = function in (torch.ops.aten.ldexp.Tensor, torch.ops.aten.masked_fill.Scalar)
        if not view and "empty" not in function.__name__:
            self.count += 1 + double
        return function(*arguments, **(options or {}))


def test_a_graph_has_as_many_launches_as_the_model_says(monkeypatch):
    """Beside the scan of few queries, launches take most of the time."""
    kernels, found = [], []
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *a, **o: kernels.append(kernel))
    monkeypatch.setattr(cpu, "in_use", lambda tensor: False)  # as on a GPU
    monkeypatch.setattr(TopKState, "sorted", TopKState.reversed)
    plain = replay._search

    def search(*arguments):
        kernels.clear()
        with Launches() as launches:
            result = plain(*arguments)
        found.append(launches.count + len(kernels))
        return result

    monkeypatch.setattr(replay, "_search", search)
    monkeypatch.setattr(replay, "capture", lambda launch: (launch(), lambda: None, None))
    index = index_of(250)
    with through_kernels():
        for _ in range(2):
            index.search(torch.randn(1, 8, device=DEVICE), 3)
    assert found == [model.IN_GRAPH]
