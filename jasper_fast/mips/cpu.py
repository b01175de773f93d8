"""Search of one corpus segment on a CPU: approximate scores with proven bounds, fp64 for possible top-k rows.

For a query q and a row x of a bin with longest row n, |approximate − q·x| ≤ ε with

    ε = relative · n + absolute

``relative`` covers the rounding of the query and of the matrix product, in any order of summation. It is γ_D of Higham,
Accuracy and Stability of Numerical Algorithms, §3.1. ``absolute`` covers underflow. A row is skipped only if
approximate + ε is below a proven lower bound of the k-th best score. Float32 rows with codes in two planes have the
bounds of docs/mips.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jasper_fast.mips.segment import BIN, UNIT_ROUNDOFF, Segment
from jasper_fast.mips.topk_state import TopKState
from jasper_fast.ops.native import in_use
from jasper_fast.utils import hardware as env

# Queries up to which the compiled loops, which read the rows once, are faster than library products. With
# vectors of 64 bytes, and with products of pairs, bfloat16 rows take several times as many.
MAX_FEW_QUERIES = {torch.float32: 4, torch.bfloat16: 8, torch.int8: 3}
MORE_BFLOAT16_QUERIES = (1, 4, 32)
MIN_PAIRS_QUERIES = 2  # One query is limited by memory, and its float32 values have tighter bounds.
TILE_ROWS, TILE_QUERIES = 2048, 256  # of one library product; its 2 MB of scores stay in the cache
QUERIES_AT_ONCE = 64  # of a search of planes
# The first 16 of 64 or more queries decide how the others are searched. It is by products, if 4-bit scores keep more
# than a fraction of the rows, and 7-bit scores a fraction between two others. With fewer, codes are faster than fp32
# products, but not than bf16 ones. With more, the scores are near-ties.
SAMPLED_QUERIES, MIN_SAMPLED, MAX_KEPT_SHARE, RESCORED_SHARES = 16, 64, 0.15, (0.04, 0.15)
SUMS_AT_ONCE = 1 << 23  # maximum number of products in memory, 4 bytes each
UNDERFLOW = 2.0**-125
MAX_FLOAT32_SCORE = 1e37  # Larger scores could overflow float32 in a partial sum.
BF16_ROUNDING = 2.0**-8  # bound of an element's relative rounding, with a margin


@dataclass
class Queries:
    """Queries scaled by powers of two to a largest element in [0.5, 1), so that no scale overflows.

    Args:
        exact: (Q, D) float64 queries.
        scan: (Q, D) float32 queries, rounded. Only float64 queries and denormals change.
        exponents: (Q,) int32 exponents, query = exact · 2^exponent.
        longest: largest norm. None until it is needed.
    """

    exact: Tensor
    scan: Tensor
    exponents: Tensor
    longest: float | None = None

    def largest_norm(self) -> float:
        """Return the largest norm of the scaled queries. Waits for the device once."""
        if self.longest is None:
            self.longest = float(self.exact.norm(dim=1).max()) if len(self) else 0.0
        return self.longest

    @classmethod
    def of(cls, queries: Tensor) -> Queries:
        """Scale (Q, D) float queries."""
        exact = queries.double()
        if in_use(exact):
            exact, scan, exponents, norms = torch.ops.jasper_fast_native.mips_scaled(exact.contiguous())
            return cls(exact, scan, exponents, float(norms.max()) if len(norms) else 0.0)
        _, exponents = torch.frexp(exact.abs().amax(dim=1))
        exact = torch.ldexp(exact, -exponents[:, None].double()).contiguous()
        return cls(exact, exact.float(), exponents)

    def __len__(self) -> int:
        return len(self.exact)

    def take(self, rows: slice | Tensor) -> Queries:
        """Return some of the queries."""
        return Queries(self.exact[rows], self.scan[rows], self.exponents[rows])

    def to(self, device: torch.device) -> Queries:
        """Return the same queries on another device."""
        return Queries(self.exact.to(device), self.scan.to(device), self.exponents.to(device))


def accumulation(width: int) -> float:
    """Return γ, the relative error of an fp32 dot product in any order, with roundings of its factors."""
    return (width + 4) * UNIT_ROUNDOFF / (1 - (width + 4) * UNIT_ROUNDOFF)


def bounds(scanned: Tensor, queries: Queries, product: float) -> Tensor:
    """Return (relative, absolute) of every query, (Q, 2) float64.

    Args:
        scanned: (Q, D) float64 values of the queries that the scan multiplies.
        queries: exact queries.
        product: relative error of the scan's arithmetic.
    """
    width = scanned.shape[1]
    norm, rounding = scanned.norm(dim=1), (queries.exact - scanned).norm(dim=1)
    relative = (norm * product + rounding) * (1 + 1e-9)
    return torch.stack((relative, torch.full_like(norm, width * UNDERFLOW)), dim=1)


def native(segment: Segment) -> bool:
    """Return True if the compiled loops can search this segment."""
    return in_use(segment.rows)


def max_few_queries(rows: Tensor, proven: bool) -> int:
    """Return the number of queries up to which `search_few` is faster than library products.

    Args:
        rows: rows of a segment that compiled loops can search.
        proven: True to rank by fp64 scores. Products of pairs round the queries, so that their own order is coarse.
    """
    limit = MAX_FEW_QUERIES[rows.dtype]
    if rows.dtype != torch.bfloat16:
        return limit
    return limit * MORE_BFLOAT16_QUERIES[min(torch.ops.jasper_fast_native.mips_vectors(rows), 2 if proven else 1)]


def takes_pairs(rows: Tensor) -> bool:
    """Return True if bfloat16 rows and queries are multiplied by instructions for pairs of elements."""
    return rows.dtype == torch.bfloat16 and torch.ops.jasper_fast_native.mips_vectors(rows) == 2


def candidates_for(k: int) -> int:
    """Return the capacity for a query's candidates. A full list is reduced to about k."""
    return 4 * k + 4 * BIN


