"""The report, the printed lines and the plots of an adaptation."""

import sys

import numpy as np
import pytest

from jasper_fast.adaptation.choose import (
    BOTH,
    HeldOutVectors,
    LengthChoice,
    candidates,
    choose_maps,
    choose_projection,
)
from jasper_fast.adaptation.report import closing_lines, opening_lines, write_adapt_report
from jasper_fast.adaptation.scores import label_free_table, recommendation
from jasper_fast.fitting.projections import principal_axes
from jasper_fast.fitting.statistics import PairStatistics

WIDTH, DOCUMENTS, QUESTIONS = 16, 200, 60
LENGTHS = [
    {"name": "128", "length": 128, "overlap": 0.5, "difference": 0.0, "difference_error": 0.0, "chosen": False},
    {"name": "256", "length": 256, "overlap": 0.6, "difference": 0.1, "difference_error": 0.01, "chosen": True},
]


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def results():
    """Results as the pipeline writes them: choices and scores are computed, facts are made up."""
    random = np.random.default_rng(0)
    known = unit(random.standard_normal((DOCUMENTS, WIDTH)) * 0.8 ** np.arange(WIDTH))
    asked = unit(known[:QUESTIONS] + 0.1 * random.standard_normal((QUESTIONS, WIDTH)))
    student = [unit(rows + 0.08 * random.standard_normal(rows.shape)) for rows in (asked, known)]
    held = HeldOutVectors(student[0], asked, student[1], known, np.arange(QUESTIONS))
    pairs = PairStatistics(WIDTH, WIDTH)
    pairs.add(student[1][QUESTIONS:], known[QUESTIONS:])
    maps = choose_maps(candidates(pairs, None, same_space=True), held)
    axes = {width: principal_axes(pairs.target, width) for width in (8, 4)}
    heads = {form: choice.map for form, choice in maps.items()}
    chosen = {width: choose_projection(held, heads, {"PCA": matrix}) for width, matrix in axes.items()}
    earlier = tuple(unit(rows + 0.3 * random.standard_normal(rows.shape)) for rows in student)
    label_free = label_free_table(held, {form: choice.map for form, choice in maps.items()}, axes, earlier=earlier)
    speed = {"student": {"documents_per_s": 22.2, "queries_per_s": 100.0}, "texts": 64, "mean_tokens": 150.4}
    speed["teacher"] = {"documents_per_s": 11.4, "queries_per_s": 40.0}
    return {
        "name": "my-model",
        "documents": {
            "sources": ["some/folder/my_docs.jsonl"],
            "columns": "title + text",
            "read": 2004,
            "used": 1999,
            "duplicates": 4,
            "empty": 1,
            "short": 2,
            "median_tokens": 150,
            "longer": 0.13,
            "max_length": 256,
        },
        "held_out": {
            "documents": 200,
            "questions": 400,
            "kinds": {"titles": 200, "first sentences": 200},
            "question_in_document": True,
        },
        "teacher": {"name": "some/teacher", "width": 16, "parameters": 22_700_000, "max_length": 256, "vectors": False},
        "student": {
            "name": "runs/student/model",
            "width": 16,
            "parameters": 17_000_000,
            "max_length": 128,
            "layers": "3 of 6",
            "same_space": True,
        },
        "training": {"minutes": 10, "texts": 2200},
        "maps": {form: choice.record() for form, choice in maps.items()},
        "length": LengthChoice(256, 128, LENGTHS, "+10.0 ± 1.0 points of the teacher's ten neighbours").record(),
        "projections": [{"width": width, **choice.record()} for width, choice in chosen.items()],
        "label_free": label_free,
        "speed": speed,
        "recommendation": recommendation(label_free, speed),
        "notes": ["48 documents have no question"],
        "seconds": {"fit": 1.25, "scores": 2.0},
        "next": ["jasper-fast search build my-model my_docs.jsonl --out my-index"],
    }


def test_the_opening_says_what_became_of_the_documents(results):
    text = "\n".join(opening_lines(results))
    assert text.splitlines()[0].startswith(
        "my_docs.jsonl   1,999 documents of 2,004 (4 repeated, 1 empty); title + text"
    )
    for part in ("2 of one word", "half have 150 tokens", "13 % have more than 256", "trained in the teacher's space"):
        assert part in " ".join(text.split())
    assert "held out        200 documents, never fitted on; 400 questions (200 titles, 200 first sentences)" in text
    assert "encodes 11 documents a second" in " ".join(text.split())
    assert all(len(line) <= 100 for line in text.splitlines())
    assert opening_lines({"held_out": results["held_out"]})[0].startswith("held out")


def test_the_closing_table_has_every_form_and_width(results):
    lines = closing_lines(results)
    assert all(len(line) <= 100 for line in lines)
    table = {line[:38].strip(): line[38:].split() for line in lines}
    kept = {(r["form"], r["width"]): r for r in results["label_free"]["rows"] if r["model"] == "student"}
    for form in ("symmetric", "asymmetric"):
        cells = table[f"{form}: neighbours"]
        assert cells == ["100", *(f"{100 * kept[form, width]['overlap']:.1f}" for width in (16, 8, 4))]
    expected = table["expected of the teacher's nDCG@10"]  # of the last form
    assert expected == ["100", *(f"{100 * kept['symmetric', width]['expected']:.1f}" for width in (16, 8, 4))]
    assert table["bytes per document"] == ["64", "64", "32", "16"]
    assert table["seconds per 1,000 queries"] == ["25.0", "10.0", "10.0", "10.0"]
    assert lines[-1].endswith(results["next"][0])
    assert results["recommendation"].split(";")[0] in " ".join(" ".join(lines).split())


