"""Reuse embeddings from other caches of the same teacher, so that a text in several datasets is encoded once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jasper_fast.teachers.cache import HEADER, TeacherCache
from jasper_fast.utils.arrow_files import read_mapped
from jasper_fast.utils.fingerprint import file_sha256

if TYPE_CHECKING:
    from datasets import Dataset


class ReusedEmbeddings(NamedTuple):
    """Embeddings of a range of texts from other caches."""

    available: np.ndarray  # (B,) bool; rows found in another cache
    embeddings: np.ndarray  # (B, D) float32; undefined in the other rows
    error: np.ndarray  # (B,) float64, mean cosine distance of storing in the source shard; 0 in the other rows
    error_max: float


class CacheReuse:
    """Index of reusable embeddings in the caches next to a new one.

    Sources are caches of the same teacher and dtype in the same folder, finished or not. Damaged shards are skipped.

    Args:
        cache: cache to fill.
        wanted: (rows, 2) uint64, the digests of all its texts in order, as from `text_keys`. None: nothing is reused.
    """

    def __init__(self, cache: TeacherCache, wanted: np.ndarray | None) -> None:
        self._shards: list[tuple[TeacherCache, int]] = []
        self._shard_of = np.full(cache.rows, -1, np.int32)
        self._row_of = np.zeros(cache.rows, np.int32)
        others = list(_other_shards(cache)) if wanted is not None and len(wanted) else []
        if wanted is None or not others:
            return
        order = np.argsort(wanted[:, 0])
        sorted_halves = wanted[order, 0]
        for other, shard in others:
            try:
                keys = digest_keys(read_mapped(other.file(shard)).column("digest").to_pylist())
            except (OSError, ValueError, KeyError):
                continue  # damaged: recomputed when that cache is used
            places = order[np.minimum(np.searchsorted(sorted_halves, keys[:, 0]), len(order) - 1)]
            hit = (wanted[places] == keys).all(axis=1)
            if hit.any() and file_sha256(other.file(shard)) == other.facts(shard)["sha256"]:
                self._shard_of[places[hit]] = len(self._shards)
                self._row_of[places[hit]] = np.flatnonzero(hit)
                self._shards.append((other, shard))

    def __len__(self) -> int:
        return int(self.found.sum())

    @property
    def found(self) -> np.ndarray:
        """Which texts another cache has, (rows,) bool."""
        return self._shard_of >= 0

    @property
    def precisions(self) -> set[str]:
        """Precisions in which the reusable embeddings were computed, such as "fp32"."""
        return {cache.facts(shard)["precision"] for cache, shard in self._shards}

    def read(self, start: int, stop: int, width: int) -> ReusedEmbeddings:
        """Return the reusable embeddings of the texts ``start`` to ``stop`` (exclusive), ``width`` coordinates each."""
        shards, rows = self._shard_of[start:stop], self._row_of[start:stop]
        reused = ReusedEmbeddings(shards >= 0, np.empty((stop - start, width), np.float32), np.zeros(stop - start), 0.0)
        for shard in np.unique(shards[reused.available]):
            other, number = self._shards[shard]
            chosen, facts = shards == shard, other.facts(number)
            reused.embeddings[chosen] = other.read_shard(number, rows[chosen])
            reused.error[chosen] = facts["error_sum"] / facts["rows"]
            reused = reused._replace(error_max=max(reused.error_max, facts["error_max"]))
        return reused


def _other_shards(cache: TeacherCache) -> Iterator[tuple[TeacherCache, int]]:
    """Yield the published shards of caches that differ from this one only in their texts."""
    free = ("texts", "rows", "shard_rows")
    expected = {key: value for key, value in cache.identity.items() if key not in free}
    for header in sorted(cache.folder.parent.glob(f"teacher-{cache.slug}-*/{HEADER}")):
        try:
            identity = json.loads(header.read_text(encoding="utf-8"))["identity"]
            same = {key: value for key, value in identity.items() if key not in free} == expected
        except (ValueError, KeyError, OSError):
            continue  # reported when that cache is used
        if header.parent == cache.folder or not same:
            continue
        stripped = {key: value for key, value in identity.items() if key not in free[1:]}
        other = TeacherCache(cache.folder.parent, stripped, identity["rows"], identity["shard_rows"])
        yield from ((other, shard) for shard in range(other.shards) if other.has(shard) and other.file(shard).is_file())


def text_keys(texts: Dataset) -> np.ndarray:
    """Return the digests of texts as numbers, (n, 2) uint64. They are read in blocks.

    Args:
        texts: texts with a column ``digest``.
    """
    batches = texts.select_columns(["digest"]).with_format("arrow").iter(65_536)
    keys = [digest_keys(batch.column("digest").to_pylist()) for batch in batches]
    return np.concatenate(keys) if keys else np.empty((0, 2), np.uint64)


def digest_keys(digests: Sequence[str]) -> np.ndarray:
    """Convert hexadecimal BLAKE2b-128 digests to numbers, (n, 2) uint64."""
    return np.frombuffer(bytes.fromhex("".join(digests)), dtype=">u8").reshape(-1, 2).astype(np.uint64)
