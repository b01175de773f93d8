"""Exponential moving average of the trained weights, with which a stage may end.

It is part of the optimizer's state. So checkpoints, another number of ranks and sharded weights handle it like Adam's
own averages.
"""

from __future__ import annotations

from typing import Any

import torch

from jasper_fast.distributed.fsdp import local_part

EMA = "average"  # its key in the optimizer's state


def track_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Update the average after every optimizer step: it keeps the fraction ``decay``, and the new weights add the rest.

    In the first steps it keeps less, n / (n + 9) after step n, so that it forgets the initial weights.

    Args:
        optimizer: an optimizer that counts its steps for each parameter, as AdamW does.
        decay: a number between 0 and 1, both excluded.
    """
    # Steps so far. They are read from the state once, since the optimizer may have been restored, and then counted:
    # every read from a GPU waits for it.
    steps = 0

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal steps
        updated = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not updated:
            return
        steps = steps + 1 if steps else int(optimizer.state[updated[0]]["step"])
        for parameter in updated:
            if EMA not in optimizer.state[parameter]:
                optimizer.state[parameter][EMA] = parameter.detach().clone()
        averages = [optimizer.state[p][EMA] for p in updated]
        weight = max(1.0 - decay, 9.0 / (9.0 + steps))  # of the new weights
        torch._foreach_lerp_([local_part(a) for a in averages], [local_part(p) for p in updated], weight)

    optimizer.register_step_post_hook(update)


@torch.no_grad()
def load_ema(optimizer: torch.optim.Optimizer) -> None:
    """Set the weights to their moving average, if the optimizer has one."""
    for parameter, state in optimizer.state.items():
        if EMA in state:
            parameter.copy_(state[EMA])
