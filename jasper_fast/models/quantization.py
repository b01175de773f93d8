"""Embeddings quantized to int8 codes or bits: straight-through training, and the same codes from sentence-transformers.

int8 codes use one symmetric step for all coordinates, so the inner product of codes is proportional to that of the
rounded embeddings. sentence-transformers' default range per coordinate would weigh and shift coordinates. Bits are the
signs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jasper_fast.models.hub import adapted_form

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


PRECISIONS = ("float32", "int8", "ubinary", "ubinary+rescore")
CALIBRATION_TEXTS = 1024
CANDIDATES = 100  # documents per query that bits retrieve and int8 codes rerank


def straight_through(vectors: Tensor, precision: str, group: ProcessGroup | None = None) -> Tensor:
    """Quantize and dequantize each row, with the gradient of the unit row (straight-through estimator).

    "int8" rounds to multiples of one step, a 127th of the largest absolute coordinate of all rows. :func:`int8_ranges`
    uses the same step for exported codes. "ubinary" takes signs, where zero is negative as in sentence-transformers.

    Args:
        vectors: (B, D) float embeddings, normalised here.
        precision: "int8" or "ubinary".
        group: process group whose ranks hold the rows of one batch. None means that these are all rows.

    Returns:
        (B, D) dequantized rows. "ubinary" rows have length one.

    Raises:
        ValueError: The precision is unknown.
    """
    unit = torch.nn.functional.normalize(vectors, dim=1)
    plain = unit.detach()
    if precision == "int8":
        largest = plain.abs().amax()
        if group is not None:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        step = largest.clamp_min(torch.finfo(plain.dtype).tiny) / 127
        code = torch.round(plain / step) * step
    elif precision == "ubinary":
        code = torch.where(plain > 0, 1.0, -1.0).to(plain.dtype) / plain.shape[1] ** 0.5
        code = code + 0 * plain  # keeps NaN
    else:
        raise ValueError(
            f"straight_through: unknown precision (got {precision!r}, expected 'int8' or 'ubinary'). "
            "Fix: give one of them"
        )
    return code + (unit - plain)


def int8_ranges(vectors: np.ndarray) -> np.ndarray:
    """Compute ranges with which sentence-transformers' int8 codes are embeddings rounded to one step.

    The step is a 127th of the largest absolute coordinate. sentence-transformers divides each coordinate's range into
    255 steps and rounds down from −128. These ranges begin half a step lower, so it rounds to the nearest code.

    Args:
        vectors: (n, D) float embeddings of texts that are typical of those to quantize.

    Returns:
        (2, D) float32 for ``quantize_embeddings(vectors, "int8", ranges=…)``.

    Raises:
        ValueError: An embedding is not finite, or all of them are zero.
    """
    largest = float(np.abs(vectors).max(initial=0.0))
    if not np.isfinite(largest) or largest == 0:
        raise ValueError(
            f"int8_ranges: the embeddings must be finite and not all zero (got a largest coordinate of {largest}). "
            "Fix: calibrate with other texts, or check the model"
        )
    step = largest / 127
    return np.repeat(np.array([[-128.5 * step], [126.5 * step]], dtype=np.float32), vectors.shape[1], axis=1)


def ranges_file(width: int | str) -> str:
    """Return the file name of one width's int8 ranges in an exported model, or a glob pattern for the width "*"."""
    return f"int8_ranges_{width}.npy"


def read_ranges(folder: str | Path) -> dict[int, np.ndarray]:
    """Read the int8 ranges of an exported model.

    Args:
        folder: model folder, run folder or folder of an adapted model.

    Returns:
        {width: (2, width) float32}, empty if the folder has no ranges or does not exist.
    """
    path = Path(folder)
    if (path / "model").is_dir():
        path /= "model"
    elif form := adapted_form(path):
        path /= form
    files = sorted(path.glob("int8_ranges_*.npy")) if path.is_dir() else []
    return {int(file.stem.rpartition("_")[2]): np.load(file) for file in files}
