"""Checks of rows, queries and masks: dense tensors and arrays of floats without masked entries."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
QUERIES = (*FLOATS, torch.float64)


def as_tensor(array: Any, name: str) -> Tensor:
    """Return a tensor that shares memory with a numpy array, or the tensor itself without its gradient.

    Args:
        array: tensor or numpy array of floats.
        name: name of the argument for error messages.

    Raises:
        TypeError: another type, another kind of numbers, or a tensor without dense values.
        ValueError: a masked array with masked entries.
    """
    if isinstance(array, Tensor):
        return _plain_tensor(array, name)
    _check_mask(array, name)
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{name} must be a torch tensor or a numpy array, got {type(array).__name__}: convert it with numpy.asarray"
        )
    if array.dtype.kind not in "fb":
        raise TypeError(f"{name} must hold floats, got {array.dtype}: convert them with .astype(numpy.float32)")
    if array.dtype.itemsize > 8:
        raise TypeError(f"{name} must not hold {array.dtype}: convert them with .astype(numpy.float64)")
    array = np.asarray(array)  # the plain array of a subclass
    if any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(array)


def _plain_tensor(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: pad it with torch.nested.to_padded_tensor")
    if tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got {kind}: convert it with .to_dense()")
    if tensor.is_meta:
        raise TypeError(f"{name} is on the device meta and has no values: load it on a real device, e.g. cpu")
    return tensor.detach().resolve_neg()


def _check_mask(array: Any, name: str) -> None:
    """Reject masked entries, because a search would read the values under the mask."""
    if np.ma.is_masked(array):
        raise ValueError(
            f"{name}: {np.ma.count_masked(array)} masked entries; fill them with .filled(0), or leave out their rows"
        )


def check_rows(rows: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless ``rows`` is a matrix of one of the dtypes with at least one column."""
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} must have the shape (rows, width), got {tuple(rows.shape)}")
    if rows.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(rows.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be one of {allowed}; got {got}: convert them, for instance to float32")


def check_width(rows: Tensor, name: str, dim: int) -> None:
    """Raise unless ``rows`` have the width of the index."""
    if rows.shape[1] != dim:
        raise ValueError(f"{name} has width {rows.shape[1]}, the index {dim}")


def check_finite(rows: Tensor, name: str) -> None:
    """Raise if a row holds NaN or infinity."""
    bad = (~rows.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(f"{name}: row {int(bad[0])} holds NaN or infinity")


def check_dim(dim: int) -> int:
    """Return ``dim``, or raise if it is no positive whole number."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be a whole number of at least 1, got {dim!r}")
    return dim


def row_filter(valid: Any, size: int, total: int) -> Tensor:
    """Return the rows that may be returned.

    Args:
        valid: bool (N,) or (Q, N), or (n,) row numbers. None allows all rows.
        size: number of queries Q.
        total: number of rows N.

    Returns:
        a mask, bool (N,) or (Q, N), which is empty if all rows are allowed. Or int64 (n,) row numbers on the CPU,
        ascending, each once.

    Raises:
        TypeError: wrong dtype, or zeros and ones that look like a mask.
        ValueError: wrong shape, or a row number outside the corpus.
    """
    if valid is None:
        return torch.empty(0, dtype=torch.bool)
    if isinstance(valid, Tensor):
        valid = _plain_tensor(valid, "valid")
    else:
        _check_mask(valid, "valid")
        valid = np.asarray(valid)
        if valid.shape == (0,) and valid.dtype.kind == "f":  # numpy reads an empty list as floats
            valid = valid.astype(np.int64)
        if valid.dtype.kind == "u":  # torch would read the largest ones as negative
            _check_numbers(valid, total)
            valid = valid.astype(np.int64)
        if valid.dtype.kind not in "bi":
            raise TypeError(f"valid must be bool, or row numbers, got {valid.dtype}")
        valid = torch.as_tensor(valid)
    if valid.dtype.is_floating_point or valid.dtype.is_complex:
        raise TypeError(f"valid must be bool, or row numbers, got {str(valid.dtype).removeprefix('torch.')}")
    if valid.dtype != torch.bool and valid.dim() != 1:
        raise TypeError(
            f"valid of {valid.dim()} dimensions must be bool, got {str(valid.dtype).removeprefix('torch.')}"
        )
    if valid.dtype != torch.bool:
        numbers = valid.cpu().numpy()
        if len(numbers) == total > 2 and ((numbers == 0) | (numbers == 1)).all():
            raise TypeError(
                f"valid holds {total} zeros and ones, which as row numbers would be two rows; give it as bool"
            )
        _check_numbers(numbers, total)
        return torch.as_tensor(ascending(numbers).astype(np.int64, copy=False))
    if tuple(valid.shape) not in ((total,), (size, total)):
        raise ValueError(f"valid must have the shape ({total},) or ({size}, {total}), got {tuple(valid.shape)}")
    return valid


def as_mask(rows: Tensor, total: int, device: torch.device) -> Tensor:
    """Return the result of `row_filter` as a mask on a device: bool (N,) or (Q, N), or empty."""
    if rows.dtype == torch.bool:
        return rows.to(device)
    mask = torch.zeros(total, dtype=torch.bool)
    mask[rows] = True
    return mask.to(device)


def ascending(numbers: np.ndarray) -> np.ndarray:
    """Return the integers (n,) in rising order, each once."""
    return numbers if (numbers[1:] > numbers[:-1]).all() else np.unique(numbers)


def _check_numbers(numbers: np.ndarray, total: int) -> None:
    wrong = numbers[(numbers < 0) | (numbers >= total)]
    if wrong.size:
        raise ValueError(f"valid: row {wrong.flat[0]} is not in a corpus of {total} rows")
