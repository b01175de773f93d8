"""Searching one piece of the corpus: approximate scores with proven bounds, fp64 for what can be among the k best.

For a query q and a row x of a bin with longest row n, |approximate − q·x| ≤ ε with

    ε = relative · n + residual · ρ + absolute

where ``relative`` holds the rounding of the query and the matrix product's own (γ_D of Higham, Accuracy and Stability
of Numerical Algorithms, §3.1, for any order of summation), ρ the rounding of the bin's rows, and ``absolute`` what
underflow can take. A row is passed over only when approximate + ε lies below a proven lower bound of the k-th best
score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jasper_fast import env, extension
from jasper_fast.mips.pieces import BIN, UNIT, Piece
from jasper_fast.mips.state import State

FEW = {torch.float32: 4, torch.bfloat16: 8, torch.int8: 3}  # queries up to which rows are read once by our own loops
TILE_ROWS, TILE_QUERIES = 2048, 256  # of one library product: its scores, 2 MB, stay in the cache
UNDERFLOW = 2.0**-125
LARGEST = 1e37  # scores beyond this might overflow float32 on the way
BF16 = 2.0**-8  # relative rounding of an element, with room


@dataclass
class Queries:
    """Queries scaled by powers of two to a largest element in [0.5, 1), so that no scale overflows.

    Args:
        exact: (Q, D) float64, the truth.
        scan: (Q, D) float32, rounded (only float64 queries and denormals change).
        exponents: (Q,) int32; query = exact · 2^exponent.
    """

    exact: Tensor
    scan: Tensor
    exponents: Tensor
    longest: float | None = None

    def largest_norm(self) -> float:
        """Of the scaled queries; waits for the device once."""
        if self.longest is None:
            self.longest = float(self.exact.norm(dim=1).max()) if len(self) else 0.0
        return self.longest

    @classmethod
    def of(cls, queries: Tensor) -> Queries:
        exact = queries.double()
        _, exponents = torch.frexp(exact.abs().amax(dim=1))
        exact = torch.ldexp(exact, -exponents[:, None].double()).contiguous()
        return cls(exact, exact.float(), exponents)

    def __len__(self) -> int:
        return len(self.exact)

    def take(self, rows: slice | Tensor) -> Queries:
        """Some of them."""
        return Queries(self.exact[rows], self.scan[rows], self.exponents[rows])

    def to(self, device: torch.device) -> Queries:
        """The same queries elsewhere."""
        return Queries(self.exact.to(device), self.scan.to(device), self.exponents.to(device))


def accumulation(width: int) -> float:
    """γ: the relative error of an fp32 dot product of this width in any order, with roundings of its factors."""
    return (width + 4) * UNIT / (1 - (width + 4) * UNIT)


def bounds(scanned: Tensor, queries: Queries, product: float) -> Tensor:
    """(relative, residual, absolute) of every query, (Q, 3) float64.

    Args:
        scanned: (Q, D) float64, the queries as the scan sees them.
        product: the relative error of the scan's own arithmetic.
    """
    width = scanned.shape[1]
    norm, rounding = scanned.norm(dim=1), (queries.exact - scanned).norm(dim=1)
    relative = (norm * product + rounding) * (1 + 1e-9)
    residual = norm * (1 + product) * (1 + 1e-9)
    return torch.stack((relative, residual, torch.full_like(norm, width * UNDERFLOW)), dim=1)


def native(piece: Piece) -> bool:
    """Whether the compiled loops can search this piece."""
    return extension.extension_path() is not None and piece.rows.device.type == "cpu"


def candidates_for(k: int) -> int:
    """Room for a query's candidates: full, it is thinned out to about k."""
    return 4 * k + 4 * BIN


