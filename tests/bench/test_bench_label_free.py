"""The comparison of label-free and judged scores orders students, and documents are split without overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.label_free import HELD_OUT, correlations, main, split_documents
from jasper_fast.utils.errors import JasperError


def test_correlations_are_those_of_the_orders() -> None:
    def student(overlap: float, spearman: float, first: float, second: float) -> dict:
        judged = {"docs/nDCG@10": first, "docs/recall@100": 1 - first, "pairs/Spearman": second}
        figures = {"overlap": overlap, "spearman": spearman}
        return {"judged": {"8": judged}, "label free": {"held-out texts": {"8": figures}}}

    scores = {"a": student(0.1, 0.9, 0.2, 0.3), "b": student(0.2, 0.7, 0.3, 0.5), "c": student(0.5, 0.8, 0.4, 0.6)}
    overlap, spearman = correlations(scores)
    assert (overlap["documents"], overlap["figure"], overlap["students"]) == ("held-out texts", "overlap", 3)
    assert overlap["spearman"] == pytest.approx({"8": 1.0, "mean": 1.0})
    assert spearman["spearman"] == pytest.approx({"8": -0.5, "mean": -0.5})


def test_no_document_is_both_held_out_and_trained_on(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 600}", "title": f"title {i}"} for i in range(700)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split_documents([str(tmp_path / "docs.jsonl")], tmp_path)
    parts = [(tmp_path / name).read_text().splitlines() for name in ("held-out.jsonl", "train.jsonl")]
    held_out, train = ({json.loads(line)["text"] for line in lines} for lines in parts)
    assert len(held_out) == HELD_OUT and len(train) == 100 and not held_out & train


def test_missing_arguments_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(JasperError, match="no sets are given"):
        main(["score", "--folder", str(tmp_path)])
