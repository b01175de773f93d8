"""Stages of images: an image's embedding learns from its caption's embedding, at every width.

Images, captions and augmentations of a step are functions of (seed, stage, step) alone. So a resumed run, or a run of
several processes, uses the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.config.stage import AugmentConfig, StageConfig
from jasper_fast.data.image_dataset import Images, connected_groups
from jasper_fast.distributed.ranks import Ranks
from jasper_fast.losses.contrastive import Captions, Mixed
from jasper_fast.models.micro_batches import ImageBatches
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch, LossInputs
from jasper_fast.training.parameters import tower_parameters
from jasper_fast.training.pooled import PooledStates, pooled_states
from jasper_fast.training.prefetch import batches_of
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.sampler import BatchPlan
from jasper_fast.training.stages.base import BaseStage
from jasper_fast.training.stages.losses import VisionLoss
from jasper_fast.utils.errors import JasperError, Problems
from jasper_fast.utils.names import first_line

if TYPE_CHECKING:
    from jasper_fast.training.run.run import Run


class VisionStage(BaseStage):
    """A stage that trains the vision tower on images with captions. The text side is frozen.

    Args:
        config: the run's configuration.
        index: the stage's position in it.
        data: the images. None: only checks that need none are made.
        labels: the teacher embeddings, which the stage does not use.
    """

    targets: CaptionTargets

    @staticmethod
    def trained_names(student: Student, stage: StageConfig) -> list[str]:
        """Return the names of the parameters that the stage trains."""
        return tower_parameters(student, stage)

    @property
    def images(self) -> Images:
        """The training images."""
        assert self.data.images is not None, "a vision stage needs images"
        return self.data.images

    def source(self) -> tuple[Any, str]:
        """Return the training images, and their unit."""
        return self.images, "images"

    def pooled_rows(self, student: Student) -> int:
        """Return an upper bound of the number of captions that are pooled before the first step."""
        return min(int(self.images.starts[-1]), self.config.steps * self.config.batch_size)

    def problems(self, student: Student, ranks: int) -> list[str]:
        """Return the problems of the stage with a student and a number of ranks, before images are read."""
        problems = Problems()
        with problems:
            _check_tower(student)
        return [*problems, *super().problems(student, ranks)]

    def parallel_problems(self, ranks: int) -> list[str]:
        """Return the problems of training the stage on several ranks."""
        problems = super().parallel_problems(ranks)
        if self.run_config.parallel.mode == "fsdp" and ranks > 1:
            problems.append(
                "a vision stage cannot shard its student (parallel.mode: fsdp). Fix: set parallel.mode: ddp"
            )
        return problems

    def pool(self, run: Run, student: Student, plan: BatchPlan) -> None:
        """Pool the captions that the stage reads."""
        captions = caption_plan(self.images, plan, *self.seed)
        source = f"captions {self.images.fingerprint}"
        self.pooled = pooled_states(run, student, self.config, captions, source, self._captions)
        self.targets = CaptionTargets(student, self.config.heads, self.pooled, captions, run.device)
        assert self.config.vision is not None
        self._all_captions = self.targets.all_captions(self.images) if self.config.vision.among == "all" else None

    def _captions(self, numbers: np.ndarray) -> tuple[list[str], list[str]]:
        texts = self.images.caption_texts(numbers)
        return texts, ["document"] * len(texts)

    def initialize(self, run: Run, student: Student, start: Position) -> None:
        """Set the loss."""
        group, rows = (run.ranks.group, run.ranks.counts(self.config.batch_size)) if self.global_loss else (None, None)
        self.loss = VisionLoss(self.config, group, rows, self._all_captions)

    def batches(self, first_step: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, this rank's batch) from ``first_step`` to the end of the stage."""
        return image_batches(
            self.config,
            self.seed,
            first_step,
            self._plan,
            self.images,
            self.targets,
            self._student,
            self._ranks,
            self.global_loss,
        )


