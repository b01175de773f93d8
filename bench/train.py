"""``python -m bench train``: a training step against sentence-transformers' trainer with the same loss, model and data.

    python -m bench train                     texts/s, tokens/s, MFU, memory and shares of time on this machine's CPU
    python -m bench train --memory            peak memory of one large batch against a small one, with gradient caching
    python -m bench train --device cuda       a 1.5 B-parameter Qwen2-shaped student of random weights on one GPU

Each side is measured in a process of its own, on the same texts, which all sides but the one that groups by length take
in the same batches. The student is all-MiniLM-L6-v2 with one head; the targets are random, since no speed depends on
them. The published training code is written out here as one loop; its relative similarity loss has a term for each
pair of pairs.
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

from bench._environment import environment
from bench._train_sides import MINILM, WARM_UP, RandomTeachers, published, trainer
from bench.losses import _in_new_process, _peak_mib
from jasper_fast.batches import Batch, stage_batches
from jasper_fast.config import StageConfig, StudentConfig
from jasper_fast.encode import MicroBatches
from jasper_fast.model import Student
from jasper_fast.ranks import Ranks
from jasper_fast.stages import StageLoss, make_optimizer, set_trained, trained_names
from jasper_fast.step import Shares, take_gradients

H100_FLOPS = 989e12  # dense bf16 of an H100 or H200
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
    parser.add_argument("--steps", type=int, default=6, help="measured steps (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="layers of all-MiniLM-L6-v2 (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens of a text at most (default 128; 512 on a GPU)")
    options = parser.parse_args(argv)
    if options.memory:
        name, results = "train-memory", memory(options.batch or 8192)
    elif options.device == "cuda":
        name, results = "train-cuda", on_gpu(options.batch or 2048, options.length or 512, options.steps)
    else:
        name, results = "train-cpu", on_cpu(options.batch or 64, options.length or 128, options.layers, options.steps)
    out = options.out or Path(f"bench/results/{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
    print(f"written to {out}")
    return 0


def on_cpu(batch: int, length: int, layers: int, steps: int) -> dict[str, Any]:
    """Ours, sentence-transformers' trainer as it comes and tuned (bf16, grouping by length), the published code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "texts.json")
        file.write_text(json.dumps(docstrings(batch * (steps + WARM_UP))))
        shape = (str(file), batch, length, layers, steps)
        sides = {
            "ours": _in_new_process(_ours, *shape),
            "sentence-transformers": _in_new_process(trainer, *shape, False),
            "sentence-transformers, tuned": _in_new_process(trainer, *shape, True),
        }
        if batch <= PUBLISHED_BATCH:
            sides["published training code"] = _in_new_process(published, *shape)
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
    """Peak resident memory of one step of a small encoder, with gradient caching, in processes of their own."""
    peaks = {rows: _in_new_process(_one_step, rows) for rows in (small, large)}
    ratio = peaks[large]["peak_mib"] / peaks[small]["peak_mib"]
    print(f"a batch of {large} takes {ratio:.2f} x the peak memory of one of {small}", end=" ")
    print(f"({peaks[large]['peak_mib']:,.0f} MiB against {peaks[small]['peak_mib']:,.0f})")
    return {"ratio": ratio, "peaks": {str(rows): peak for rows, peak in peaks.items()}}


def on_gpu(batch: int, length: int, steps: int) -> dict[str, Any]:
    """A Qwen2-shaped student of 1.5 B parameters, with and without gradient caching, full checkpointing, bf16."""
    device = torch.device("cuda")
    results: dict[str, Any] = {}
    for name, settings in {
        "cached, checkpointed": {"gradient_caching": True, "gradient_checkpointing": True, "micro_batch": 64},
        "checkpointed": {"gradient_checkpointing": True, "micro_batch": 64},
        "checkpointed, batch of one pass": {"gradient_checkpointing": True, "micro_batch": 64, "batch_size": 64},
        "batch of one pass": {"micro_batch": 16, "batch_size": 16},
    }.items():
        torch.cuda.reset_peak_memory_stats()
        stage = _stage(
            [12288, 1024, 512, 256], **{"batch_size": batch, "max_length": length, "steps": steps, **settings}
        )
        student = qwen2_student(length, [12288, 1024, 512, 256]).to(device)
        texts = Texts([" ".join(["7"] * length)] * stage.batch_size)
        try:
            found = _loop(student, stage, texts, 12288, device, "bf16", H100_FLOPS)
        except torch.OutOfMemoryError:
            results[name] = {"out_of_memory": True}
            print(f"{name}: a batch of {stage.batch_size} does not fit")
        else:
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            shares = ", ".join(f"{part} {100 * share:.1f} %" for part, share in found["shares"].items())
            print(f"{name}: MFU {100 * found['mfu']:.1f} %, {found['texts_per_s']:.0f} texts/s", end=", ")
            print(f"{found['peak_gb']:.1f} GB; {shares}")
            results[name] = found
        del student
        torch.cuda.empty_cache()
    student = qwen2_student(length, [12288]).to(device)
    results["stage 1"] = stage_one(student, Texts([" ".join(["7"] * length)] * batch), steps, device, "bf16")
    return {"batch": batch, "length": length, "configurations": results}


