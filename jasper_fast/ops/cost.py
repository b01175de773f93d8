"""Cost model of the two forms of the similarity loss, and the limit of the cheaper one's accuracy."""

from __future__ import annotations

import torch

# Below this fraction of |S'S|^2 + |T'T|^2 the feature form has lost about three of its seven digits to cancellation.
# Of bfloat16 rows on a GPU it has five digits: errors are up to 7e-6 of the sums, 0.7 % of the loss at this fraction.
CANCELLATION = 1e-3
# On a GPU: products of the feature form in the time of one of the tile form's. float16 leaves the tensor cores.
PASSES = {torch.bfloat16: 2.0, torch.float16: 12.0}
WORTH_WAITING = 2.0**38  # multiply-adds that take 2 ms on a GPU, for which the host waits to see if the sums cancel


def feature_form_is_cheaper(
    rows: int, width: int, teacher_width: int, teacher_gradient: bool, *, heads: int = 1, passes: float = 1.0
) -> bool:
    """Compare the two forms by multiply-adds of forward and gradient, for ``method="auto"``.

    The tile form computes half of both Gram matrices by symmetry, and one product for each requested gradient. The
    heads share the teacher's Gram matrix. Its cost is B^2 (D / 2 + E / 2H + D [+ E]). The feature form computes S'S,
    T'S, the shared T'T and two products for each gradient. Its cost is B (D^2 + D E + E^2 / H + D (D + E)
    [+ E (D + E)]). The tile form is more accurate, so the feature form must be cheaper by a quarter.

    Args:
        rows: batch size B.
        width: student's width D.
        teacher_width: teacher's width E.
        teacher_gradient: whether the teacher's gradient is wanted.
        heads: number H of students of one teacher.
        passes: products that the feature form needs for one of the tile form's, to be as exact as float32.
    """
    tile = rows * (width / 2 + teacher_width / 2 / heads + width + (teacher_width if teacher_gradient else 0))
    both = width + teacher_width
    feature = width * width + width * teacher_width + teacher_width * teacher_width / heads + width * both
    feature += teacher_width * both if teacher_gradient else 0
    return passes * feature < 0.8 * tile
