"""The optimizer of a stage, its learning rate, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import full_tensor
from jasper_fast.models.student import Student
from jasper_fast.training.ema import track_ema
from jasper_fast.training.muon import MuonWithAdamW, hidden_matrices

FLOOR = 0.1  # of the peak rate, where a cycle ends


def make_optimizer(student: Student, stage: StageConfig) -> torch.optim.Optimizer:
    """Return the stage's optimizer over the trained parameters, with the stage's moving average of the weights.

    Biases and norms, which have fewer than two dimensions, get no weight decay.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    hidden = hidden_matrices(student) if stage.optimizer == "muon" else []
    others = [p for p in trained if all(p is not matrix for matrix in hidden)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if hidden:
        optimizer = MuonWithAdamW(hidden, groups, stage.lr, stage.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, lr=stage.lr, fused=True)
    if stage.average:
        track_ema(optimizer, stage.average)
    return optimizer


def learning_rate(stage: StageConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then the stage's schedule.

    The linear and the cosine schedule end at 0. Each cycle of a cyclic one ends at a tenth of the peak.
    """
    warmup = round(stage.warmup * stage.steps)
    if step < warmup:
        return stage.lr * (step + 1) / (warmup + 1)
    steps = max(1, stage.steps - warmup)
    done = (step - warmup) / steps
    if stage.schedule == "linear":
        return stage.lr * (1.0 - done)
    if stage.schedule == "cosine":
        return stage.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    if stage.schedule == "cyclic":
        return stage.lr * cycle_factor((step - warmup) * stage.cycles % steps / steps)
    return stage.lr


def cycle_factor(done: float) -> float:
    """Return the fraction of the peak rate after the fraction ``done`` of a cycle."""
    return 1.0 - (1.0 - FLOOR) * done


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
