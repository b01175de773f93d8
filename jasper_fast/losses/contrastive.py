"""The contrastive loss of vision stages: images and captions, each to be recognized by the other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DUPLICATE_TOLERANCE = 1e-4  # captions whose cosine is nearer to 1 count as one caption


class Captions(NamedTuple):
    """All distinct captions of a stage.

    The first field has unit embeddings (n, sum of the heads' widths), those of the heads next to each other. The second
    has a number (n,) int64 for each caption. Captions of one image have equal numbers.
    """

    embeddings: Tensor
    image_ids: Tensor


class Mixed(NamedTuple):
    """The other images that are mixed into a batch's images.

    Args:
        captions: (B, sum of the heads' widths) captions of the others, in the form of the loss's captions.
        fractions: (B, 1) fraction of each image itself.
        places: `LossInputs.places` of the others.
    """

    captions: Tensor
    fractions: Tensor
    places: Tensor | None = None


def contrastive_loss(
    images: Tensor,
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
        images: unit embeddings (B, D) of the images.
        captions: unit embeddings (B, D) of the images' captions, row by row.
        temperature: divisor of the cosines.
        others: the (n, D) captions among which an image's caption is to be recognized, the batch's included. Those of
            the same image are left out. None means the batch's alone.
        places: the captions' indices (B,) among the others.
        mixed: the captions (B, D) of the images that are mixed in, the fractions of the images themselves, and the
            places of those captions. All mixed images are in the batch. None means that nothing is mixed.
        balance: weight of `hubness`, so that no image is found by captions of all kinds.

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
        fraction = mixed.fractions[:, 0]
        sets = [(captions, places, fraction), (mixed.captions, mixed.places, 1 - fraction)]
    all_captions = captions if others is None else others.embeddings  # (n, D)
    labels = torch.arange(len(images), device=images.device)
    left_out = torch.zeros(len(images), len(all_captions), dtype=torch.bool, device=images.device)
    terms = []  # of each set: its captions' places, the images' fractions, the cross-entropy given a caption
    for set_captions, place, weight in sets:
        if others is None:
            near = set_captions @ all_captions.T  # (B, B)
            place = near.argmax(dim=1)
            left_out |= near > 1.0 - DUPLICATE_TOLERANCE
        else:
            assert place is not None
            left_out |= others.image_ids[place][:, None] == others.image_ids
        shown = (
            torch.stack([one @ set_captions.T > 1.0 - DUPLICATE_TOLERANCE for one, _, _ in sets])
            .any(dim=0)
            .fill_diagonal_(False)
        )
        scores = (images @ set_captions.T / temperature).masked_fill(shown, -torch.inf)  # (B, B): captions in columns
        terms.append((place[:, None], weight, F.cross_entropy(scores.T, labels, reduction="none")))
    for place, _, _ in terms:
        left_out.scatter_(1, place, False)
    scores = images @ all_captions.T / temperature  # (B, n)
    total = torch.logsumexp(scores.masked_fill(left_out, -torch.inf), dim=1)
    loss = torch.zeros_like(total)
    for place, weight, given_caption in terms:
        loss = loss + weight * (total - scores.gather(1, place)[:, 0] + given_caption)
    return loss.mean() / 2 + (balance * hubness(scores) if balance else 0.0)


def hubness(scores: Tensor) -> Tensor:
    """Measure how unevenly captions spread over the images of a batch, if each caption chooses among them.

    An image that many captions choose is a hub: it comes first for captions of other images.

    Args:
        scores: scores (B, n) of images and captions, in nats. A caption chooses by their softmax over the images.

    Returns:
        The Kullback-Leibler divergence of the fractions of captions per image from equal ones. 0 is the best value.
    """
    count, captions = scores.shape
    logs = torch.logsumexp(torch.log_softmax(scores, dim=0), dim=1) - math.log(captions)  # (B,) log of each fraction
    return -logs.mean() - math.log(count)
