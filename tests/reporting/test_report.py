"""The report shows the kept fraction of the teacher's quality, in one line, in tables and in plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jasper_fast.config.load import dump_config, load_config
from jasper_fast.reporting.plots import MAX_TICKS, MIN_TICKS, log_ticks
from jasper_fast.reporting.quality import final_line, quality_lines
from jasper_fast.reporting.report import write_report
from jasper_fast.utils.errors import JasperError

CONFIG = {
    "name": "small",
    "seed": 7,
    "student": {"model": "some/encoder", "layers": [0, 2], "heads": [64, 16]},
    "teachers": [{"model": "some/teacher", "max_length": 99}, {"vectors": "ready.npy"}],
    "data": {"sources": [{"path": "docstrings"}, {"path": "my texts"}]},
    "stages": [
        {"name": "head", "train": ["heads.64.*"], "heads": [64], "batch_size": 50, "steps": 4, "lr": 0.001},
        {
            "name": "all",
            "train": ["*"],
            "last_layers": 2,
            "heads": [64, 16],
            "weights": {"cosine": 5, "similarity": 0, "relative_similarity": 0, "neighbourhood": 1},
            "batch_size": 20,
            "steps": 3,
            "lr": 0.0002,
        },
    ],
}


def results() -> dict[str, Any]:
    def row(model: str, width: int, ndcg: float, spearman: float) -> dict[str, Any]:
        return {
            "model": model,
            "width": width,
            "scores": {"docs/nDCG@10": ndcg, "docs/recall@100": 0.9, "pairs/Spearman": spearman},
        }

    return {
        "recipe": "small",
        "primary": {"set": "docs", "metric": "nDCG@10"},
        "sets": [
            {"name": "docs", "kind": "docstrings", "metric": "nDCG@10"},
            {"name": "pairs", "kind": "sts", "metric": "Spearman"},
        ],
        "rows": [
            row("teacher", 128, 0.82, 0.7),
            row("teacher PCA", 64, 0.79, 0.66),
            row("teacher PCA", 16, 0.5, 0.6),
            row("teacher truncated", 64, 0.78, 0.65),
            row("teacher truncated", 16, 0.55, 0.61),
            row("student before", 32, 0.612, 0.5),
            row("student", 64, 0.803, 0.69),
            row("student", 16, 0.62, 0.64),
        ],
        "transductive": [],
        "facts": {
            "texts": 12345,
            "texts_line": "texts: 9 documents read → 12,345 training texts",
            "seconds": 61.25,
            "versions": {"torch": "2.13.0"},
        },
    }


def write_run(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(load_config(CONFIG)))
    (folder / "results.json").write_text(json.dumps(content))
    lines: list[dict[str, Any]] = [{"event": "start"}]
    for step in range(1, 8):
        stage, at, part = ("head", step, "similarity") if step <= 4 else ("all", step - 4, "neighbourhood")
        numbers = {"loss": 8.0 / step, "cosine": 0.1 / step, part: 0.01 / step, "texts_per_s": 10.0}
        lines.append({"event": "step", "stage": stage, "step": step, "stage_step": at, **numbers})
    lines.insert(3, {**lines[2], "loss": 99.0})  # step 2 once more, as after a resumed run: the later line counts
    lines[2], lines[3] = lines[3], lines[2]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def table_row(report: str, *start: str) -> list[str]:
    """The cells of the one table row that begins with these cells."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in report.splitlines() if line[:1] == "|"]
    (found,) = [row for row in rows if tuple(row[: len(start)]) == start]
    return found


def test_final_line_names_before_after_teacher_and_share() -> None:
    assert final_line(results()) == "docs nDCG@10: before 61.2 → after 80.3 · teacher 82.0 (97.9 % kept)"
    alone = results()
    alone["rows"] = [row for row in alone["rows"] if not row["model"].startswith("teacher")]
    assert final_line(alone) == "docs nDCG@10: before 61.2 → after 80.3"
    assert final_line({}) == "no scores: no evaluation sets and no held-out documents"


def label_free() -> dict[str, Any]:
    rows = [
        {"model": "teacher", "width": 128, "ndcg": 0.9},
        {"model": "student before", "width": 32, "overlap": 0.4, "overlap_error": 0.02, "spearman": 0.5, "ndcg": 0.6},
        {"model": "student", "width": 64, "overlap": 0.61, "overlap_error": 0.01, "spearman": 0.8, "ndcg": 0.85},
        {"model": "student", "width": 16, "overlap": 0.5, "overlap_error": 0.015, "spearman": 0.7, "ndcg": 0.8},
        {
            "model": "student",
            "width": 16,
            "precision": "int8",
            "overlap": 0.49,
            "overlap_error": 0.01,
            "spearman": 0.69,
        },
        {"model": "student PCA", "width": 16, "overlap": 0.52, "overlap_error": 0.01, "spearman": 0.72, "ndcg": 0.7},
    ]
    return {"documents": 300, "queries": 250, "neighbours": 10, "chance": 0.0334, "rows": rows, "differences": []}


