"""Write the training texts to a file, so that embeddings can be computed elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jasper_fast.config.run import Config
from jasper_fast.teachers.embedding_folder import has_files
from jasper_fast.teachers.precomputed import PrecomputedEmbeddings
from jasper_fast.teachers.source_keys import identified_documents
from jasper_fast.utils.atomic import TEMPORARY, disk_errors
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = (".parquet", ".jsonl")


def check_format(option: str, file: str) -> None:
    """Reject a file name that does not end with .parquet or .jsonl.

    Args:
        option: the option of the command, for the error.
        file: the file name.
    """
    if not file.endswith(FORMATS):
        raise JasperError(
            f"{option}: unknown format (got {file!r}, expected a name that ends with {' or '.join(FORMATS)}). "
            f"Fix: write {Path(file).stem + FORMATS[1]!r}"
        )


def write_texts(texts: Dataset, file: Path, config: Config) -> None:
    """Write texts in order, with columns ``text``, ``role`` and ``digest``, and ``id`` if a source has an id column.

    A piece of a cut document has no id.

    Args:
        texts: training texts with the first three columns.
        file: .parquet or .jsonl file. An existing one is replaced atomically.
        config: configuration of the run.

    Raises:
        JasperError: the file cannot be written, or the ids of a source cannot be read.
    """
    if any(source.id_column is not None for source in config.data.sources):
        ids = {row.digest: row.id for source in config.data.sources for row in identified_documents(source)}
        texts = texts.add_column("id", [ids.get(digest) for digest in texts["digest"]])
    temporary = file.with_name(f"{TEMPORARY}{file.name}")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file.suffix == ".jsonl":
                texts.to_json(str(temporary), lines=True, force_ascii=False)
            else:
                texts.to_parquet(str(temporary))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def missing_texts(texts: Dataset, config: Config) -> Dataset:
    """Return the training texts that lack an embedding in the file of any teacher.

    A file that does not exist yet lacks all of them.

    Args:
        texts: training texts with columns ``text``, ``role`` and ``digest``.
        config: configuration of the run.

    Raises:
        JasperError: no teacher has ``vectors``, a file cannot be read, or its rows have a position and no key.
    """
    teachers = [teacher for teacher in config.teachers if teacher.vectors is not None]
    if not teachers:
        raise JasperError("--missing: no teacher has `vectors`. Fix: set teachers: [{vectors: FILE}]")
    found, scratch = np.ones(len(texts), bool), Path(config.data.cache).expanduser()
    for teacher in teachers:
        if not has_files(teacher):
            found[:] = False
            continue
        ready = PrecomputedEmbeddings.open(teacher, None, scratch, config.precision, config.data)
        if ready.key is None:
            raise JasperError(
                f"--missing: the rows of {ready.name} have no column `digest`, `text` or `id` (got a position for each "
                "row). Fix: add such a column, or use --texts to write all texts"
            )
        found &= ready.find_all(texts) >= 0
    return texts.select(np.flatnonzero(~found))
