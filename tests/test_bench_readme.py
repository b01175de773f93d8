"""The README's tables are what the committed results give."""

from bench.readme import losses_section, main, public_section, section

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
    assert "| student's share of the teacher | 95.0 % | 75.0 % |" in text


def test_minutes_and_shared_sentences_are_told_where_a_run_noted_them():
    more = {"seconds": {"training": 500.0, "evaluation": 60.0, "in all": 610.0}}
    more["held_out_docstrings"] = {"all": 1000, "with a trained piece": 17}
    text = section(RESULTS | {"facts": RESULTS["facts"] | more})
    assert "`make train` on 2 CPU cores, 10 minutes after set-up (9,000 texts;" in text
    assert "never trained on as a whole (17 of 1,000 share a sentence or more with those)" in text
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
    assert "| 64 | 100 × as fast | 1.0 ms | 100 ms |" in text
    assert "| 2,048 | 2.5 × as fast | 100 ms, 3 MiB | 250 ms, 12 MiB |" in text
    assert "time of 9 products" in text and "10.0 million pairs a second, 1.5 ×" in text


def test_the_public_section_has_a_row_for_every_width_and_floor():
    facts = RESULTS["facts"] | {"teacher_width": 8}
    more = {"recipe": "r", "sets": [{"name": "s", "metric": "nDCG@10"}], "facts": facts}
    text = public_section(RESULTS | more)
    assert "| teacher | 80.0 |" in text and "| its share of the teacher | 95.0 % |" in text
    assert "| **student**, 4 wide | 60.0 |\n| PCA of the teacher, 4 wide | 55.0 |" in text
    assert "none of their texts was trained on" in text


def test_the_readme_is_up_to_date():
    assert main(["--check"]) == 0
