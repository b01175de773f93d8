"""Training steps of a 1.5 B-parameter student on a GPU, for ``python -m bench train --device cuda``: about 100 s.

The student has random weights in the shape of stella_en_1.5B_v5 and the paper's four heads. Batches are full, of texts
of full length, in bf16. A full batch of 2,048 texts takes half a minute, so one step is measured after a small warm-up
step. MFU is 6 x parameters (without embeddings) x tokens / seconds, of 989 TFLOP/s. Recomputation does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.common.budget import Budget
from bench.common.targets import Target, judged, print_judged
from bench.train.baselines import RandomTeachers
from bench.train.cpu import NumberTokenizer, Texts, _loop, _stage
from bench.train.loop import PreparedStage, one_stage, recorded_steps
from jasper_fast.config.models import StudentConfig
from jasper_fast.models.micro_batches import MicroBatches
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch

H100_FLOPS = 989e12  # dense bf16 of an H100 or H200
HEADS = [12288, 1024, 512, 256]
CACHED, PLAIN, SMALL, STAGE_ONE = "cached, checkpointed", "checkpointed", "neither", "stage 1"
# Texts (None: the whole batch) and steps measured. Without gradient caching the graph of 256 texts takes 23 GB.
CONFIGURATIONS: dict[str, tuple[int | None, int, dict[str, Any]]] = {
    CACHED: (None, 1, {"gradient_caching": True, "gradient_checkpointing": True, "micro_batch": 64}),
    PLAIN: (256, 3, {"gradient_checkpointing": True, "micro_batch": 64}),
    SMALL: (16, 4, {"micro_batch": 16}),
}
TARGETS: dict[str, list[Target]] = {
    CACHED: [
        Target("% MFU", lambda found: 100 * found["mfu"], 30.0),
        Target("% of the step is the loss", lambda found: 100 * found["shares"]["loss"], 0.2, at_most=True),
        Target("GB at most in use", lambda found: found["peak_gb"], 45.0, at_most=True),
    ],
    PLAIN: [Target("% MFU", lambda found: 100 * found["mfu"], 45.0)],
    STAGE_ONE: [Target("x faster per text than a plain forward step", lambda found: found["ratio"], 100.0)],
}


def measure(
    student: Student,
    device: torch.device,
    batch: int,
    length: int,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Measure speed, memory and fractions of the time of every configuration and of stage 1, and compare with targets.

    Args:
        student: student with heads. Stage 1 trains only the widest head.
        device: device that trains. Peak memory is left out on a CPU.
        batch: number of texts in a full batch.
        length: number of tokens in a text.
        keep: function that is called with all results so far after each configuration.
        budget: limit after which no configuration starts. None sets no limit.
    """
    budget = budget or Budget()
    texts = Texts([" ".join(["7"] * length)] * batch)
    configurations: dict[str, dict[str, Any]] = {}
    found = {"batch": batch, "length": length, "peak_tflops": H100_FLOPS / 1e12, "configurations": configurations}

    def step(name: str) -> dict[str, Any]:
        size, steps, settings = CONFIGURATIONS[name]
        stage = _stage(student.widths, batch_size=min(size or batch, batch), max_length=length, steps=steps, **settings)
        warm = min(2 * stage.micro_batch, stage.batch_size)
        return {"texts": stage.batch_size} | _loop(
            student, stage, texts, student.widths[0], device, "bf16", H100_FLOPS, warm_up=1, warm_up_texts=warm
        )

    student.to(device)
    for name in (*CONFIGURATIONS, STAGE_ONE):
        begin = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            if left_out := budget.spent():
                own = {"error": left_out}
            else:
                own = stage_one(student, texts, device, "bf16") if name == STAGE_ONE else step(name)
        except torch.OutOfMemoryError:
            own = {"error": "out of memory"}
        except Exception as error:  # the other configurations are still measured
            own = {"error": repr(error)}
        if device.type == "cuda" and "error" not in own:
            own["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        own |= {"took_s": time.perf_counter() - begin, "targets": judged(TARGETS.get(name, ()), own)}
        configurations[name] = own
        keep(found)
        _print(name, own)
        student.zero_grad(set_to_none=True)
    return found


def _print(name: str, own: dict[str, Any]) -> None:
    if "error" in own:
        print(f"{name}: {own['error']}")
    elif "mfu" in own:
        shares = ", ".join(f"{part} {100 * share:.2f} %" for part, share in own["shares"].items())
        memory = f", {own['peak_gb']:.1f} GB" if "peak_gb" in own else ""
        print(f"{name}: MFU {100 * own['mfu']:.1f} %, {own['texts_per_s']:.0f} texts/s{memory}; {shares}")
    print_judged(own["targets"])


def stage_one(
    student: Student, texts: Texts, device: torch.device, precision: Any, plain_texts: int = 256, steps: int = 2
) -> dict[str, Any]:
    """Measure stage 1 in seconds per text, with states pooled once and with encoding in every step without a graph.

    Args:
        student: student whose widest head alone trains.
        texts: number of texts in a batch. Steps on pooled states take all of them.
        plain_texts: number of texts in a step that encodes. The whole batch would take half a minute.
        steps: number of measured steps that encode. Steps on pooled states are three times as many.
    """
    width, count = student.widths[0], len(texts)
    teachers = RandomTeachers(count, width)
    plain_texts = min(plain_texts, count)
    micro = MicroBatches.of(student.tokenize(texts.texts[:plain_texts], "document", student.max_length), 64)
    student.eval()
    with torch.no_grad():
        pooled = micro.pool(student, device, precision).cpu()
    states = pooled.repeat(-(-count // plain_texts), 1)[:count]

    every, some = np.arange(count), np.arange(plain_texts)
    cached_step = Batch(every, teachers.read(every), None, states, 0, 0, 0.0)
    plain_step = Batch(some, teachers.read(some), micro, None, 0, 0, 0.0)
    prepared = [cached_step] * (1 + 3 * steps) + [plain_step] * (1 + steps)
    stage = _stage([width], train=[f"heads.{width}.*"], batch_size=count, steps=len(prepared))
    config = one_stage(student, stage, precision)
    seconds = [step["seconds"] for step in recorded_steps(config, student, PreparedStage(config, prepared), device)]
    cached = statistics.median(seconds[1 : 1 + 3 * steps]) / count  # the first of each kind warms up
    plain = statistics.median(seconds[2 + 3 * steps :]) / plain_texts
    print(f"stage 1: {plain / cached:.0f} x faster per text on cached states than encoding in each step", end=" ")
    print(f"({cached * 1e6:.1f} us against {plain * 1e6:.1f})")
    return {"ratio": plain / cached, "texts": count, "cached_s_per_text": cached, "plain_s_per_text": plain}


def qwen2_student(length: int, heads: list[int]) -> Student:
    """Build a student on the GPU with random weights in the shape of stella_en_1.5B_v5: 28 layers, 1536 wide."""
    from transformers import Qwen2Config, Qwen2Model

    from jasper_fast.models.backbone import make_bidirectional

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
