"""The optimizer of a stage: AdamW, its learning rate, and gradient clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import full_tensor
from jasper_fast.models.student import Student
from jasper_fast.training.ema import track_ema


def make_optimizer(student: Student, stage: StageConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, with the stage's moving average of the weights.

    Biases and norms, which have fewer than two dimensions, get no weight decay.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, fused=True)
    if stage.average:
        track_ema(optimizer, stage.average)
    return optimizer


def learning_rate(stage: StageConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then the stage's schedule down to 0."""
    warmup = round(stage.warmup * stage.steps)
    if step < warmup:
        return stage.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, stage.steps - warmup)
    if stage.schedule == "linear":
        return stage.lr * (1.0 - done)
    if stage.schedule == "cosine":
        return stage.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return stage.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(student: Student, clip: float | None) -> Tensor:
    """Scale the gradient of all trained parameters to a norm of at most ``clip`` and return its norm before, ().

    Args:
        student: the student after the backward pass.
        clip: the largest norm. None: the gradient stays as it is.
    """
    trained = [p for p in student.parameters() if p.grad is not None]
    return full_tensor(torch.nn.utils.clip_grad_norm_(trained, clip if clip is not None else math.inf))
