"""Graph of nearest neighbours by the teacher's embeddings, found by exact search and cached next to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.utils.atomic import locked, publish_dir
from jasper_fast.utils.fingerprint import content_digest, settings_digest

if TYPE_CHECKING:
    import torch

    from jasper_fast.training.data import Teachers

DUPLICATE = 0.03  # near-duplicates: a distance of at most this fraction of the mean distance
ROUNDING = 1e-5  # distance of equal texts
SPARE = 8  # further neighbours searched, to replace near-duplicates
PROBES = 64  # embeddings that identify a graph's teacher

Vectors = Callable[[np.ndarray], np.ndarray]  # (rows,) int64 -> (rows, D) float32 unit vectors


@dataclass(frozen=True)
class Graph:
    """Nearest neighbours and near-duplicates among n texts.

    Args:
        nearest: (n, k) int32. Column 0 is the row itself. Its nearest rows follow, nearest first, without
            near-duplicates of each other. The rest is −1.
        copies: (n,) int32. Rows with the same number are near-duplicates of each other.
    """

    nearest: np.ndarray
    copies: np.ndarray


def neighbour_graph(vectors: Vectors, n: int, k: int, *, duplicate: float = DUPLICATE, block: int = 16_384) -> Graph:
    """Return the k nearest rows of every row by inner product, with near-duplicates counted once.

    Near-duplicates are rows connected by a chain of pairs, each with a distance (1 − cosine) of at most ``duplicate``
    times the mean over all pairs. The distance is relative because some teachers' embeddings fill a narrow cone.

    Args:
        vectors: a function from rows to embeddings. It is called for every block n/block times.
        n: the number of rows.
        k: rows per neighbourhood, the row itself included.
        duplicate: the fraction of the mean distance.
        block: rows in memory at once, twice (as queries and as corpus).

    Raises:
        ValueError: there are fewer rows than a neighbourhood has, or an embedding is not finite.
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
    candidates = np.empty((n, width), dtype=np.int32)
    near = np.empty((n, width), dtype=bool)
    for start in range(0, n, block):
        queries = block_at(start)
        scores, rows = (part.numpy() for part in search(pieces, n, queries, width, "certified", None, SCRATCH))
        own_rows = np.arange(start, start + len(queries))[:, None]
        # The row itself comes first, even where its duplicates with lower numbers fill all places.
        later = np.argsort(rows == own_rows, axis=1, kind="stable")[:, : width - 1]
        stop = start + len(queries)
        candidates[start:stop] = np.concatenate([own_rows, np.take_along_axis(rows, later, axis=1)], axis=1)
        near[start:stop, 0] = False
        near[start:stop, 1:] = np.take_along_axis(scores, later, axis=1) >= same
    copies = _connected(candidates, near)
    return Graph(_one_of_copies(candidates, copies, k, block), copies)


def cached_graph(folder: str | Path, teachers: Teachers, n: int, k: int, log: Callable[[str], None]) -> Graph:
    """Return the graph of the first ``n`` texts by the teachers' embeddings, from the cache if it has one.

    A graph of other embeddings is built again. Runs with the same cache wait for each other.

    Args:
        folder: the cache.
        teachers: the teacher embeddings.
        n: the number of texts.
        k: rows per neighbourhood, the row itself included.
        log: a function that prints a line.
    """
    identity = {
        "teachers": teachers.fingerprint,
        "texts": n,
        "neighbours": k,
        "duplicate": DUPLICATE,
        "vectors": _probe(teachers, n),
    }
    path = graph_folder(folder, teachers.fingerprint, n, k)
    with locked(path):
        cached = _read_identity(path)
        if cached != identity:
            if path.exists():
                differ = sorted(name for name in identity if (cached or {}).get(name) != identity[name])
                log(f"{path} is a graph of something else (other {', '.join(differ)}). Building it again")
            log(f"finding the {k - 1} nearest neighbours of {n} texts by the teachers' embeddings")
            graph = neighbour_graph(lambda rows: teachers.read(rows).numpy(), n, k)
            with publish_dir(path, replace=True) as new:
                np.save(new / "nearest.npy", graph.nearest)
                np.save(new / "copies.npy", graph.copies)
                (new / "graph.json").write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        return Graph(*(np.load(path / f"{name}.npy", mmap_mode="r") for name in ("nearest", "copies")))


def graph_folder(folder: str | Path, fingerprint: str, n: int, k: int) -> Path:
    """Return the place of a graph in the cache. It exists once the graph is complete.

    Args:
        folder: the cache.
        fingerprint: the teachers' fingerprint.
        n: the number of texts.
        k: rows per neighbourhood, the row itself included.
    """
    return Path(folder).expanduser() / f"neighbours-{settings_digest([fingerprint, n, k])}"


def _connected(candidates: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Return the number of every row's group of near-duplicates, (n,) int32."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    left, place = np.nonzero(near)
    edges = coo_matrix(
        (np.ones(len(left), dtype=bool), (left, candidates[left, place])), shape=(len(candidates), len(candidates))
    )
    return connected_components(edges, directed=False)[1].astype(np.int32)


def _one_of_copies(candidates: np.ndarray, copies: np.ndarray, k: int, block: int) -> np.ndarray:
    """Return each row's first k candidates without near-duplicates of earlier ones, (n, k) int32, filled with −1."""
    nearest = np.empty((len(candidates), k), dtype=np.int32)
    for start in range(0, len(candidates), block):
        rows = candidates[start : start + block]
        groups = copies[rows]  # (b, candidates)
        new = np.stack([(groups[:, :j] != groups[:, j : j + 1]).all(axis=1) for j in range(rows.shape[1])], axis=1)
        order = np.argsort(~new, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(rows, order, axis=1)
        nearest[start : start + block] = np.where(np.take_along_axis(new, order, axis=1), chosen, -1)
    return nearest


def _probe(teachers: Teachers, n: int) -> str:
    """Return a digest of a few embeddings, coarse enough to survive another machine's rounding."""
    rows = np.unique(np.linspace(0, n - 1, PROBES).astype(np.int64))
    vectors = np.rint(teachers.read(rows).numpy() * 100).astype(np.int8)
    return content_digest(vectors.tobytes(), size=8)


def _read_identity(path: Path) -> dict[str, Any] | None:
    """Return the identity of a cached graph. None if there is no graph or it cannot be read."""
    try:
        return json.loads((path / "graph.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
