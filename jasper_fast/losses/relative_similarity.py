"""The relative similarity loss: the order of the similarities of all pairs.

`relative_exact` counts exactly, in C++ or Triton if available. `relative_binned` counts in bins, for large batches.
"""

from __future__ import annotations

from torch import Tensor

from jasper_fast.losses import reference, relative_binned, relative_exact
from jasper_fast.losses.arguments import LossOptions, check_choice, check_number, check_pair
from jasper_fast.losses.autograd import attach_gradients, compute_dtype, full_precision, needs_gradient
from jasper_fast.ops.normalize import l2_normalize, l2_normalize_backward

RELATIVE_METHODS = ("auto", "exact", "binned", "reference")
TIES = ("exclude", "label")


def relative_similarity_loss(
    student: Tensor, teacher: Tensor, *, margin: float = 0.015, ties: str = "exclude", method: str = "auto"
) -> Tensor:
    """Compare any two pairs of rows: the teacher's more similar pair must be so for the student, by a margin.

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, E). They never get a gradient.
        margin: smallest difference of the two cosines, finite.
        ties: "exclude" leaves out pairs of pairs with equal teacher scores (the paper). "label" lets their index decide
            (the published code). "binned" does not distinguish the two: its ties count half either way.
        method: "exact" counts all C(C(B, 2), 2) terms in O(P log P) time and O(P) memory for P = C(B, 2), B <= 65536.
            "binned" counts scores in bins, in O(B D) memory and with an error that docs/binned.md shows. "reference"
            writes out all terms, O(P^2). "auto" is "exact" until `relative_binned.preferred` finds its memory too much.

    Raises:
        TypeError: a floating-point tensor, or a number as the margin, was expected.
        ValueError: the inputs are not matrices of B rows on one device, B is too large, the margin is not finite, or a
            choice is unknown.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # cosines 1, 0, 0
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # cosines 0, 1, 0
        >>> relative_similarity_loss(student, teacher, margin=0.5)  # (1 - 0 + 0.5) + (0 - 0 + 0.5), of three terms
        tensor(0.6667)
    """
    check_pair(student, teacher)
    margin = check_number("margin", margin)
    check_choice("ties", ties, TIES)
    check_choice("method", method, RELATIVE_METHODS)
    if method != "reference":
        _check_rows(teacher)
    with full_precision(teacher):
        dtype = compute_dtype([student], teacher)
        if method == "reference":
            return reference.relative_similarity_loss(student.to(dtype), teacher.to(dtype), margin=margin, ties=ties)
        unit, inverse = l2_normalize(student.detach(), dtype)
        target, _ = l2_normalize(teacher.detach(), dtype)
        losses, gradients = _losses_and_gradients([unit], target, margin, ties, method, needs_gradient([student]))
        gradients = [l2_normalize_backward(g, unit, inverse) if len(g) else g for g in gradients]
        return attach_gradients(losses, [student], gradients, [0])[0]


def compute(heads: list[Tensor], teacher: Tensor, options: LossOptions) -> Tensor:
    """Return the losses (H,) of unit rows, for `jasper_fast.losses.combined`.

    Raises:
        ValueError: more rows than the counts can hold.
    """
    _check_rows(teacher)
    units, with_gradient = [head.detach() for head in heads], needs_gradient(heads)
    losses, gradients = _losses_and_gradients(
        units, teacher.detach(), options.margin, options.ties, "auto", with_gradient
    )
    return attach_gradients(losses, heads, gradients, list(range(len(heads))))


def _losses_and_gradients(
    units: list[Tensor], target: Tensor, margin: float, ties: str, method: str, with_gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the losses of unit rows, and their gradients with respect to them if these are wanted."""
    if method == "binned" or (method == "auto" and relative_binned.preferred(target.shape[0], len(units))):
        return relative_binned.relative_similarity(units, target, margin, with_gradient)
    return relative_exact.relative_similarity(units, target, margin, ties == "exclude", with_gradient)


def _check_rows(embeddings: Tensor) -> None:
    count = embeddings.shape[0]
    if count * (count - 1) // 2 > relative_exact.MAX_PAIRS:
        raise ValueError(f"relative similarity: expected at most 65536 rows, got {count}. Fix: split the batch")
