"""The cosine loss: the distance of each embedding to the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.losses.arguments import LossOptions, check_pair
from jasper_fast.losses.autograd import compute_dtype, full_precision, normalize


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cos over the rows. The paper sums, and the published code takes this mean.

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, D). They get a gradient if they require one.

    Raises:
        TypeError: a floating-point tensor was expected.
        ValueError: the two are not matrices of equal shape on one device.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> cosine_loss(student, torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    check_pair(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"cosine loss: expected equal widths, got {student.shape[1]} and {teacher.shape[1]}. Fix: use "
            "similarity_loss or relative_similarity_loss, which take embeddings of different widths"
        )
    with full_precision(teacher):
        dtype = compute_dtype([student], teacher)
        return _cosine(normalize(student, dtype), normalize(teacher, dtype))


def compute(heads: list[Tensor], teacher: Tensor, options: LossOptions) -> Tensor:
    """Return the losses (H,) of unit rows, for `jasper_fast.losses.combined`."""
    return torch.stack([_cosine(head, teacher) for head in heads])


def _cosine(unit: Tensor, target: Tensor) -> Tensor:
    return (1.0 - (unit * target).sum(dim=1)).mean()
