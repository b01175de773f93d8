"""The contrastive loss of vision stages: images and captions, each to be recognized by the other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SAME = 1e-4  # captions whose cosine is nearer to 1 count as one caption


class Captions(NamedTuple):
    """All distinct captions of a stage.

    The first field has unit embeddings (n, sum of the heads' widths), those of the heads next to each other. The second
    has a number (n,) int64 for each caption. Captions of one image have equal numbers.
    """

    vectors: Tensor
    pictures: Tensor


class Mixed(NamedTuple):
    """The other images that are mixed into a batch's images.

    Args:
        captions: (B, sum of the heads' widths) captions of the others, in the form of the loss's captions.
        shares: (B, 1) fraction of each image itself.
        places: `LossInputs.places` of the others.
    """

    captions: Tensor
    shares: Tensor
    places: Tensor | None = None


def contrastive_loss(
    pictures: Tensor,
    captions: Tensor,
    temperature: float,
    others: Captions | None = None,
    places: Tensor | None = None,
    mixed: Mixed | None = None,
    balance: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy of captions given an image, and of the batch's images given a caption.

    A caption that equals another image's is not a wrong answer for it and is left out there. A mixed image has two
    right captions. It gets the mean of both cross-entropies, weighted by the fractions.

    Args:
        pictures: unit embeddings (B, D) of the images.
        captions: unit embeddings (B, D) of the images' captions, row by row.
        temperature: divisor of the cosines.
        others: the (n, D) captions among which an image's caption is to be recognized, the batch's included. Those of
            the same image are left out. None means the batch's alone.
        places: the captions' indices (B,) among the others.
        mixed: the captions (B, D) of the images that are mixed in, the fractions of the images themselves, and the
            places of those captions. All mixed images are in the batch. None means that nothing is mixed.
        balance: weight of `unevenness`, so that no image is found by captions of all kinds.

    Returns:
        A scalar. It is 0 for a batch of one without others.

    Example:
        >>> import torch
        >>> captions = torch.eye(2)
        >>> right = contrastive_loss(torch.eye(2), captions, temperature=0.1)
        >>> wrong = contrastive_loss(torch.eye(2).flip(0), captions, temperature=0.1)
        >>> bool(right < 1e-3), bool(wrong > 1)
        (True, True)
    """
    sets: list[tuple[Tensor, Tensor | None, Tensor | float]] = [(captions, places, 1.0)]
    if mixed is not None:
        share = mixed.shares[:, 0]
        sets = [(captions, places, share), (mixed.captions, mixed.places, 1 - share)]
    every = captions if others is None else others.vectors  # (n, D)
    own = torch.arange(len(pictures), device=pictures.device)
    left_out = torch.zeros(len(pictures), len(every), dtype=torch.bool, device=pictures.device)
    terms = []  # of each set: its captions' places, the images' fractions, the cross-entropy given a caption
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
        terms.append((place[:, None], weight, F.cross_entropy(scores.T, own, reduction="none")))
    for place, _, _ in terms:
        left_out.scatter_(1, place, False)
    scores = pictures @ every.T / temperature  # (B, n)
    total = torch.logsumexp(scores.masked_fill(left_out, -torch.inf), dim=1)
    loss = torch.zeros_like(total)
    for place, weight, given_caption in terms:
        loss = loss + weight * (total - scores.gather(1, place)[:, 0] + given_caption)
    return loss.mean() / 2 + (balance * unevenness(scores) if balance else 0.0)


def unevenness(scores: Tensor) -> Tensor:
    """Measure how unevenly captions spread over the images of a batch, if each caption chooses among them.

    An image that many captions choose is a hub: it comes first for captions of other images.

    Args:
        scores: scores (B, n) of images and captions, in nats. A caption chooses by their softmax over the images.

    Returns:
        The Kullback-Leibler divergence of the fractions of captions per image from equal ones. 0 is the best value.
    """
    count, captions = scores.shape
    share = torch.logsumexp(torch.log_softmax(scores, dim=0), dim=1) - math.log(captions)  # (B,) log of each fraction
    return -share.mean() - math.log(count)
