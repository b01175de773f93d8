"""Tiny documents and students for adaptations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jasper_fast.config.load import dump_config, load_config
from jasper_fast.exporting.student import export_student
from jasper_fast.models.hub import model_revision
from jasper_fast.models.student import build_student
from jasper_fast.reporting.model_card import run_facts


def write_documents(file: Path, texts: list[str], count: int) -> list[dict[str, str]]:
    """Write documents of three sentences with ids and titles, as JSON lines."""
    rows = []
    for i in range(count):
        parts = [texts[(i * k + k) % len(texts)] for k in (1, 7, 13)]
        rows.append({"id": f"d{i}", "title": f"Note {i} on {parts[0].split()[-1]}", "text": " ".join(parts)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_student(folder: Path, bert: Path, documents: Path) -> Path:
    """Write a run folder with an untrained student of two of the teacher's three layers."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "student": {"model": str(bert), "layers": [0, 2], "heads": [32, 16], "head_init": "identity", "max_length": 24},
        "teachers": [{"model": str(bert), "max_length": 24}],
        "data": {"sources": [{"path": str(documents), "columns": ["title", "text"]}], "cache": str(folder / "cache")},
        "stages": [{"name": "one", "last_layers": "all", "heads": [32, 16], "batch_size": 8, "steps": 2, "lr": 1e-3}],
    }
    config = load_config(tree)
    facts = run_facts(config, revisions=[model_revision(str(bert))])
    export_student(build_student(config), folder / "model", card=facts)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder
