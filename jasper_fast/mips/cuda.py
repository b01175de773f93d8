"""Searching a piece of the corpus with the GPU kernels: a sample sets a threshold, one pass collects, proof follows.

Every query's threshold is a low-precision order statistic of a random sample of the rows, chosen so that the whole
corpus holds a few k rows above it. One product of the whole piece then collects what can reach it. That guess is
checked, not trusted: if the k-th best proven lower bound of the collected rows reaches the threshold, then no row that
was left out can be among the k best (docs/mips.md). What fails, or finds no room, is marked in ``state.missed``.
Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jasper_fast.mips import pieces
from jasper_fast.mips.pieces import BIN, UNIT, Piece
from jasper_fast.mips.sample import KEPT_STEP, sample, short_norms
from jasper_fast.mips.scan import UNDERFLOW, Queries, accumulation
from jasper_fast.mips.settle import bytes_of_query, just_below, settle
from jasper_fast.mips.state import State

LOW = torch.bfloat16  # in which float32 rows are scanned
FEW = 16  # queries whose scan is bound by memory: a thinner sample costs less of it
OWN_PRECISION = 64  # queries up to which converting float32 rows would cost more than it saves
ROOM, ROOM_OF_FEW = 1024, 8192  # candidates of a query, for small k
MOST_BINS = 16_384  # of a query whose threshold a program finds; kernels/mips_start.py has blocks up to it
MOST_ROWS = 1 << 23  # of a slice: places in a tile's mask fit 32 bits
STEPS = (256, 128, 64, 32, 16, 8, 4, 2)  # one row in so many is sampled
TENSOR_CORE = 4  # times the rounding of ordinary sums: tensor cores cut off where others round
SLACK = 16 * UNIT  # what float32 arithmetic on bounds can lose, of ‖q‖‖x‖


@dataclass(frozen=True)
class Plan:
    """How a piece is searched.

    Args:
        step: one row in ``step`` is sampled; 1: all rows give the threshold, and it is proven from the start.
        rank: the threshold is this largest of the sample's bin maxima.
        capacity: candidates that a query has room for.
    """

    step: int
    rank: int
    capacity: int


def serves(piece: Piece, k: int) -> bool:
    """Whether the kernels can search this piece."""
    return pieces.on_gpu(piece.rows) and k * BIN <= len(piece)


def plan(rows: int, k: int, size: int) -> Plan:
    """The thinnest sample whose threshold is too high or too low for only about one query in ten thousand.

    Of n rows above the r-th largest of one row in s, n / s is nearly Gamma(r) distributed, whatever the corpus, because
    the rows are drawn at random.
    """
    capacity = max(ROOM_OF_FEW if size <= FEW else ROOM, 4 * k + 4 * BIN)
    for step in STEPS:
        rank = math.ceil(k / step + 3 + 5 * math.sqrt(k / step))
        fits = step * (rank + 5 * math.sqrt(rank) + 5) <= capacity
        if fits and rows // step // BIN >= 4 * rank:
            return Plan(step, rank, capacity)
    return Plan(1, k, capacity)


def rows_at_once(piece: Piece, size: int, k: int, scratch: int) -> int:
    """Rows, a multiple of 64, whose low-precision copy and sample fit an eighth of the scratch memory each.

    What a lasting piece keeps of its sample is part of the piece.
    """
    width = piece.rows.shape[1]
    step = plan(len(piece), k, size).step
    kept = step == 1 or (piece.lasting and step >= KEPT_STEP)
    sample = 0 if kept else piece.rows.element_size() * width / step
    copied = 2 * width if _converts(piece, size) else 0
    fits = int(scratch / 8 / max(sample, copied, 1.0)) // BIN * BIN
    return min(max(64 * BIN, fits), MOST_ROWS)


def queries_at_once(piece: Piece, size: int, k: int, scratch: int) -> int:
    """Queries whose bins and candidates fit three eighths of the scratch memory."""
    chosen = plan(len(piece), k, size)
    bins = len(piece) // chosen.step // BIN + 1
    each = (4 if bins <= MOST_BINS else 12) * bins + bytes_of_query(k, chosen.capacity)
    most = min(3 * scratch // 8 // each, 2**30 // chosen.capacity)
    return max(1, most // 128 * 128 or most)


def low_plane(piece: Piece, size: int) -> Tensor:
    """(N, D) rows as they are scanned: as stored, or float32 ones rounded where there are many queries."""
    if piece.plane is not None:
        return piece.plane.codes
    return piece.rows.to(LOW) if _converts(piece, size) else piece.rows


def _converts(piece: Piece, size: int) -> bool:
    return piece.rows.dtype == torch.float32 and piece.plane is None and size > OWN_PRECISION


def search_device(
    piece: Piece, plane: Tensor, first_id: int, queries: Queries, valid: Tensor, state: State, proven: bool
) -> None:
    """Many queries or few, on CUDA. ``piece.norms`` is known and no score can overflow.

    Args:
        plane: of ``low_plane``.
        valid: bool (N,) or (Q, N), contiguous; empty where all rows are valid.
    """
    from jasper_fast.kernels import mips as kernels
    from jasper_fast.kernels.mips_finish import Collected

    how = plan(len(piece), state.k, len(queries))
    asked, query_scales, limits = operands(piece, plane, queries, proven)
    scales = (piece.scales if query_scales is not None else None, query_scales)
    norms = short_norms(piece)
    mask = valid if valid.numel() else None
    if how.step == 1:
        lower = kernels.lower_bounds(plane, asked, scales, mask, norms, limits, BIN)
    else:
        drawn = sample(piece, plane, how.step)
        shown = None if mask is None else mask[..., drawn.numbers].contiguous()
        lower = kernels.lower_bounds(drawn.plane, asked, (drawn.scales, query_scales), shown, drawn.norms, limits, 1)
    threshold, counts = _thresholds(lower, how.rank, state)
    del lower
    scores, rows = kernels.collect(plane, asked, scales, mask, norms, limits, threshold, counts, how.capacity)
    settle(Collected(counts, scores, rows, threshold, norms, limits), piece, first_id, queries, state, proven)


def operands(
    piece: Piece, plane: Tensor, queries: Queries, proven: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Queries as the scan multiplies them, their scales if they are integers, and (relative, absolute) errors."""
    from jasper_fast.kernels import mips_start

    width = plane.shape[1]
    # Sums of codes are exact.
    product = 8 * UNIT if plane.dtype == torch.int8 else TENSOR_CORE * accumulation(width)
    product += SLACK
    if plane.dtype != piece.rows.dtype:  # float32 rows, each element rounded to the plane's dtype
        product += torch.finfo(plane.dtype).eps / 2 * (1 + product)
    return mips_start.operands(queries.exact, plane.dtype, product, width * UNDERFLOW, proven)


def _thresholds(lower: Tensor, rank: int, state: State) -> tuple[Tensor, Tensor]:
    """What to collect by, (Q,) float32, and counters for what will be, (Q,) int32."""
    from jasper_fast.kernels import mips_start

    if lower.shape[1] <= MOST_BINS:
        return mips_start.thresholds(lower, rank, state.cutoffs)
    found = torch.maximum(lower.topk(rank, dim=1).values[:, -1], just_below(state.cutoffs))
    return found, torch.zeros_like(found, dtype=torch.int32)
