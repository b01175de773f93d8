"""A tiny student, its teacher and documents, in a folder with its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

SPEED = {"documents_per_s": 100.0, "queries_per_s": 100.0}


class World(NamedTuple):
    folder: Path
    teacher: Path
    student: Path
    few: Path  # 90 documents
    many: Path  # the same and 40 more
    cache: Path

    def options(self, **changes):
        return {
            "columns": ["title", "text"],
            "model": str(self.student),
            "widths": [8],
            "cache": str(self.cache),
            **changes,
        }


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_bert, tiny_texts) -> World:
    from tests.helpers.adaptations import write_documents, write_student  # needs more than torch

    folder = tmp_path_factory.mktemp("adapt")
    few, many = folder / "few.jsonl", folder / "many.jsonl"
    write_documents(few, tiny_texts, 90)
    write_documents(many, tiny_texts, 130)
    student = write_student(folder / "run", tiny_bert, few)
    return World(folder, tiny_bert, student, few, many, folder / "cache")


@pytest.fixture
def fast(monkeypatch):
    """Leave out what only takes time: measured speeds and long searches for projections."""
    from jasper_fast.adaptation import plan, steps

    table = {"student": SPEED, "teacher": SPEED, "texts": 8, "mean_tokens": 20.0}
    monkeypatch.setattr(plan, "speeds", lambda model, teacher, *_: table | ({} if teacher else {"teacher": None}))
    monkeypatch.setattr(steps, "SECONDS", 0.05)