def test_held_out_documents_are_in_report_plot_and_last_lines(tmp_path: Path) -> None:
    content = {"facts": {}, "label_free": label_free(), "advice": "Use 16."}
    line = "neighbours kept of the teacher's (300 held-out documents): 64: 61 %, 16: 50 % (± 1.5); before training 40 %"
    ndcg = "nDCG@10 kept of the teacher's (250 held-out queries): 64: 94 %, 16: 89 %; before training 67 %"
    assert quality_lines(content) == [line, ndcg, "Use 16."]
    folder = write_run(tmp_path / "run", content)
    report = write_report(folder).read_text(encoding="utf-8")
    assert f"**{line}**\n\n**{ndcg}**\n\nUse 16." in report
    section = report.split("## Held-out documents")[1].split("\n## ")[0]
    assert table_row(section, "student", "16", "float32")[3:] == ["50.0", "1.5", "70.0", "80.0"]
    assert table_row(section, "student", "16", "int8")[3:] == ["49.0", "1.0", "69.0", "–"]
    assert table_row(section, "student, PCA", "16")[3:] == ["52.0", "1.0", "72.0", "70.0"]
    assert "cannot encode queries" not in section and (folder / "plots" / "label_free.png").is_file()
    content["label_free"]["rows"].pop(0)
    assert "The teacher cannot encode queries" in write_report(folder, content).read_text(encoding="utf-8")
    few = {"documents": 3, "queries": 0, "missing": "too few held-out documents (got 3, expected at least 21)"}
    assert quality_lines({"label_free": few}) == [f"no score without labels: {few['missing']}"]
    assert "## Held-out" not in write_report(folder, {"facts": {}, "label_free": few}).read_text(encoding="utf-8")


def test_the_last_lines_name_all_sets_and_their_sizes() -> None:
    content = results()
    content["sets"][0] |= {"name": "docs", "sizes": {"queries": 99, "documents": 12345}}
    assert quality_lines(content) == [
        "docs nDCG@10: before 61.2 → after 80.3 · teacher 82.0 (97.9 % kept) · 99 queries, 12,345 documents",
        "pairs Spearman: before 50.0 → after 69.0 · teacher 70.0 (98.6 % kept)",
    ]
    long = "a-very-long-name-of-a-set-of-documents-" * 3
    content["sets"][0]["name"] = long
    for row in content["rows"]:
        row["scores"][f"{long}/nDCG@10"] = row["scores"]["docs/nDCG@10"]
    first = quality_lines(content)[0]
    assert len(first) <= 100 and "… nDCG@10: before 61.2" in first


