"""Export a student without a head: Transformer, Pooling and Normalize, for servers that ignore Dense modules."""

from __future__ import annotations

from pathlib import Path

from jasper_fast.exporting.flat import copy_model
from jasper_fast.exporting.parity import check_flat_export
from jasper_fast.models.folder import POOLING, read_json


def headless_width(source: Path) -> int:
    """Return the width of a student without a head.

    Args:
        source: model folder.
    """
    pooling = read_json(source / POOLING / "config.json")
    return int(pooling.get("embedding_dimension") or pooling["word_embedding_dimension"])


def write_headless(source: Path, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write a student without a head into an unpublished folder, and compare its embeddings with the source's.

    Args:
        source: model folder from export_student.
        folder: unpublished folder.
        trust_remote_code: permission to run the model's code. Default: False.

    Raises:
        JasperError: an embedding differs.
    """
    copy_model(source, headless_width(source), folder, {"Pooling": source / POOLING, "Normalize": None}, "headless")
    check_flat_export(source, folder, None, trust_remote_code=trust_remote_code)
