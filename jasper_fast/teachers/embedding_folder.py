"""Find the files of precomputed embeddings, and check their order by their names."""

from __future__ import annotations

import re
from pathlib import Path

from jasper_fast.config.models import TeacherConfig
from jasper_fast.data.listing import listed_files, user_path
from jasper_fast.teachers.embedding_files import KINDS, SUFFIXES, embedding_paths
from jasper_fast.utils.errors import JasperError

TEXTS = "`jasper-fast teach --texts texts.jsonl` writes the training texts of a configuration"
ADD_KEYS = (
    "save the embeddings as .jsonl or .parquet with a column `digest` or `text`, or `id` with --id-column. "
    f"{TEXTS} with their digests"
)


def has_files(config: TeacherConfig) -> bool:
    """Return whether the file or folder of a teacher with precomputed embeddings exists."""
    return user_path(str(config.vectors)).exists()


def embedding_files(config: TeacherConfig) -> list[Path]:
    """List the files of a teacher with precomputed embeddings, in natural order.

    Raises:
        JasperError: there are none.
    """
    path, files = user_path(str(config.vectors)), embedding_paths(str(config.vectors))
    if not files:
        nested = ", ".join(_nested(path)[:3]) if path.is_dir() else ""
        raise JasperError(
            f"{path}: no teacher embeddings here (expected a {KINDS} file, or a folder of them"
            + (f"; subfolders are not read: {nested}" if nested else "")
            + f"). Fix: write one embedding per training text there. {TEXTS}"
        )
    return files


def _nested(folder: Path) -> list[str]:
    """List the subfolders that hold files of embeddings."""
    inner = {file.relative_to(folder).parts[0] for file in listed_files(folder, SUFFIXES) if file.parent != folder}
    return sorted(inner)


def check_names(files: list[Path]) -> None:
    """Reject file names whose order is ambiguous, and incomplete sets of shards."""
    seen: dict[str, Path] = {}
    for file in files:
        stem = re.sub(r"\d+", lambda digits: digits[0].lstrip("0"), _stem(file).casefold())
        other = seen.setdefault(stem, file)
        if other != file:
            raise JasperError(
                f"{file}: its order relative to {other.name} is ambiguous. Fix: delete one of them, or {ADD_KEYS}"
            )
    totals = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)$", _stem(file)))}
    if totals and totals != {len(files)}:
        raise JasperError(
            f"{files[0].parent}: incomplete shards (got {len(files)} files, expected {sorted(totals)} from their "
            "names). Fix: add the missing files, and remove others"
        )


def folder_anomalies(path: Path, files: list[Path]) -> list[str]:
    """Describe anomalies of a folder: a gap in the numbers of its files, and subfolders that are not read."""
    if not path.is_dir():
        return []
    numbers = [int(digits[-1]) for file in files if (digits := re.findall(r"\d+", _stem(file)))]
    steps = {after - before for before, after in zip(numbers, numbers[1:], strict=False)}
    nested = _nested(path)
    gaps = ["their numbers have a gap"] if len(numbers) == len(files) and len(steps) > 1 else []
    return gaps + ([f"subfolders are not read: {', '.join(nested[:3])}"] if nested else [])


def _stem(file: Path) -> str:
    return next(file.name[: -len(suffix)] for suffix in SUFFIXES if file.name.lower().endswith(suffix))
