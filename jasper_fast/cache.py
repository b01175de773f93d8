"""Teacher vectors on disk: a `datasets` folder of shards, each published whole with its checksum, and memory-mapped.

A shard holds ``digest`` and ``vector`` (float16, or int8 with a float32 ``scale``) of a fixed range of texts, so a
cache is the same, byte for byte, however often its making was interrupted. ``teacher.json`` says whose vectors of what.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.arrow import read_mapped, stream_bytes, write_index
from jasper_fast.config import config_difference
from jasper_fast.errors import JasperError
from jasper_fast.files import TEMPORARY, sha256, sweep_unfinished, write_atomic

if TYPE_CHECKING:
    from datasets import Features

HEADER = "teacher.json"
SHARD_ROWS = 2048  # what a killed process loses at most


class TeacherCache:
    """One teacher's vectors of one set of texts.

    Args:
        root: the folder of caches.
        identity: what decides the vectors, as plain JSON values; its hash names the folder.
        rows: how many texts.
        shard_rows: texts per shard.

    Raises:
        JasperError: the folder holds the vectors of another teacher or other texts.
    """

    def __init__(self, root: str | Path, identity: dict[str, Any], rows: int, shard_rows: int = SHARD_ROWS) -> None:
        self.identity = {**identity, "rows": rows, "shard_rows": shard_rows}
        self.name = str(identity.get("model") or identity.get("vectors"))
        self.fingerprint = hashlib.blake2b(
            json.dumps(self.identity, sort_keys=True).encode(), digest_size=8
        ).hexdigest()
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.name.removeprefix("package:")).strip("-.")[-60:].lower()
        self.slug = slug
        self.folder = Path(root).expanduser() / f"teacher-{slug}-{self.fingerprint}"
        self.rows, self.shard_rows = rows, shard_rows
        self.shards = -(-rows // shard_rows)
        if (self.folder / HEADER).is_file():
            self._check_header()

    @property
    def complete(self) -> bool:
        """Whether all shards are there and the folder is a dataset."""
        return (self.folder / "state.json").is_file()

    @property
    def header(self) -> dict[str, Any]:
        """What ``teacher.json`` says."""
        return json.loads((self.folder / HEADER).read_text(encoding="utf-8"))

    def span(self, shard: int) -> tuple[int, int]:
        """The rows of a shard, from .. to before."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)

    def file(self, shard: int) -> Path:
        """A shard's Arrow file; its checksum lies beside it as JSON."""
        return self.folder / f"data-{shard:05d}-of-{self.shards:05d}.arrow"

    def has(self, shard: int) -> bool:
        """Whether a shard was published."""
        return self._facts_file(shard).is_file()

    def facts(self, shard: int) -> dict[str, Any]:
        """A published shard's checksum, width, error of storing and tokens."""
        return json.loads(self._facts_file(shard).read_text(encoding="utf-8"))

    def damage(self, shard: int, digests: Sequence[str]) -> str | None:
        """What is wrong with a published shard: its bytes, or the texts it belongs to; None if nothing is."""
        file = self.file(shard)
        try:
            facts = self.facts(shard)
        except ValueError:
            return f"{self._facts_file(shard)} is not JSON"
        if not file.is_file():
            return f"{file} is missing"
        if sha256(file) != facts["sha256"]:
            return f"{file} is damaged (its checksum differs)"
        if read_mapped(file).column("digest").to_pylist() != list(digests):
            return f"{file} holds the vectors of other texts"
        return None

    def drop(self, shard: int) -> None:
        """Forget a shard, so that it is made again; the folder is no dataset until then."""
        for file in (self.folder / "state.json", self._facts_file(shard), self.file(shard)):
            file.unlink(missing_ok=True)

    def begin(self) -> None:
        """Make the folder and its header, if they are not there."""
        if not (self.folder / HEADER).is_file():
            write_atomic(self.folder / HEADER, _json({"complete": False, "identity": self.identity}))

    def write(
        self,
        shard: int,
        digests: Sequence[str],
        vectors: np.ndarray,
        precision: str,
        tokens: int,
        known_error: tuple[np.ndarray, float] | None = None,
    ) -> None:
        """Publish a shard.

        Args:
            shard: which.
            digests: of its texts.
            vectors: (rows of the shard, width) float32, unit rows.
            precision: of the forward pass, for the record.
            tokens: that were read for it, for the record.
            known_error: what storing cost where a row was stored before, (rows,), else 0; and the largest of it.
        """
        import pyarrow as pa

        for left in self.folder.glob(f"{TEMPORARY}{self.file(shard).stem}*"):  # of a killed process
            left.unlink(missing_ok=True)
        dtype, width = self.identity["dtype"], vectors.shape[1]
        stored, scale = quantise(vectors, dtype)
        columns = {"digest": pa.array(digests, pa.string())}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), width)
        if scale is not None:
            columns["scale"] = pa.array(scale)
        table = pa.table(columns, schema=features(dtype, width).arrow_schema)
        error, known = storing_error(vectors, dequantise(stored, scale)), known_error or (0.0, 0.0)
        content = stream_bytes(table)
        facts = {
            "error_max": max(float(error.max()), known[1]),
            "error_sum": float(np.maximum(error, known[0]).sum()),
            "precision": precision,
            "rows": len(vectors),
            "sha256": hashlib.sha256(content).hexdigest(),
            "tokens": tokens,
            "width": width,
        }
        write_atomic(self.file(shard), content)
        write_atomic(self._facts_file(shard), _json(facts))

    def finish(self) -> None:
        """Turn the folder with all its shards into a dataset. One process only."""
        facts = [self.facts(shard) for shard in range(self.shards)]
        widths = sorted({f["width"] for f in facts})
        if len(widths) != 1:
            raise JasperError(
                f"{self.folder}: its shards have vectors of different widths, {widths}; delete it, then teach"
            )
        summary = {
            "complete": True,
            "cosine_distance_of_storing": {
                "mean": sum(f["error_sum"] for f in facts) / self.rows,
                "max": max(f["error_max"] for f in facts),
            },
            "identity": self.identity,
            "precision": sorted({f["precision"] for f in facts}),
            "tokens": sum(f["tokens"] for f in facts),
            "width": widths[0],
        }
        sweep_unfinished(self.folder)
        write_atomic(self.folder / HEADER, _json(summary))
        files = [self.file(shard).name for shard in range(self.shards)]
        write_index(self.folder, files, features(self.identity["dtype"], widths[0]), self.fingerprint)

    def map(self) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """Every shard's stored vectors (rows, width) and scales (rows,), memory-mapped."""
        vectors: list[np.ndarray] = []
        scales: list[np.ndarray | None] = []
        width = self.header["width"]
        for shard in range(self.shards):
            stored, scale = self._mapped(shard, width)
            vectors.append(stored)
            scales.append(scale)
        return vectors, scales

    def read_shard(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Some rows of a published shard, as they are stored. (B, width) float32"""
        stored, scale = self._mapped(shard, self.facts(shard)["width"])
        return dequantise(stored[rows], None if scale is None else scale[rows])

    def _mapped(self, shard: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        table = read_mapped(self.file(shard))
        flat = table.column("vector").chunk(0).values.to_numpy(zero_copy_only=True)
        scale = table.column("scale").chunk(0).to_numpy(zero_copy_only=True) if "scale" in table.column_names else None
        return flat.reshape(-1, width), scale

    def _facts_file(self, shard: int) -> Path:
        return self.file(shard).with_suffix(".json")

    def _check_header(self) -> None:
        try:
            there = self.header["identity"]
        except (ValueError, KeyError):
            raise JasperError(f"{self.folder / HEADER} cannot be read; delete the folder, then teach again") from None
        different = config_difference(there, self.identity)
        if different:
            raise JasperError(
                "\n  - ".join([f"{self.folder} holds other vectors than this run needs (there -> needed):", *different])
                + "\ndelete or move that folder, or use another data.cache"
            )


class TeacherVectors:
    """The teachers' target, ``norm(concat(norm(t_1), …, norm(t_n)))``, put together on reading.

    Args:
        caches: complete caches of the same texts, in the order of concatenation.
    """

    def __init__(self, caches: Sequence[TeacherCache]) -> None:
        if not caches or len({cache.identity["texts"] for cache in caches}) != 1:
            raise ValueError("expected one or more caches of the same texts")
        self.names = [cache.name for cache in caches]
        self.revisions: list[str | None] = [cache.identity.get("revision") for cache in caches]  # None: ready vectors
        self.folders = [cache.folder for cache in caches]
        self.widths: list[int] = [cache.header["width"] for cache in caches]
        self.width = sum(self.widths)
        self.fingerprint = joined_fingerprint(caches)
        self._rows = caches[0].rows
        self._parts = [(cache.shard_rows, *cache.map()) for cache in caches]

    def __len__(self) -> int:
        return self._rows

    def read(self, rows: np.ndarray) -> Tensor:
        """The targets of some texts, in the order asked for.

        Args:
            rows: (B,) int64 positions among the texts, in any order.

        Returns:
            (B, width) float32, unit rows.

        Raises:
            IndexError: a row beyond the texts.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self._rows:
            raise IndexError(f"rows from {rows.min()} to {rows.max()} were asked for; there are {self._rows}")
        out = torch.empty(len(rows), self.width)  # (B, width)
        first = 0
        for width, (shard_rows, vectors, scales) in zip(self.widths, self._parts, strict=True):
            part = _gather(rows, shard_rows, vectors, scales, width)
            out[:, first : first + width] = torch.nn.functional.normalize(torch.from_numpy(part), dim=1)
            first += width
        return torch.nn.functional.normalize(out, dim=1)


def joined_fingerprint(caches: Sequence[TeacherCache]) -> str:
    """The identity of the vectors of several teachers together, whether they were computed or not."""
    return hashlib.blake2b("".join(cache.fingerprint for cache in caches).encode(), digest_size=16).hexdigest()


def quantise(vectors: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Unit rows as they are stored: float16, or int8 with a float32 scale per row (largest coordinate = 127)."""
    if dtype == "float16":
        return vectors.astype(np.float16), None
    scale = np.abs(vectors).max(axis=1) / np.float32(127)  # (B,)
    return np.rint(vectors / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def dequantise(stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """The stored rows as float32, not normalised. (B, D)"""
    vectors = stored.astype(np.float32)
    return vectors if scale is None else vectors * scale[:, None]


def storing_error(original: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Cosine distance between each row and its stored form. (B,) float64

    As half the squared distance of the unit vectors: 1 − cos would drown in rounding.
    """
    a, b = original.astype(np.float64), stored.astype(np.float64)
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    return 0.5 * np.square(a - b).sum(axis=1)


def features(dtype: str, width: int) -> Features:
    """The columns of a cache."""
    from datasets import Features, List, Value

    columns = {"digest": Value("string"), "vector": List(Value(dtype), length=width)}
    return Features({**columns, "scale": Value("float32")} if dtype == "int8" else columns)


def nearest_cache(cache: TeacherCache) -> str | None:
    """The cache of a teacher of that name that differs least, and in what; None if there is none."""
    found = []
    for header in cache.folder.parent.glob(f"teacher-{cache.slug}-*/{HEADER}"):
        there = json.loads(header.read_text(encoding="utf-8"))["identity"]
        found.append((config_difference(there, cache.identity), header.parent))
    if not found:
        return None
    different, folder = min(found, key=lambda pair: (len(pair[0]), str(pair[1])))
    return "\n  - ".join([f"{folder} is there, but of something else (there -> needed):", *different])


def _gather(
    rows: np.ndarray, shard_rows: int, vectors: list[np.ndarray], scales: list[np.ndarray | None], width: int
) -> np.ndarray:
    """Rows from their shards, shard by shard. (B, width) float32"""
    out = np.empty((len(rows), width), np.float32)
    shards, offsets = np.divmod(rows, shard_rows)
    order = np.argsort(shards, kind="stable")
    bounds = np.flatnonzero(np.diff(shards[order])) + 1
    for places in np.split(order, bounds) if len(rows) else []:
        shard = int(shards[places[0]])
        scale = scales[shard]
        out[places] = dequantise(vectors[shard][offsets[places]], None if scale is None else scale[offsets[places]])
    return out


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"
