"""Small runs with a ranking stage, and a cross-encoder that needs no model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.helpers.runs import settings

WEIGHTS = {"cosine": 10.0, "similarity": 20.0, "relative_similarity": 0.0}


class Judge:
    """A cross-encoder that counts common words."""

    name, identity = "judge", "identity of the judge"

    def __init__(self) -> None:
        self.scored = 0

    def scores(self, pairs, progress=None):
        self.scored += len(pairs)
        return np.array([len(set(a.split()) & set(b.split())) for a, b in pairs], np.float32)


def replace_cross_encoder(judge: Judge | None = None) -> Judge:
    """Let every cross-encoder of this process be a judge. Processes that are started call it themselves."""
    import jasper_fast.training.ranking as module

    judge = judge or Judge()
    module.open_cross_encoder = lambda source, **options: judge
    module.scorer_identity.cache_clear()
    return judge


def rank_stage(**rank) -> dict:
    """Return a stage of four steps."""
    return {
        "name": "rank",
        "rank": {"candidates": 5, "contrastive": 0.5} | rank,
        "train": ["heads.*"],
        "last_layers": 1,
        "heads": [32, 8],
        "batch_size": 6,
        "micro_batch": 7,
        "steps": 4,
        "lr": 1e-3,
        "weights": WEIGHTS,
    }


def rank_settings(folder: Path, bert: Path, **rank) -> dict:
    """Return the configuration of a run of a head stage and a ranking stage."""
    tree = settings(folder, bert)
    tree["student"]["heads"] = [32, 8]
    tree["data"]["held_out"] = 0  # so that all candidates of a file may be trained on
    first = tree["stages"][0] | {"heads": [32, 8], "train": ["heads.*"], "steps": 2}
    return tree | {"stages": [first, rank_stage(**rank)], "evaluate": [], "refit": False}


def write_queries(folder: Path, texts: list[str]) -> Path:
    """Write queries with graded candidates, of which some are training texts."""
    file = folder / "queries.jsonl"
    with open(file, "w") as rows:
        for number in range(12):
            candidates = [texts[number], texts[number + 20], f"a document of its own, number {number}"]
            row = {"query": f"who repaired number {number}", "candidates": candidates, "grades": [1, 2, 0]}
            rows.write(json.dumps(row) + "\n")
    return file
