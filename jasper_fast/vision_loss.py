"""The losses of the vision stage: each head's vector of a caption teaches the picture's vector of the same head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config import StageConfig
from jasper_fast.gather import gather_rows
from jasper_fast.losses import AnyOutput
from jasper_fast.stages import jasper_loss, temperature_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAME = 1e-4  # captions whose cosine is nearer to 1 count as one caption


class Captions(NamedTuple):
    """Every distinct caption that a stage may ask for: unit vectors of each head side by side, (n, sum of the heads'
    widths), and which captions are of one picture, (n,) int64: those of equal number."""

    vectors: Tensor
    pictures: Tensor


class Mixed(NamedTuple):
    """Of pictures that others are laid over: the others' captions as the loss takes captions, (B, sum of the heads'
    widths), the share of each picture that is its own, (B, 1), and the others' `Told.places`."""

    captions: Tensor
    shares: Tensor
    places: Tensor | None = None


class Told(NamedTuple):
    """What a loss is told of a batch beside its captions' vectors: where they stand among the stage's distinct ones,
    (B,) int64, None where those are not asked for; and what is laid over the pictures."""

    places: Tensor | None = None
    mixed: Mixed | None = None

    def to(self, device: torch.device) -> Told:
        places = None if self.places is None else self.places.to(device)
        if self.mixed is None:
            return Told(places)
        captions, shares, laid = self.mixed
        return Told(places, Mixed(captions.to(device), shares.to(device), None if laid is None else laid.to(device)))


NOTHING = Told()


class ContrastiveOutput(NamedTuple):
    """A `JasperLoss`' parts and the contrastive term, unweighted; the loss has all of them, weighted."""

    loss: Tensor
    cosine: Tensor
    similarity: Tensor
    relative_similarity: Tensor
    neighbourhood: Tensor
    contrastive: Tensor


class VisionLoss(nn.Module):
    """Three losses per head, averaged over the heads (arXiv 2412.19048, stage 4), and a contrastive term if weighted.

    Args:
        stage: weights, margin, temperature, heads.
        group: whose ranks' batches make one batch; None: this process's alone.
        rows: how many of the stage's ``batch_size`` pictures each rank of the group has.
        captions: what a picture's caption is told from, float32 where the pictures' vectors are; None: the batch's.
    """

    def __init__(
        self,
        stage: StageConfig,
        group: ProcessGroup | None = None,
        rows: Sequence[int] | None = None,
        captions: Captions | None = None,
    ) -> None:
        super().__init__()
        assert stage.vision is not None
        self.heads = stage.heads
        self.contrastive, self.balance = stage.vision.contrastive, stage.vision.balance
        temperature = temperature_of(stage)
        self.temperatures = temperature if isinstance(temperature, dict) else dict.fromkeys(stage.heads, temperature)
        self.group, self.rows = group, rows
        self.captions: dict[int, Captions] = {}  # by head
        if captions is not None:
            parts = captions.vectors.split(stage.heads, dim=1)
            self.captions = {w: Captions(own, captions.pictures) for w, own in zip(stage.heads, parts, strict=True)}
        self.one = jasper_loss(stage.weights, stage, group, rows)

    def forward(
        self, students: Mapping[int, Tensor], teacher: Tensor, told: Told = NOTHING
    ) -> AnyOutput | ContrastiveOutput:
        """Losses of a batch.

        Args:
            students: width -> (B, width) pictures' vectors.
            teacher: (B, sum of the heads' widths) captions' unit vectors of each head, in ``heads``' order.
            told: its places, where ``captions`` were given. Of pictures that others are laid over, the three losses
                compare with the captions' weighted means.
        """
        own = self._by_head(teacher)
        laid = own if told.mixed is None else self._by_head(told.mixed.captions)
        outputs = []
        for width, vectors in students.items():
            mixed = None if told.mixed is None else told.mixed._replace(captions=laid[width])
            outputs.append(self._head(width, vectors, own[width], told.places, mixed))
        return type(outputs[0])(*(torch.stack(parts).mean() for parts in zip(*outputs, strict=True)))

    def _by_head(self, vectors: Tensor) -> dict[int, Tensor]:
        return dict(zip(self.heads, vectors.split(self.heads, dim=1), strict=True))

    def _head(
        self, width: int, pictures: Tensor, captions: Tensor, places: Tensor | None, mixed: Mixed | None
    ) -> AnyOutput | ContrastiveOutput:
        mean = captions
        if mixed is not None:
            mean = F.normalize(mixed.shares * captions + (1 - mixed.shares) * mixed.captions, dim=1)
        output = self.one({width: pictures}, mean)
        if not self.contrastive:
            return output
        parts = {"pictures": F.normalize(pictures.float(), dim=1), "captions": captions, "places": places}
        if mixed is not None:
            parts |= {"laid": mixed.captions, "shares": mixed.shares, "laid places": mixed.places}
        # places as floats as well: exact below 2**24
        rows = {name: part.float().view(len(pictures), -1) for name, part in parts.items() if part is not None}
        if self.group is not None:
            rows = dict(zip(rows, gather_rows([*rows.values()], self.group, self.rows), strict=True))
        places, laid = (rows[name][:, 0].long() if name in rows else None for name in ("places", "laid places"))
        mixed = None if mixed is None else Mixed(rows["laid"], rows["shares"], laid)
        term = contrastive_loss(
            rows["pictures"],
            rows["captions"],
            self.temperatures[width],
            self.captions.get(width),
            places,
            mixed,
            self.balance,
        )
        known = {"neighbourhood": torch.zeros_like(term), **output._asdict(), "contrastive": term}
        return ContrastiveOutput(**(known | {"loss": output.loss + self.contrastive * term}))


