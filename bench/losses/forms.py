"""``python -m bench similarity_forms``: time and error of the similarity loss's two forms, and which one "auto" takes.

Measured on a CPU in float32 against float64 autograd. Writes JSON and, from it, docs/similarity-forms.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.common.environment import environment
from jasper_fast.losses import reference
from jasper_fast.losses.similarity import similarity_op
from jasper_fast.ops import cost

OUT = Path("bench/results/similarity-forms.json")
TABLE = Path("docs/similarity-forms.md")
SHAPES = [(512, 64, 64), (512, 256, 256), (2048, 64, 384), (2048, 256, 256), (2048, 512, 512)]
SHAPES += [(4096, 256, 384)]
COLUMNS = " | tile ms | feature ms | auto took | loss: tile | feature | gradient: tile | feature |"
NOISE = (1.0, 1e-1, 1e-2, 1e-3)  # how far the student is from its teacher, at B = 512, D = 64


def main(argv: list[str]) -> int:
    """Measure, write the JSON and the table."""
    parser = argparse.ArgumentParser(prog="python -m bench similarity_forms", description=__doc__)
    parser.add_argument("--table", action="store_true", help="only write the table from the committed JSON")
    if not parser.parse_args(argv).table:
        found = {
            "environment": environment(),
            "threads": torch.get_num_threads(),
            "shapes": [measure(*shape) for shape in SHAPES],
            "near": [measure(512, 64, 64, noise) for noise in NOISE],
        }
        OUT.write_text(json.dumps(found, indent=1) + "\n")
    TABLE.write_text(table(json.loads(OUT.read_text())))
    print(f"written to {OUT} and {TABLE}")
    return 0


def measure(rows: int, width: int, teacher_width: int, noise: float | None = None) -> dict[str, Any]:
    """Measure both forms on one random batch. With noise, the student is its teacher plus that much noise."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, teacher_width, generator=generator)
    student = torch.randn(rows, width, generator=generator)
    if noise is not None:
        student = teacher + noise * student
    exact = student.double().requires_grad_()
    value = reference.similarity_loss(exact, teacher.double())
    value.backward()
    s, t = (reference.normalise(v.double()) for v in (student, teacher))
    scale = 4 / rows**2 * float((s @ (s.T @ s)).norm() + (t @ (t.T @ s)).norm()) / float(student.norm(dim=1).mean())
    found: dict[str, Any] = {"rows": rows, "width": width, "teacher_width": teacher_width, "loss": value.item()}
    if noise is not None:
        found["noise"] = noise
    for method in ("tile", "feature", "auto"):
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            (loss,), (gradient,), _ = similarity_op([student], teacher, method, True, False)
            seconds.append(time.perf_counter() - begin)
        found[method] = {
            "seconds": min(seconds[1:]),
            "loss_error": abs(loss.item() - value.item()) / value.item(),
            "gradient_error": (gradient.double() - exact.grad).norm().item() / scale,
        }
    cheaper = cost.feature_form_is_cheaper(rows, width, teacher_width, False)
    found["model"] = "feature" if cheaper else "tile"
    found["auto_took"] = "tile" if found["auto"]["gradient_error"] == found["tile"]["gradient_error"] else "feature"
    return found


def table(found: dict[str, Any]) -> str:
    """Format two Markdown tables: over shapes, and as the student nears its teacher."""
    lines = [
        "# The two forms of the similarity loss",
        "",
        f"Written by `python -m bench similarity_forms` from `{OUT}`. Forward and gradient in float32 on "
        f"{found['threads']} CPU threads are compared with float64 autograd. The gradient's error is relative to "
        "4/B² (‖S SᵀS‖ + ‖T TᵀS‖), and the loss's to the loss. `auto` takes the feature form if "
        "`jasper_fast.ops.cost.feature_form_is_cheaper` says so. It takes the tile form if the sums of the feature "
        f"form cancel, which is below {cost.CANCELLATION:g} of ‖SᵀS‖² + ‖TᵀT‖².",
        "",
        "| B | D / E" + COLUMNS,
        "| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for e in found["shapes"]:
        lines.append(f"| {e['rows']} | {e['width']} / {e['teacher_width']} " + _figures(e))
    lines += [
        "",
        "As a student (B = 512, D = 64) nears its teacher:",
        "",
        "| noise | loss" + COLUMNS,
        "| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for e in found["near"]:
        lines.append(f"| {e['noise']:g} | {e['loss']:.1e} " + _figures(e))
    lines += [
        "",
        "On CUDA the same model decides for batches of at least 2 ms of work. The feature form has more weight there "
        "if it needs more time for a product: 2 for bfloat16 and 12 for float16 (`jasper_fast.ops.cost`). "
        "The host waits once to see if the sums cancel. That weight is counted, not measured, since no GPU has run it "
        "yet.",
    ]
    return "\n".join(lines) + "\n"


def _figures(e: dict[str, Any]) -> str:
    tile, feature = e["tile"], e["feature"]
    return (
        f"| {tile['seconds'] * 1e3:.1f} | {feature['seconds'] * 1e3:.1f} | {e['auto_took']} | "
        f"{tile['loss_error']:.0e} | {feature['loss_error']:.0e} | "
        f"{tile['gradient_error']:.0e} | {feature['gradient_error']:.0e} |"
    )
