"""Blocks of rows, so that losses over a B x B matrix of cosines take bounded memory in plain torch.

A form in blocks returns the losses of several students against one teacher. The same pass gives their gradients with
respect to the embeddings as they were given, so a backward pass only scales. What depends on the teacher alone is
computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jasper_fast.ops.dispatch import gradient_dtype
from jasper_fast.ops.normalize import l2_normalize, l2_normalize_backward_

WORKSPACE = 4 * 2**20  # elements of one block's buffer; a pass holds one for the teacher and a few for a student


class UnitRows(NamedTuple):
    """Unit rows (B, D), the reciprocals (B, 1) of their lengths before, and the dtype of their gradient."""

    rows: Tensor
    inverse: Tensor
    dtype: torch.dtype

    def backward(self, gradient: Tensor | None) -> Tensor:
        """Return the gradient with respect to the embeddings, from one with respect to the unit rows.

        Args:
            gradient: the gradient (B, D), which is overwritten. None gives an empty tensor.
        """
        if gradient is None:
            return self.rows.new_empty(0, dtype=self.dtype)
        return l2_normalize_backward_(gradient, self.rows, self.inverse).to(self.dtype).contiguous()


def normalize_all(students: list[Tensor], teacher: Tensor) -> tuple[list[UnitRows], UnitRows]:
    """Normalize the rows of all students and of the teacher, in float64 if any of them is, else in float32."""
    double = any(v.dtype == torch.float64 for v in (*students, teacher))
    dtype = torch.float64 if double else torch.float32
    *heads, target = [UnitRows(*l2_normalize(v, dtype), gradient_dtype(v)) for v in (*students, teacher)]
    return heads, target


def row_blocks(rows: int, columns: int | None = None) -> list[tuple[int, int]]:
    """Return the first row and the end of each block of a matrix with ``columns`` columns, or with ``rows``."""
    height = max(16, min(rows, 512, WORKSPACE // (rows if columns is None else columns)))
    return [(begin, min(begin + height, rows)) for begin in range(0, rows, height)]
