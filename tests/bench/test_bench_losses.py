"""The loss benchmarks check results before timing, continue after an error, keep results, and judge targets."""

from __future__ import annotations

import json

import pytest
import torch

from bench.common.budget import Budget
from bench.common.targets import Target
from bench.losses import cpu as losses
from bench.losses import cuda as _losses_cuda
from bench.losses import published as _published
from jasper_fast.losses import reference, similarity_loss

SHAPES = {
    "similarity": [("wide", 96, [48], 48, torch.float32), ("two heads", 80, [32, 16], 32, torch.bfloat16)],
    "relative_similarity": [("published size", 70, [16], 16, torch.float32)],
    "neighbourhood": [("usual", 96, [32], 32, torch.float32)],
    "jasper_loss": [("all heads", 96, [32, 8], 32, torch.float32)],
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(_losses_cuda, "SHAPES", SHAPES)
    monkeypatch.setattr(_losses_cuda, "PRODUCT", 64)


def test_the_gpu_benchmark_measures_what_its_targets_name(small, capsys):
    """Here on a CPU: plain torch in the place of kernels."""
    kept = []
    found = _losses_cuda.measure("cpu", 1, keep=lambda found: kept.append(json.dumps(found)))
    cases = [case for loss in SHAPES for case in found[loss]]
    assert len(kept) == len(cases) == 5 and json.loads(kept[-1]) == found
    for case in cases:
        assert "error" not in case and "unchecked" not in case
        for method, own in case["methods"].items():
            assert own["both_s"] > 0 and own["gradient_error"] < 0.25, (case, method)
        assert case["methods"]["jasper_fast"]["gradient_error"] < 1e-2
    wide, _, published, _, whole = cases
    assert {"published", "eager", "chunked"} <= set(wide["methods"])
    assert [target["what"] for target in wide["targets"]] == ["x the speed of eager", "of eager's extra memory"]
    assert wide["targets"][0]["met"] in (True, False) and wide["targets"][1]["met"] is None  # memory is a GPU's
    assert published["targets"][0]["value"] > 0 and set(published["methods"]) == {"jasper_fast", "binned", "published"}
    assert found["read_gb_s"] > 0 and all(case["took_s"] > 0 for case in cases)
    (share,) = whole["targets"]
    assert share["value"] == pytest.approx(100 * whole["methods"]["jasper_fast"]["both_s"] / whole["step_s"])
    assert "x the speed of eager, at least 1.8" in capsys.readouterr().out


def test_a_quick_run_is_small_and_has_no_targets(small, monkeypatch):
    monkeypatch.setattr(_losses_cuda, "SHAPES", {"similarity": [("wide", 2048, [256], 512, torch.float32)]})
    (case,) = _losses_cuda.measure("cpu", 1, quick=True)["similarity"]
    assert (case["rows"], case["widths"], case["teacher_width"], case["targets"]) == (128, [16], 32, [])


def test_what_is_wrong_is_written_down_and_not_timed(small, monkeypatch, capsys):
    plain = _losses_cuda._methods

    def refuse(heads, teacher):
        raise ZeroDivisionError("no kernel")

    def methods(loss, device, rows, name):
        ours = plain(loss, device, rows, name)["jasper_fast"]
        return {
            "broken": refuse,
            "wrong": lambda heads, teacher: 2.0 * ours(heads, teacher),
            "not finite": lambda heads, teacher: ours(heads, teacher) * torch.nan,
            "jasper_fast": ours,
        }

    monkeypatch.setattr(_losses_cuda, "_methods", methods)
    found = _losses_cuda.measure("cpu", 1)
    for loss in SHAPES:
        for case in found[loss]:
            figures = case["methods"]
            assert figures["broken"] == {"error": "ZeroDivisionError('no kernel')"}
            assert "far from the values in float64" in figures["wrong"]["error"]
            assert "the loss or its gradient is not finite" in figures["not finite"]["error"]
            assert figures["jasper_fast"]["both_s"] > 0
    assert found["similarity"][0]["targets"][0]["value"] is None  # eager was not measured
    assert "target: not measured x the speed of eager" in capsys.readouterr().out


def test_what_would_begin_after_the_budget_is_left_out(small):
    found = _losses_cuda.measure("cpu", 1, budget=Budget(0))
    cases = [case for loss in SHAPES for case in found[loss]]
    assert all(case["error"] == "left out: the budget of 0 s is spent" and not case["methods"] for case in cases)
    assert all(target["met"] is None for case in cases for target in case["targets"])


def test_a_slow_method_is_measured_twice(small, monkeypatch):
    calls = []

    def method(heads, teacher):
        calls.append(1)
        return similarity_loss(heads[0], teacher)

    monkeypatch.setattr(_losses_cuda, "METHOD_S", 0.0)
    _losses_cuda._timed(method, [torch.randn(5, 4)], torch.randn(5, 4), 7)
    assert len(calls) == 2


def test_compiled_forms_are_measured_where_they_are_worth_their_minute(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    have = {
        (loss, name): _losses_cuda._methods(loss, "cuda", 64, name) for loss in SHAPES for name in ("wide", "usual")
    }
    assert {key for key, methods in have.items() if "torch.compile" in methods} == set(_losses_cuda.COMPILED)
    shapes = {(loss, shape[0]) for loss, shapes in _losses_cuda.SHAPES.items() for shape in shapes}
    assert set(_losses_cuda.COMPILED) <= shapes


@pytest.mark.parametrize("ties", [False, True])
def test_the_published_formulation_is_the_reference(ties):
    student, teacher = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    if ties:  # the same texts twice: pairs whose teacher scores are the same bits, or a rounding apart
        teacher = torch.eye(5, dtype=torch.float64)[[0, 1, 0, 1, 2, 2, 3, 4, 4]]
    found = []
    for loss in (
        _published.relative_similarity_loss,
        lambda s, t: reference.relative_similarity_loss(s, t, ties="label"),
    ):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*found)


def test_a_device_that_fails_leaves_what_was_found_before(small, monkeypatch, tmp_path):
    plain = _losses_cuda._measure

    def fails(case, *options):
        if case["name"] == "two heads":
            raise RuntimeError("CUDA error")
        plain(case, *options)

    monkeypatch.setattr(_losses_cuda, "_measure", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(losses, "environment", lambda: {"commit": "abc"})
    measure = _losses_cuda.measure
    monkeypatch.setattr(_losses_cuda, "measure", lambda device, *options: measure("cpu", *options))
    out = tmp_path / "out.json"
    assert losses.on_cuda(out, 1, False) == 0
    found = json.loads(out.read_text())
    assert found["similarity"][1]["error"] == "RuntimeError('CUDA error')"
    assert found["similarity"][0]["methods"]["jasper_fast"]["both_s"] > 0 and found["environment"] == {"commit": "abc"}
    assert found["jasper_loss"][0]["methods"]["jasper_fast"]["both_s"] > 0


def test_the_cpu_benchmark_goes_on_after_an_error(monkeypatch, tmp_path, capsys):
    def published(rows: int, repeats: int) -> dict[str, float]:
        return {"ratio": 3.0}

    def gram_products(rows: int, width: int, repeats: int) -> dict[str, float]:
        raise MemoryError("too much")

    def rest(*shape: int) -> dict[str, float]:
        return {"shape": shape[0]}

    monkeypatch.setattr(losses, "published", published)
    monkeypatch.setattr(losses, "gram_products", gram_products)
    monkeypatch.setattr(losses, "pairs_per_second", rest)
    monkeypatch.setattr(losses, "similarity", rest)
    aim = Target("x the published formulation's speed", lambda found: found["ratio"], 2.0)
    monkeypatch.setattr(losses, "TARGETS", {("published", 64): [aim]})
    assert losses.main(["--quick", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["published"][0]["targets"][0]["met"] is True
    assert found["gram_products"] == {"shape": [1024, 384], "error": "MemoryError('too much')"}
    assert found["similarity"] == [{"shape": 512, "targets": []}]
    printed = capsys.readouterr().out
    assert "3 x the published formulation's speed, at least 2: met" in printed and "too much" in printed


def test_the_cpu_benchmark_measures_and_checks():
    found = losses.published(20, 1)
    assert found["ratio"] > 0
    student, teacher = losses._batch(30, 8, 8)
    with pytest.raises(AssertionError, match="far from the values in float64"):
        losses._check_all([similarity_loss, lambda s, t: 1.01 * similarity_loss(s, t)], student, teacher)


def test_ranking_losses_are_compared_with_plain_pytorch(tmp_path, monkeypatch):
    from bench.losses import ranking

    monkeypatch.setattr(ranking, "in_new_process", lambda function, *arguments: function(*arguments))
    out = tmp_path / "ranking.json"
    assert ranking.main(["--quick", "--repeats", "1", "--out", str(out)]) == 0
    for name, figures in json.loads(out.read_text())["losses"].items():
        assert figures["methods"].keys() == {"jasper_fast", "plain"} and figures["gradient_error"] <= ranking.NEAR
        batch = ranking.random_batch(ranking.QUICK)
        ours, plain = (ranking.step(table[name], batch) for table in (ranking.OURS, ranking.PLAIN))
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