@torch.no_grad()
def _check_tower(student: Student) -> None:
    """Encode one blank image: nothing else shows whether a tower and a text encoder fit each other."""
    tower, training = student.vision_tower, student.training
    student.eval()
    try:
        student.pool(torch.zeros(1, 3, tower.side, tower.side))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise JasperError(
            f"student.vision: no image can pass from {type(tower.tower).__name__} through "
            f"{type(student.encoder).__name__} ({first_line(error)}). The tower must return `last_hidden_state`, and "
            "the text encoder take `inputs_embeds`. Fix: choose another student.vision.model or student.model"
        ) from error
    finally:
        student.train(training)


class CaptionTargets:
    """Caption embeddings of every head of a stage, from states that are pooled once.

    Args:
        student: the student, whose text side is frozen.
        heads: the widths of the stage.
        states: the states of the captions that the stage reads.
        captions: the plan of caption numbers, (B,) for every step.
        device: the device of the heads.
    """

    def __init__(
        self, student: Student, heads: list[int], states: PooledStates, captions: BatchPlan, device: torch.device
    ) -> None:
        self.student, self.heads, self.states, self.captions, self.device = student, heads, states, captions, device
        self._places: np.ndarray | None = None  # by caption number

    @torch.no_grad()
    def read(self, numbers: np.ndarray) -> Tensor:
        """Return the unit embeddings of each head side by side, (B, sum of widths) float32."""
        pooled = self.states.read(numbers).to(self.device)
        no_dropout = torch.ones((), device=self.device)
        embeddings = self.student.project(pooled, self.heads, no_dropout)
        return torch.cat([F.normalize(embeddings[width].float(), dim=1) for width in self.heads], dim=1).cpu()

    def all_captions(self, images: Images) -> Captions:
        """Return all distinct captions that the stage reads. Images with a common caption count as one."""
        numbers = self.states.rows
        owners = np.searchsorted(images.starts, numbers, side="right") - 1
        texts = images.caption_texts(numbers)
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        chosen = sorted(first.values())
        place = {texts[row]: i for i, row in enumerate(chosen)}
        self._places = np.full(images.starts[-1], -1)
        self._places[numbers] = [place[text] for text in texts]
        groups = connected_groups([[f"{owner}", f" {text}"] for owner, text in zip(owners, texts, strict=True)])
        group = {row: number for number, rows in groups.items() for row in rows}
        images_of = torch.tensor([group[row] for row in chosen], device=self.device)
        return Captions(self.read(numbers[chosen]).to(self.device), images_of)  # once: every step compares with them

    def places(self, numbers: np.ndarray) -> Tensor | None:
        """Return the positions of captions among those of :meth:`every`, (B,) int64. None before its first call."""
        return None if self._places is None else torch.from_numpy(self._places[numbers])


def caption_plan(images: Images, plan: BatchPlan, seed: int, stage: int) -> BatchPlan:
    """Return the plan of caption numbers: of an image with several captions, each step draws one."""
    counts = np.diff(images.starts)

    def numbers(step: int) -> np.ndarray:
        rows = plan(step)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stage, step, 1])))
        return images.starts[rows] + generator.integers(counts[rows])

    return numbers


