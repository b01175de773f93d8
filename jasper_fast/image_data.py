"""The pictures of a run: checked, put together with their captions, parted into training and held-out, published once.

Their bytes are copied as they are into the cache, so a run depends on no archive that may move, and what is broken is
known before training. A picture is held out with all that share its bytes or one of its captions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jasper_fast.arrow import write_index
from jasper_fast.config import Config, ImagesConfig, ImageSourceConfig
from jasper_fast.errors import JasperError
from jasper_fast.files import locked, publish_dir
from jasper_fast.glyphs import GLYPHS
from jasper_fast.image_sources import Item, read_images, source_stamp
from jasper_fast.images import BadImage, decode, need_pillow, resize
from jasper_fast.text import normal_form

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 4  # raised when the same settings would give other pictures
KEPT_PIXELS = 1 << 29  # bytes of decoded pictures held in memory
TOLD = 5  # broken pictures named one by one


@dataclass
class Images:
    """One part of a run's pictures.

    Args:
        table: columns ``image`` (bytes), ``captions`` (list of text), ``name``.
        fingerprint: of pictures and captions in order.
        left_out: pictures of the sources that could not be used, and why.
    """

    table: Dataset
    fingerprint: str
    left_out: list[str] = field(default_factory=list)
    starts: np.ndarray = field(init=False)  # (n + 1,) int64: captions of picture i are starts[i] .. starts[i + 1]
    _decoded: dict[int, dict[int, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counts = [len(captions) for captions in self.table["captions"]] if len(self.table) else []
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.table)

    def captions(self, rows: Sequence[int] | np.ndarray | None = None) -> list[list[str]]:
        """All captions of each picture."""
        table = self.table.select_columns(["captions"])
        return list(table["captions"] if rows is None else table[np.asarray(rows).tolist()]["captions"])

    def caption_texts(self, numbers: np.ndarray) -> list[str]:
        """Captions by their number over all pictures (``starts``)."""
        rows = np.searchsorted(self.starts, numbers, side="right") - 1
        found = self.captions(rows)
        return [found[i][n - self.starts[row]] for i, (n, row) in enumerate(zip(numbers, rows, strict=True))]

    def pixels(self, rows: Sequence[int] | np.ndarray, side: int, workers: int | None = None) -> Tensor:
        """Decoded squares, (B, 3, side, side) uint8; small sets are kept decoded."""
        wanted = np.asarray(rows).tolist()
        kept = self._decoded.setdefault(side, {})
        missing = [row for row in dict.fromkeys(wanted) if row not in kept]
        found: dict[int, np.ndarray] = {}
        if missing:
            files = self.table.select_columns(["image"])[missing]["image"]
            with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
                found = dict(zip(missing, pool.map(partial(_square, side), files), strict=True))
            if len(self) * 3 * side * side <= KEPT_PIXELS:
                kept.update(found)
        squares = np.stack([found[row] if row in found else kept[row] for row in wanted])  # (B, side, side, 3)
        return torch.from_numpy(squares).permute(0, 3, 1, 2)


def prepare_images(config: Config) -> tuple[Images, Images]:
    """The training pictures and the held-out ones of a run; none of both where it has no pictures.

    Raises:
        JasperError: as :func:`build_images`.
    """
    assert config.images is not None
    return build_images(config.images, config.data.cache)


def build_images(config: ImagesConfig, cache: str | Path) -> tuple[Images, Images]:
    """(training pictures, held-out pictures), built once and published at ``{cache}/images-<settings>``.

    Raises:
        JasperError: a source cannot be read, too many pictures are broken, or fewer are left than are to be held out.
    """
    from datasets import load_from_disk

    need_pillow()
    folder = _folder(config, cache)
    with locked(folder):
        if not (folder / "facts.json").is_file():
            with publish_dir(folder, replace=True) as temporary:
                _build(config, temporary)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    table = load_from_disk(str(folder / "table"))
    held = np.array(facts["held_out"], dtype=np.int64)
    train = np.setdiff1d(np.arange(len(table)), [*facts["held_out"], *facts["beside_held_out"]])
    kept = Images(table.select(train), facts["fingerprint"] + "t", facts["left_out"])
    return kept, Images(table.select(held), facts["fingerprint"] + "h")


def images_built(config: ImagesConfig, cache: str | Path) -> bool:
    """Whether :func:`build_images` has nothing left to do.

    Raises:
        JasperError: Pillow or, for the glyphs, matplotlib is not installed.
    """
    need_pillow()
    return (_folder(config, cache) / "facts.json").is_file()


def try_images(source: ImageSourceConfig) -> None:
    """Read the first picture of a source: what is wrong with all of them is told before any source is read.

    Raises:
        JasperError: as :func:`jasper_fast.image_sources.read_images`; a picture that is broken is no error yet.
    """
    if source.path != GLYPHS:
        next(read_images(source), None)


def _folder(config: ImagesConfig, cache: str | Path) -> Path:
    settings = {
        "format": FORMAT,
        "images": config.model_dump(mode="json"),
        "sources": [source_stamp(source) for source in config.sources],
    }
    key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Path(cache).expanduser() / f"images-{key}"


def _build(config: ImagesConfig, folder: Path) -> None:
    import pyarrow as pa
    from datasets import Features, Sequence, Value

    features = Features(
        {"image": Value("large_binary"), "captions": Sequence(Value("string")), "name": Value("string")}
    )
    schema = features.arrow_schema
    broken: list[str] = []
    digest = hashlib.blake2b(digest_size=16)
    groups: list[list[str]] = []  # per picture: what ties it to others
    extra: list[bool] = []  # per picture: only for training
    table = folder / "table"
    table.mkdir()
    with pa.OSFile(str(table / "pictures.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for source in config.sources:
            for where, data, captions in _sound(read_images(source), broken, config.max_bad):
                content = hashlib.blake2b(data, digest_size=16).hexdigest()
                digest.update("\0".join([content, *captions, ""]).encode("utf-8", "surrogatepass"))
                groups.append([content, *map(normal_form, captions)])
                extra.append(source.train_only)
                writer.write_batch(pa.record_batch([[data], [captions], [where]], schema=schema))
    write_index(table, ["pictures.arrow"], features, digest.hexdigest()[:16])
    if broken:
        print(f"left out {len(broken)} pictures:\n  - " + "\n  - ".join(broken[:TOLD]), flush=True)
        if len(broken) > TOLD:
            print(f"  - and {len(broken) - TOLD} more")
    own = extra.count(False)
    if own <= config.held_out:
        others = f" beside {len(extra) - own} of sources that are train_only" if own < len(extra) else ""
        raise JasperError(
            f"{own} pictures can be used{others}, and {config.held_out} are to be held out; give more pictures, or a "
            "smaller images.held_out"
        )
    held, beside = hold_out(groups, config.held_out, config.seed, extra)
    facts = {
        "fingerprint": digest.hexdigest(),
        "held_out": held,
        "beside_held_out": beside,
        "left_out": broken,
        "settings": config.model_dump(),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def hold_out(
    groups: Sequence[Sequence[str]], count: int, seed: int, extra: Sequence[bool] = ()
) -> tuple[list[int], list[int]]:
    """Rows to hold out: whole groups of what is tied together, in an order that a hash with the seed gives.

    Args:
        groups: per row its ties; rows that share one (the same bytes, the same caption) stay together.
        count: at most so many rows; groups that would exceed it are passed over.
        extra: per row, whether it is only for training; such rows change nothing about the others.

    Returns:
        those rows, and the extra ones that are tied to them and may not be trained on either; both ascending.
    """
    own = [row for row in range(len(groups)) if not extra or not extra[row]]
    members = tied(groups, own)
    place = {r: hashlib.blake2b(f"{seed} {min(groups[r])}".encode("utf-8", "surrogatepass")).digest() for r in members}
    held: set[int] = set()
    for group in sorted(members, key=lambda r: place[r]):
        if len(held) + len(members[group]) <= count:
            held.update(members[group])
    beside = [
        row for rows in tied(groups).values() if not held.isdisjoint(rows) for row in rows if extra and extra[row]
    ]
    return sorted(held), sorted(beside)


def tied(groups: Sequence[Sequence[str]], rows: Sequence[int] | None = None) -> dict[int, list[int]]:
    """These rows, or all, by the one that stands for all they are tied to, near or far; ``groups`` as in `hold_out`."""
    rows = range(len(groups)) if rows is None else rows
    parent = {row: row for row in rows}

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    first: dict[str, int] = {}
    for row in rows:
        for tie in groups[row]:
            parent[root(row)] = root(first.setdefault(tie, row))
    members: dict[int, list[int]] = {}
    for row in rows:
        members.setdefault(root(row), []).append(row)
    return members


def _sound(items: Iterator[Item], broken: list[str], most: int) -> Iterator[tuple[str, bytes, list[str]]]:
    """The pictures that can be decoded and have a caption; the others are noted, up to a limit."""

    def check(item: Item) -> str | None:
        where, data, captions = item
        if isinstance(data, str):
            return f"{where}: {data}"
        if not captions:
            return f"{where}: has no caption"
        try:
            decode(data)
        except BadImage as bad:
            return f"{where}: {bad}"
        return None

    waiting: list[Item] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def checked() -> Iterator[tuple[str, bytes, list[str]]]:
            for (where, data, captions), problem in zip(waiting, pool.map(check, waiting), strict=True):
                if problem is None:
                    assert isinstance(data, bytes)
                    yield where, data, captions
                    continue
                broken.append(problem)
                if len(broken) > most:
                    raise JasperError(
                        f"{len(broken)} pictures cannot be used, more than images.max_bad allows; mend them or raise "
                        "it:\n  - " + "\n  - ".join(broken[:TOLD])
                    )
            waiting.clear()

        for item in items:
            waiting.append(item)
            if len(waiting) == 64:
                yield from checked()
        yield from checked()


def _square(side: int, data: bytes) -> np.ndarray:
    return resize(decode(data), side)
