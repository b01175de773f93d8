"""The losses written the slow, obvious way: what tests and benchmarks compare the fast versions with.

Everything is plain autograd in the dtype of the inputs, so float64 in gives float64 out. Memory is O(B^2), and O(B^4)
for the relative similarity loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(embeddings: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero and gets no gradient. (B, D) -> (B, D)."""
    largest = embeddings.detach().abs().amax(dim=1, keepdim=True)  # (B, 1)
    zero = largest == 0
    scaled = embeddings / torch.where(zero, 1.0, largest)  # so that no square overflows or vanishes
    length = scaled.square().sum(dim=1, keepdim=True)
    return torch.where(zero, 0.0, scaled / torch.where(zero, 1.0, length).sqrt())


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos between the rows of (B, D) student and (B, D) teacher."""
    return (1.0 - (normalise(student) * normalise(teacher)).sum(dim=1)).mean()


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the two (B, B) cosine matrices."""
    unit, target = normalise(student), normalise(teacher)
    return (unit @ unit.T - target @ target.T).square().mean()


def pair_scores(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs of rows i < j, row by row. (B, D) -> (P,)."""
    unit = normalise(embeddings)
    i, j = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (unit @ unit.T)[i, j]


def relative_similarity_of_scores(student: Tensor, teacher: Tensor, margin: float, ties: str = "exclude") -> Tensor:
    """The published formulation on pair scores: one term for each pair of pairs. (P,), (P,) -> ()."""
    pairs = len(student)
    if pairs < 2:
        return student.nan_to_num().sum() * 0.0
    first, second = torch.triu_indices(pairs, pairs, offset=1, device=student.device)  # (N,)
    above = teacher[first] > teacher[second]
    label = torch.where(above, 1.0, -1.0).to(student.dtype)
    terms = torch.relu(margin - label * (student[first] - student[second]))
    if ties == "exclude":
        terms = terms * (teacher[first] != teacher[second])
    # NaN compares as if there were an order: a teacher's score that is not a number must spoil loss and gradient.
    spoilt = teacher.sum() * 0.0
    return terms.mean() + (student * spoilt).sum()


def relative_similarity_loss(
    student: Tensor, teacher: Tensor, *, margin: float = 0.015, ties: str = "exclude"
) -> Tensor:
    """Pairs the teacher finds more alike must be so for the student, by a margin (arXiv 2412.19048).

    Args:
        student: (B, D) vectors.
        teacher: (B, E) vectors.
        margin: added to every term.
        ties: "exclude" leaves out pairs with equal teacher scores (the paper); "label" orders them by pair index (the
            published code).
    """
    return relative_similarity_of_scores(pair_scores(student), pair_scores(teacher.detach()), margin, ties)


def neighbourhood_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Mean over rows of KL(softmax(teacher cosines / t) || softmax(student cosines / t)), each row without itself."""
    unit, target = normalise(student), normalise(teacher.detach())
    rows = len(unit)
    if rows < 2:
        return unit.nan_to_num().sum() * 0.0
    others = ~torch.eye(rows, dtype=torch.bool, device=unit.device)

    def log_softmax(vectors: Tensor) -> Tensor:
        return ((vectors @ vectors.T)[others].view(rows, rows - 1) / temperature).log_softmax(dim=1)

    wanted, given = log_softmax(target), log_softmax(unit)
    return (wanted.exp() * (wanted - given)).sum(dim=1).mean()


def pair_counts(student: Tensor, teacher: Tensor, margin: float, ties: str = "exclude") -> tuple[Tensor, Tensor]:
    """Brute-force counts of active terms: (P,) student and teacher scores -> up (P,) and low (P,), int64.

    A term of p and q, with p below q in teacher order, is active when x_p > fl(x_q - margin). up counts a pair's active
    terms as p, low as q. The gradient of the summed loss with respect to x is up - low.
    """
    threshold = student - margin
    below = teacher[:, None] < teacher[None, :]  # (P, P): the row's pair comes before the column's
    if ties == "label":
        index = torch.arange(len(teacher), device=teacher.device)
        below |= (teacher[:, None] == teacher[None, :]) & (index[:, None] < index[None, :])
    active = below & (student[:, None] > threshold[None, :])
    return active.sum(dim=1), active.sum(dim=0)