def image_batches(
    stage: StageConfig,
    seed: tuple[int, int],
    first_step: int,
    plan: BatchPlan,
    images: Images,
    targets: CaptionTargets,
    student: Student,
    ranks: Ranks,
    across_ranks: bool = True,
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, this rank's batch of images) from ``first_step`` to the end of the stage.

    Args:
        stage: the stage's settings.
        seed: the run's seed and the stage's index.
        first_step: the first step.
        plan: the rows of every step.
        images: the training images.
        targets: the caption embeddings.
        student: the student.
        ranks: the ranks that divide a batch.
        across_ranks: whether the loss compares the images of all ranks. If not, images are mixed with images of the
            same rank, whose captions are all that its loss has.
    """
    assert stage.vision is not None
    mine = ranks.rows(stage.batch_size)
    side, tokens_per_image, views = (
        student.vision_tower.side,
        student.vision_tower.image_tokens + 2,
        stage.vision.augment,
    )

    def prepare(step: int) -> Batch:
        rows, captions, total = plan(step), targets.captions(step), stage.batch_size
        here, mixed = np.arange(total)[mine], None
        if views.mix:
            partners, fractions = draw_partners(views.mix, (*seed, step), total)
            other, fraction = partners[mine], fractions[mine]
            other = other if across_ranks else here[np.argsort(other)]
            decoded, at = np.unique(np.concatenate([here, other]), return_inverse=True)
            pixels = see(rows[decoded], step, decoded)
            weight = fraction.view(-1, 1, 1, 1)
            pixels = weight * pixels[at[: len(here)]] + (1 - weight) * pixels[at[len(here) :]]
            mixed = Mixed(targets.read(captions[other]), fraction[:, None], targets.places(captions[other]))
        else:
            pixels = see(rows[here], step, here)
        micro = ImageBatches(list(pixels.split(stage.micro_batch)), tokens_per_image)
        teacher = targets.read(captions[mine])
        inputs = LossInputs(targets.places(captions[here]), mixed)
        return Batch(rows[here], teacher, micro, None, micro.tokens, micro.padded, 0.0, inputs)

    def see(rows: np.ndarray, step: int, places: np.ndarray) -> Tensor:
        """Return augmented images, given their rows and their places in the whole batch."""
        pixels = images.pixels(rows, side)
        if not views.has_affine:
            return pixels
        return warp_images(pixels, draw_affine_maps(views, (*seed, step), stage.batch_size)[places])

    return batches_of(prepare, first_step, stage.steps, student.device)


def draw_affine_maps(views: AugmentConfig, seed: tuple[int, int, int], total: int) -> Tensor:
    """Draw an affine map for each image of a batch, (total, 2, 3) as ``affine_grid`` takes them.

    Args:
        views: the limits of shift, scale and rotation.
        seed: the run's seed, the stage's index and the stage's step.
        total: images of the whole batch.
    """
    generator = torch.Generator().manual_seed((seed[0] * 1000 + seed[1]) * 10_000_000 + seed[2])
    draws = torch.rand(total, 6, generator=generator) * 2 - 1  # (total, 6) in -1..1
    angle = draws[:, 0] * math.radians(views.rotate)
    wide, high = 1 + draws[:, 1] * views.scale, 1 + draws[:, 2] * views.scale
    wide = torch.where(draws[:, 3] < 0, -wide, wide) if views.flip else wide
    shift = 2 * views.shift * draws[:, 4:6]  # affine_grid counts from -1 to 1
    rows = [angle.cos() * wide, -angle.sin() * high, shift[:, 0], angle.sin() * wide, angle.cos() * high, shift[:, 1]]
    return torch.stack(rows, dim=1).view(total, 2, 3)


def draw_partners(spread: float, seed: tuple[int, int, int], total: int) -> tuple[np.ndarray, Tensor]:
    """Draw the image that each image of a batch is mixed with (mixup, arXiv 1710.09412).

    Args:
        spread: the parameter of the distribution Beta(spread, spread).
        seed: the run's seed, the stage's index and the stage's step.
        total: images of the whole batch.

    Returns:
        (total,) positions in the batch, and (total,) float32 fractions that each image keeps, at least 1/2: a draw of
        the distribution, or 1 minus it.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, 2])))
    fraction = generator.beta(spread, spread, total)
    return generator.permutation(total), torch.from_numpy(np.maximum(fraction, 1.0 - fraction).astype(np.float32))


def warp_images(pixels: Tensor, maps: Tensor) -> Tensor:
    """Apply affine maps to images, (B, 3, side, side) float32 in 0..255. Pixels outside an image repeat its edge."""
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
