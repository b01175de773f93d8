"""Vectors as int8 or as bits: trained for, written by sentence-transformers' own quantiser, and scored.

int8 codes come of one symmetric step for all coordinates, so that the inner product of codes is that of the vectors;
stock ranges per coordinate would weigh and shift coordinates. Bits are the signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jasper_fast.errors import JasperError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PRECISIONS = ("float32", "int8", "ubinary", "ubinary+rescore")
CALIBRATION_TEXTS = 1024
CANDIDATES = 100  # documents that bits find for a query and int8 codes put in order


def straight_through(vectors: Tensor, precision: str, group: ProcessGroup | None = None) -> Tensor:
    """What a code of each row stands for; backward it is the unit row, as rounding has no slope.

    Args:
        vectors: (B, D) float.
        precision: "int8" (steps of a 127th of the largest coordinate of all rows, as :func:`int8_ranges` has it for
            what is exported) or "ubinary" (signs; zero counts as minus, as in sentence-transformers).
        group: whose ranks' rows are one batch; None: these are all rows.

    Returns:
        (B, D); signs have length one.
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
        code = code + 0 * plain  # NaN stays NaN
    else:
        raise ValueError(f"precision must be 'int8' or 'ubinary', got {precision!r}")
    return code + (unit - plain)


def int8_ranges(vectors: np.ndarray) -> np.ndarray:
    """Ranges that make sentence-transformers' int8 codes the vectors rounded to one step: a 127th of the largest.

    Its quantiser cuts each coordinate's range into 255 floors that begin at −128; half a step lower, it rounds.

    Args:
        vectors: (n, D) float, of texts like those to be quantised.

    Returns:
        (2, D) float32: ``quantize_embeddings(vectors, "int8", ranges=…)``.
    """
    largest = float(np.abs(vectors).max(initial=0.0))
    if not np.isfinite(largest) or largest == 0:
        raise ValueError(
            f"int8 ranges need finite vectors that are not all zero, got a largest coordinate of {largest}"
        )
    step = largest / 127
    return np.repeat(np.array([[-128.5 * step], [126.5 * step]], dtype=np.float32), vectors.shape[1], axis=1)


def ranges_file(width: int | str) -> str:
    """Where an exported model keeps one width's ranges; of "*", a pattern for all."""
    return f"int8_ranges_{width}.npy"


def read_ranges(folder: str | Path) -> dict[int, np.ndarray]:
    """The ranges an exported model carries, by width; those of a run folder's model."""
    path = Path(folder)
    path = path / "model" if (path / "model").is_dir() else path
    found = sorted(path.glob("int8_ranges_*.npy")) if path.is_dir() else []
    return {int(file.stem.rpartition("_")[2]): np.load(file) for file in found}


def coded(vectors: Mapping[str, np.ndarray], precision: str, ranges: np.ndarray | None) -> dict[str, np.ndarray]:
    """Vectors as sentence-transformers' codes stand for them, as float32 whole numbers.

    Args:
        vectors: (n, D) float32 by group.
        precision: "int8" or "ubinary".
        ranges: for int8; None takes them from the largest group, which is the corpus of a retrieval set.
    """
    from sentence_transformers.util import quantize_embeddings

    if precision == "ubinary":
        width = next(iter(vectors.values())).shape[1]
        bits = {name: np.unpackbits(quantize_embeddings(v, "ubinary"), axis=1) for name, v in vectors.items()}
        return {name: v[:, :width].astype(np.float32) * 2 - 1 for name, v in bits.items()}
    ranges = ranges if ranges is not None else int8_ranges(max(vectors.values(), key=len))
    return {name: quantize_embeddings(v, "int8", ranges=ranges).astype(np.float32) for name, v in vectors.items()}


def known_precisions(text: str) -> list[str]:
    """The precisions of a command line, with commas between.

    Raises:
        JasperError: an unknown one.
    """
    given = [part.strip() for part in text.split(",")]
    if unknown := [part for part in given if part not in PRECISIONS]:
        raise JasperError(f"--precision knows {', '.join(PRECISIONS)}; got {', '.join(map(repr, unknown))}")
    return given