def search_few(
    segment: Segment, first_id: int, queries: Queries, valid: Tensor, state: TopKState, proven: bool
) -> None:
    """Search for few queries with compiled loops that read the rows once.

    Args:
        segment: segment to search. Its ``norms`` are computed if they are None.
        first_id: id of the first row.
        queries: the Q queries.
        valid: bool (N,) or (Q, N) mask. Empty if all rows are valid.
        state: best rows so far, updated in place.
        proven: True to rank by fp64 scores, False by the scan's.
    """
    if segment.rows.dtype == torch.int8:
        scanned, query_scales, limits = _integers(queries)
    else:
        scanned, query_scales = queries.scan, torch.empty(0)
        pairs = proven and len(queries) >= MIN_PAIRS_QUERIES and takes_pairs(segment.rows)
        if pairs:
            low = scanned.bfloat16()
            scanned = low.where(low.abs() >= torch.finfo(low.dtype).tiny, 0)
        limits = bounds(scanned.double(), queries, accumulation(segment.rows.shape[1]))
        if pairs:
            limits[:, 1] *= 2  # Denormals become 0: of rows, products and sums.
    fill = segment.norms is None
    norms = segment.norms
    if norms is None:
        norms = segment.norms = torch.empty(-(-len(segment) // BIN), dtype=torch.float64)
    torch.ops.jasper_fast_native.mips_few(
        scanned, query_scales, fill, queries.exact, segment.rows, segment.scales, norms, limits, valid, first_id,
        proven, candidates_for(state.k), state.best, state.counts, state.cutoffs, state.broken,
    )  # fmt: skip


def search_tiles(
    segment: Segment,
    first_id: int,
    queries: Queries,
    valid: Tensor,
    state: TopKState,
    proven: bool,
    rows: int,
    bf16: bool,
) -> None:
    """Search for many queries with matrix products and the compiled selection.

    Args:
        segment: segment to search, with known ``norms``.
        first_id: id of the first row.
        queries: the Q queries.
        valid: bool (N,) or (Q, N) mask. Empty if all rows are valid.
        state: best rows so far, updated in place.
        proven: True to rank by fp64 scores, False by the scan's.
        rows: number of corpus rows in one product.
        bf16: multiply in bf16.
    """
    width, size = segment.rows.shape[1], len(queries)
    factor = torch.bfloat16 if bf16 else torch.float32
    scanned = queries.scan.to(factor)
    limits = bounds(scanned.double(), queries, accumulation(width) + _product_rounding(segment.rows, factor))
    scores = torch.empty(min(rows, len(segment)), size, dtype=factor)

    def product(start: int, stop: int) -> Tensor:
        # Libraries are fastest with the corpus as the left factor.
        return torch.mm(segment.values(start, stop, factor), scanned.T, out=scores[: stop - start]).float()

    candidates = torch.empty(size, candidates_for(state.k), dtype=torch.int64)
    counts = torch.zeros(size, dtype=torch.int64)
    assert segment.norms is not None
    common = (queries.exact, segment.rows, segment.scales, segment.norms, limits, valid, first_id, proven)
    selection = (candidates, counts, state.best, state.counts, state.cutoffs, state.broken)
    for start in range(0, len(segment), rows):
        tile = product(start, min(start + rows, len(segment)))
        torch.ops.jasper_fast_native.mips_tile(tile, start, *common, *selection)
    torch.ops.jasper_fast_native.mips_settle(*common, *selection)


def search_planes(
    segment: Segment, first_id: int, queries: Queries, valid: Tensor, state: TopKState, proven: bool, scratch: int
) -> int:
    """Search a segment with planes, and return the number of queries done: all, or the first few.

    If a sample of many queries shows that matrix products are faster for the others, these are left to the caller.

    Args:
        segment: segment to search, with known ``norms``.
        first_id: id of the first row.
        queries: the Q queries.
        valid: bool (N,) or (Q, N) mask. Empty if all rows are valid.
        state: best rows so far, updated in place.
        proven: True to rank by fp64 scores, False by those of the 7-bit codes.
        scratch: bytes that the search may use.
    """
    planes, size = segment.planes, len(queries)
    assert planes is not None
    sums = max(1, min(SUMS_AT_ONCE, scratch // 8))

    def scan(part: slice) -> None:
        mask = valid[part].contiguous() if valid.dim() == 2 else valid
        own = state if part.stop - part.start == size else state.part(part)
        torch.ops.jasper_fast_native.mips_planes(
            queries.exact[part], segment.rows, *planes.tensors().values(), segment.norms, mask, first_id, proven,
            QUERIES_AT_ONCE, sums, own.best, own.counts, own.cutoffs, own.broken, own.survivors,
        )  # fmt: skip

    if size < MIN_SAMPLED:
        scan(slice(0, size))
        return size
    sample = slice(0, SAMPLED_QUERIES)
    before = state.survivors[sample].sum(dim=0)
    scan(sample)
    kept = (state.survivors[sample].sum(dim=0) - before) / (SAMPLED_QUERIES * len(segment))
    least = 0.0 if multiply_in_bf16() else RESCORED_SHARES[0]
    if kept[0] > MAX_KEPT_SHARE and least <= kept[1] < RESCORED_SHARES[1]:
        return SAMPLED_QUERIES
    scan(slice(SAMPLED_QUERIES, size))
    return size


def _integers(queries: Queries) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries as int16 codes (Q, D), their scales (Q,) float32, and the bounds of integer scores."""
    width = queries.exact.shape[1]
    top = min(32767, (2**31 - 1) // (127 * width))  # sums of products fit 32 bits
    scales = queries.exact.abs().amax(dim=1).div(top).float()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (queries.exact / scales.double()[:, None]).round_().clamp_(-top, top)
    return codes.to(torch.int16), scales, bounds(codes * scales.double()[:, None], queries, 8 * UNIT_ROUNDOFF)


def search_plain(
    segment: Segment,
    first_id: int,
    queries: Queries,
    valid: Tensor,
    state: TopKState,
    precision: str,
    rows: int,
) -> None:
    """Search for any number of queries on any device in plain torch.

    Args:
        segment: segment to search, with known ``norms``.
        first_id: id of the first row.
        queries: the Q queries.
        valid: bool (N,) or (Q, N) mask. Empty if all rows are valid.
        state: best rows so far, updated in place.
        precision: "certified", "exact" or "fast". "exact" scans in fp64.
        rows: number of corpus rows in one product.
    """
    width, size = segment.rows.shape[1], len(queries)
    proven, k = precision != "fast", state.k
    factor = torch.float64 if precision == "exact" else torch.float32
    scanned = queries.exact if precision == "exact" else queries.scan
    product = 2.0**-28 * accumulation(width) if precision == "exact" else accumulation(width)
    product += _product_rounding(segment.rows, factor)
    limits = bounds(scanned.double(), queries, product)
    assert segment.norms is not None
    chunk = max(1, rows * size * 4 // (3 * width))  # pairs rescored at once
    for start in range(0, len(segment), rows):
        block = segment.values(start, start + rows, factor)
        scores = (scanned @ block.T).double()  # (Q, R)
        stop = start + len(block)
        norms = segment.norms[start // BIN : -(-stop // BIN)].repeat_interleave(BIN)[: len(block)]
        errors = limits[:, :1] * norms + limits[:, 1:] if proven else torch.zeros_like(scores)
        if valid.numel():
            scores.masked_fill_(~valid[..., start:stop], -torch.inf)
        if len(block) >= k:
            kth = (scores - errors).topk(k, dim=1).values[:, -1]
            torch.maximum(state.cutoffs, kth, out=state.cutoffs)
        possible = (scores + errors >= state.cutoffs[:, None]) & (scores > -torch.inf)
        query, row = possible.nonzero(as_tuple=True)
        for at in range(0, len(query), chunk):
            part = query[at : at + chunk], row[at : at + chunk] + start
            approximate = scores[part[0], part[1] - start]
            true = segment.exact(queries.exact, part) if proven else approximate
            wrong = (true - approximate).abs() > errors[part[0], part[1] - start] if proven else part[0] < 0
            state.broken[part[0][wrong]] = True
            state.merge(part[0], true, part[1] + first_id)


def _product_rounding(rows: Tensor, factor: torch.dtype) -> float:
    """Return what a library product adds to γ: the rounding of its factors and result, relative to the norms."""
    if factor == torch.bfloat16:
        # A CPU's bf16 product rounds its result too. bf16 rows are not rounded.
        return BF16_ROUNDING if rows.dtype == torch.bfloat16 else 2 * BF16_ROUNDING + BF16_ROUNDING**2
    if factor == torch.float32 and _low_precision_allowed():
        return 2 * BF16_ROUNDING + BF16_ROUNDING**2
    return 0.0


def _low_precision_allowed() -> bool:
    """Return True if torch may be allowed to multiply float32 in TF32 or bf16."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # raised after fp32_precision was set in torch.backends
        return True


def multiply_in_bf16() -> bool:
    """Return True if library products in bf16 save more time on this CPU than their wider bounds cost."""
    return env.cpu_bf16_is_fast()
