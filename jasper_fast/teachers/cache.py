"""Store teacher embeddings on disk, as a memory-mapped `datasets` folder of shards with checksums.

Each shard is published atomically. It holds ``digest`` and ``vector`` (float16, or int8 with a float32 ``scale``) of a
fixed range of texts. Interruptions do not change the bytes of a cache. ``teacher.json`` names teacher and texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.config.diff import config_difference
from jasper_fast.config.models import TEACHER_KINDS
from jasper_fast.teachers.reduction import Reduction
from jasper_fast.utils.arrow_files import read_mapped, stream_bytes, write_index
from jasper_fast.utils.atomic import TEMPORARY, sweep_unfinished, write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest, file_sha256, settings_digest, sha256

if TYPE_CHECKING:
    from datasets import Features


HEADER = "teacher.json"
SHARD_ROWS = 2048  # texts; a killed process loses at most one shard


class TeacherCache:
    """Embeddings of one dataset by one teacher.

    Args:
        root: folder of all caches.
        identity: everything that determines the embeddings, as plain JSON values. Its hash is part of the folder name.
        rows: number of texts.
        shard_rows: texts per shard.

    Raises:
        JasperError: the folder holds the embeddings of another teacher or other texts.
    """

    def __init__(self, root: str | Path, identity: dict[str, Any], rows: int, shard_rows: int = SHARD_ROWS) -> None:
        self.identity = {**identity, "rows": rows, "shard_rows": shard_rows}
        self.name = str(next((identity[kind] for kind in TEACHER_KINDS if identity.get(kind)), None))
        self.fingerprint = settings_digest(self.identity)
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.name.removeprefix("package:")).strip("-.")[-60:].lower()
        self.slug = slug
        self.folder = Path(root).expanduser() / f"teacher-{slug}-{self.fingerprint}"
        self.rows, self.shard_rows = rows, shard_rows
        self.shards = -(-rows // shard_rows)
        if (self.folder / HEADER).is_file():
            self._check_header()

    @property
    def complete(self) -> bool:
        """True if all shards are published and the folder is a dataset."""
        return (self.folder / "state.json").is_file()

    @property
    def header(self) -> dict[str, Any]:
        """Content of ``teacher.json``."""
        return json.loads((self.folder / HEADER).read_text(encoding="utf-8"))

    def span(self, shard: int) -> tuple[int, int]:
        """Return the rows of a shard as (first, last + 1)."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)

    def file(self, shard: int) -> Path:
        """Return the path of a shard's Arrow file. Its checksum is next to it in a JSON file."""
        return self.folder / f"data-{shard:05d}-of-{self.shards:05d}.arrow"

    def has(self, shard: int) -> bool:
        """Return True if a shard was published."""
        return self._facts_file(shard).is_file()

    def facts(self, shard: int) -> dict[str, Any]:
        """Read a published shard's checksum, rows, width, precision, tokens and storing error."""
        return json.loads(self._facts_file(shard).read_text(encoding="utf-8"))

    def damage(self, shard: int, digests: Sequence[str]) -> str | None:
        """Describe why a published shard cannot be used, or return None for a good one.

        Args:
            shard: number of the shard.
            digests: expected digests of its texts.
        """
        file = self.file(shard)
        try:
            facts = self.facts(shard)
        except ValueError:
            return f"{self._facts_file(shard)} is not JSON"
        if not file.is_file():
            return f"{file} is missing"
        if file_sha256(file) != facts["sha256"]:
            return f"{file} failed its checksum"
        if read_mapped(file).column("digest").to_pylist() != list(digests):
            return f"{file} holds the embeddings of other texts"
        return None

    def drop(self, shard: int) -> None:
        """Delete a shard, so that it is computed again. The folder is not a dataset until then."""
        for file in (self.folder / "state.json", self._facts_file(shard), self.file(shard)):
            file.unlink(missing_ok=True)

    def begin(self) -> None:
        """Create the folder and its header if they are missing."""
        if not (self.folder / HEADER).is_file():
            write_atomic(self.folder / HEADER, _json({"complete": False, "identity": self.identity}))

    def write(
        self,
        shard: int,
        digests: Sequence[str],
        vectors: np.ndarray,
        precision: str,
        tokens: int,
        stored_error: tuple[np.ndarray, float] | None = None,
    ) -> None:
        """Publish a shard.

        Args:
            shard: number of the shard.
            digests: digests of its texts.
            vectors: (rows of the shard, width) float32, unit rows.
            precision: precision of the forward pass, kept in the header.
            tokens: number of tokens encoded for the shard, kept in the header.
            stored_error: cosine distances of an earlier storing, (rows,), 0 for new rows, and their maximum. None means
                that all rows are new.
        """
        for leftover in self.folder.glob(f"{TEMPORARY}{self.file(shard).stem}*"):  # from a killed process
            leftover.unlink(missing_ok=True)
        stored, scale = quantise(vectors, self.identity["dtype"])
        error, earlier = storage_error(vectors, dequantise(stored, scale)), stored_error or (0.0, 0.0)
        content = stream_bytes(self._table(digests, stored, scale))
        facts = {
            "error_max": max(float(error.max()), earlier[1]),
            "error_sum": float(np.maximum(error, earlier[0]).sum()),
            "precision": precision,
            "rows": len(vectors),
            "sha256": sha256(content),
            "tokens": tokens,
            "width": vectors.shape[1],
        }
        write_atomic(self.file(shard), content)
        write_atomic(self._facts_file(shard), _json(facts))

    def finish(self) -> None:
        """Turn the folder of complete shards into a dataset. Only one process may call this.

        Raises:
            JasperError: the shards differ in width.
        """
        facts = [self.facts(shard) for shard in range(self.shards)]
        widths = sorted({f["width"] for f in facts})
        if len(widths) != 1:
            raise JasperError(
                f"{self.folder}: its shards differ in width (got {widths}). Fix: delete the folder and run "
                "`jasper-fast teach` again"
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
        """Map all shards to memory: stored embeddings, (rows, width) each, and scales, (rows,) or None each."""
        vectors: list[np.ndarray] = []
        scales: list[np.ndarray | None] = []
        width = self.header["width"]
        for shard in range(self.shards):
            stored, scale = self._mapped(shard, width)
            vectors.append(stored)
            scales.append(scale)
        return vectors, scales

    def read_shard(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Read some rows of a published shard, (B, width) float32, not normalised."""
        stored, scale = self._mapped(shard, self.facts(shard)["width"])
        return dequantise(stored[rows], None if scale is None else scale[rows])

    def _mapped(self, shard: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        table = read_mapped(self.file(shard))
        flat = table.column("vector").chunk(0).values.to_numpy(zero_copy_only=True)
        scale = table.column("scale").chunk(0).to_numpy(zero_copy_only=True) if "scale" in table.column_names else None
        return flat.reshape(-1, width), scale

    def _table(self, digests: Sequence[str], stored: np.ndarray, scale: np.ndarray | None) -> Any:
        """Build the Arrow table of a shard."""
        import pyarrow as pa

        width = stored.shape[1]
        columns = {"digest": pa.array(digests, pa.string())}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), width)
        if scale is not None:
            columns["scale"] = pa.array(scale)
        return pa.table(columns, schema=features(self.identity["dtype"], width).arrow_schema)

    def _facts_file(self, shard: int) -> Path:
        return self.file(shard).with_suffix(".json")

    def _check_header(self) -> None:
        try:
            cached = self.header["identity"]
        except (ValueError, KeyError):
            raise JasperError(
                f"{self.folder / HEADER}: cannot be read. Fix: delete the folder and run `jasper-fast teach` again"
            ) from None
        differences = config_difference(cached, self.identity)
        if differences:
            first = f"{self.folder}: holds other embeddings than this run needs (got -> expected):"
            raise JasperError(
                "\n  - ".join([first, *differences])
                + "\nFix: delete or move that folder, or use another cache (--cache or data.cache)"
            )


class TeacherEmbeddings:
    """Target embeddings ``norm(concat(norm(t_1), …, norm(t_n)))`` of n teachers, concatenated when they are read.

    Args:
        caches: complete caches of the same texts, in the order of concatenation.
        reduction: projection of the concatenation to fewer dimensions. None: they stay as wide as they are.

    Raises:
        ValueError: there are no caches, or they differ in their texts.
    """

    def __init__(self, caches: Sequence[TeacherCache], reduction: Reduction | None = None) -> None:
        if not caches or len({cache.identity["texts"] for cache in caches}) != 1:
            raise ValueError("expected one or more caches of the same texts")
        self.names = [cache.name for cache in caches]
        self.revisions: list[str | None] = [cache.identity.get("revision") for cache in caches]  # None: precomputed
        self.folders = [cache.folder for cache in caches]
        self.widths: list[int] = [cache.header["width"] for cache in caches]
        self.reduction = reduction
        self.width = sum(self.widths) if reduction is None else reduction.matrix.shape[1]
        self.fingerprint = joined_fingerprint(caches)
        if reduction is not None:
            self.fingerprint = content_digest([self.fingerprint, reduction.fingerprint])
        self._rows = caches[0].rows
        self._parts = [(cache.shard_rows, *cache.map()) for cache in caches]

    def __len__(self) -> int:
        return self._rows

    def read(self, rows: np.ndarray) -> Tensor:
        """Read the target embeddings of some texts, reduced if there is a projection.

        Args:
            rows: (B,) int64 row numbers of texts, in any order.

        Returns:
            (B, width) float32, unit rows in the order of ``rows``.

        Raises:
            IndexError: a row number is out of range.
        """
        full = self.read_full(rows)
        if self.reduction is None:
            return full
        return torch.nn.functional.normalize(full @ torch.from_numpy(self.reduction.matrix), dim=1)

    def read_full(self, rows: np.ndarray) -> Tensor:
        """Read the teachers' own embeddings of some texts, (B, sum of the widths) float32, as in :meth:`read`.

        Raises:
            IndexError: a row number is out of range.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self._rows:
            raise IndexError(f"rows: out of range (got {rows.min()} to {rows.max()}, expected 0 to {self._rows - 1})")
        out = torch.empty(len(rows), sum(self.widths))  # (B, D)
        first = 0
        for width, (shard_rows, vectors, scales) in zip(self.widths, self._parts, strict=True):
            part = _gather(rows, shard_rows, vectors, scales, width)
            out[:, first : first + width] = torch.nn.functional.normalize(torch.from_numpy(part), dim=1)
            first += width
        return torch.nn.functional.normalize(out, dim=1)


def joined_fingerprint(caches: Sequence[TeacherCache]) -> str:
    """Hash the identities of several teachers' caches, computed or not, into one hexadecimal string."""
    return content_digest(cache.fingerprint for cache in caches)


def quantise(vectors: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert unit rows to the stored dtype.

    Args:
        vectors: (B, D) float32, unit rows.
        dtype: "float16" or "int8".

    Returns:
        (B, D) float16 and None, or (B, D) int8 and (B,) float32 scales that make the largest coordinate 127.
    """
    if dtype == "float16":
        return vectors.astype(np.float16), None
    scale = np.abs(vectors).max(axis=1) / np.float32(127)  # (B,)
    return np.rint(vectors / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def dequantise(stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """Convert stored rows, (B, D), back to float32. The result is not normalised."""
    vectors = stored.astype(np.float32)
    return vectors if scale is None else vectors * scale[:, None]


def storage_error(original: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Measure the cosine distance between each row and its stored form, (B,) float64.

    It is computed as half the squared distance of the unit vectors, because 1 − cos would be lost in rounding.
    """
    a, b = original.astype(np.float64), stored.astype(np.float64)
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    return 0.5 * np.square(a - b).sum(axis=1)


def features(dtype: str, width: int) -> Features:
    """Return the columns of a cache, for embeddings of this dtype and width."""
    from datasets import Features, List, Value

    columns = {"digest": Value("string"), "vector": List(Value(dtype), length=width)}
    return Features({**columns, "scale": Value("float32")} if dtype == "int8" else columns)


def _gather(
    rows: np.ndarray, shard_rows: int, vectors: list[np.ndarray], scales: list[np.ndarray | None], width: int
) -> np.ndarray:
    """Read rows shard by shard, (B, width) float32."""
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
