"""Ids of the rows of an index: row numbers, or the user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.inputs import ascending


class RowIds:
    """Ids of an index's rows.

    Args:
        explicit: (N,) int64 ids of the rows. None if the ids are the row numbers.
        own: True if the user gave the ids.
        following: id of the next row that is added without an id.

    Raises:
        ValueError: an id is negative or appears twice.
    """

    def __init__(self, explicit: Tensor | None = None, own: bool = False, following: int = 0) -> None:
        if explicit is not None:
            _check_new(explicit, torch.empty(0, dtype=torch.int64))
        self.explicit, self.own, self.following = explicit, own, following
        self._sorted: tuple[Tensor, Tensor] | None = None

    def numbers(self, total: int) -> Tensor:
        """Return the ids of all rows, (N,) int64."""
        return torch.arange(total) if self.explicit is None else self.explicit.clone()

    def append(self, total: int, count: int, ids: Any) -> None:
        """Give ids to new rows.

        Args:
            total: number of rows before.
            count: number of new rows.
            ids: one id per new row. None numbers them.

        Raises:
            ValueError: ids are missing, not wanted, negative or repeated, or not one per row.
            TypeError: the ids are no integers.
        """
        if total and (ids is not None) != self.own:
            fix = "without ids. Fix: leave out ids=" if ids is not None else "with ids. Fix: give ids="
            raise ValueError(f"ids: this index was made {fix}")
        if ids is not None:
            new = _integers(ids)
            if len(new) != count:
                raise ValueError(f"ids: expected one per row ({count}), got {len(new)}")
            known = torch.empty(0, dtype=torch.int64) if self.explicit is None else self.explicit
            _check_new(new, known)
            self._set(torch.cat([known, new]))
            self.own = True if count else self.own
            return
        self.own = False
        new = torch.arange(self.following, self.following + count)
        if self.explicit is not None:
            self._set(torch.cat([self.explicit, new]))
        self.following += count

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return the ids of row numbers. A row number of −1 stays −1."""
        if self.explicit is None or not self.explicit.numel():
            return rows
        ids = self.explicit.to(rows.device)[rows.clamp(min=0).long()]
        return torch.where(rows < 0, -1, ids)

    def rows(self, ids: Any, total: int) -> Tensor:
        """Return the row numbers of ids, (n,) int64.

        Args:
            ids: (n,) integers, each once.
            total: number of rows.

        Raises:
            ValueError: an id is unknown or appears twice.
            TypeError: the ids are no integers.
        """
        wanted = _integers(ids)
        values, counts = wanted.unique(return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"ids: {int(values[counts > 1][0])} is given twice. Fix: give each id once")
        found, rows = self.find(wanted, total)
        if not bool(found.all()):
            raise ValueError(f"ids: {int(wanted[~found][0])} is not in this index of {total} rows")
        return rows

    def find(self, wanted: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return which ids are known, and their row numbers, both in the shape of ``wanted`` (int64)."""
        if self.explicit is None or not len(self.explicit):
            return (wanted >= 0) & (wanted < total), wanted
        if self._sorted is None:
            self._sorted = self.explicit.sort()
        ordered, order = (part.to(wanted.device) for part in self._sorted)
        at = torch.searchsorted(ordered, wanted.contiguous()).clamp(max=len(ordered) - 1)
        return ordered[at] == wanted, order[at]

    def valid_rows(self, valid: Any, total: int) -> Any:
        """Return the argument ``valid`` of a search with row numbers in place of ids."""
        if self.explicit is None or valid is None:
            return valid
        given = valid if isinstance(valid, Tensor) else np.asarray(valid)
        if given.dtype in (torch.bool, np.bool_) or given.ndim != 1:
            return valid
        wanted = _integers(valid)
        found, rows = self.find(wanted, total)
        if not bool(found.all()):
            raise ValueError(f"ids: {int(wanted[~found][0])} is not in this index of {total} rows")
        return torch.as_tensor(ascending(rows.numpy()))

    def keep(self, mask: Tensor, renumber: bool) -> None:
        """Drop the ids of removed rows.

        Args:
            mask: bool (N,), False for removed rows.
            renumber: number the rows that are left from 0.

        Raises:
            ValueError: the ids are the user's own and ``renumber`` is True.
        """
        if not renumber:
            if not bool(mask.all()):
                self._set(self.numbers(len(mask))[mask])
            return
        if self.own:
            raise ValueError("renumber: this index has ids of its user. Fix: leave out renumber=True")
        self.following = int(mask.sum())
        self._set(None)

    def _set(self, explicit: Tensor | None) -> None:
        self.explicit, self._sorted = explicit, None


def _integers(ids: Any) -> Tensor:
    array = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return torch.empty(0, dtype=torch.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers of shape (n,), got {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "u" and int(array.max()) >= 2**63:
        raise ValueError(f"ids: {int(array.max())} does not fit 64 bits with a sign")
    return torch.as_tensor(array.astype(np.int64))


def _check_new(new: Tensor, known: Tensor) -> None:
    if bool((new < 0).any()):
        raise ValueError(f"ids: {int(new[new < 0][0])} is negative, and −1 stands for no row. Fix: use ids from 0 on")
    values, counts = torch.cat([known, new]).unique(return_counts=True)
    if bool((counts > 1).any()):
        raise ValueError(f"ids: {int(values[counts > 1][0])} appears twice. Fix: remove() it first, or use another id")
