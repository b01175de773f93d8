"""The tables of README and docs/results.md are what the committed results give."""

from __future__ import annotations

import json
import re

from bench.pages.readme import (
    DEFAULT,
    FIGURE,
    PUBLIC,
    ROOT,
    draw_figure,
    losses_section,
    main,
    public_section,
    read_results,
    section,
    summary_section,
)
from jasper_fast.reporting.quality import final_line

RESULTS = {
    "primary": {"set": "s", "metric": "nDCG@10"},
    "rows": [
        {"model": "teacher", "width": 8, "scores": {"s/nDCG@10": 0.8}},
        {"model": "student before", "width": 8, "scores": {"s/nDCG@10": 0.2}},
        {"model": "student", "width": 8, "scores": {"s/nDCG@10": 0.76}},
        {"model": "student", "width": 4, "scores": {"s/nDCG@10": 0.6}},
        {"model": "teacher PCA", "width": 4, "scores": {"s/nDCG@10": 0.55}},
    ],
    "transductive": [],
    "facts": {"teacher_width": 8, "texts": 9000, "student_parameters": 17_000_000, "threads": 2},
}


def test_the_section_holds_every_figure_in_its_place():
    text = section(RESULTS)
    assert "| teacher | 80.0 |  |" in text
    assert "| **student** | 76.0 | 60.0 |" in text
    assert "| PCA of the teacher |  | 55.0 |" in text
    assert "| kept of the teacher | 95.0 % | 75.0 % |" in text


def test_minutes_and_trained_sentences_appear_if_a_run_recorded_them():
    more = {"seconds": {"training": 500.0, "evaluation": 60.0, "in all": 610.0}}
    more["held_out_docstrings"] = {"all": 1000, "with a trained piece": 17}
    text = section(RESULTS | {"facts": RESULTS["facts"] | more})
    assert "`make train` on 2 CPU cores takes 10 minutes after set-up." in text and "from 9,000 texts" in text
    assert "never trained on as a whole. Of 1,000, 17 contain a sentence that was trained on." in text
    assert "minutes" not in section(RESULTS) and "a whole" not in section(RESULTS)


def test_the_losses_ratios_come_first_and_are_of_the_seconds_shown():
    text = losses_section(
        {
            "environment": {"cpu": {"threads": 2, "isa": ["avx2"]}},
            "published": [{"rows": 64, "ratio": 100.0, "ours_s": 0.001, "published_s": 0.1}],
            "similarity": [
                {
                    "rows": 2048,
                    "width": 8,
                    "teacher_width": 4,
                    "methods": {
                        "auto": {"seconds": 0.1, "peak_mib": 3.0},
                        "reference": {"seconds": 0.25, "peak_mib": 12.0},
                    },
                }
            ],
            "gram_products": {"rows": 1024, "products": 9.2},
            "pairs_per_second": {"rows": 2001, "all_threads_s": 0.2, "speed_up": 1.5},
        }
    )
    assert "| 64 | 100 × | 1.0 ms | 100 ms |" in text
    assert "| 2,048 | 2.5 × | 100 ms, 3 MiB | 250 ms, 12 MiB |" in text
    assert "time of 9 products" in text and "10.0 million pairs per second, 1.5 ×" in text


def test_the_public_section_has_a_row_for_every_width_and_floor():
    facts = RESULTS["facts"] | {"teacher_width": 8}
    more = {"recipe": "r", "sets": [{"name": "s", "metric": "nDCG@10"}], "facts": facts}
    text = public_section(RESULTS | more)
    assert "| teacher | 80.0 |" in text and "| kept of the teacher | 95.0 % |" in text
    assert "| **student**, 4 wide | 60.0 |\n| PCA of the teacher, 4 wide | 55.0 |" in text
    assert "None of the sets' texts was trained on." in text


def test_the_summary_has_the_mean_kept_and_counts_wins_over_pca():
    more = {"sets": [{"name": "s", "metric": "nDCG@10"}]}
    text = summary_section(RESULTS | more)
    assert "| **student**, 8 wide | 32 | 76.0 | 95.0 % |\n| **student**, 4 wide | 16 | 60.0 | 75.0 % |" in text
    assert "The student beats it on 1 of 1 sets at 4 dimensions." in text


def test_the_figure_is_drawn_and_committed(tmp_path):
    draw_figure(read_results(DEFAULT), read_results(PUBLIC), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == (ROOT / FIGURE).read_bytes()[:4] == b"\x89PNG"


def test_the_pages_are_up_to_date():
    assert main(["--check"]) == 0


def test_the_output_and_minutes_in_the_readme_are_those_of_the_committed_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- output:start -->\n```\n(.*?)```", readme, flags=re.DOTALL)
    default, public = read_results(DEFAULT), read_results(PUBLIC)
    assert shown.splitlines()[-1] == final_line(default)
    assert f"{default['facts']['student_parameters']:,} parameters" in shown
    minutes = [round(results["facts"]["seconds"]["in all"] / 60) for results in (default, public)]
    assert (
        minutes == [5, 20] and "5 to 10 minutes on two CPU cores" in readme and "Twenty minutes of training" in readme
    )


def test_the_first_page_gives_the_figures_of_adapted_students():
    """The sentence on the first page is written by hand. Its figures are those of the committed benchmark."""
    summary = json.loads((ROOT / "bench" / "results" / "adapt.json").read_text())["summary"]

    def mean(model: str, form: str, width: int) -> str:
        (row,) = (r for r in summary if (r["limit"], r["model"], r["form"], r["width"]) == (None, model, form, width))
        return f"{row['mean'][0]:.1f} %"

    (paragraph,) = [p for p in (ROOT / "README.md").read_text().split("\n\n") if p.startswith("[Adapted](")]
    claimed = re.findall(r"\d+\.\d %", " ".join(paragraph.split()))
    adapted = [mean("adapted", "asymmetric", width) for width in (384, 64)]
    assert claimed == adapted + [mean("student before", "symmetric", width) for width in (384, 64)]
