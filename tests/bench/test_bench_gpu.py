"""The page about GPUs is made of what the benchmarks write: they run here, small, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.common.environment import environment
from bench.common.roofline import Roof, loss_point, search_point, train_point
from bench.gpu import report
from bench.losses import cuda as _losses_cuda
from bench.mips import cuda as _mips_cuda
from bench.pages import gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results():
    """By file: what each benchmark's own `measure` finds, with a GPU's name and memory put in."""
    patch = pytest.MonkeyPatch()
    shapes = {
        "similarity": [("wide", 96, [48], 48, torch.float32)],
        "relative_similarity": [("published size", 70, [16], 16, torch.float32)],
        "neighbourhood": [("usual", 96, [32], 32, torch.bfloat16)],
        "jasper_loss": [("all heads", 96, [32, 8], 32, torch.float32)],
    }
    patch.setattr(_losses_cuda, "SHAPES", shapes)
    patch.setattr(_losses_cuda, "PRODUCT", 64)
    patch.setattr(_mips_cuda, "SHAPES", [(4, 3000, 16, 5, ("bfloat16", "int8"))])
    patch.setattr(_mips_cuda, "TARGETS", {(4, 3000, 16, 5): _mips_cuda.TARGETS[4096, 1_000_000, 1024, 100]})
    patch.setattr(_mips_cuda, "bandwidth", lambda device, size, repeats: 10.0)
    patch.setattr(_losses_cuda, "bandwidth", lambda device, size, repeats: 10.0)
    about = environment()
    about["gpus"] = {"devices": [{"name": "NVIDIA H200", "capability": "sm_90", "memory_gb": 150.8}]}
    found = {"losses": _losses_cuda.measure("cpu", 1), "mips": {"search": _mips_cuda.measure("cpu", 1)}}
    for loss in shapes:
        for case in found["losses"][loss]:
            for n, own in enumerate(case["methods"].values(), 1):
                own["extra_bytes"] = n * 2**20  # ours is the first
    patch.undo()
    return {name: {"environment": about} | own for name, own in found.items()}


@pytest.fixture(scope="module")
def training(results):
    pytest.importorskip("pydantic")
    from bench.train import cuda as _train_cuda
    from bench.train.cpu import small_student

    found = _train_cuda.measure(small_student([32, 16]), torch.device("cpu"), 16, 8)
    return {"environment": results["losses"]["environment"]} | found


def written(folder: Path, **found: dict) -> str:
    for name, own in found.items():
        (folder / f"{name}-cuda.json").write_text(json.dumps(own))
    assert gpu.main(["--results", str(folder), "--page", str(folder / "gpu.md")]) == 0
    return (folder / "gpu.md").read_text()


def test_the_page_says_what_was_measured(results, training, tmp_path):
    pytest.importorskip("matplotlib")
    case = {
        "predicted_s": 1e-3,
        "methods": {"jasper_fast": {"seconds": 2e-3, "energy_j": 0.5}, "eager": {"error": "no"}},
    }
    single = {"environment": training["environment"], "cases": {"packing": case, "other": {"error": "late"}}}
    text = written(tmp_path, train=training, kernels=single | {"constants": {"read": case}}, **results)
    assert "| packing | jasper_fast | 1 ms | 2 ms | 500 mJ |" in text and "| packing | eager |  | no |  |" in text
    assert "| other | | | late | |" in text and text.count("NVIDIA H200 (sm_90, 150.8 GB)") == 4
    assert {file.name for file in (tmp_path / "gpu").iterdir()} == {"losses.png", "mips.png", "train.png"}
    assert all(f"gpu/{name}.png)" in text for name in ("losses", "mips", "train")) and "No GPU has run" not in text
    assert f"torch {torch.__version__}" in text
    assert results["losses"]["environment"]["digest"] in text
    wide = results["losses"]["similarity"][0]
    ratio = wide["methods"]["eager"]["both_s"] / wide["methods"]["jasper_fast"]["both_s"]
    assert f"| | eager | {gpu.times(ratio)} | 33.3 % |" in text  # the third, of 3 MiB
    every = [target for name, own in {"train": training, **results}.items() for _, target in gpu.targets(name, own)]
    met = sum(target["met"] is True for target in every)
    assert len(every) == 11 and f"**{met} of 11 targets are met.**" in text
    assert text.count("**not met**") == sum(target["met"] is False for target in every) > 0
    keys = {(where, target["what"]) for name, own in {"train": training, **results}.items()
            for where, target in gpu.targets(name, own)}  # fmt: skip
    predicted = {(where, own["what"]) for where, (_, targets) in report.predictions().items() for own in targets}
    unknown = sum(target["met"] is None for target in every)
    assert text.count("| **not measured** |") == unknown + len(predicted - keys) > unknown > 0
    assert (
        "search, ," not in text
        and "4 of 3,000 x 16, k 5 | certified, bfloat16 |" in text
        and "In stage 1, a text takes" in text
    )


def test_what_failed_and_where_ours_loses_is_said(results, tmp_path):
    pytest.importorskip("matplotlib")
    losses, search = (json.loads(json.dumps(results[name])) for name in ("losses", "mips"))
    methods = losses["similarity"][0]["methods"]
    methods["jasper_fast"] |= {"both_s": 3.0, "extra_bytes": 8 * 2**20}
    methods["eager"] |= {"both_s": 2.0, "extra_bytes": 2**20}
    methods["chunked"] = {"error": "out of memory"}
    losses["neighbourhood"][0] |= {"methods": {}, "error": "left out: the budget of 9 s is spent"}
    search["search"]["cases"][0]["errors"]["int8"] = "out of memory"
    text = written(tmp_path, losses=losses, mips=search)
    assert "- similarity, wide: 1.50 × the time of eager" in text
    assert "- similarity, wide: 8 MiB against 1 MiB of eager" in text
    assert "| | chunked | | | | out of memory | |" in text and "left out: the budget of 9 s is spent" in text
    assert "| int8 | out of memory |" in text
    assert "No GPU has run this: there is no `train-cuda.json`." in text


def test_without_results_it_says_so(tmp_path):
    text = written(tmp_path)
    assert "**No GPU has run the benchmarks yet**" in text and text.count("No GPU has run this") == 4


def test_useful_flop_and_least_bytes():
    case = {"name": "n", "rows": 10, "widths": [4, 2], "teacher_width": 3, "dtype": "bfloat16"}
    case["methods"] = {"jasper_fast": {"both_s": 2e-12}}
    pairs = 10**2 * 3 + 3 * 10**2 * (4 + 2)
    features = 10 * 3**2 + 10 * (3 * 4**2 + 4 * 4 * 3) + 10 * (3 * 2**2 + 4 * 2 * 3)
    for loss, flop in (("similarity", min(pairs, features)), ("neighbourhood", pairs)):
        point = loss_point(loss, case, "jasper_fast")
        assert point.flop == flop and point.bytes == 2 * 10 * (3 + 2 * 6) and point.tflops == pytest.approx(flop / 2)
    found = {"queries": 2, "rows": 7, "width": 5, "k": 3, "seconds": {"certified, int8": 1.0}}
    point = search_point(found, "certified, int8")
    assert (point.flop, point.bytes) == (2 * 2 * 7 * 5, 7 * 5 + 2 * (20 + 36))
    point = train_point("n", {"parameters": 100, "tokens": 30, "steps": 2, "mfu": 0.5}, 1.0)
    assert point.tflops == pytest.approx(0.5) and point.bytes == 2 * 28 * 100
    roof = Roof(2.0, 100.0)
    assert roof.at(10.0) == 1.0 and roof.at(1e6) == 2.0 and point.share(Roof(1.0, None)) == pytest.approx(0.5)


def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    pytest.importorskip("matplotlib")
    gpu.write_page(ROOT / "bench" / "results", tmp_path / "gpu.md")
    assert (tmp_path / "gpu.md").read_text() == (ROOT / "docs" / "gpu.md").read_text(), "run python -m bench gpu"
