"""The teacher's graph of nearest neighbours, found by exact search and kept beside the teacher's vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.files import locked, publish_dir

if TYPE_CHECKING:
    import torch

    from jasper_fast.batches import Teachers

DUPLICATE = 0.03  # two texts that much nearer than any two texts on average are near-duplicates
ROUNDING = 1e-5  # distance of equal texts
SPARE = 8  # neighbours looked up beyond those wanted, to stand in for near-duplicates
PROBES = 64  # vectors that tell a graph's teacher from another

Vectors = Callable[[np.ndarray], np.ndarray]  # (rows,) int64 -> (rows, D) float32 unit vectors


@dataclass(frozen=True)
class Graph:
    """Who is near whom among n texts.

    Args:
        nearest: (n, k) int32; column 0 is the row itself, then its nearest rows, nearest first, no two of one row being
            near-duplicates of each other; −1 where none was found.
        copies: (n,) int32; rows with the same number are near-duplicates of each other.
    """

    nearest: np.ndarray
    copies: np.ndarray


def neighbour_graph(vectors: Vectors, n: int, k: int, *, duplicate: float = DUPLICATE, block: int = 16_384) -> Graph:
    """The k nearest rows of every row by inner product, near-duplicates counted once.

    Near-duplicates are rows that a chain of pairs connects, each of a distance (1 − cosine) of at most ``duplicate``
    times the mean over all pairs: some teachers' vectors fill a narrow cone, so no cosine means the same to all.

    Args:
        vectors: asked for in blocks, n/block times over.
        n: number of rows.
        k: rows per neighbourhood, the row itself included.
        duplicate: share of the mean distance.
        block: rows held in memory at once, twice (as queries and as corpus).

    Raises:
        ValueError: fewer rows than a neighbourhood, or a vector that is not finite.
    """
    import torch

    from jasper_fast.mips.segment import Segment
    from jasper_fast.mips.top_k import SCRATCH, search

    if n < k:
        raise ValueError(f"a neighbourhood of {k} needs at least {k} rows, got {n}")

    def block_at(start: int) -> torch.Tensor:
        return torch.as_tensor(vectors(np.arange(start, min(start + block, n)))).contiguous()

    def pieces() -> Iterator[tuple[int, Segment]]:
        return ((at, Segment(block_at(at))) for at in range(0, n, block))

    centre = sum((block_at(at).double().sum(dim=0) for at in range(0, n, block)), start=torch.zeros(())) / n
    same = 1.0 - max(ROUNDING, duplicate * (1.0 - float(centre @ centre)))  # the mean cosine is the centre's square
    width = min(n, k + SPARE)
    found = np.empty((n, width), dtype=np.int32)
    near = np.empty((n, width), dtype=bool)
    for start in range(0, n, block):
        queries = block_at(start)
        scores, rows = (part.numpy() for part in search(pieces, n, queries, width, "certified", None, SCRATCH))
        own = np.arange(start, start + len(queries))[:, None]
        # The row itself comes first, even where its duplicates with lower numbers fill all places.
        later = np.argsort(rows == own, axis=1, kind="stable")[:, : width - 1]
        stop = start + len(queries)
        found[start:stop] = np.concatenate([own, np.take_along_axis(rows, later, axis=1)], axis=1)
        near[start:stop, 0] = False
        near[start:stop, 1:] = np.take_along_axis(scores, later, axis=1) >= same
    copies = _connected(found, near)
    return Graph(_one_of_copies(found, copies, k, block), copies)


def kept_graph(folder: str | Path, teachers: Teachers, n: int, k: int, say: Callable[[str], None]) -> Graph:
    """The graph of the first ``n`` texts by the teachers' vectors, built where ``folder`` does not hold it yet.

    A graph that lies there but was made from other vectors is never used; it is built again, and ``say`` is told. Runs
    that share the folder wait for each other.
    """
    identity = {
        "teachers": teachers.fingerprint,
        "texts": n,
        "neighbours": k,
        "duplicate": DUPLICATE,
        "vectors": _probe(teachers, n),
    }
    key = hashlib.blake2b(json.dumps([teachers.fingerprint, n, k]).encode(), digest_size=8).hexdigest()
    path = Path(folder).expanduser() / f"neighbours-{key}"
    with locked(path):
        there = _note(path)
        if there != identity:
            if path.exists():
                differ = sorted(name for name in identity if (there or {}).get(name) != identity[name])
                say(f"{path} is a graph of something else (other {', '.join(differ)}): it is built again")
            say(f"finding the {k - 1} nearest neighbours of {n} texts by the teachers' vectors")
            graph = neighbour_graph(lambda rows: teachers.read(rows).numpy(), n, k)
            with publish_dir(path, replace=True) as new:
                np.save(new / "nearest.npy", graph.nearest)
                np.save(new / "copies.npy", graph.copies)
                (new / "graph.json").write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        return Graph(*(np.load(path / f"{name}.npy", mmap_mode="r") for name in ("nearest", "copies")))


def _connected(found: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The number of every row's group of near-duplicates, (n,) int32."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    left, place = np.nonzero(near)
    edges = coo_matrix((np.ones(len(left), dtype=bool), (left, found[left, place])), shape=(len(found), len(found)))
    return connected_components(edges, directed=False)[1].astype(np.int32)


def _one_of_copies(found: np.ndarray, copies: np.ndarray, k: int, block: int) -> np.ndarray:
    """The first k of each row's candidates without near-duplicates of earlier ones, (n, k) int32, filled with −1."""
    nearest = np.empty((len(found), k), dtype=np.int32)
    for start in range(0, len(found), block):
        rows = found[start : start + block]
        groups = copies[rows]  # (b, candidates)
        new = np.stack([(groups[:, :j] != groups[:, j : j + 1]).all(axis=1) for j in range(rows.shape[1])], axis=1)
        order = np.argsort(~new, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(rows, order, axis=1)
        nearest[start : start + block] = np.where(np.take_along_axis(new, order, axis=1), kept, -1)
    return nearest


def _probe(teachers: Teachers, n: int) -> str:
    """A digest of a few vectors, coarse enough to survive another machine's rounding."""
    rows = np.unique(np.linspace(0, n - 1, PROBES).astype(np.int64))
    vectors = np.rint(teachers.read(rows).numpy() * 100).astype(np.int8)
    return hashlib.blake2b(vectors.tobytes(), digest_size=8).hexdigest()


def _note(path: Path) -> dict[str, Any] | None:
    """What the graph in a folder says it was made of; None where there is none, or it cannot be read."""
    try:
        return json.loads((path / "graph.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
