"""Muon for the matrices of the encoder's layers, together with AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jasper_fast.models.student import Student


def hidden_matrices(student: Student) -> list[Tensor]:
    """Return the trained matrices of the encoder's layers, without embeddings and heads."""
    return [p for layer in student.layers() for p in layer.parameters() if p.requires_grad and p.ndim == 2]


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer of two: ``torch.optim.Muon`` for hidden matrices, ``torch.optim.AdamW`` for the others.

    Muon's updates are scaled to the size of AdamW's, so both have the same learning rate. Parameter groups and state
    are shared with the two parts. So a checkpoint holds and restores both.

    Args:
        hidden: matrices (2-D) that Muon trains.
        others: parameter groups that AdamW trains, possibly none.
        lr: learning rate of both.
        weight_decay: weight decay of Muon.
    """

    def __init__(self, hidden: list[Tensor], others: list[dict[str, Any]], lr: float, weight_decay: float) -> None:
        groups: list[dict[str, Any]] = [{"params": hidden}, *others]
        super().__init__(groups, {"lr": lr})
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._parts: list[torch.optim.Optimizer] = [muon]
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, fused=True))
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both optimizers."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, and count the steps of Muon's, as AdamW counts its own.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("MuonWithAdamW.step: got a closure, expected none. Fix: compute the gradients first")
        for part in self._parts:
            part.step()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["step"] = state.get("step", torch.zeros(())) + 1

    def _share(self) -> None:
        """Give the parts the groups and the state of this optimizer."""
        first = 0
        for part in self._parts:
            part.state = self.state
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            first += len(part.param_groups)
