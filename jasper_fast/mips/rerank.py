"""From the rows that a scan collected to the k best: what is possible is rescored, and what is missing is noticed.

The kernels (kernels/mips_finish.py) do it where one program can hold a query's candidates. Plain torch does the same
for larger k, in some seventy launches for three, and says for tests what the kernels must find.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jasper_fast.mips.pieces import BIN, Piece
from jasper_fast.mips.scan import Queries
from jasper_fast.mips.state import State

if TYPE_CHECKING:
    from jasper_fast.kernels.mips_finish import Collected

MOST = 8192  # candidates of a query that a program holds; kernels/mips_finish.py has blocks up to it


def room(k: int, capacity: int) -> int:
    """Rows of a query that are rescored at most."""
    return min(capacity, 2 * k + BIN)


def bytes_of_query(k: int, capacity: int) -> int:
    """Memory for the candidates of a query."""
    return 8 * capacity + 24 * room(k, capacity) + 16 * k if capacity <= MOST else 48 * capacity


def settle(found: Collected, piece: Piece, first_id: int, queries: Queries, state: State, proven: bool) -> None:
    """Takes what was collected of a piece into the state; with ``proven`` rescored in fp64."""
    if found.scores.shape[1] > MOST:
        settle_in_torch(found, piece, first_id, queries, state, proven)
        return
    from jasper_fast.kernels.mips_finish import finish

    finish(
        found, queries.exact, piece.rows, _row_scales(piece), first_id, room(state.k, found.scores.shape[1]), proven,
        (state.best, state.counts, state.cutoffs, state.broken, state.missed),
    )  # fmt: skip


def settle_in_torch(
    found: Collected, piece: Piece, first_id: int, queries: Queries, state: State, proven: bool
) -> None:
    """`settle` for any k."""
    from jasper_fast.kernels.mips import rescore

    counts, scores, numbers, limits = found.counts, found.scores, found.rows, found.limits
    (size, capacity), k, device = scores.shape, state.k, scores.device
    # Of what was collected, the k-th best lower bound is proven; most candidates fall below it.
    there = torch.arange(capacity, device=device) < counts[:, None]
    numbers = numbers.where(there, 0)
    error = found.norms[numbers // BIN] * limits[0][:, None] + limits[1][:, None]
    cutoff = (scores - error).where(there, -torch.inf).topk(k, dim=1).values[:, -1]
    cutoff = torch.maximum(cutoff, just_below(state.cutoffs))
    upper = (scores + error).where(there, -torch.inf)
    few = room(k, capacity)
    best, place = upper.topk(few, dim=1)
    kept = (best >= cutoff[:, None]) & (best > -torch.inf)
    crowded = (upper >= cutoff[:, None]).logical_and_(there).sum(dim=1) > few
    missed = (counts > capacity) | (found.thresholds > cutoff) | crowded
    kept &= ~missed[:, None]
    numbers, scores = numbers.gather(1, place).long(), scores.gather(1, place).double()
    if proven:
        query = torch.arange(size, device=device)[:, None].expand(size, few).reshape(-1)
        row = numbers.where(kept, -1).view(-1)
        true = rescore(queries.exact, piece.rows, _row_scales(piece), query, row).view(size, few)
        wrong = ((true - scores).abs() > error.gather(1, place)) & kept
        state.broken |= wrong.any(dim=1)
    else:
        true = scores.masked_fill(~kept, -torch.inf)
    state.missed |= missed
    state.merge_table(true, numbers + first_id)


def just_below(cutoffs: Tensor) -> Tensor:
    """float32 numbers below float64 ones."""
    return torch.nextafter(cutoffs.float(), torch.full((), -torch.inf, device=cutoffs.device))


def _row_scales(piece: Piece) -> Tensor | None:
    return piece.scales if piece.rows.dtype == torch.int8 else None
