"""``python -m bench train``: a training step against sentence-transformers' trainer with the same loss, model and data.

    python -m bench train                     texts/s, tokens/s, MFU, memory and fractions of time on this machine's CPU
    python -m bench train --memory            peak memory of one large batch against a small one, with gradient caching
    python -m bench train --device cuda       a 1.5 B-parameter student of random weights on one GPU (train/cuda.py)

Each side is measured in a separate process, on the same texts. All sides take the same batches, except for the one that
groups by length. The student is all-MiniLM-L6-v2 with one head. The targets are random, since no speed depends on them.
Ours is the loop of a run (jasper_fast/training/loop.py). The published training code is written out as one loop. Its
relative similarity loss has a term for each pair of pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.budget import Budget
from bench.common.environment import environment
from bench.common.measure import in_new_process, peak_mib
from bench.train.baselines import MINILM, WARM_UP, RandomTeachers, published, trainer
from bench.train.loop import PlannedStage, one_stage, recorded_steps
from jasper_fast.config.models import StudentConfig
from jasper_fast.config.stage import StageConfig
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch, Precision
from jasper_fast.training.stages.losses import StageLoss
from jasper_fast.training.step import take_gradients
from jasper_fast.utils.atomic import write_atomic

PUBLISHED_BATCH = 128  # texts whose pairs of pairs fit: 33 million; at 256 each tensor of them takes 2 GB


def main(argv: list[str]) -> int:
    """Measure, print ratios first, and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON to write (default bench/results/train-….json)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", action="store_true", help="peak memory of a large batch against a small one")
    parser.add_argument("--batch", type=int, help="texts per step (default 64; 2048 on a GPU, 8192 with --memory)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps on a CPU (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="layers of all-MiniLM-L6-v2 (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens of a text at most (default 128; 512 on a GPU)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="on a GPU: leave out what would begin later")
    options = parser.parse_args(argv)
    name = "train-memory" if options.memory else f"train-{options.device}"
    out = options.out or Path(f"bench/results/{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    about = environment()

    def keep(results: dict[str, Any]) -> None:
        write_atomic(out, json.dumps({"environment": about, **results}, indent=2) + "\n")

    if options.memory:
        keep(memory(options.batch or 8192))
    elif options.device == "cuda":
        from bench.train import cuda as _train_cuda

        if not torch.cuda.is_available():
            raise SystemExit(
                "no CUDA device is in use here; python -m jasper_fast.env says why. For a CPU: --device cpu"
            )
        batch, length = options.batch or 2048, options.length or 512
        student = _train_cuda.qwen2_student(length, _train_cuda.HEADS)
        _train_cuda.measure(student, torch.device("cuda"), batch, length, keep, Budget(options.budget))
    else:
        keep(on_cpu(options.batch or 64, options.length or 128, options.layers, options.steps))
    print(f"written to {out}")
    return 0


def on_cpu(batch: int, length: int, layers: int, steps: int) -> dict[str, Any]:
    """Measure our loop, the published code, and the trainer of sentence-transformers by default and tuned."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "texts.json")
        file.write_text(json.dumps(docstrings(batch * (steps + WARM_UP))))
        shape = (str(file), batch, length, layers, steps)
        sides = {
            "ours": in_new_process(_ours, *shape),
            "sentence-transformers": in_new_process(trainer, *shape, False),
            "sentence-transformers, tuned": in_new_process(trainer, *shape, True),
        }
        if batch <= PUBLISHED_BATCH:
            sides["published training code"] = in_new_process(published, *shape)
        else:
            print(f"the published training code is left out: beyond {PUBLISHED_BATCH} texts its loss takes gigabytes")
    own = sides["ours"]
    for name, other in sides.items():
        if name != "ours":
            print(f"{own['texts_per_s'] / other['texts_per_s']:.2f} x the texts/s of {name}", end=" ")
            print(f"({own['texts_per_s']:.1f} against {other['texts_per_s']:.1f};", end=" ")
            print(f"{other['tokens_per_s']:,.0f} tokens/s, {other['peak_mib']:,.0f} MiB)")
    shares = ", ".join(f"{part} {100 * share:.1f} %" for part, share in own["shares"].items())
    print(
        f"ours: {own['tokens_per_s']:,.0f} tokens/s, MFU {100 * own['mfu']:.0f} % of this CPU's float32 product, "
        f"{own['peak_mib']:,.0f} MiB; {shares}"
    )
    return {"batch": batch, "length": length, "layers": layers, "steps": steps, "sides": sides}


def memory(large: int, small: int = 256) -> dict[str, Any]:
    """Measure the peak resident memory of one step of a small encoder with gradient caching, in separate processes."""
    peaks = {rows: in_new_process(_one_step, rows) for rows in (small, large)}
    ratio = peaks[large]["peak_mib"] / peaks[small]["peak_mib"]
    print(f"a batch of {large} takes {ratio:.2f} x the peak memory of one of {small}", end=" ")
    print(f"({peaks[large]['peak_mib']:,.0f} MiB against {peaks[small]['peak_mib']:,.0f})")
    return {"ratio": ratio, "peaks": {str(rows): peak for rows, peak in peaks.items()}}


class Texts:
    """Texts as a stage reads them, without a dataset."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: list[int]) -> dict[str, list[str]]:
        return {"text": [self.texts[row] for row in rows], "role": ["document"] * len(rows)}


def docstrings(count: int) -> list[str]:
    """Return real texts of all lengths: docstrings of the installed packages."""
    from jasper_fast.data.docstrings import docstring_pairs

    texts = [text for pair in docstring_pairs() for text in pair]
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))[:count]]