def contrastive_loss(
    pictures: Tensor,
    captions: Tensor,
    temperature: float,
    others: Captions | None = None,
    places: Tensor | None = None,
    mixed: Mixed | None = None,
    balance: float = 0.0,
) -> Tensor:
    """How badly each picture finds its caption, and each caption its picture among the batch's; the mean of both.

    A caption that equals another picture's is no wrong answer for it and is left out there. Pictures that others are
    laid over are to find both captions: the mean of what both lose, by their shares.

    Args:
        pictures, captions: (B, D) unit vectors, row by row of one another.
        temperature: by which cosines are divided.
        others: (n, D) captions that a picture's is told from, the batch's among them, but for those of the same
            picture; None: the batch's alone.
        places: (B,) where the captions stand among the others.
        mixed: (B, D) captions of what is laid over the pictures, all of them the batch's, the pictures' own shares, and
            the places of those captions.
        balance: above 0, so many times `unevenness` is added: no picture is to be found by captions of all kinds.

    Returns:
        a scalar; 0 for a batch of one without others.
    """
    sets: list[tuple[Tensor, Tensor | None, Tensor | float]] = [(captions, places, 1.0)]
    if mixed is not None:
        share = mixed.shares[:, 0]
        sets = [(captions, places, share), (mixed.captions, mixed.places, 1 - share)]
    every = captions if others is None else others.vectors  # (n, D)
    own = torch.arange(len(pictures), device=pictures.device)
    left_out = torch.zeros(len(pictures), len(every), dtype=torch.bool, device=pictures.device)
    asked = []  # of each set: its captions' places, the shares by which pictures are to find them, what they lose
    for each, place, weight in sets:
        if others is None:
            near = each @ every.T  # (B, B)
            place = near.argmax(dim=1)
            left_out |= near > 1.0 - SAME
        else:
            assert place is not None
            left_out |= others.pictures[place][:, None] == others.pictures
        shown = torch.stack([one @ each.T > 1.0 - SAME for one, _, _ in sets]).any(dim=0).fill_diagonal_(False)
        scores = (pictures @ each.T / temperature).masked_fill(shown, -torch.inf)  # (B, B): captions in columns
        asked.append((place[:, None], weight, F.cross_entropy(scores.T, own, reduction="none")))
    for place, _, _ in asked:
        left_out.scatter_(1, place, False)
    scores = pictures @ every.T / temperature  # (B, n)
    found = torch.logsumexp(scores.masked_fill(left_out, -torch.inf), dim=1)
    lost = torch.zeros_like(found)
    for place, weight, missed in asked:
        lost = lost + weight * (found - scores.gather(1, place)[:, 0] + missed)
    return lost.mean() / 2 + (balance * unevenness(scores) if balance else 0.0)


def unevenness(scores: Tensor) -> Tensor:
    """How unevenly captions that each choose among a batch's pictures spread over them.

    Pictures that many captions choose are hubs: they come first for captions that are not theirs.

    Args:
        scores: (B, n) of pictures and captions, in nats; a caption chooses by their softmax over the pictures.

    Returns:
        the Kullback-Leibler divergence of the shares of captions that pictures get from equal ones; 0 at best.
    """
    count, captions = scores.shape
    share = torch.logsumexp(torch.log_softmax(scores, dim=0), dim=1) - math.log(captions)  # (B,) log of each one's
    return -share.mean() - math.log(count)
