"""Write a small BEIR folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)


def write_beir(folder: Path, texts: list[str], queries: int = 6, suffix: str = "") -> Path:
    """Write a BEIR folder. Query i is the first half of document i, its only relevant document."""
    rows = [{"_id": f"d{i}", "title": f"title {i}", "text": text} for i, text in enumerate(texts)]
    write_jsonl(folder / f"corpus.jsonl{suffix}", rows)
    questions = [{"_id": f"q{i}", "text": text[: len(text) // 2]} for i, text in enumerate(texts[: queries + 1])]
    write_jsonl(folder / f"queries.jsonl{suffix}", questions)  # the last query has no judgement
    (folder / "qrels").mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(queries))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder
