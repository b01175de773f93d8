"""Score int8 and binary codes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jasper_fast.models.quantization import PRECISIONS, int8_ranges
from jasper_fast.utils.errors import JasperError


def quantize_groups(
    vectors: Mapping[str, np.ndarray], precision: str, ranges: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Quantize embeddings with sentence-transformers and return the codes as float32.

    Args:
        vectors: (n, D) float32 embeddings by group of an evaluation set.
        precision: "int8" or "ubinary".
        ranges: (2, D) ranges of int8 codes. None computes them from the largest group, which is the corpus of a
            retrieval set.

    Returns:
        (n, D) float32 by group, with values −128..127 for "int8", and −1 or 1 for "ubinary".
    """
    from sentence_transformers.util import quantize_embeddings

    if precision == "ubinary":
        width = next(iter(vectors.values())).shape[1]
        bits = {name: np.unpackbits(quantize_embeddings(v, "ubinary"), axis=1) for name, v in vectors.items()}
        return {name: v[:, :width].astype(np.float32) * 2 - 1 for name, v in bits.items()}
    ranges = ranges if ranges is not None else int8_ranges(max(vectors.values(), key=len))
    return {name: quantize_embeddings(v, "int8", ranges=ranges).astype(np.float32) for name, v in vectors.items()}


def parse_precisions(text: str) -> list[str]:
    """Parse the comma-separated value of ``--precision``.

    Args:
        text: precisions separated by commas.

    Raises:
        JasperError: A precision is unknown.
    """
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise JasperError(
            f"--precision: unknown precision (got {', '.join(map(repr, unknown))}). Fix: choose from "
            f"{', '.join(PRECISIONS)}"
        )
    return names
