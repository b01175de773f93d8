"""The kernel times that a GPU benchmark reports."""

from __future__ import annotations

import torch

from bench.common.profile import LONGEST, kernel_section, kernels, summary


def test_launches_of_one_name_are_added_up_longest_first():
    found = summary([("sort", 0.25), ("dot" * 60, 1.0), ("sort", 0.5), *((f"copy {n}", 0.125) for n in range(20))])
    assert found["launches"] == 23 and found["device_s"] == 4.25 and len(found["longest"]) == LONGEST
    assert found["longest"][0] == {"name": "dot" * 40, "count": 1, "seconds": 1.0}
    assert found["longest"][1] == {"name": "sort", "count": 2, "seconds": 0.75}


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels(lambda: None) == {"error": "no CUDA device"}


def test_a_page_tells_of_what_was_launched():
    found = summary([("sort", 0.002), ("dot", 0.001), ("sort", 0.003)])
    page = kernel_section({"wide": (found, 0.0125), "long": ({"error": "no CUDA device"}, 1.0)})
    assert page.endswith("- wide: 6 of 12.5 ms on the device in 3 launches: sort 5 ms (2); dot 1 ms (1)")
    assert "long" not in page and kernel_section({}) == ""
