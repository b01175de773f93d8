"""Build the image dataset of a run: check images and captions, split off held-out images, and publish the result.

The image files are copied unchanged into the cache, so a run does not depend on the original archives. Damaged images
are found before training. An image is held out together with all images of the same content or with the same caption.
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

from jasper_fast.config.data import ImagesConfig, ImageSourceConfig
from jasper_fast.config.run import Config
from jasper_fast.data.captions import Item
from jasper_fast.data.glyphs import GLYPHS
from jasper_fast.data.image_files import BadImage, decode, require_pillow, resize
from jasper_fast.data.image_sources import read_images, source_stamp
from jasper_fast.data.text import normal_form
from jasper_fast.utils.arrow_files import write_index
from jasper_fast.utils.atomic import locked, publish_dir
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest, settings_digest

if TYPE_CHECKING:
    from datasets import Dataset


FORMAT = 4  # increment it when a code change makes the same settings give other images
MAX_CACHED_BYTES = 1 << 29  # maximum bytes of decoded images in memory
MAX_LISTED = 5  # maximum number of unusable images to list


@dataclass
class Images:
    """The training images or the held-out images of a run.

    Args:
        table: the images, with the columns ``image`` (bytes), ``captions`` (list of texts) and ``name`` (text).
        fingerprint: the identity of the images and captions, in order.
        left_out: the unusable images of the sources, each with the reason.

    Attributes:
        starts: the offsets of the captions, (n + 1,) int64. Image i has the captions starts[i] to starts[i + 1] - 1.
    """

    table: Dataset
    fingerprint: str
    left_out: list[str] = field(default_factory=list)
    starts: np.ndarray = field(init=False)
    _decoded: dict[int, dict[int, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counts = [len(captions) for captions in self.table["captions"]] if len(self.table) else []
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.table)

    def captions(self, rows: Sequence[int] | np.ndarray | None = None) -> list[list[str]]:
        """Return all captions of each image.

        Args:
            rows: the indices of the images, (B,). None selects all images.
        """
        table = self.table.select_columns(["captions"])
        return list(table["captions"] if rows is None else table[np.asarray(rows).tolist()]["captions"])

    def caption_texts(self, numbers: np.ndarray) -> list[str]:
        """Return captions by their index among the captions of all images, as in ``starts``.

        Args:
            numbers: the indices of the captions, (B,) int64.
        """
        rows = np.searchsorted(self.starts, numbers, side="right") - 1
        captions = self.captions(rows)
        return [captions[i][n - self.starts[row]] for i, (n, row) in enumerate(zip(numbers, rows, strict=True))]

    def pixels(self, rows: Sequence[int] | np.ndarray, side: int) -> Tensor:
        """Decode images and resize them to squares. A small dataset is kept in memory decoded.

        Args:
            rows: the indices of the images, (B,).
            side: the side of the squares, in pixels.

        Returns:
            A (B, 3, side, side) uint8 tensor.
        """
        indices = np.asarray(rows).tolist()
        cached = self._decoded.setdefault(side, {})
        missing = [row for row in dict.fromkeys(indices) if row not in cached]
        decoded: dict[int, np.ndarray] = {}
        if missing:
            files = self.table.select_columns(["image"])[missing]["image"]
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                decoded = dict(zip(missing, pool.map(partial(_decode_square, side), files), strict=True))
            if len(self) * 3 * side * side <= MAX_CACHED_BYTES:
                cached.update(decoded)
        squares = np.stack([decoded[row] if row in decoded else cached[row] for row in indices])  # (B, side, side, 3)
        return torch.from_numpy(squares).permute(0, 3, 1, 2)


def prepare_images(config: Config) -> tuple[Images, Images]:
    """Build the training images and the held-out images of a run with an ``images`` section.

    Raises:
        JasperError: `build_images` fails.
    """
    assert config.images is not None
    return build_images(config.images, config.data.cache)


def build_images(config: ImagesConfig, cache: str | Path) -> tuple[Images, Images]:
    """Build the images, or load them from the cache folder ``{cache}/images-<settings>``.

    Args:
        config: the sources and the number of held-out images.
        cache: the cache folder.

    Returns:
        The training images and the held-out images.

    Raises:
        JasperError: Pillow is missing, a source is unreadable, too many images are unusable, or too few are left.
    """
    from datasets import load_from_disk

    require_pillow()
    folder = _folder(config, cache)
    with locked(folder):
        if not (folder / "facts.json").is_file():
            with publish_dir(folder, replace=True) as temporary:
                _build(config, temporary)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    table = load_from_disk(str(folder / "table"))
    held = np.array(facts["held_out"], dtype=np.int64)
    train = np.setdiff1d(np.arange(len(table)), [*facts["held_out"], *facts["beside_held_out"]])
    train_images = Images(table.select(train), facts["fingerprint"] + "t", facts["left_out"])
    return train_images, Images(table.select(held), facts["fingerprint"] + "h")


def images_cached(config: ImagesConfig, cache: str | Path) -> bool:
    """Return whether the images are already in the cache, as built by `build_images`.

    Args:
        config: the sources and the number of held-out images.
        cache: the cache folder.

    Raises:
        JasperError: Pillow is not installed, or matplotlib, which the glyphs need.
    """
    require_pillow()
    return (_folder(config, cache) / "facts.json").is_file()


def check_images(source: ImageSourceConfig) -> None:
    """Read the first image of a source, to find errors that affect all its images. A damaged image is not an error.

    Raises:
        JasperError: the source cannot be read, as in `jasper_fast.data.image_sources.read_images`.
    """
    if source.path != GLYPHS:
        next(read_images(source), None)


def _folder(config: ImagesConfig, cache: str | Path) -> Path:
    settings = {
        "format": FORMAT,
        "images": config.model_dump(mode="json"),
        "sources": [source_stamp(source) for source in config.sources],
    }
    key = settings_digest(settings)
    return Path(cache).expanduser() / f"images-{key}"


def _build(config: ImagesConfig, folder: Path) -> None:
    unusable: list[str] = []
    fingerprint, groups, extra = _write_table(config, folder / "table", unusable)
    if unusable:
        print(f"skipped {len(unusable)} images:\n  - " + "\n  - ".join(unusable[:MAX_LISTED]), flush=True)
        if len(unusable) > MAX_LISTED:
            print(f"  - and {len(unusable) - MAX_LISTED} more")
    candidates = extra.count(False)
    if candidates <= config.held_out:
        others = f", plus {len(extra) - candidates} of train_only sources" if candidates < len(extra) else ""
        raise JasperError(
            f"images: too few usable images to hold out {config.held_out} (got {candidates}{others}, expected at least "
            f"{config.held_out + 1}). Fix: add images, or lower images.held_out"
        )
    held, linked = hold_out(groups, config.held_out, config.seed, extra)
    facts = {
        "fingerprint": fingerprint,
        "held_out": held,
        "beside_held_out": linked,
        "left_out": unusable,
        "settings": config.model_dump(),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _write_table(config: ImagesConfig, folder: Path, unusable: list[str]) -> tuple[str, list[list[str]], list[bool]]:
    """Write the usable images of all sources as a dataset.

    Args:
        config: the sources, and the maximum number of unusable images.
        folder: the folder of the dataset. It must not exist.
        unusable: the list to which unusable images are added, each with the reason.

    Returns:
        The fingerprint of images and captions, and for each image its ties to other images and whether it is only for
        training.
    """
    import pyarrow as pa
    from datasets import Features, Sequence, Value

    features = Features(
        {"image": Value("large_binary"), "captions": Sequence(Value("string")), "name": Value("string")}
    )
    schema = features.arrow_schema
    digest = hashlib.blake2b(digest_size=16)
    groups: list[list[str]] = []
    extra: list[bool] = []
    folder.mkdir()
    with pa.OSFile(str(folder / "pictures.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for source in config.sources:
            for where, data, captions in _usable_images(read_images(source), unusable, config.max_bad):
                content = content_digest(data)
                digest.update("\0".join([content, *captions, ""]).encode("utf-8", "surrogatepass"))
                groups.append([content, *map(normal_form, captions)])
                extra.append(source.train_only)
                writer.write_batch(pa.record_batch([[data], [captions], [where]], schema=schema))
    write_index(folder, ["pictures.arrow"], features, digest.hexdigest()[:16])
    return digest.hexdigest(), groups, extra


def hold_out(
    groups: Sequence[Sequence[str]], count: int, seed: int, extra: Sequence[bool] = ()
) -> tuple[list[int], list[int]]:
    """Select rows to hold out, as whole groups of connected rows, in a random order given by the seed.

    Args:
        groups: the ties of each row. Rows with a common tie (the same content or the same caption) stay together.
        count: the maximum number of held-out rows. A group that would exceed it is skipped.
        seed: the seed of the order.
        extra: for each row, whether it is only for training. Such rows do not affect the selection. An empty sequence
            means that no row is.

    Returns:
        The held-out rows, and the training-only rows that are connected to them and must not be used either. Both are
        in ascending order.
    """
    candidates = [row for row in range(len(groups)) if not extra or not extra[row]]
    members = connected_groups(groups, candidates)
    order = {r: content_digest(f"{seed} {min(groups[r])}", size=64) for r in members}
    held: set[int] = set()
    for group in sorted(members, key=lambda r: order[r]):
        if len(held) + len(members[group]) <= count:
            held.update(members[group])
    linked = [
        row
        for rows in connected_groups(groups).values()
        if not held.isdisjoint(rows)
        for row in rows
        if extra and extra[row]
    ]
    return sorted(held), sorted(linked)


def connected_groups(groups: Sequence[Sequence[str]], rows: Sequence[int] | None = None) -> dict[int, list[int]]:
    """Group rows that are connected by common ties, directly or through other rows.

    Args:
        groups: the ties of each row, as in `hold_out`.
        rows: the rows to group. None groups all rows.

    Returns:
        The rows of each group, by one row that represents the group.
    """
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


def _usable_images(items: Iterator[Item], unusable: list[str], limit: int) -> Iterator[tuple[str, bytes, list[str]]]:
    """Yield the images that can be decoded and have a caption. Add the others to ``unusable``.

    Raises:
        JasperError: more than ``limit`` images are unusable.
    """

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

    batch: list[Item] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def checked() -> Iterator[tuple[str, bytes, list[str]]]:
            for (where, data, captions), problem in zip(batch, pool.map(check, batch), strict=True):
                if problem is None:
                    assert isinstance(data, bytes)
                    yield where, data, captions
                    continue
                unusable.append(problem)
                if len(unusable) > limit:
                    raise JasperError(
                        f"images: too many unusable images (got {len(unusable)}, expected at most {limit}, the value "
                        "of images.max_bad). Fix: repair or remove these images, or raise images.max_bad:\n  - "
                        + "\n  - ".join(unusable[:MAX_LISTED])
                    )
            batch.clear()

        for item in items:
            batch.append(item)
            if len(batch) == 64:
                yield from checked()
        yield from checked()


def _decode_square(side: int, data: bytes) -> np.ndarray:
    return resize(decode(data), side)
