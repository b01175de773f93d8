"""The losses in their slow, obvious form, with which tests and benchmarks compare the fast forms.

Everything is plain autograd in the dtype of the inputs: float64 in gives float64 out. Memory is O(B^2), and O(B^4) for
the relative similarity loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(embeddings: Tensor) -> Tensor:
    """Scale rows to unit length. A zero row stays zero and gets no gradient. (B, D) -> (B, D)."""
    largest = embeddings.detach().abs().amax(dim=1, keepdim=True)  # (B, 1)
    zero = largest == 0
    scaled = embeddings / torch.where(zero, 1.0, largest)  # so that no square overflows or vanishes
    length = scaled.square().sum(dim=1, keepdim=True)
    return torch.where(zero, 0.0, scaled / torch.where(zero, 1.0, length).sqrt())


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cos between the rows of (B, D) student and (B, D) teacher."""
    return (1.0 - (normalise(student) * normalise(teacher)).sum(dim=1)).mean()


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the two (B, B) cosine matrices."""
    unit, target = normalise(student), normalise(teacher)
    return (unit @ unit.T - target @ target.T).square().mean()


def pair_scores(embeddings: Tensor) -> Tensor:
    """Return the cosines of all pairs of rows i < j, row by row. (B, D) -> (P,)."""
    unit = normalise(embeddings)
    i, j = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (unit @ unit.T)[i, j]


def relative_similarity_of_scores(student: Tensor, teacher: Tensor, margin: float, ties: str = "exclude") -> Tensor:
    """Compute the published formulation on pair scores: one term for each pair of pairs. (P,), (P,) -> ()."""
    pairs = len(student)
    if pairs < 2:
        return student.nan_to_num().sum() * 0.0
    first, second = torch.triu_indices(pairs, pairs, offset=1, device=student.device)  # (N,)
    above = teacher[first] > teacher[second]
    label = torch.where(above, 1.0, -1.0).to(student.dtype)
    terms = torch.relu(margin - label * (student[first] - student[second]))
    if ties == "exclude":
        terms = terms * (teacher[first] != teacher[second])
    # Comparisons with NaN are false instead of NaN. A teacher's NaN must reach loss and gradient all the same.
    spoilt = teacher.sum() * 0.0
    return terms.mean() + (student * spoilt).sum()


def relative_similarity_loss(
    student: Tensor, teacher: Tensor, *, margin: float = 0.015, ties: str = "exclude"
) -> Tensor:
    """Compare any two pairs of rows: the teacher's more similar pair must be so for the student (arXiv 2412.19048).

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, E).
        margin: number added to every term.
        ties: "exclude" leaves out pairs with equal teacher scores (the paper). "label" orders them by pair index (the
            published code).
    """
    return relative_similarity_of_scores(pair_scores(student), pair_scores(teacher.detach()), margin, ties)


def neighbourhood_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Return the mean of KL(softmax(teacher cosines / t) || softmax(student cosines / t)), each row without itself."""
    unit, target = normalise(student), normalise(teacher.detach())
    rows = len(unit)
    if rows < 2:
        return unit.nan_to_num().sum() * 0.0
    others = ~torch.eye(rows, dtype=torch.bool, device=unit.device)

    def log_softmax(embeddings: Tensor) -> Tensor:
        return ((embeddings @ embeddings.T)[others].view(rows, rows - 1) / temperature).log_softmax(dim=1)

    teacher_log, student_log = log_softmax(target), log_softmax(unit)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=1).mean()


def listwise_loss(
    queries: Tensor,
    documents: Tensor,
    candidates: Tensor,
    scores: Tensor,
    *,
    temperature: float = 0.05,
    teacher_temperature: float = 0.05,
) -> Tensor:
    """Return the mean of KL(softmax(scores / teacher_temperature) || softmax(q . d / temperature)) over candidates."""
    unit, document_unit = normalise(queries), normalise(documents)
    total = (unit.nan_to_num() * 0.0).sum() + (document_unit.nan_to_num() * 0.0).sum()
    for query, row, given in zip(unit, candidates, scores.to(unit.dtype), strict=True):
        row, given = row[row != -1], given[row != -1]
        if len(row) > 1:
            student_log = (document_unit[row] @ query / temperature).log_softmax(dim=0)
            teacher_log = ((given - given.amax()) / teacher_temperature).log_softmax(dim=0)
            teacher = teacher_log.exp()
            terms = teacher * (teacher_log.clamp(min=torch.finfo(unit.dtype).min) - student_log)
            total = total + terms.sum()
    return total / len(queries)


def info_nce_loss(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.05,
    teacher_queries: Tensor | None = None,
    teacher_documents: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy of each query's positive among its negatives, in O(QMD) memory."""
    scores = normalise(queries) @ normalise(documents).T / temperature  # (Q, M)
    deciding = documents if teacher_documents is None else teacher_documents
    left_out = (deciding[positives][:, None] == deciding).all(dim=2)
    if teacher_queries is not None and teacher_documents is not None:
        teacher = normalise(teacher_queries) @ normalise(teacher_documents).T
        left_out |= teacher > teacher.gather(1, positives[:, None]) - margin
        scores = scores + 0.0 * teacher.detach()  # a teacher's NaN reaches the loss, though comparisons drop it
    left_out.scatter_(1, positives[:, None], False)
    scores = scores + torch.zeros_like(scores).masked_fill(left_out, -torch.inf)
    return torch.nn.functional.cross_entropy(scores, positives)


def pair_counts(student: Tensor, teacher: Tensor, margin: float, ties: str = "exclude") -> tuple[Tensor, Tensor]:
    """Count active terms by brute force: (P,) student and teacher scores -> up (P,) and low (P,), int64.

    A term of p and q, with p below q in teacher order, is active if x_p > fl(x_q - margin). For a pair, up counts the
    active terms with it as p, and low those with it as q. The gradient of the summed loss with respect to x is
    up - low.
    """
    threshold = student - margin
    below = teacher[:, None] < teacher[None, :]  # (P, P): the row's pair comes before the column's
    if ties == "label":
        index = torch.arange(len(teacher), device=teacher.device)
        below |= (teacher[:, None] == teacher[None, :]) & (index[:, None] < index[None, :])
    active = below & (student[:, None] > threshold[None, :])
    return active.sum(dim=1), active.sum(dim=0)