def search_few(piece: Piece, first_id: int, queries: Queries, valid: Tensor, state: State, proven: bool) -> None:
    """Few queries on a CPU: the rows, or their int8 plane, are read once. Fills ``piece.norms`` where it is None."""
    plane, scales, residuals = _low_plane(piece)
    if plane.dtype == torch.int8:
        scanned, query_scales, limits = _integers(queries)
    else:
        scanned, query_scales = queries.scan, torch.empty(0)
        limits = bounds(scanned.double(), queries, accumulation(piece.rows.shape[1]))
    fill = piece.norms is None
    norms = piece.norms
    if norms is None:
        norms = piece.norms = torch.empty(-(-len(piece) // BIN), dtype=torch.float64)
    torch.ops.jasper_fast_native.mips_few(
        scanned, query_scales, plane, scales, residuals, fill, queries.exact, piece.rows, piece.scales, norms, limits,
        valid, first_id, proven, candidates_for(state.k), state.best, state.counts, state.cutoffs, state.broken,
    )  # fmt: skip


def search_tiles(
    piece: Piece, first_id: int, queries: Queries, valid: Tensor, state: State, proven: bool, rows: int, bf16: bool
) -> None:
    """Many queries on a CPU: products of ``rows`` corpus rows, then our selection. ``piece.norms`` is known.

    Library products, except where an int8 plane is there and the library has no faster unit for bf16: integer products
    of our own run at up to twice the speed of fp32 ones, and their bound is nearly that of the plane.
    """
    width, size = piece.rows.shape[1], len(queries)
    plane, scales, residuals = _low_plane(piece)
    product: Callable[[int, int], Tensor]
    if plane.dtype == torch.int8 and not bf16:
        codes, query_scales, limits = _integers(queries)
        packed = torch.ops.jasper_fast_native.mips_pack(codes)
        columns = packed.shape[0] * packed.shape[2]
        query_scales = torch.nn.functional.pad(query_scales, (0, columns - size))
        scores = torch.empty(min(rows, len(piece)), columns)

        def product(start: int, stop: int) -> Tensor:
            out = scores[: stop - start]
            torch.ops.jasper_fast_native.mips_product(plane[start:stop], scales[start:stop], packed, query_scales, out)
            return out[:, :size]

    else:
        factor = torch.bfloat16 if bf16 else torch.float32
        scanned, residuals = queries.scan.to(factor), torch.empty(0, dtype=torch.float64)
        limits = bounds(scanned.double(), queries, accumulation(width) + _product_rounding(piece.rows, factor))
        scores = torch.empty(min(rows, len(piece)), size, dtype=factor)

        def product(start: int, stop: int) -> Tensor:
            # The corpus is the left factor, the orientation libraries are fastest in.
            return torch.mm(piece.values(start, stop, factor), scanned.T, out=scores[: stop - start]).float()

    candidates = torch.empty(size, candidates_for(state.k), dtype=torch.int64)
    counts = torch.zeros(size, dtype=torch.int64)
    assert piece.norms is not None
    common = (queries.exact, piece.rows, piece.scales, piece.norms, residuals, limits, valid, first_id, proven)
    kept = (candidates, counts, state.best, state.counts, state.cutoffs, state.broken)
    for start in range(0, len(piece), rows):
        tile = product(start, min(start + rows, len(piece)))
        torch.ops.jasper_fast_native.mips_tile(tile, start, *common, *kept)
    torch.ops.jasper_fast_native.mips_settle(*common, *kept)


def _low_plane(piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """What a scan reads: (rows or codes, their scales or none, norms of what rounding left or none)."""
    if piece.plane is None:
        return piece.rows, piece.scales, torch.empty(0, dtype=torch.float64)
    return piece.plane.codes, piece.plane.scales, piece.plane.residuals


def _integers(queries: Queries) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as int16 codes (Q, D) and scales (Q,) float32, and the bounds of integer scores."""
    width = queries.exact.shape[1]
    top = min(32767, (2**31 - 1) // (127 * width))  # no sum of products leaves 32 bits
    scales = queries.exact.abs().amax(dim=1).div(top).float()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (queries.exact / scales.double()[:, None]).round_().clamp_(-top, top)
    return codes.to(torch.int16), scales, bounds(codes * scales.double()[:, None], queries, 8 * UNIT)


def search_plain(
    piece: Piece,
    first_id: int,
    queries: Queries,
    valid: Tensor,
    state: State,
    precision: str,
    rows: int,
) -> None:
    """Any number of queries on any device in plain torch; ``exact`` scans in fp64. ``piece.norms`` is known."""
    width, size = piece.rows.shape[1], len(queries)
    proven, k = precision != "fast", state.k
    factor = torch.float64 if precision == "exact" else torch.float32
    scanned = queries.exact if precision == "exact" else queries.scan
    product = 2.0**-28 * accumulation(width) if precision == "exact" else accumulation(width)
    product += _product_rounding(piece.rows, factor)
    limits = bounds(scanned.double(), queries, product)
    assert piece.norms is not None
    chunk = max(1, rows * size * 4 // (3 * width))  # rescored at once
    for start in range(0, len(piece), rows):
        block = piece.values(start, start + rows, factor)
        scores = (scanned @ block.T).double()  # (Q, R)
        stop = start + len(block)
        norms = piece.norms[start // BIN : -(-stop // BIN)].repeat_interleave(BIN)[: len(block)]
        errors = limits[:, :1] * norms + limits[:, 2:] if proven else torch.zeros_like(scores)
        if valid.numel():
            scores.masked_fill_(~valid[..., start:stop], -torch.inf)
        if len(block) >= k:
            kth = (scores - errors).topk(k, dim=1).values[:, -1]
            torch.maximum(state.cutoffs, kth, out=state.cutoffs)
        found = (scores + errors >= state.cutoffs[:, None]) & (scores > -torch.inf)
        query, row = found.nonzero(as_tuple=True)
        for at in range(0, len(query), chunk):
            part = query[at : at + chunk], row[at : at + chunk] + start
            approximate = scores[part[0], part[1] - start]
            true = piece.exact(queries.exact, part) if proven else approximate
            wrong = (true - approximate).abs() > errors[part[0], part[1] - start] if proven else part[0] < 0
            state.broken[part[0][wrong]] = True
            state.merge(part[0], true, part[1] + first_id)


def _product_rounding(rows: Tensor, factor: torch.dtype) -> float:
    """What a library product adds to γ: the rounding of its factors and of its result, relative to the norms."""
    if factor == torch.bfloat16:
        # a CPU's bf16 product rounds its result too; bf16 rows are not rounded
        return BF16 if rows.dtype == torch.bfloat16 else 2 * BF16 + BF16**2
    if factor == torch.float32 and _low_precision_allowed():
        return 2 * BF16 + BF16**2
    return 0.0


def _low_precision_allowed() -> bool:
    """Whether the user may have let torch multiply float32 in TF32 or bf16."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by torch.backends' fp32_precision, after which torch refuses to tell
        return True


def multiply_in_bf16() -> bool:
    """Whether library products in bf16 are faster than in fp32 on this CPU by more than their bounds cost."""
    return env.cpu_bf16_is_fast()
