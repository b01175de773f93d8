"""Vectors that another cache of the same teacher holds: a text that stands in two sets of texts is read once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jasper_fast.arrow import read_mapped
from jasper_fast.cache import HEADER, TeacherCache
from jasper_fast.files import sha256


class Lent(NamedTuple):
    """Vectors of a range of texts as far as other caches hold them."""

    there: np.ndarray  # (B,) bool
    vectors: np.ndarray  # (B, D) float32; rows that are not there are not written
    error: np.ndarray  # (B,) float64, what storing had cost: the mean of the lender's shard; 0 where not there
    error_max: float


class Lenders:
    """Where the caches beside this one hold vectors of its texts.

    Args:
        cache: which is to be filled; those of the same teacher, dtype and folder lend, finished or not.
        digests: of all its texts.
    """

    def __init__(self, cache: TeacherCache, digests: Sequence[str]) -> None:
        self._shards: list[tuple[TeacherCache, int]] = []
        self._shard_of = np.full(cache.rows, -1, np.int32)
        self._row_of = np.zeros(cache.rows, np.int32)
        others = list(_others(cache))
        if not others:
            return
        wanted = digest_keys(digests)
        order = np.argsort(wanted[:, 0])
        first = wanted[order, 0]
        for other, shard in others:
            try:
                held = digest_keys(read_mapped(other.file(shard)).column("digest").to_pylist())
            except (OSError, ValueError, KeyError):
                continue  # damaged: it is made again by whoever needs that cache
            at = order[np.minimum(np.searchsorted(first, held[:, 0]), len(order) - 1)]
            hit = (wanted[at] == held).all(axis=1)
            if hit.any() and sha256(other.file(shard)) == other.facts(shard)["sha256"]:
                self._shard_of[at[hit]] = len(self._shards)
                self._row_of[at[hit]] = np.flatnonzero(hit)
                self._shards.append((other, shard))

    def __len__(self) -> int:
        return int((self._shard_of >= 0).sum())

    def read(self, start: int, stop: int, width: int) -> Lent:
        """What there is of the texts from ``start`` to before ``stop``, ``width`` wide."""
        shards, rows = self._shard_of[start:stop], self._row_of[start:stop]
        lent = Lent(shards >= 0, np.empty((stop - start, width), np.float32), np.zeros(stop - start), 0.0)
        for shard in np.unique(shards[lent.there]):
            other, number = self._shards[shard]
            here, facts = shards == shard, other.facts(number)
            lent.vectors[here] = other.read_shard(number, rows[here])
            lent.error[here] = facts["error_sum"] / facts["rows"]
            lent = lent._replace(error_max=max(lent.error_max, facts["error_max"]))
        return lent


def _others(cache: TeacherCache) -> Iterator[tuple[TeacherCache, int]]:
    """The published shards of other texts' caches, by the same teacher in the same form."""
    free = ("texts", "rows", "shard_rows")
    wanted = {key: value for key, value in cache.identity.items() if key not in free}
    for header in sorted(cache.folder.parent.glob(f"teacher-{cache.slug}-*/{HEADER}")):
        try:
            there = json.loads(header.read_text(encoding="utf-8"))["identity"]
            same = {key: value for key, value in there.items() if key not in free} == wanted
        except (ValueError, KeyError, OSError):
            continue  # whoever needs that cache is told
        if header.parent == cache.folder or not same:
            continue
        identity = {key: value for key, value in there.items() if key not in free[1:]}
        other = TeacherCache(cache.folder.parent, identity, there["rows"], there["shard_rows"])
        yield from ((other, shard) for shard in range(other.shards) if other.has(shard) and other.file(shard).is_file())


def digest_keys(digests: Sequence[str]) -> np.ndarray:
    """BLAKE2b-128 digests in hexadecimal as numbers. (n, 2) uint64"""
    return np.frombuffer(bytes.fromhex("".join(digests)), dtype=">u8").reshape(-1, 2).astype(np.uint64)
