"""The kernels on hypothesis examples: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from jasper_fast.mips.segment import BIN  # noqa: E402
from jasper_fast.mips.topk_state import TopKState  # noqa: E402
from tests.helpers.mips_cases import KINDS  # noqa: E402

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")
pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.helpers.mips_kernels import GPU, SHARES, WIDTHS, _poisoned_memory, in_the_order_of_fp64  # noqa: E402, F401
from tests.helpers.pair_counts import EQUAL, MARGINS, SPECIAL, count_as_on_the_cpu  # noqa: E402

NUMBERS = st.one_of(st.floats(-1, 1, width=32), st.sampled_from(EQUAL), st.sampled_from(SPECIAL))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=60), st.sampled_from(MARGINS), st.booleans())
def test_counts_are_those_of_the_cpu(values, margin, exclude_ties):
    """Ties, signed zeros, infinities and NaN."""
    count_as_on_the_cpu(values, margin, exclude_ties)


@settings(deadline=None, max_examples=16)
@given(
    kind=st.sampled_from(KINDS),
    stored=st.sampled_from(["float32", "float16", "int8"] + (["bfloat16"] if GPU else [])),
    rows=st.integers(64, 400),
    size=st.sampled_from([1, 2, 3, 5]),
    width=st.sampled_from(WIDTHS),
    share=st.sampled_from(SHARES),
    masks=st.booleans(),
    descriptors=st.booleans(),
    seed=st.integers(0, 1 << 16),
    data=st.data(),
)
def test_the_order_of_fp64(kind, stored, rows, size, width, share, masks, descriptors, seed, data):
    k = data.draw(st.one_of(st.integers(1, -(-rows // 64)), st.integers(1, rows)), label="k")
    bins = data.draw(st.integers(1, -(-rows // BIN)), label="first segment in bins")
    in_the_order_of_fp64(kind, stored, rows, size, width, share, masks, descriptors, seed, k, bins)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 5), st.lists(st.integers(0, 9), max_size=3), st.integers(0, 99))
def test_tables_merge_as_lists_do(k, size, widths, seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = TopKState(size, k, torch.device("cpu")), TopKState(size, k, torch.device("cpu"))
    first = 0
    for width in widths:
        scores = torch.randint(-3, 3, (size, width), generator=generator).double()
        scores[torch.rand(size, width, generator=generator) < 0.3] = -torch.inf
        ids = (first + torch.arange(width)).expand(size, width)
        one.merge_table(scores, ids)
        query, column = (scores > -torch.inf).nonzero(as_tuple=True)
        other.merge(query, scores[query, column], ids[query, column])
        first += width
        for a, b in zip(one.sorted(), other.sorted(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(one.counts, other.counts) and torch.equal(one.cutoffs, other.cutoffs)
