"""Data of a training run, teacher embeddings by row, and one batch of both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from jasper_fast.losses.contrastive import Mixed

if TYPE_CHECKING:
    from jasper_fast.data.image_dataset import Images
    from jasper_fast.data.text_counts import TextCounts
    from jasper_fast.models.micro_batches import ImageBatches, MicroBatches
    from jasper_fast.teachers.reduction import Reduction

Precision = Literal["auto", "fp32", "bf16"]


class Teachers(Protocol):
    """Teacher embeddings of the training texts."""

    fingerprint: str
    width: int
    reduction: Reduction | None  # None: the targets have the teachers' width
    revisions: list[str | None]

    def read(self, rows: np.ndarray) -> Tensor:
        """Return the targets of some texts, (B, width) float32, unit rows."""
        ...

    def read_full(self, rows: np.ndarray) -> Tensor:
        """Return the teachers' own embeddings of some texts, (B, D) float32, unit rows, without a reduction."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """Texts and images of a run.

    Args:
        texts: the training texts, a dataset with columns ``text`` and ``role``.
        transductive: names of evaluation sets with a text among the training texts.
        images: the training images. None: the run has no images.
        held_out_images: the images kept for evaluation. None: the run has no images.
        held_out_texts: the documents kept for evaluation, with columns ``text``, ``role``, ``digest``, ``query`` and
            ``body``. None: the texts are not of a run.
        counts: what became of the texts of the sources. None: as ``held_out_texts``.
        texts_line: one line about the texts.
    """

    texts: Any
    transductive: tuple[str, ...] = ()
    images: Images | None = None
    held_out_images: Images | None = None
    held_out_texts: Any = None
    counts: TextCounts | None = None
    texts_line: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the texts."""
        from jasper_fast.data.text_dataset import texts_fingerprint

        return texts_fingerprint(self.texts)


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch: the texts or images to encode, or their pooled states, and the targets.

    Args:
        rows: (B,) int64 positions among the training texts or images.
        teacher: (B, D) float32 target embeddings.
        texts: micro-batches to encode. None: ``pooled`` has the states.
        pooled: (B, hidden) float32 states of a frozen encoder. None: ``texts`` are encoded.
        tokens: number of tokens without padding.
        padded: number of tokens with padding.
        wait: seconds that training waited for the batch.
        inputs: more inputs of a vision or ranking stage's loss. None: its loss takes none.
        places: (B,) int64 positions of the rows in the whole batch. None: ranks divide ``batch_size`` rows in order.
        total: rows of the whole batch. None: ``batch_size``.
    """

    rows: np.ndarray
    teacher: Tensor
    texts: MicroBatches | ImageBatches | None
    pooled: Tensor | None
    tokens: int
    padded: int
    wait: float
    inputs: LossInputs | RankInputs | None = None
    places: np.ndarray | None = None
    total: int | None = None

    @property
    def longest_text(self) -> list[int] | None:
        """Token ids of the longest text. None: nothing is encoded, or images are."""
        first: Any = self.texts.token_ids[0][0] if self.texts is not None else None
        return first if isinstance(first, list) else None


class LossInputs(NamedTuple):
    """Inputs of the vision loss next to the embeddings of the batch's captions.

    The first field has the captions' indices among the stage's distinct ones, (B,) int64. None means that the loss does
    not use those. The second has the images that are mixed in, or None.
    """

    places: Tensor | None = None
    mixed: Mixed | None = None

    def to(self, device: torch.device) -> LossInputs:
        """Move all tensors to a device."""
        places = None if self.places is None else self.places.to(device)
        if self.mixed is None:
            return LossInputs(places)
        captions, fractions, caption_places = self.mixed
        return LossInputs(
            places,
            Mixed(
                captions.to(device), fractions.to(device), None if caption_places is None else caption_places.to(device)
            ),
        )


NO_INPUTS = LossInputs()


class RankInputs(NamedTuple):
    """Inputs of the ranking losses next to the embeddings of Q queries and then M documents.

    With several ranks they are those of the whole batch.

    Attributes:
        candidates: (Q, K) int64, among the M documents. -1: no candidate.
        scores: (Q, K) float32.
        positives: (Q,) int64, among the M documents. -1: no document is known to answer the query.
        order: (Q + M,) int64, the places of the batch's rows among the gathered rows of all ranks.
        counts: number of rows of each rank.
    """

    candidates: Tensor
    scores: Tensor
    positives: Tensor
    order: Tensor
    counts: tuple[int, ...]

    def to(self, device: torch.device) -> RankInputs:
        """Move all tensors to a device."""
        candidates, scores, positives, order = (part.to(device) for part in self[:4])
        return RankInputs(candidates, scores, positives, order, self.counts)