def test_what_training_and_adapting_gained_is_claimed_beyond_two_errors(results):
    text = " ".join(" ".join(closing_lines(results)).split())
    assert "Training for 10 minutes and adapting (symmetric) gained +" in text
    unclear = {**results, "label_free": {**results["label_free"]}}
    unclear["label_free"]["differences"] = [
        {"form": form, "width": 16, "to": to, "difference": 0.01, "error": 0.006}
        for form in ("symmetric", "asymmetric")
        for to in ("student before", "student before training", "symmetric")
    ]
    text = " ".join(" ".join(closing_lines(unclear)).split())
    for subject in ("Adapting (symmetric)", "Adapting (asymmetric)", "minutes and adapting (symmetric)"):
        assert f"{subject} gained nothing measurable (+1.0 ± 0.6 points of the teacher's neighbours)." in text
    unclear["label_free"]["differences"][0]["difference"] = -0.05
    text = " ".join(" ".join(closing_lines(unclear)).split())
    assert "Adapting (symmetric) lost −5.0 ± 0.6 points" in text


def test_the_gain_of_a_student_trained_from_nothing_comes_from_its_run(results):
    run = {"differences": [{"width": 16, "to": "student before", "difference": 0.2, "error": 0.01}]}
    lines = closing_lines({**results, "training": {**results["training"], "label_free": run}})
    assert any(
        "Training for 10 minutes gained +20.0 ± 1.0 points of the teacher's neighbours" in line for line in lines
    )


def test_the_report_has_every_section_and_both_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    path = write_adapt_report(tmp_path, results)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Report of the adaptation my-model\n\n**Use ")
    for name in ("bytes", "query_time"):
        assert f"plots/{name}.png" in text
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Scores without labels",
        "## Map from the student's space to the teacher's",
        "## Length",
        "## Narrow projections",
        "## Facts",
        "## Next",
    ]
    table = [line for line in text.splitlines() if line.startswith("| student, adapted | ")]
    assert len(table) == 6  # two forms, three widths
    assert "| teacher | – | 16 | 64 | 100.0 | 0.0 |" in text
    assert "- 48 documents have no question" in text and "seconds: fit 1.2, scores 2.0" in text
    assert "| 256 | 60.0 | +10.0 | 1.0 |" in text
    assert "jasper-fast search build my-model my_docs.jsonl --out my-index" in text
    for row in results["maps"]["symmetric"]["table"]:
        assert f"| {row['name']} | {100 * row['overlap']:.1f} |" in text


def test_the_report_says_which_maps_were_averaged(results, tmp_path):
    explained = "*documents and sentences* is the mean of two maps"
    assert explained not in write_adapt_report(tmp_path, results).read_text(encoding="utf-8")
    maps = {
        form: {**choice, "table": [*choice["table"], {**choice["table"][-1], "name": f"{BOTH}, λ 1", "texts": BOTH}]}
        for form, choice in results["maps"].items()
    }
    text = write_adapt_report(tmp_path, {**results, "maps": maps}).read_text(encoding="utf-8")
    assert explained in text and "\n| documents and sentences, λ 1 | " in text


def test_figures_have_the_names_of_training_reports(results, tmp_path):
    """*neighbours*, *nDCG@10* (of the own document) and *kept* mean the same in all reports, tables and plots."""
    text = write_adapt_report(tmp_path, results).read_text(encoding="utf-8")
    head = next(line for line in text.splitlines() if line.startswith("| model | form |"))
    assert head == (
        "| model | form | width | bytes | neighbours | ± | ranking | ± | nDCG@10 | ± | kept | ± | expected |"
    )
    row = next(row for row in results["label_free"]["rows"] if row["model"] == "student")
    cells = next(line for line in text.splitlines() if line.startswith("| student, adapted |")).split(" | ")
    figures = [f"{100 * row[key]:.1f}" for key in ("overlap", "ndcg", "answer_ndcg", "kept")]
    assert [cells[place] for place in (4, 6, 8, 10)] == figures


def test_too_few_documents_give_the_reason(results, tmp_path):
    label_free = {"documents": 12, "questions": 3, "missing": "too few documents to search (got 12, …)"}
    few = {**results, "label_free": label_free, "recommendation": recommendation(label_free)}
    text = write_adapt_report(tmp_path, few).read_text(encoding="utf-8")
    assert "No scores: too few documents to search (got 12, …)." in text and not (tmp_path / "plots").exists()
    assert any(line.startswith("No recommendation: too few") for line in closing_lines(few))


def test_precomputed_vectors_have_one_form_and_no_query_time(results, tmp_path):
    random = np.random.default_rng(1)
    known, asked = unit(random.standard_normal((100, 8))), unit(random.standard_normal((30, 8)))
    label_free = label_free_table(HeldOutVectors(asked, asked, known, known), {"symmetric": np.eye(8)}, {})
    vectors = {
        **results,
        "teacher": {"name": "vectors.npy", "width": 8, "parameters": None, "max_length": None, "vectors": True},
        "maps": {"symmetric": results["maps"]["symmetric"]},
        "speed": {**results["speed"], "teacher": None},
        "label_free": label_free,
        "projections": [],
        "recommendation": recommendation(label_free),
    }
    text = write_adapt_report(tmp_path, vectors).read_text(encoding="utf-8")
    assert "vectors.npy, 8 wide, precomputed" in text and "## Narrow projections" not in text
    assert "*nDCG@10*" not in text and "query_time" not in text
    lines = closing_lines(vectors)
    assert not any("asymmetric:" in line for line in lines if "map:" not in line)
    assert [line.split()[-2:] for line in lines if line.startswith("seconds per")] == [["–", "10.0"]]


def test_a_report_without_matplotlib_says_so(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_adapt_report(tmp_path, results).read_text(encoding="utf-8")
    assert "matplotlib is not installed" in text and not (tmp_path / "plots").exists()