def test_report_holds_every_score_beside_its_floor(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", results()))
    report = path.read_text(encoding="utf-8")
    assert path == tmp_path / "run" / "report.md"
    assert final_line(results()) in report
    assert table_row(report, "docs", "nDCG@10")[2:] == ["82.00", "61.20", "80.30", "97.9 %"]
    assert table_row(report, "docs", "recall@100")[2:] == ["90.00", "90.00", "90.00", "100.0 %"]
    assert table_row(report, "docs nDCG@10", "16")[2:] == ["62.00", "75.6 %", "50.00", "55.00"]
    assert table_row(report, "pairs Spearman", "64")[2:] == ["69.00", "98.6 %", "66.00", "65.00"]
    assert "Transductive" not in report


def test_report_has_the_gpus_readings_where_there_are_any(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    assert "GPU" not in write_report(run).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("stage") == "head" and line["stage_step"] % 2 == 0:
            line |= {"gpu_utilisation": 0.25 * line["stage_step"], "gpu_memory_gb": line["stage_step"]}
            line |= {"joules_per_1000_texts": 1000.0 + line["stage_step"]}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = write_report(run).read_text(encoding="utf-8")
    section = report.split("### The first rank's GPU")[1].split("\n## ")[0]
    assert table_row(section, "head")[1:] == ["75 %", "4.0 GB", "–", "1,003 J"]
    assert "| all |" not in section


def test_report_says_what_was_trained_on_what(tmp_path: Path) -> None:
    content = results() | {"transductive": ["pairs"]}
    content["facts"] = content["facts"] | {"pictures_left_out": [f"{i}.png: torn" for i in range(22)]}
    report = write_report(write_run(tmp_path / "run", content)).read_text(encoding="utf-8")
    head = table_row(report, "head")
    assert head[1:4] == ["`heads.64.*`", "64", "10 cosine, 200 similarity, 20 relative similarity"]
    assert head[4:] == ["50", "0.001", "4", "0.3", "10", "8.000 → 2.000"], "4 steps of 50 texts at 10 texts/s are 20 s"
    assert table_row(report, "all")[1:4] == ["`*`, last 2 layers", "64, 16", "5 cosine, 1 neighbourhood"]
    for fact in (
        "student: `some/encoder`, its layers [0, 2]",
        "teacher: `some/teacher`, at most 99 tokens",
        "teacher: embeddings from `ready.npy`",
        "sources: `docstrings`, `my texts`",
        "seed: 7",
        "- texts: 9 documents read → 12,345 training texts",
        "seconds: 61.2",
        "- pictures left out: 0.png: torn; 1.png: torn; ",
        "; 19.png: torn; and 2 more (results.json has them)",
        "versions: torch 2.13.0",
        "*Transductive*: texts of pairs were among the training texts",
    ):
        assert fact in report


def test_sizes_come_from_the_weights(tmp_path: Path, tiny_bert: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel

    run = write_run(tmp_path / "run", results())
    config = load_config({**CONFIG, "teachers": [{"model": str(tiny_bert)}]})
    (run / "config.yaml").write_text(dump_config(config))
    (run / "model" / "2_Router").mkdir(parents=True)
    save_file({"a": torch.zeros(500, 1000)}, run / "model" / "model.safetensors")
    save_file({"w": torch.zeros(300, 1000), "b": torch.zeros(300)}, run / "model" / "2_Router" / "model.safetensors")
    report = write_report(run).read_text(encoding="utf-8")
    assert "its layers [0, 2], at most 512 tokens; 0.8 M parameters, 3.2 MB" in report
    teacher = AutoModel.from_pretrained(tiny_bert).num_parameters() / 1e6
    assert f"at most 512 tokens; {teacher:.1f} M parameters" in report


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (11.0, 22.0, [12, 14, 16, 18, 20, 22]),
        (19.9, 20.21, [19.9, 19.95, 20, 20.05, 20.1, 20.15, 20.2]),
        (3.0, 6.2, [3, 3.5, 4, 4.5, 5, 5.5, 6]),
        (0.004, 0.9, [0.01, 0.03, 0.1, 0.3]),
        (1e-4, 50.0, [1e-4, 1e-3, 0.01, 0.1, 1, 10]),
    ],
)
def test_a_logarithmic_axis_has_enough_labels(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("ratio", [1.0001, 1.01, 1.3, 2.0, 7.0, 40.0, 1e3, 1e9, 1e25])
@pytest.mark.parametrize("low", [1.7e-5, 0.02, 1.0, 8.8, 1234.0])
def test_any_logarithmic_axis_has_between_4_and_12_labels(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert MIN_TICKS <= len(ticks) <= MAX_TICKS and low * (1 - 1e-9) <= ticks[0] < ticks[-1] <= low * ratio * (1 + 1e-9)


def test_pictures_are_drawn_and_not_blank(tmp_path: Path) -> None:
    from matplotlib.image import imread

    run = write_run(tmp_path / "run", results())
    report = write_report(run).read_text(encoding="utf-8")
    for name in ("losses", "widths", "sets"):
        assert f"(plots/{name}.png)" in report
        pixels = imread(run / "plots" / f"{name}.png")[..., :3]
        assert pixels.shape[0] > 400 and pixels.shape[1] > 600
        blue = np.abs(pixels - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=2) < 0.02
        assert blue.sum() > 200, f"{name}.png lacks the student's colour"
        border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
        assert border.min() == 1, f"something is cut off at the border of {name}.png"


def test_report_without_matplotlib_says_how_to_get_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "run", results())
    report = write_report(run).read_text(encoding="utf-8")
    assert "`pip install matplotlib`" in report and "plots/" not in report
    assert not (run / "plots").exists()
    assert table_row(report, "docs", "nDCG@10")[4] == "80.30"


def test_report_without_evaluation_or_before_the_run_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"recipe": "small", "facts": {"texts": 3}})
    report = write_report(run).read_text(encoding="utf-8")
    assert "no evaluation sets" in report and "plots/losses.png" in report and "widths.png" not in report
    (run / "results.json").unlink()
    assert final_line(results()) in write_report(run, results()).read_text(encoding="utf-8")
    with pytest.raises(JasperError, match="results.json is missing, and a report needs a finished run"):
        write_report(run)
    (run / "results.json").write_text('{"rows": [')
    with pytest.raises(JasperError, match="results.json is damaged"):
        write_report(run)


def test_report_names_what_an_evaluation_set_lacks(tmp_path: Path) -> None:
    content = results()
    content["sets"][0]["remarks"] = "2 judgements of absent documents, 1 query without a relevant document (scored 0)"
    report = write_report(write_run(tmp_path / "run", content)).read_text(encoding="utf-8")
    assert "- docs: 2 judgements of absent documents, 1 query without a relevant document (scored 0)\n" in report
    assert "- pairs" not in report