def stage_one(student: Student, texts: Texts, steps: int, device: torch.device, precision: Any) -> dict[str, float]:
    """Seconds that stage 1 takes for a text, on states pooled once, against encoding it in every step without a graph.

    Args:
        student: with one head, which alone trains.
        texts: of one batch.
        steps: measured.
    """
    (width,), count = student.widths, len(texts)
    stage = _stage([width], train=[f"heads.{width}.*"], batch_size=count, steps=steps)
    set_trained(student, trained_names(student, stage))
    optimizer, loss_of = make_optimizer(student, stage), StageLoss(stage, width)
    teacher = RandomTeachers(count, width).read(np.arange(count))
    micro = MicroBatches.of(student.tokenize(texts.texts, "document", student.max_length), 64)
    with torch.no_grad():
        pooled = micro.pool(student, device, precision).cpu()
    seconds = []
    for given, states in ((None, pooled), (micro, None)):
        batch = Batch(np.arange(count), teacher, given, states, 0, 0, 0.0)
        times = []
        for _ in range(WARM_UP + steps):
            started = time.perf_counter()
            output, _ = take_gradients(student, batch, stage, loss_of, device, precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(output.loss.detach())  # which waits for the device
            times.append(time.perf_counter() - started)
        seconds.append(statistics.median(times[WARM_UP:]) / count)
    cached, plain = seconds
    print(f"stage 1: {plain / cached:.0f} x faster per text on cached states than encoding in each step", end=" ")
    print(f"({cached * 1e6:.1f} us against {plain * 1e6:.1f})")
    return {"ratio": plain / cached, "cached_s_per_text": cached, "plain_s_per_text": plain}


class Texts:
    """Texts as `stage_batches` reads them, without a dataset."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: list[int]) -> dict[str, list[str]]:
        return {"text": [self.texts[row] for row in rows], "role": ["document"] * len(rows)}


def docstrings(count: int) -> list[str]:
    """Real texts of every length: docstrings of the installed packages."""
    from jasper_fast.docstrings import docstring_pairs

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
    precision: Any,
    peak_flops: float,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """Steps as the training loop takes them; medians over those after the warm-up."""
    stage = stage.model_copy(update={"steps": stage.steps + warm_up})
    set_trained(student, trained_names(student, stage))
    student.train()
    student.set_gradient_checkpointing(stage.gradient_checkpointing)
    optimizer, loss_of = make_optimizer(student, stage), StageLoss(stage, student.widths[0])
    teachers = RandomTeachers(len(texts), width)
    ranks = Ranks()

    def plan(step: int) -> np.ndarray:
        return np.arange(step * stage.batch_size, (step + 1) * stage.batch_size) % len(texts)

    taken: list[dict[str, float]] = []
    clock = time.perf_counter()
    for _, batch in stage_batches(stage, 0, plan, texts, teachers, student, None, ranks):
        shares = Shares(device, wait=True)
        output, _ = take_gradients(student, batch, stage, loss_of, device, precision, None, shares)
        with shares.part("communication"):
            ranks.average_gradients(student.parameters())
        with shares.part("optimiser"):
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(output.loss.detach())
        now = time.perf_counter()
        taken.append({"seconds": now - clock, "tokens": batch.tokens, "padded": batch.padded, "data": batch.wait})
        taken[-1].update(shares.seconds)
        clock = now
    taken = taken[warm_up:]
    seconds, tokens = sum(t["seconds"] for t in taken), sum(t["tokens"] for t in taken)
    embeddings = sum(p.numel() for p in student.encoder.get_input_embeddings().parameters())
    parameters = sum(p.numel() for p in student.encoder.parameters()) - embeddings
    return {
        "texts_per_s": stage.batch_size * len(taken) / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens": tokens,
        "seconds_median": statistics.median(t["seconds"] for t in taken),
        "padding": 1.0 - tokens / sum(t["padded"] for t in taken),
        "mfu": 6 * parameters * tokens / seconds / peak_flops,
        "shares": {
            part: sum(t.get(part, 0.0) for t in taken) / seconds
            for part in ("encoder", "loss", "optimiser", "data", "communication")
        },
    }


def _ours(file: str, batch: int, length: int, layers: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    texts = Texts(json.loads(Path(file).read_text()))
    student = Student.build(StudentConfig(model=MINILM, layers=layers, heads=[384], max_length=length))
    stage = _stage([384], batch_size=batch, steps=steps)
    found = _loop(student, stage, texts, 384, torch.device("cpu"), "auto", cpu_flops())
    return {**found, "peak_mib": _peak_mib()}


def _one_step(rows: int) -> dict[str, float]:
    """One step, with the paper's three losses, of a small random BERT over so many texts of 4 to 32 tokens."""
    student = small_student([128, 32])
    draw = np.random.default_rng(0)
    texts = Texts([" ".join(map(str, draw.integers(5, 999, draw.integers(4, 33)))) for _ in range(rows)])
    stage = _stage([128, 32], batch_size=rows, steps=1, gradient_caching=True)
    before = _peak_mib()
    _loop(student, stage, texts, 128, torch.device("cpu"), "fp32", 1.0, warm_up=0)
    return {"peak_mib": _peak_mib(), "before_mib": before}


def small_student(heads: list[int]) -> Student:
    """A random BERT of two layers, 128 wide."""
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


def qwen2_student(length: int, heads: list[int]) -> Student:
    """A student of random weights in the shape of stella_en_1.5B_v5: 28 layers, 1536 wide."""
    from transformers import Qwen2Config, Qwen2Model

    from jasper_fast.pretrained import make_bidirectional

    config = Qwen2Config(
        vocab_size=151_646,
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        max_position_embeddings=length,
    )
    with torch.device("cuda"):
        encoder = Qwen2Model(config)
    make_bidirectional(encoder)
    return Student(encoder, NumberTokenizer(), StudentConfig(model="random", heads=heads, max_length=length))


def cpu_flops(side: int = 1024) -> float:
    """What this CPU's float32 product does a second, best of a few: the yardstick of its MFU."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)