def _stage(heads: list[int], **given: Any) -> StageConfig:
    return StageConfig(**{"name": "all", "train": ["*"], "heads": heads, "lr": 1e-4, "steps": 8, **given})


def _loop(
    student: Student,
    stage: StageConfig,
    texts: Texts,
    width: int,
    device: torch.device,
    precision: Precision,
    peak_flops: float,
    warm_up: int = WARM_UP,
    warm_up_texts: int | None = None,
) -> dict[str, Any]:
    """Measure steps of the training loop after a warm-up.

    Args:
        student: the student on its device.
        stage: the stage's settings, with the number of measured steps.
        texts: the texts, which batches take in order.
        width: the width of the random teacher embeddings.
        device: the device that trains.
        precision: the precision of encoder passes.
        peak_flops: the FLOP/s of the device, for MFU.
        warm_up: steps before the measured ones.
        warm_up_texts: texts of such a step. None: a whole batch. The loss still runs on a whole batch.
    """
    stage = stage.model_copy(update={"steps": stage.steps + warm_up})
    teachers = RandomTeachers(len(texts), width)

    def plan(step: int) -> np.ndarray:
        size = warm_up_texts if warm_up_texts and step < warm_up else stage.batch_size
        return np.arange(step * stage.batch_size, step * stage.batch_size + size) % len(texts)

    if warm_up_texts:  # kernels are chosen, and compiled, by the number of rows
        rows = np.arange(stage.batch_size) % len(texts)
        pooled = torch.randn(len(rows), student.hidden_size)
        whole = Batch(rows, teachers.read(rows), None, pooled, 0, 0, 0.0)
        take_gradients(student, whole, stage, StageLoss(stage, student.widths[0]), device, precision)

    config = one_stage(student, stage, precision)
    measured = recorded_steps(config, student, PlannedStage(config, texts, teachers, plan), device)[warm_up:]
    seconds = sum(step["seconds"] for step in measured)
    counts = [round(step["tokens_per_s"] * step["seconds"]) for step in measured]
    padded = [round(count / (1.0 - step["padding"])) for count, step in zip(counts, measured, strict=True)]
    tokens = sum(counts)

    def fraction(field: str) -> float:
        return sum(step.get(field, 0.0) * step["seconds"] for step in measured) / seconds

    embeddings = sum(p.numel() for p in student.encoder.get_input_embeddings().parameters())
    parameters = sum(p.numel() for p in student.encoder.parameters()) - embeddings
    return {
        "texts_per_s": stage.batch_size * len(measured) / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens": tokens,
        "steps": len(measured),
        "parameters": parameters,
        "seconds_median": statistics.median(step["seconds"] for step in measured),
        "padding": 1.0 - tokens / sum(padded),
        "mfu": 6 * parameters * tokens / seconds / peak_flops,
        "shares": {
            **{part: fraction(f"share_{part}") for part in ("encoder", "loss", "optimiser")},
            "data": fraction("data_wait"),
            "communication": fraction("share_communication"),
        },
    }


def _ours(file: str, batch: int, length: int, layers: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    texts = Texts(json.loads(Path(file).read_text()))
    student = Student.build(StudentConfig(model=MINILM, layers=layers, heads=[384], max_length=length))
    stage = _stage([384], batch_size=batch, steps=steps)
    found = _loop(student, stage, texts, 384, torch.device("cpu"), "auto", cpu_flops())
    return {**found, "peak_mib": peak_mib()}


def _one_step(rows: int) -> dict[str, float]:
    """Run one step of a small random BERT on texts of 4 to 32 tokens, with the paper's three losses."""
    student = small_student([128, 32])
    draw = np.random.default_rng(0)
    texts = Texts([" ".join(map(str, draw.integers(5, 999, draw.integers(4, 33)))) for _ in range(rows)])
    stage = _stage([128, 32], batch_size=rows, steps=1, gradient_caching=True)
    before = peak_mib()
    _loop(student, stage, texts, 128, torch.device("cpu"), "fp32", 1.0, warm_up=0)
    return {"peak_mib": peak_mib(), "before_mib": before}


def small_student(heads: list[int]) -> Student:
    """Build a random BERT of two layers, 128 wide."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    encoder = BertModel(BertConfig(vocab_size=1000, **shape), add_pooling_layer=False)
    return Student(encoder, NumberTokenizer(), StudentConfig(model="random", heads=heads, max_length=32))


class NumberTokenizer:
    """Texts that are token ids already, written as numbers."""

    pad_token_id = 0
    model_max_length = 512

    def __call__(self, texts: list[str], *, max_length: int, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()][:max_length] for text in texts]}


def cpu_flops() -> float:
    """Measure the FLOP/s of this CPU's float32 product, best of a few, as the reference of its MFU."""
    side = 1024
    a, b = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)
