"""Batches of a vision stage: decoded pictures, other views of them, and their captions' vectors.

Which pictures, which of their captions and which views come when is a function of (seed, stage, step) alone, so a
resumed run, or one of several processes, sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.batches import POOL_CHUNK, Batch, PooledStates, batches_of
from jasper_fast.config import AugmentConfig, StageConfig
from jasper_fast.encode import EVAL_MICRO_BATCH, autocast, pool_texts
from jasper_fast.image_data import Images, tied
from jasper_fast.losses.contrastive import Captions, Mixed
from jasper_fast.model import Student
from jasper_fast.ranks import Ranks
from jasper_fast.sampler import BatchPlan
from jasper_fast.sharding import is_sharded
from jasper_fast.stages import frozen_digest
from jasper_fast.vision_loss import Told


@dataclass(frozen=True)
class ImageBatches:
    """Pictures of one batch cut into micro-batches; it answers as :class:`jasper_fast.encode.MicroBatches` does.

    Args:
        token_ids: per micro-batch, (b, 3, side, side) pictures.
        each: input embeddings that a picture becomes, its marks included.
    """

    token_ids: list[Tensor]
    each: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids)) * self.each

    @property
    def padded(self) -> int:
        return self.tokens  # pictures are equally long

    @property
    def order(self) -> Tensor:
        return torch.arange(sum(map(len, self.token_ids)))

    def pool(
        self,
        student: Student,
        device: torch.device,
        precision: Literal["auto", "fp32", "bf16"],
        before_pass: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Mean states of the pictures' tokens, (B, hidden), at least fp32."""
        pooled = []
        with autocast(device, precision):
            for pixels in self.token_ids:
                before_pass()
                pooled.append(student.pool(pixels, device))
        return torch.cat(pooled)


class CaptionTargets:
    """Captions' vectors of every head of a stage, from pooled states that are computed once; the text side is frozen.

    Args:
        states: of the captions that the stage will ask for.
        captions: (stage step) -> (B,) numbers of the captions that teach there.
    """

    def __init__(
        self, student: Student, heads: list[int], states: PooledStates, captions: BatchPlan, device: torch.device
    ) -> None:
        self.student, self.heads, self.states, self.captions, self.device = student, heads, states, captions, device
        self._places: np.ndarray | None = None  # by number

    @torch.no_grad()
    def read(self, numbers: np.ndarray) -> Tensor:
        """(B, sum of widths) fp32: a unit vector per head, side by side."""
        pooled = self.states.read(numbers).to(self.device)
        whole = torch.ones((), device=self.device)  # no dropout on what teaches
        vectors = self.student.project(pooled, self.heads, whole)
        return torch.cat([F.normalize(vectors[width].float(), dim=1) for width in self.heads], dim=1).cpu()

    def every(self, images: Images) -> Captions:
        """All distinct captions that the stage will ask for. Pictures that share a caption count as one."""
        numbers = self.states.rows
        pictures = np.searchsorted(images.starts, numbers, side="right") - 1
        texts = images.caption_texts(numbers)
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        chosen = sorted(first.values())
        place = {texts[row]: i for i, row in enumerate(chosen)}
        self._places = np.full(images.starts[-1], -1)
        self._places[numbers] = [place[text] for text in texts]
        groups = tied([[f"{picture}", f" {text}"] for picture, text in zip(pictures, texts, strict=True)])
        group = {row: number for number, rows in groups.items() for row in rows}
        pictures_of = torch.tensor([group[row] for row in chosen], device=self.device)
        return Captions(self.read(numbers[chosen]).to(self.device), pictures_of)  # once: every step compares with them

    def places(self, numbers: np.ndarray) -> Tensor | None:
        """(B,) int64, where these captions stand among `every` one; None until those have been asked for."""
        return None if self._places is None else torch.from_numpy(self._places[numbers])


def caption_plan(images: Images, plan: BatchPlan, seed: int, stage: int) -> BatchPlan:
    """Which caption teaches: of a picture with several, one drawn anew at every step."""
    counts = np.diff(images.starts)

    def numbers(step: int) -> np.ndarray:
        rows = plan(step)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stage, step, 1])))
        return images.starts[rows] + generator.integers(counts[rows])

    return numbers


def caption_targets(
    folder: Path,
    student: Student,
    stage: StageConfig,
    images: Images,
    captions: BatchPlan,
    device: torch.device,
    precision: Any,
    progress: Callable[[int], Any],
    ranks: Ranks,
) -> CaptionTargets:
    """Pool the captions that the stage will ask for, once.

    Args:
        progress: told how many more are there; may raise to stop.
    """
    rows = np.unique(np.concatenate([captions(step) for step in range(stage.steps)]))
    length = stage.max_length or student.max_length
    key = f"captions {images.fingerprint} {length} {precision} {frozen_digest(student)}"
    states = PooledStates(folder, rows, key, ranks)

    def pool(part: np.ndarray) -> np.ndarray:
        texts = images.caption_texts(part)
        roles = ["document"] * len(texts)
        return np.concatenate(list(pool_texts(student, texts, roles, length, device, precision, POOL_CHUNK)))

    states.compute(pool, progress, together=is_sharded(student))
    return CaptionTargets(student, stage.heads, states, captions, device)


