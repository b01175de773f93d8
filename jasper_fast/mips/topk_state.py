"""The state that a search carries between corpus segments: the best exactly scored rows of every query so far."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from jasper_fast.ops.native import in_use


class TopKState:
    """The k best rows so far of Q queries.

    ``broken`` marks queries with a score outside its error bound. ``missed`` marks queries with an incomplete set of
    candidates. ``survivors`` counts the rows that 4-bit scores kept in a search of planes, and those rescored in fp64.
    ``best`` holds (score as the bits of a float64, id) pairs. The first ``counts`` pairs of each query are
    a heap with the worst pair on top, the form that csrc/mips_select.h works on. All other code leaves them sorted from
    worst to best, which is such a heap.

    Args:
        size: number of queries Q.
        k: number of rows to keep for each query.
        device: device of the state.
    """

    def __init__(self, size: int, k: int, device: torch.device) -> None:
        self.k = k
        # One allocation, because each one is a launch on a GPU.
        numbers = torch.zeros(size * (2 * k + 3), dtype=torch.int64, device=device)
        best, self.counts, survivors = numbers.split((2 * size * k, size, 2 * size))
        self.best, self.survivors = best.view(size, k, 2), survivors.view(size, 2)
        self.cutoffs = torch.full((size,), -torch.inf, dtype=torch.float64, device=device)
        self.broken = torch.zeros(size, dtype=torch.bool, device=device)
        self.missed = torch.zeros(size, dtype=torch.bool, device=device)

    def warn_of_broken(self, stacklevel: int) -> bool:
        """Return True if a score was outside its error bound, and warn that these queries are redone in fp64."""
        count = int(self.broken.sum())
        if count:
            warnings.warn(
                f"{count} of {len(self.broken)} queries were redone in fp64: a score was outside its proven error "
                "bound. Matrix products on this machine are less exact than documented.",
                RuntimeWarning,
                stacklevel=stacklevel,
            )
        return count > 0

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Return scores (Q, k) float64 and ids (Q, k), best first, padded with −inf and −1."""
        if self.best.is_cuda:
            return self.reversed()
        if in_use(self.best):
            return torch.ops.jasper_fast_native.mips_sorted(self.best, self.counts)
        scores, ids = self.best[..., 0].view(torch.float64), self.best[..., 1]
        empty = torch.arange(self.k, device=ids.device) >= self.counts[:, None]
        scores, ids = scores.masked_fill(empty, -torch.inf), ids.masked_fill(empty, -1)
        ids, order = ids.sort(dim=1)
        scores, by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        return scores, ids.gather(1, by_score)

    def reversed(self) -> tuple[Tensor, Tensor]:
        """Return the result of `sorted` for a state that is already sorted from worst to best."""
        place = self.counts[:, None] - torch.arange(1, self.k + 1, device=self.best.device)
        empty, place = place < 0, place.clamp(min=0)
        scores, ids = self.best[..., 0].gather(1, place).view(torch.float64), self.best[..., 1].gather(1, place)
        return scores.masked_fill_(empty, -torch.inf), ids.masked_fill_(empty, -1)

    def merge(self, queries: Tensor, scores: Tensor, ids: Tensor) -> None:
        """Merge M exactly scored rows, each for one query.

        Args:
            queries: (M,) int64 query numbers.
            scores: (M,) float64 scores.
            ids: (M,) int64 row ids.
        """
        if not len(queries):
            return
        size = len(self.counts)
        filled = torch.arange(self.k, device=ids.device) < self.counts[:, None]
        query = torch.cat((filled.nonzero()[:, 0], queries))
        score = torch.cat((self.best[..., 0].view(torch.float64)[filled], scores))
        number = torch.cat((self.best[..., 1][filled], ids))
        order = number.argsort()
        order = order[score[order].argsort(descending=True, stable=True)]
        order = order[query[order].argsort(stable=True)]
        query, score, number = query[order], score[order], number[order]
        starts = torch.searchsorted(query, torch.arange(size + 1, device=query.device))
        self.counts.copy_(starts.diff().clamp(max=self.k))
        rank = torch.arange(len(query), device=query.device) - starts[query]
        keep = rank < self.k
        query, rank = query[keep], rank[keep]
        place = self.counts[query] - 1 - rank  # worst first
        self.best[query, place, 0] = score[keep].view(torch.int64)
        self.best[query, place, 1] = number[keep]
        full = self.counts == self.k
        worst = self.best[:, 0, 0].view(torch.float64)
        self.cutoffs.copy_(torch.where(full, torch.maximum(self.cutoffs, worst), self.cutoffs))

    def merge_table(self, scores: Tensor, ids: Tensor) -> None:
        """Merge M exactly scored rows of every query, without waiting for the device.

        Args:
            scores: (Q, M) float64 scores. −inf marks an absent row.
            ids: (Q, M) int64 row ids.
        """
        held_scores, numbers = self.sorted()
        scores, numbers = torch.cat((held_scores, scores), 1), torch.cat((numbers, ids), 1)
        numbers, order = numbers.sort(dim=1)
        scores, by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        scores, numbers = scores[:, : self.k], numbers.gather(1, by_score)[:, : self.k]
        counts = (scores > -torch.inf).sum(dim=1)
        place = (counts[:, None] - 1 - torch.arange(scores.shape[1], device=ids.device)) % self.k  # worst first
        self.best[..., 0].scatter_(1, place, scores.contiguous().view(torch.int64))
        self.best[..., 1].scatter_(1, place, numbers)
        self.counts.copy_(counts)
        worst = scores[:, -1] if scores.shape[1] == self.k else torch.full_like(self.cutoffs, -torch.inf)
        self.cutoffs.copy_(torch.maximum(self.cutoffs, worst))

    def part(self, rows: slice | Tensor) -> TopKState:
        """Return a state of some queries.

        Args:
            rows: slice, for views whose changes affect this state, or (n,) int64 query numbers, for copies.
        """
        part = object.__new__(TopKState)
        part.k = self.k
        part.best, part.counts = self.best[rows], self.counts[rows]
        part.cutoffs, part.broken, part.missed = self.cutoffs[rows], self.broken[rows], self.missed[rows]
        part.survivors = self.survivors[rows]
        return part
