"""Scores of a cross-encoder on disk, found by the digests of query and document.

A folder ``scores-NAME-HASH`` belongs to one cross-encoder and its settings. Each file has the scores of some pairs, and
its name is the digest of its content. So a damaged file is recognized, and several processes can write at once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jasper_fast.distributed.ranks import Ranks
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest

CHUNK = 1024  # pairs that are scored and published at once
ENTRY = np.dtype([("pair", "<u8"), ("score", "<f4")])
ALONE = Ranks()

Pair = tuple[str, str]  # query and document
Score = Callable[[Sequence[Pair]], np.ndarray]  # n pairs -> (n,) float32


class ScoreCache:
    """The scores of one cross-encoder.

    Args:
        root: the folder of all caches.
        name: the cross-encoder, for the name of the folder.
        identity: all that determines its scores.
    """

    def __init__(self, root: str | Path, name: str, identity: str) -> None:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-60:].lower()
        self.name = name
        self.folder = Path(root).expanduser() / f"scores-{slug}-{content_digest(identity, size=8)}"

    def scores(
        self,
        pairs: Sequence[Pair],
        score: Callable[[], Score],
        progress: Callable[[int], None] = lambda pairs: None,
        ranks: Ranks = ALONE,
        warn: Callable[[str], None] = print,
    ) -> np.ndarray:
        """Return the scores of pairs, and compute those that are missing, chunk by chunk.

        An interrupted call loses at most one chunk. All ranks must call it with the same pairs, and divide the work.

        Args:
            pairs: n pairs of a query and a document.
            score: a function that opens the cross-encoder. It is not called if all scores are on disk.
            progress: a function that gets the number of further pairs done, and may raise to stop.
            ranks: the processes that divide the work, through one file system.
            warn: a function that gets a line about each damaged file, whose scores are computed again.

        Returns:
            (n,) float32.

        Raises:
            JasperError: a score is not finite.
        """
        keys = np.array([_key(pair) for pair in pairs], np.uint64)
        known = ranks.on_main(lambda: self._read(warn))
        chunks = [np.arange(start, min(start + CHUNK, len(pairs))) for start in range(0, len(pairs), CHUNK)]
        missing = [rows[~np.isin(keys[rows], known["pair"])] for rows in chunks]
        progress(len(pairs) - sum(map(len, missing)))
        todo = [rows for rows in missing if len(rows)]
        if todo:
            mine = todo[ranks.rank :: ranks.world]
            compute = score() if mine else None
            for rows in mine:
                assert compute is not None
                self._write(keys[rows], compute([pairs[row] for row in rows]))
                progress(len(rows))
            ranks.wait_for_all()
            known = ranks.on_main(lambda: self._read(warn))
        at = np.searchsorted(known["pair"], keys)
        found = at < len(known)
        found[found] = known["pair"][at[found]] == keys[found]
        if not found.all():
            raise JasperError(
                f"{self.folder}: {int((~found).sum())} scores of another process are missing. Fix: let all processes "
                "use one file system for the cache, and run the command again"
            )
        return known["score"][at]

    def _write(self, keys: np.ndarray, scores: np.ndarray) -> None:
        if not np.isfinite(scores).all():
            raise JasperError(
                f"{self.name}: {int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite. Fix: choose "
                "another cross-encoder"
            )
        entries = np.empty(len(keys), ENTRY)
        entries["pair"], entries["score"] = keys, scores
        buffer = io.BytesIO()
        np.save(buffer, entries)
        content = buffer.getvalue()
        write_atomic(self.folder / f"{content_digest(content)}.npy", content)

    def _read(self, warn: Callable[[str], None]) -> np.ndarray:
        """Return all entries on disk, sorted by pair, each pair once. Damaged files are deleted."""
        parts = [np.empty(0, ENTRY)]
        for file in sorted(self.folder.glob("*.npy")):
            content = file.read_bytes()
            if content_digest(content) == file.stem:
                parts.append(np.load(io.BytesIO(content)))
            else:
                warn(f"{file} failed its checksum. Computing its scores again")
                file.unlink(missing_ok=True)
        entries = np.concatenate(parts)
        _, first = np.unique(entries["pair"], return_index=True)
        return entries[first]


def _key(pair: Pair) -> int:
    query, document = pair
    return int(content_digest(f"{len(query)}\0{query}\0{document}", size=8), 16)