def vision_batches(
    stage: StageConfig,
    place: tuple[int, int],
    first_step: int,
    plan: BatchPlan,
    images: Images,
    targets: CaptionTargets,
    student: Student,
    ranks: Ranks,
    together: bool = True,
) -> Iterator[tuple[int, Batch]]:
    """Yield (stage step, this rank's batch) from ``first_step`` to the end.

    Args:
        place: the run's seed and the stage's position.
        together: the loss is one over all ranks' pictures; else only this rank's own are laid over its pictures, whose
            captions are all that its loss knows.
    """
    assert stage.vision is not None
    mine = ranks.rows(stage.batch_size)
    side, each, views = student.seeing.side, student.seeing.image_tokens + 2, stage.vision.augment

    def prepare(step: int) -> Batch:
        rows, captions, total = plan(step), targets.captions(step), stage.batch_size
        here, mixed = np.arange(total)[mine], None
        if views.mix:
            partners, shares = draw_partners(views.mix, (*place, step), total)
            other, share = partners[mine], shares[mine]
            other = other if together else here[np.argsort(other)]
            seen, found = np.unique(np.concatenate([here, other]), return_inverse=True)
            pixels = see(rows[seen], step, seen)
            whole = share.view(-1, 1, 1, 1)
            pixels = whole * pixels[found[: len(here)]] + (1 - whole) * pixels[found[len(here) :]]
            mixed = Mixed(targets.read(captions[other]), share[:, None], targets.places(captions[other]))
        else:
            pixels = see(rows[here], step, here)
        micro = ImageBatches(list(pixels.split(stage.micro_batch)), each)
        teacher = targets.read(captions[mine])
        told = Told(targets.places(captions[here]), mixed)
        return Batch(rows[here], teacher, micro, None, micro.tokens, micro.padded, 0.0, told)

    def see(rows: np.ndarray, step: int, places: np.ndarray) -> Tensor:
        """Views of the pictures that stand at ``places`` of the whole batch."""
        pixels = images.pixels(rows, side)
        if not views.moved:
            return pixels
        return other_views(pixels, draw_views(views, (*place, step), stage.batch_size)[places])

    return batches_of(prepare, first_step, stage.steps, student.device)


def draw_views(views: AugmentConfig, place: tuple[int, int, int], total: int) -> Tensor:
    """For each picture of a batch, where its pixels come from: (total, 2, 3) affine maps, as affine_grid takes them."""
    generator = torch.Generator().manual_seed((place[0] * 1000 + place[1]) * 10_000_000 + place[2])
    draws = torch.rand(total, 6, generator=generator) * 2 - 1  # (total, 6) in -1..1
    angle = draws[:, 0] * math.radians(views.rotate)
    wide, high = 1 + draws[:, 1] * views.scale, 1 + draws[:, 2] * views.scale
    wide = torch.where(draws[:, 3] < 0, -wide, wide) if views.flip else wide
    shift = 2 * views.shift * draws[:, 4:6]  # affine_grid counts from -1 to 1
    rows = [angle.cos() * wide, -angle.sin() * high, shift[:, 0], angle.sin() * wide, angle.cos() * high, shift[:, 1]]
    return torch.stack(rows, dim=1).view(total, 2, 3)


def draw_partners(spread: float, place: tuple[int, int, int], total: int) -> tuple[np.ndarray, Tensor]:
    """Which picture of the batch is laid over each, (total,), and the share that the lower one keeps, (total,) >= 1/2.

    Shares are of Beta(spread, spread) (mixup, arXiv 1710.09412), or one minus it.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*place, 2])))
    share = generator.beta(spread, spread, total)
    return generator.permutation(total), torch.from_numpy(np.maximum(share, 1.0 - share).astype(np.float32))


def other_views(pixels: Tensor, maps: Tensor) -> Tensor:
    """Pictures seen through affine maps, (B, 3, side, side) float32, 0..255; what lies outside repeats the edge."""
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def picture_vectors(
    student: Student,
    images: Images,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
) -> dict[int, np.ndarray]:
    """{width: (n, width) unit vectors} of all pictures of a part."""
    training = student.training
    student.eval()
    parts = []
    for start in range(0, len(images), EVAL_MICRO_BATCH):
        pixels = images.pixels(np.arange(start, min(start + EVAL_MICRO_BATCH, len(images))), student.seeing.side)
        parts.append(ImageBatches([pixels], 0).pool(student, device, precision))
    vectors = student.project(torch.cat(parts))
    student.train(training)
    return {width: F.normalize(v.float(), dim=1).cpu().numpy() for width, v in vectors.items()}
