"""A moving average of what a stage trains, in which the stage ends.

It lies in the optimiser's state: checkpoints, other numbers of ranks and sharded weights hold for it as they do for
Adam's own averages.
"""

from __future__ import annotations

from typing import Any

import torch

from jasper_fast.sharding import own_part

AVERAGE = "average"


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """From now on, move the average after every step: ``decay`` of it stays, the rest is the new weights.

    In the first steps less of it stays, n / (n + 9) after step n, so that it forgets where the weights began.

    Args:
        optimizer: one that counts its steps for each parameter, as AdamW does.
        decay: 0 < decay < 1.
    """

    # Made so far; first read from the state, since the optimiser may have been restored, then counted: on a GPU every
    # reading waits.
    steps = 0

    @torch.no_grad()
    def move(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal steps
        moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return
        steps = steps + 1 if steps else int(optimizer.state[moved[0]]["step"])
        for parameter in moved:
            if AVERAGE not in optimizer.state[parameter]:
                optimizer.state[parameter][AVERAGE] = parameter.detach().clone()
        averages = [optimizer.state[p][AVERAGE] for p in moved]
        share = max(1.0 - decay, 9.0 / (9.0 + steps))  # of the new weights
        torch._foreach_lerp_([own_part(a) for a in averages], [own_part(p) for p in moved], share)

    optimizer.register_step_post_hook(move)


@torch.no_grad()
def take_average(optimizer: torch.optim.Optimizer) -> None:
    """Give the weights the values of their average, where one is kept."""
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            parameter.copy_(state[AVERAGE])
