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
from jasper_fast.mips.scan import Queries, accumulation, bounds
from jasper_fast.mips.state import State

LOW = torch.bfloat16  # in which float32 rows are scanned
FEW = 16  # queries whose scan is bound by memory: a thinner sample costs less of it
OWN_PRECISION = 64  # queries up to which converting float32 rows would cost more than it saves
ROOM, ROOM_OF_FEW = 1024, 8192  # candidates of a query, for small k
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
    """Rows, a multiple of 64, whose low-precision copy and sample fit an eighth of the scratch memory each."""
    width = piece.rows.shape[1]
    step = plan(len(piece), k, size).step
    sample = piece.rows.element_size() * width / step if step > 1 else 0
    copied = 2 * width if _converts(piece, size) else 0
    fits = int(scratch / 8 / max(sample, copied, 1.0)) // BIN * BIN
    return min(max(64 * BIN, fits), MOST_ROWS)


def queries_at_once(piece: Piece, size: int, k: int, scratch: int) -> int:
    """Queries whose bins and candidates fit three eighths of the scratch memory."""
    chosen = plan(len(piece), k, size)
    each = 12 * (len(piece) // chosen.step // BIN + 1) + 48 * chosen.capacity
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

    size, k, device = len(queries), state.k, plane.device
    how = plan(len(piece), k, size)
    asked, query_scales, limits = _operands(piece, plane, queries, proven)
    scales = (piece.scales if query_scales is not None else None, query_scales)
    assert piece.norms is not None
    norms = (piece.norms * (1 + 2 * UNIT)).float()  # the factor makes rounding go up
    mask = valid if valid.numel() else None
    if how.step == 1:
        lower = kernels.lower_bounds(plane, asked, scales, mask, norms, limits, BIN)
    else:
        rows = _sample(len(piece), how.step, device)
        shown = None if mask is None else mask[..., rows].contiguous()
        own = (None if scales[0] is None else scales[0][rows], query_scales)
        lower = kernels.lower_bounds(plane[rows], asked, own, shown, norms[rows // BIN], limits, 1)
    known = torch.nextafter(state.cutoffs.float(), torch.full((), -torch.inf, device=device))
    threshold = torch.maximum(lower.topk(how.rank, dim=1).values[:, -1], known)
    del lower
    counts, scores, numbers = kernels.collect(plane, asked, scales, mask, norms, limits, threshold, how.capacity)

    # Of what was collected, the k-th best lower bound is proven; most candidates fall below it.
    there = torch.arange(how.capacity, device=device) < counts[:, None]
    numbers = numbers.where(there, 0)
    error = norms[numbers // BIN] * limits[0][:, None] + limits[1][:, None]
    cutoff = torch.maximum((scores - error).where(there, -torch.inf).topk(k, dim=1).values[:, -1], known)
    upper = (scores + error).where(there, -torch.inf)
    few = min(how.capacity, 2 * k + BIN)
    best, place = upper.topk(few, dim=1)
    kept = (best >= cutoff[:, None]) & (best > -torch.inf)
    crowded = (upper >= cutoff[:, None]).logical_and_(there).sum(dim=1) > few
    missed = (counts > how.capacity) | (threshold > cutoff) | crowded
    kept &= ~missed[:, None]
    numbers, scores = numbers.gather(1, place).long(), scores.gather(1, place).double()
    if proven:
        query = torch.arange(size, device=device)[:, None].expand(size, few).reshape(-1)
        row = numbers.where(kept, -1).view(-1)
        row_scales = piece.scales if piece.rows.dtype == torch.int8 else None
        true = kernels.rescore(queries.exact, piece.rows, row_scales, query, row).view(size, few)
        wrong = ((true - scores).abs() > error.gather(1, place)) & kept
        state.broken |= wrong.any(dim=1)
    else:
        true = scores.masked_fill(~kept, -torch.inf)
    state.missed |= missed
    state.merge_table(true, numbers + first_id)


def _operands(
    piece: Piece, plane: Tensor, queries: Queries, proven: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Queries as the scan multiplies them, their scales if they are integers, and (relative, absolute) errors."""
    width = plane.shape[1]
    query_scales = None
    if plane.dtype == torch.int8:
        query_scales = (queries.exact.abs().amax(dim=1) / 127).float()
        query_scales = torch.where(query_scales > 0, query_scales, torch.ones_like(query_scales))
        codes = (queries.exact / query_scales.double()[:, None]).round_().clamp_(-127, 127)
        asked, scanned = codes.to(torch.int8), codes * query_scales.double()[:, None]
        product = 8 * UNIT  # sums of codes are exact
    else:
        asked = queries.scan.to(plane.dtype)
        scanned = asked.double()
        product = TENSOR_CORE * accumulation(width)
    product += SLACK
    if plane.dtype != piece.rows.dtype:  # float32 rows, each element rounded to the plane's dtype
        product += torch.finfo(plane.dtype).eps / 2 * (1 + product)
    limits = bounds(scanned, queries, product)
    if not proven:
        limits = torch.zeros_like(limits)
    limits = (limits * (1 + 2.0**-20)).float()
    return asked.contiguous(), query_scales, (limits[:, 0].contiguous(), limits[:, 2].contiguous())


def _sample(rows: int, step: int, device: torch.device) -> Tensor:
    """One row in every ``step``, at random; the same ones each time. (rows // step,)"""
    generator = torch.Generator(device).manual_seed(0)
    count = rows // step
    return torch.arange(count, device=device) * step + torch.randint(
        0, step, (count,), generator=generator, device=device
    )
